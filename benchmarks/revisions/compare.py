"""Whether a change made anything slower: two checkouts of this library, in turn.

    git worktree add ../before HEAD~1
    python -m benchmarks.revisions.compare --old ../before --new .

The facade with trees and packed, a jitted step with the parameters kept packed, and a federated round. The old
checkout is measured twice: a difference means nothing unless it is larger than what the old one differs from
itself. Where a process has its memory moves a short step by a tenth: each launch starts all processes anew, and
counts once, by its median. The code that measures is this folder's on all sides.
"""

import contextlib
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.report import parse_arguments, table, write
from benchmarks.revisions.worker import STEPS
from benchmarks.rounds.averaging import MODELS
from benchmarks.step.trees import CHOICE
from benchmarks.timing import RATIOS, TIMES, interleave, ratio_row, time_rows
from benchmarks.worker import ROOT, Worker

METHODS = ("fedavg", "scaffold")
BURST = 0.02  # seconds of steps in a row, so that waking a process up counts for little


@contextlib.contextmanager
def launched(checkouts):
    """Start a worker for each checkout, which finds the library there and all else here."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = {}
        for name, checkout in checkouts.items():
            package = checkout.resolve() / "functional_optimodules"
            if not package.is_dir():
                raise SystemExit(f"{checkout} holds no functional_optimodules: name the root of a checkout")
            own = Path(folder, name)
            own.mkdir()
            (own / package.name).symlink_to(package)
            workers[name] = Worker(sys.executable, "benchmarks.revisions.worker", folder=own)
            stack.callback(workers[name].close)
        yield workers


def measure(case, workers, seconds):
    """Return the median seconds of each side's step of a case, `(what is done, on which tree or model)`."""
    longest = max(worker.ask("make", *case) for worker in workers.values())
    count = max(1, round(BURST / longest))
    times = interleave({name: functools.partial(side.ask, "steps", count) for name, side in workers.items()}, seconds)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def revision(checkout):
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "not under git"


def main():
    args = parse_arguments(
        __doc__,
        old=(ROOT, "the root of a checkout"),
        new=(ROOT, "the root of another"),
        trees=CHOICE,
        cases=((*STEPS, *METHODS), "only these"),
        launches=(7, "how often all is started anew"),
        seconds=(1.0, "about how long to time each case in a launch"),
    )
    cases = [(case, what) for case in args.cases for what in (args.trees if case in STEPS else MODELS)]
    medians = {case: [] for case in cases}
    for launch in range(args.launches):
        with launched({"old": args.old, "new": args.new, "old, again": args.old}) as workers:
            for case in cases:
                medians[case].append(measure(case, workers, args.seconds))
                print(launch, *case, medians[case][-1], flush=True)
    rows, ratios = [], []
    for case, taken in medians.items():
        title, times = "; ".join(case), {name: np.array([one[name] for one in taken]) for name in taken[0]}
        rows += time_rows(title, times)
        ratios += [ratio_row(title, times, "new", "old"), ratio_row(title, times, "old, again", "old", "control")]
    intro = [f"- {name}: {revision(checkout)}" for name, checkout in (("old", args.old), ("new", args.new))]
    ratios = table(("case", *RATIOS[1:-1]), [row[:-1] for row in ratios])
    times = table(("case", *TIMES[1:-1], "launches"), rows)
    write(args.results / "revisions" / "compare.md", "Two checkouts", intro, ratios, times)


if __name__ == "__main__":
    main()
