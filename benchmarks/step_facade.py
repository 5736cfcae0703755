"""The stateful `Optimizer` beside a jitted and donated step with optax, both called from Python, in turn.

    python benchmarks/step_facade.py

First: gradients and parameters as trees, in and out; and both packed. Then what a call of
the facade costs on top of the compiled function that it calls.
"""

import jax
import numpy as np
from step_timing import (
    RATIOS,
    TIMES,
    at_least,
    at_most,
    interleave,
    parse_arguments,
    ratio_row,
    table,
    time_rows,
    write,
)
from step_trees import (
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

import functional_optimodules as fo

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
    """What one call of `run` costs on the host, above the compiled function that it calls.

    The gradients are single numbers, so that the program itself takes no time to speak of.
    """

    def __init__(self, leaves):
        self.gradients = normal(uniform(leaves, 1))
        self.optimizer, self.compiled = fo.AdamModule(), None
        self.optimizer.run(self.gradients)
        session = self.optimizer._session
        self.bare_state, self.specs, self.step = copy(session.state), session.specs, session.compiled.step

    def facade(self):
        return first(self.optimizer.run(self.gradients))

    def bare(self):
        updates, self.bare_state = self.step(self.specs, self.bare_state, self.gradients, None, {})
        return first(updates)


def calls(seconds):
    """Return the rows of the table of call costs."""
    rows = []
    for leaves in LEAVES:
        case = Calls(leaves)
        times = interleave({"run": case.facade, "bare": case.bare}, seconds, least=400, most=4000)
        microseconds = {name: 1e6 * taken for name, taken in times.items()}
        above = float(np.median(microseconds["run"]) - np.median(microseconds["bare"]))
        low, high = np.quantile(microseconds["run"] - microseconds["bare"], [0.25, 0.75])
        limit = 20 + 0.1 * leaves
        medians = [f"{np.median(microseconds[name]):.1f}" for name in ("run", "bare")]
        verdict = "reached" if above <= limit else "missed"
        rows.append((leaves, *medians, f"{above:.1f}", f"{low:.1f} to {high:.1f}", f"<= {limit:g}", verdict))
    return rows


def main():
    args = parse_arguments(__doc__, TREES, tables=("steps calls", "which tables"))
    sections = []
    if "steps" in args.tables:
        rows, ratios = [], []
        for tree in args.trees:
            measured = measure(tree, args.seconds)
            rows, ratios = rows + measured[0], ratios + measured[1]
            print(*measured[0], *measured[1], sep="\n", flush=True)
        lines = ["## `apply_gradients(donate=True)` beside a jitted and donated step", "", *table(TIMES, rows), ""]
        sections.append([*lines, *table(RATIOS, ratios)])
    if "calls" in args.tables:
        header = ("leaves", "`run`, us", "bare call, us", "above, us", "quartiles of the difference, us", "target", "")
        text = "`run` of an Adam whose leaves have one element each, and the same compiled function called by itself."
        sections.append(["## The cost of a Python call", "", text, "", *table(header, calls(args.seconds))])
    intro = [
        "Clip by the global norm, Adam, decoupled decay, learning rate, apply; gradients given. All sides were held to",
        "the same parameters before they were timed. *Packed*: the parameters are a `Packed` that stays one.",
    ]
    write(args.results / "step_facade.md", "The facade beside a jitted optax step", intro, *sections)


if __name__ == "__main__":
    main()
