"""Steps on a TPU, compiled and not run: what the compiler for TPU v5e says of them, ours beside optax.

    python -m benchmarks.step.tpu

It needs a package index and Linux on x86, and no TPU: the chip is described to the compiler, which comes with `libtpu`,
in an environment of its own. The last two tables are where the library's choice of what to pack on a TPU comes from.
"""

import functools
import itertools

from benchmarks.environments import LIBTPU, with_libtpu
from benchmarks.report import parse_arguments, section, write
from benchmarks.step.trees import CHOICE
from benchmarks.worker import Worker

NETWORKS = {"50 layers of 64 x 64": 64, "50 layers of 256 x 256": 256}
QUESTIONS = {
    "loss": "With a loss over named leaves",
    "given": "With the gradients given; *packed inside* has trees in and out",
}
# The name, and what makes its case of a question's.
SIDES = {
    "optax": {"side": "optax"},
    "ours, tree": {"side": "tree"},
    "ours, packed": {"side": "packed"},
    "ours, packed inside": {"side": "packed", "question": "inside"},
}
HEADER = (
    "tree",
    "side",
    "trace, CPU s",
    "compile, CPU s",
    "kernels",
    "copies",
    "MB moved",
    "temporary, MB",
    "memory, us",
    "kernels, us",
    "not estimated",
)
ALL = 2**30
VECTORS = (16, 100, 120, 128, 256, 1000, 1024, 4096, 8192, 16384)
WIDTHS = (8, 16, 32, 48, 64, 100, 128)
FOUND = ("leaves", "question", "side", "kernels", "copies", "MB moved", "memory, us", "kernels, us", "larger / left")
# What is packed must gain more than estimates are off.
GAIN = 1.5
INTRO = [
    "By `python -m benchmarks.step.tpu`. Nothing was run on a TPU: this is what the compiler for TPU v5e says of a",
    "step: clip by the global norm, Adam, decoupled decay, learning rate, apply, donated. *Ours, packed* is as the",
    "library chooses for a TPU.",
    "",
    "There are two estimates of the time. *Memory* is the compiler's `optimal_seconds`, which goes by the bytes moved",
    "and counts no kernel's start; what it has no estimate of is not in it, and is counted in the last column.",
    "*Kernels* is the sum of the cycles that it expects of each kernel, its start included, at 1.5 GHz; copies and",
    "waiting for memory are not in it. Sides are compared by the larger of the two: packing pays where it falls to two",
    "thirds or less, and for matrices where that by memory does not rise besides.",
]


def case_of(tree):
    return {"leaves": 50, "width": NETWORKS[tree]} if tree in NETWORKS else {"tree": tree}


def measure(worker, question, tree):
    """Return the rows of one tree."""
    rows = []
    for name, side in SIDES.items():
        case = {"question": question, **case_of(tree), **side}
        if question == "loss" and case["question"] == "inside":
            continue
        found = worker.ask("compile", case)
        rows.append(
            (
                tree,
                name,
                f"{found['trace_s']:.1f}",
                f"{found['compile_s']:.1f}",
                f"{found['kernels']:,}",
                f"{found['copies']:,}",
                f"{found['bytes'] / 1e6:,.1f}",
                f"{found['temporary'] / 1e6:,.1f}",
                f"{found['optimal_s'] * 1e6:,.0f}",
                f"{found['kernels_s'] * 1e6:,.0f}",
                found["unknown"],
            )
        )
    return [rows]


def larger(found):
    return max(found["optimal_s"], found["kernels_s"])


def compared(worker, leaves, case, left, packed, pays):
    """Return rows of the leaves of one size, left alone and packed, and add to `pays` the questions where that pays.

    Args:
      left: the most bytes of a vector and of a matrix that are packed where the leaves in question are left alone.
      packed: the same where they are packed.
      pays: for each question, the sizes at which packing pays.
    """
    rows = []
    for question in ("loss", "inside"):
        asked = {**case, "question": question, "side": "packed"}
        both = [worker.ask("compile", {**asked, "small": small}) for small in (left, packed)]
        gain = larger(both[0]) / larger(both[1])
        # A matrix is laid out anew: not at the cost of moving more.
        if gain >= GAIN and ("width" not in case or both[1]["optimal_s"] <= both[0]["optimal_s"]):
            pays[question].append(case.get("width") or case["elements"])
        for side, found in zip(("left", "packed"), both, strict=True):
            numbers = [f"{found[name]:,}" for name in ("kernels", "copies")]
            times = [f"{found['bytes'] / 1e6:,.1f}", *(f"{found[at] * 1e6:,.1f}" for at in ("optimal_s", "kernels_s"))]
            rows.append((leaves, question, side, *numbers, *times, f"{larger(both[0]) / larger(found):.2f}"))
    return rows


def vectors(worker, pays, size):
    return [compared(worker, f"100 of {size:,}", {"leaves": 100, "elements": size}, (0, 0), (ALL, ALL), pays)]


def matrices(worker, pays, width):
    # Biases are packed on both sides.
    case = {"leaves": 50, "width": width}
    return [compared(worker, f"50 of {width} x {width}", case, (ALL, 0), (ALL, ALL), pays)]


def verdict(pays, sizes, shape):
    """Say up to which size packing pays without a gap."""
    lines = []
    for question, found in pays.items():
        most = max(itertools.takewhile(found.__contains__, sizes), default=0)
        lines.append(f"- {question}: packing pays {f'up to {shape.format(most)}' if most else 'for none'}")
    return ["", *lines]


def main():
    trees = (*CHOICE[0], *NETWORKS)
    args = parse_arguments(
        __doc__, trees=(trees, CHOICE[1]), tables=((*QUESTIONS, "vectors", "matrices"), "only these tables")
    )
    worker = Worker(with_libtpu(), "benchmarks.step.tpu_worker")
    sizes = {
        "vectors": ("What is small: vectors, by themselves", vectors, VECTORS, "{:,} numbers"),
        "matrices": ("What is small: matrices, in a network whose biases are packed", matrices, WIDTHS, "{0} x {0}"),
    }
    sections = []
    try:
        for table in args.tables:
            if table in QUESTIONS:
                take = functools.partial(measure, worker, table)
                sections.append(section(QUESTIONS[table], take, args.trees, HEADER))
            else:
                title, rows, cases, shape = sizes[table]
                pays = {"loss": [], "inside": []}
                lines = section(title, functools.partial(rows, worker, pays), cases, FOUND)
                sections.append(lines + verdict(pays, cases, shape))
    finally:
        worker.close()
    intro = [*INTRO, "", f"- compiler: {LIBTPU}"]
    write(args.results / "step" / "tpu.md", "Steps compiled for a described TPU", intro, *sections)


if __name__ == "__main__":
    main()
