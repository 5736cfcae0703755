"""The chain with declearn and with PyTorch beside ours, on the CPU, one step at a time and in turn.

    python -m benchmarks.step.peers

declearn and PyTorch each live in a process of their own, and in an environment of their own if
this one has not what they need: declearn's is made in the user's cache, which needs a package
index; PyTorch's Python is named with `--torch-python`, or PyTorch is left out.
"""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np

import functional_optimodules as fo
from benchmarks.environments import make_environment
from benchmarks.report import SECONDS, parse_arguments, section, write
from benchmarks.step.trees import (
    BETA_2,
    CHOICE,
    DECAY,
    EPS,
    LRATE,
    MAX_NORM,
    TREES,
    Facade,
    Stepper,
    copy,
    given_step,
    normal,
    our_optimizer,
)
from benchmarks.timing import RATIOS, TIMES, at_least, interleave, ratio_row, time_rows
from benchmarks.worker import Worker

DECLEARN = ("declearn==2.9.1", "dm-haiku==0.0.16", f"jax=={jax.__version__}", f"jaxlib=={jax.__version__}")
FASTER = {"200 x 1,000": 50.0, "ResNet-50": 6.0}
STEPS = 4
SETTINGS = {"lrate": LRATE, "decay": DECAY, "max_norm": MAX_NORM, "beta_2": BETA_2, "eps": EPS}


class Peer:
    """A side in another process. A call takes a step there, and returns its seconds."""

    def __init__(self, python, module, kind, shapes):
        self.worker = Worker(python, module)
        threads = len(os.sched_getaffinity(0))
        self.about = self.worker.ask("make", kind, list(shapes.values()), {**SETTINGS, "threads": threads})

    def __call__(self):
        return self.worker.ask("step")

    def squares(self):
        return self.worker.ask("squares")


def squares(side):
    return sum(float(np.sum(np.asarray(leaf, np.float64) ** 2)) for leaf in jax.tree.leaves(fo.unpack(side.params)))


def require_same(sides):
    """Take some steps on each side, and raise unless all parameters' squares add up to the same.

    Raises:
      RuntimeError: if two sides differ by more than a millionth.
    """
    totals = {}
    for name, side in sides.items():
        for _ in range(STEPS):
            jax.block_until_ready(side())
        totals[name] = side.squares() if isinstance(side, Peer) else squares(side)
    if not max(totals.values()) <= (1 + 1e-6) * min(totals.values()):
        raise RuntimeError(f"the sides are not at the same parameters after {STEPS} steps: {totals}")


def ours(shapes):
    params, gradients, optimizer = normal(shapes), normal(shapes, seed=1), our_optimizer()
    packed = fo.pack(copy(params))
    step = jax.jit(given_step(optimizer), donate_argnums=(0, 1))
    return {
        "ours, facade": Facade(optimizer, copy(params), gradients, donate=True),
        "ours, packed": Stepper(step, packed, optimizer.init(packed), fo.pack(gradients)),
    }


def measure(tree, peers, seconds, targets, said):
    """Return the rows of both tables on one tree, and add to `said` what the peers say of themselves."""
    shapes = TREES[tree]
    others = {name: Peer(*command, shapes) for name, command in peers.items()}
    try:
        sides = {**ours(shapes), **others}
        require_same(sides)
        times = interleave(sides, seconds)
    finally:
        for peer in others.values():
            peer.worker.close()
    said |= {name: peer.about for name, peer in others.items()}
    judge = at_least(targets.get(tree, 1.0))
    pairs = [(peer, mine) for peer in others for mine in sides if mine not in others]
    return time_rows(tree, times), [ratio_row(tree, times, *pair, **judge) for pair in pairs]


def has(python, module):
    """Whether a Python finds a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], cwd=os.path.sep, capture_output=True).returncode == 0


def main():
    args = parse_arguments(
        __doc__,
        trees=CHOICE,
        seconds=SECONDS,
        torch_python=(sys.executable, "a Python that has PyTorch"),
        peers=(("declearn", "torch"), "only these tables"),
    )
    sections, said = [], {}
    if "declearn" in args.peers:
        python = sys.executable if importlib.util.find_spec("haiku") else make_environment(DECLEARN)
        peers = {"declearn": (python, "benchmarks.step.declearn_worker", "")}
        take = functools.partial(measure, peers=peers, seconds=args.seconds, targets=FASTER, said=said)
        trees = [tree for tree in args.trees if tree in FASTER]
        sections.append(section("declearn's `Optimizer` on its JaxNumpyVector", take, trees, TIMES, RATIOS))
    if "torch" in args.peers and not has(args.torch_python, "torch"):
        print(f"{args.torch_python} has no PyTorch: left out. Name one that has with --torch-python", file=sys.stderr)
    elif "torch" in args.peers:
        peers = {
            f"PyTorch, {kind}": (args.torch_python, "benchmarks.step.torch_worker", kind)
            for kind in ("foreach", "fused")
        }
        take = functools.partial(measure, peers=peers, seconds=args.seconds, targets={}, said=said)
        sections.append(section("PyTorch's AdamW", take, args.trees, TIMES, RATIOS))
    intro = [
        "Clip by the global norm, Adam, decoupled decay, learning rate, apply; gradients given, the same at each step;",
        "all cores for every side, one side at a time. *facade* is `apply_gradients(donate=True)` with trees in and",
        "out, *packed* a jitted step on a packed training state. All sides start from the same numbers, and were held",
        "to the same sum of squares of the parameters before they were timed.",
        "",
        *(f"- {name}: {about}" for name, about in said.items()),
    ]
    write(args.results / "step" / "peers.md", "One step beside declearn and PyTorch", intro, *sections)


if __name__ == "__main__":
    main()
