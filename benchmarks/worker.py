"""Sides in processes of their own: a line of JSON is asked, and one answered.

Nothing but Python is needed here, since peers have environments of their own.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Worker:
    """A process that answers.

    Args:
      python: the Python that runs it.
      module: what it runs, which calls `serve`.
      devices: on how many host devices.
      folder: where it begins, which is the first place where it looks for modules.
    """

    def __init__(self, python, module, devices=1, folder=ROOT):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}" if devices > 1 else "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONWARNINGS": "ignore",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([str(python), "-m", module], cwd=folder, env=environment, **pipes)

    def ask(self, name, *arguments):
        """Return what a method of the process's side returns."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps((name, *arguments)), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended before it answered {(name, *arguments)}")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(side):
    """Answer each line `[name, *arguments]` with what that method of a side returns, until no more is asked."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(side, name)(*arguments)), file=answers, flush=True)


def timed(function):
    """Return the wall-clock and the CPU seconds of a call, and what it returns."""
    start, worked = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - start, time.process_time() - worked, result
