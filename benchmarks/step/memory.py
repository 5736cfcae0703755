"""What a step has to move and to hold: time against the machine's copy bandwidth, and peak memory.

    python -m benchmarks.step.memory

First, steps with the gradients given, on large leaves, against the fastest copy of a large
array that could be had in the same run. Then the peak memory of a donated step: what the
compiler says of it, and by how much the process grew, each in a process of its own.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from benchmarks.peak import alone, peak_of
from benchmarks.report import SECONDS, parse_arguments, table, write
from benchmarks.step.trees import (
    CHOICE,
    LARGE,
    TREES,
    Facade,
    Stepper,
    copy,
    given_step,
    normal,
    optax_chain,
    our_optimizer,
    size,
    trained_step,
)
from benchmarks.timing import TIMES, at_most, interleave, time_rows

LIMITS = {"ResNet-50": 1.5, "one leaf of 16 M": 1.25}
COPIED = 32_000_000  # elements: more than caches hold
IN_PLACE = "negation in place, XLA"
STEPS = 3
MEMORY = ("called", "given", "facade")


class Copies:
    """Copies of an array of float32 to another that is there already: by NumPy, a thread for each core, and by XLA.

    The negation in place is no copy. It is what a step comes nearest to, and faster where
    a processor reads what it is about to overwrite.
    """

    def __init__(self):
        cores = len(os.sched_getaffinity(0))
        source, target = np.ones(COPIED, np.float32), np.zeros(COPIED, np.float32)
        self.parts = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
        self.pool = ThreadPoolExecutor(cores)
        self.array, self.other, self.own = jnp.ones(COPIED), jnp.zeros(COPIED), jnp.ones(COPIED)
        self.into = jax.jit(lambda source, target: -source, donate_argnums=1, keep_unused=True)
        self.in_place = jax.jit(jnp.negative, donate_argnums=0)

    def numpy(self):
        list(self.pool.map(lambda part: np.copyto(*part), self.parts))

    def xla(self):
        self.other = self.into(self.array, self.other)
        return self.other

    def xla_in_place(self):
        self.own = self.in_place(self.own)
        return self.own

    def sides(self):
        return {"copy, NumPy": self.numpy, "copy, negated, XLA": self.xla, IN_PLACE: self.xla_in_place}


def bandwidth(tree, seconds):
    """Return the rows of times, and of the fraction of the bandwidth, on one tree."""
    shapes = TREES[tree]
    params, gradients, theirs, ours = normal(shapes), normal(shapes, seed=1), optax_chain(), our_optimizer()
    packed = fo.pack(copy(params))
    donate = {"donate_argnums": (0, 1)}
    sides = {
        "ours, packed": Stepper(jax.jit(given_step(ours), **donate), packed, ours.init(packed), fo.pack(gradients)),
        "ours, facade on trees": Facade(ours, copy(params), gradients, donate=True),
        "optax, donated": Stepper(jax.jit(given_step(theirs), **donate), copy(params), theirs.init(params), gradients),
    }
    times = interleave({**sides, **Copies().sides()}, seconds)
    copies = {name: np.median(taken) for name, taken in times.items() if name not in sides}
    in_place = 2 * 4 * COPIED / copies.pop(IN_PLACE)
    fastest = min(copies, key=copies.get)
    rate = 2 * 4 * COPIED / copies[fastest]
    rows = []
    for name in sides:
        # Gradients are read once, parameters and both moments read and written; the norm reads the gradients once more.
        least, with_norm = (passes * 4 * size(shapes) / rate for passes in (7, 8))
        median = float(np.median(times[name]))
        judged = at_most(LIMITS[tree]) if tree in LIMITS and name.startswith("ours") else {"target": ""}
        verdict = "" if "reached" not in judged else "reached" if judged["reached"](median / least) else "missed"
        limits = (
            f"{1e3 * least:.1f}",
            f"{median / least:.2f}",
            f"{median / with_norm:.2f}",
            f"{median / least * in_place / rate:.2f}",
        )
        rows.append((tree, name, f"{1e3 * median:.1f}", *limits, judged["target"], verdict))
    return time_rows(tree, times), rows, f"{tree}: {rate / 1e9:.1f} GB/s by {fastest}; {in_place / 1e9:.1f} in place"


def growth(side):
    """Return by how many bytes the process grew, at its peak, during some steps after the first ones."""

    def steps():
        for _ in range(STEPS):
            jax.block_until_ready(side())

    steps()
    return peak_of(steps)[1]


def memory(tree, kind, who):
    """Measure one side in this process; return bytes: what the compiler counts at the peak, and the growth."""
    shapes = TREES[tree]
    params, gradients = normal(shapes), normal(shapes, seed=1)
    tx = optax_chain() if who == "optax" else our_optimizer()
    if kind == "facade":
        return None, growth(Facade(tx, params, gradients, donate=True))
    params = params if who == "optax" else fo.pack(params)
    state = tx.init(params)
    step, extra = (given_step(tx), gradients) if kind == "given" else (trained_step(tx), jnp.float32(1))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, extra).compile()
    said = compiled.memory_analysis()
    peak = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes + said.temp_size_in_bytes
    return peak, growth(Stepper(compiled, params, state, extra))


def memories(tree):
    """Return the rows of peak memory on one tree, in parts of parameters + gradients + state."""
    whole, rows = 4 * 4 * size(TREES[tree]), []
    what = {"called": "loss included", "given": "gradients given as a tree", "facade": "facade, trees"}
    for kind in MEMORY:
        for who in ("ours",) if kind == "facade" else ("ours", "optax"):
            peak, grew = alone(memory, tree, kind, who)
            # Gradients that are given are held before the step begins; the others are made in it.
            allowed = whole / 4 if kind == "called" else 0
            said = "-" if peak is None else f"{peak / whole:.2f}"
            kept = grew <= allowed + max(0.05 * whole, 8 * 2**20) and (peak is None or peak <= 1.05 * whole)
            verdict = "" if who == "optax" else "reached" if kept else "missed"
            rows.append((tree, what[kind], who, f"{whole / 2**20:,.0f}", said, f"{grew / 2**20:,.0f}", verdict))
    return rows


def main():
    args = parse_arguments(__doc__, trees=CHOICE, seconds=SECONDS)
    rows, limits, rates, peaks = [], [], [], []
    for tree in args.trees:
        if tree in LARGE:
            measured = bandwidth(tree, args.seconds)
            rows, limits, rates = rows + measured[0], limits + measured[1], [*rates, f"- {measured[2]}"]
        peaks += memories(tree)
    header = (
        "tree",
        "side",
        "median, ms",
        "limit, ms",
        "times the limit",
        "with the norm's read",
        "of in place",
        "target",
        "",
    )
    text = [
        "The limit is the time to read gradients once, and to read and write parameters and both moments once, at the",
        "bandwidth of the fastest copy in the same run. The norm of all gradients must be known before any of them",
        "is scaled, so that they are read twice where they are not in a cache: the second ratio allows for that. The",
        "third is to the time at the bandwidth of an array overwritten in place, without that second read.",
        "",
        *rates,
    ]
    titles = ("tree", "step", "side", "p + g + state, MiB", "peak by the compiler", "the process grew by, MiB", "")
    text_2 = [
        "The compiler's peak (arguments, outputs and temporaries, less what is donated) is in parts of parameters +",
        "gradients + state. The target is 1, with 5 % for what is not an array of the model; and a process that grows",
        "no more than that, or 8 MiB, during later steps, besides the gradients where the step makes them.",
    ]
    write(
        args.results / "step" / "memory.md",
        "A step against copy bandwidth, and its peak memory",
        ["Clip by the global norm, Adam, decoupled decay, learning rate, apply, donated."],
        *([["## Bandwidth", "", *text, "", *table(header, limits), "", *table(TIMES, rows)]] if rows else []),
        ["## Peak memory", "", *text_2, "", *table(titles, peaks)],
    )


if __name__ == "__main__":
    main()
