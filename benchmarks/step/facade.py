"""The stateful `Optimizer` beside a jitted and donated step with optax, both called from Python, in turn.

    python -m benchmarks.step.facade

First: gradients and parameters as trees, in and out; and both packed. Then what a call of
the facade costs on top of the compiled function that it calls.
"""

import functools
import time

import jax
import numpy as np

import functional_optimodules as fo
from benchmarks.report import SECONDS, parse_arguments, section, table, write
from benchmarks.step.trees import (
    CHOICE,
    TREES,
    Facade,
    Stepper,
    copy,
    first,
    given_step,
    normal,
    optax_chain,
    our_optimizer,
    require_same,
    uniform,
)
from benchmarks.timing import RATIOS, TIMES, at_least, at_most, interleave, ratio_row, time_rows

FASTER = {"1,000 x 100": {"ours, trees": 1.5, "ours, packed": 6.0}}
SLOWER = 1.05
LEAVES = (1, 50, 200, 1000)


def make_sides(shapes):
    params, gradients, theirs = normal(shapes), normal(shapes, seed=1), optax_chain()

    donated = jax.jit(given_step(theirs), donate_argnums=(0, 1))
    packed = fo.pack(copy(params))
    return {
        "optax, jitted": Stepper(donated, copy(params), theirs.init(params), gradients),
        "ours, trees": Facade(our_optimizer(), copy(params), gradients, donate=True),
        "ours, packed": Facade(our_optimizer(), packed, fo.pack(gradients), donate=True),
        "ours, packed, gradients a tree": Facade(our_optimizer(), fo.pack(copy(params)), gradients, donate=True),
        "optax, jitted again": Stepper(donated, copy(params), theirs.init(params), gradients),
    }


def measure(tree, seconds):
    sides = make_sides(TREES[tree])
    require_same(sides)
    times = interleave(sides, seconds)
    ratios = []
    for name in sides:
        if name.startswith("ours"):
            faster = FASTER.get(tree, {}).get(name)
            judged = ("optax, jitted", name, at_least(faster)) if faster else (name, "optax, jitted", at_most(SLOWER))
            ratios.append(ratio_row(tree, times, *judged[:2], **judged[2]))
    return time_rows(tree, times), [
        *ratios,
        ratio_row(tree, times, "optax, jitted", "optax, jitted again", target="control"),
    ]


class Calls:
    """`run` of an Adam whose leaves have one element each, and within each call the time in the compiled function.

    The program itself takes next to no time, so that what is left of a call is the host's.
    """

    def __init__(self, leaves):
        self.gradients, self.within = normal(uniform(leaves, 1)), []
        # The compiled methods are shared by equal bricks: this one is equal to no other.
        self.optimizer = fo.AdamModule(beta_1=0.5 + leaves / 1e4)
        self.optimizer.run(self.gradients)
        compiled = self.optimizer._session.memory.fit.compiled
        self.step, compiled.step = compiled.step, self.timed

    def timed(self, *args):
        start = time.perf_counter()
        result = self.step(*args)
        self.within.append(time.perf_counter() - start)
        return result

    def __call__(self):
        start = time.perf_counter()
        updates = self.optimizer.run(self.gradients)
        taken = time.perf_counter() - start
        jax.block_until_ready(first(updates))
        return taken


def calls(seconds):
    """Return the rows of the table of call costs."""
    rows = []
    for leaves in LEAVES:
        case = Calls(leaves)
        taken = interleave({"run": case}, seconds / 4, least=400, most=4000)["run"]
        within = np.array(case.within[-len(taken) :])
        low, above, high = 1e6 * np.quantile(taken - within, [0.25, 0.5, 0.75])
        limit = 20 + 0.1 * leaves
        medians = [f"{1e6 * np.median(part):.1f}" for part in (taken, within)]
        verdict = "reached" if above <= limit else "missed"
        rows.append((leaves, *medians, f"{above:.1f}", f"{low:.1f} to {high:.1f}", f"<= {limit:g}", verdict))
    return rows


def main():
    args = parse_arguments(__doc__, trees=CHOICE, seconds=SECONDS, tables=(("steps", "calls"), "only these tables"))
    sections = []
    if "steps" in args.tables:
        title = "`apply_gradients(donate=True)` beside a jitted and donated step"
        take = functools.partial(measure, seconds=args.seconds)
        sections.append(section(title, take, args.trees, TIMES, RATIOS))
    if "calls" in args.tables:
        header = ("leaves", "`run`, us", "compiled function, us", "above, us", "quartiles, us", "target", "")
        text = (
            "`run` of an Adam whose leaves have one element each, and the compiled function within, until both return."
        )
        sections.append(["## The cost of a Python call", "", text, "", *table(header, calls(args.seconds))])
    intro = [
        "Clip by the global norm, Adam, decoupled decay, learning rate, apply; gradients given. All sides were held to",
        "the same parameters before they were timed. *Packed*: the parameters are a `Packed` that stays one.",
    ]
    write(args.results / "step" / "facade.md", "The facade beside a jitted optax step", intro, *sections)


if __name__ == "__main__":
    main()
