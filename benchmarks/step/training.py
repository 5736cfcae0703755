"""One training step of this library, packed, beside the same chain in optax, in turn in one process.

    python -m benchmarks.step.training

Three questions, a table each:

- a jitted step called from Python, the gradient of a loss over named leaves included;
- the same step inside of `lax.scan`;
- a jitted step with the gradients given as a tree, and the parameters kept packed.

Ours donates parameters and state. optax runs donated, donated again as a control of
how much a side differs from itself, and not donated; the better of its medians counts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from benchmarks.report import SECONDS, parse_arguments, section, write
from benchmarks.step.trees import (
    CHOICE,
    LARGE,
    TREES,
    Stepper,
    copy,
    given_step,
    normal,
    optax_chain,
    our_optimizer,
    require_same,
    trained_step,
)
from benchmarks.timing import RATIOS, TIMES, at_least, interleave, ratio_row, time_rows, within_control

SCANNED = 10
QUESTIONS = {
    "called": ("A step called from Python, loss included", {"1,000 x 100": 4.5, "200 x 1,000": 2.5}),
    "scanned": (f"{SCANNED} steps in one `lax.scan`, loss included", {"1,000 x 100": 2.5, "200 x 1,000": 1.5}),
    "given": ("Parameters kept packed, gradients given as a tree", {"1,000 x 100": 6.0, "200 x 1,000": 3.0}),
}


def scanned_step(tx):
    step = trained_step(tx)

    def steps(params, state, target):
        return jax.lax.scan(lambda carry, _: (step(*carry, target), None), (params, state), length=SCANNED)[0]

    return steps


def make_sides(question, shapes):
    make = {"called": trained_step, "scanned": scanned_step, "given": given_step}[question]
    given = normal(shapes, seed=1) if question == "given" else jnp.float32(1)
    params, theirs, ours = normal(shapes), optax_chain(), our_optimizer()
    packed = fo.pack(copy(params))
    donated = jax.jit(make(theirs), donate_argnums=(0, 1))
    return {
        "optax, donated": Stepper(donated, copy(params), theirs.init(params), given),
        "ours": Stepper(jax.jit(make(ours), donate_argnums=(0, 1)), packed, ours.init(packed), given),
        "optax, donated again": Stepper(donated, copy(params), theirs.init(params), given),
        "optax, not donated": Stepper(jax.jit(make(theirs)), params, theirs.init(params), given),
    }


def measure(question, tree, seconds):
    """Return the rows of both tables of one question on one tree."""
    sides = make_sides(question, TREES[tree])
    require_same(sides, steps=2)
    times = interleave(sides, seconds)
    if question == "scanned":
        times = {name: taken / SCANNED for name, taken in times.items()}
    best = min(("optax, donated", "optax, not donated"), key=lambda name: np.median(times[name]))
    rows = time_rows(tree, times)
    targets = QUESTIONS[question][1]
    if tree in targets:
        ratios = [ratio_row(tree, times, best, "ours", **at_least(targets[tree]))]
    else:
        control = within_control(times, "optax, donated", "optax, donated again")
        ratios = [ratio_row(tree, times, "ours", best, **control)]
    return rows, [*ratios, ratio_row(tree, times, "optax, donated", "optax, donated again", target="control")]


def main():
    args = parse_arguments(__doc__, trees=CHOICE, seconds=SECONDS, questions=(tuple(QUESTIONS), "only these tables"))
    sections = []
    for question in args.questions:
        take = functools.partial(measure, question, seconds=args.seconds)
        sections.append(section(QUESTIONS[question][0], take, args.trees, TIMES, RATIOS))
    intro = [
        "Clip by the global norm, Adam, decoupled decay, learning rate, apply. The loss is half the squared distance",
        "of every leaf to a number: its gradient needs each named leaf, and little else is computed. Both sides were",
        "held to the same parameters before they were timed. Each call is waited for. The target of large trees is",
        "1.02 times what optax differs from itself in the same run, by the end of the control's interval.",
        f"Large trees: {', '.join(LARGE)}.",
    ]
    write(args.results / "step" / "training.md", "One training step beside optax", intro, *sections)


if __name__ == "__main__":
    main()
