"""The loop of a worker that takes a step of a peer's optimizer when asked, in an environment of its own."""

import json
import sys
import time


def answer(make, about, squares):
    """Answer `make`, `step` and `squares`, one JSON line each, until there is no more to answer.

    Args:
      make: `(*arguments) -> step, holder`.
      about: what the peer is.
      squares: `(holder) -> float`, the sum of the squares of its parameters.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "make":
            step, holder = make(*arguments)
            found = about
        elif command == "step":
            start = time.perf_counter()
            step()
            found = time.perf_counter() - start
        else:
            found = squares(holder)
        print(json.dumps(found), file=answers, flush=True)
