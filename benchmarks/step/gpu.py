"""Steps on a GPU: absolute times, the fraction of the card's copy bandwidth, and the ratio to optax.

    python -m benchmarks.step.gpu

It needs what the library needs, and a jaxlib for the card. Without a card it runs on the CPU and says so,
which is a check of the script and no result. The card's bandwidth is that of a jitted copy in the same run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from benchmarks.report import SECONDS, parse_arguments, section, write
from benchmarks.step.trees import (
    CHOICE,
    TREES,
    Facade,
    Stepper,
    copy,
    given_step,
    normal,
    optax_chain,
    our_optimizer,
    require_same,
    size,
    trained_step,
)
from benchmarks.timing import RATIOS, interleave, ratio_row

COPIED = {"gpu": 2**28, "cpu": 2**25}  # elements of float32: many times what the caches hold
QUESTIONS = {
    "loss": "A step called from Python, loss included",
    "given": "Gradients given, ours packed already",
    "facade": "The facade, trees in and out, beside a jitted optax step",
}
PASSES = {"loss": 6, "given": 7, "facade": 7}  # times that a step must read or write an array like the parameters


def bandwidth():
    """Return bytes a second of reading and writing a large array on the device, the best of many."""
    array = jnp.ones(COPIED["cpu" if jax.default_backend() == "cpu" else "gpu"])
    copies = {"in place": jax.jit(jnp.negative, donate_argnums=0), "fresh": jax.jit(jnp.negative)}
    own = [jnp.copy(array)]

    def in_place():
        own[0] = copies["in place"](own[0])
        return own[0]

    times = interleave({"in place": in_place, "fresh": lambda: copies["fresh"](array)}, seconds=5.0)
    return 2 * array.nbytes / min(float(np.median(taken)) for taken in times.values())


def make_sides(question, shapes):
    params, gradients, theirs, ours = normal(shapes), normal(shapes, seed=1), optax_chain(), our_optimizer()
    make = trained_step if question == "loss" else given_step
    batch = jnp.float32(1) if question == "loss" else gradients
    donated = jax.jit(make(theirs), donate_argnums=(0, 1))
    if question == "facade":
        mine = Facade(ours, copy(params), gradients, donate=True)
    else:
        packed = fo.pack(copy(params))
        step = jax.jit(make(ours), donate_argnums=(0, 1))
        mine = Stepper(step, packed, ours.init(packed), batch if question == "loss" else fo.pack(gradients))
    return {
        "optax": Stepper(donated, copy(params), theirs.init(params), batch),
        "ours": mine,
        "optax, again": Stepper(donated, copy(params), theirs.init(params), batch),
    }


def measure(question, tree, seconds, rate):
    """Return the rows of both tables of one question on one tree."""
    shapes = TREES[tree]
    sides = make_sides(question, shapes)
    require_same(sides, steps=2)
    times = interleave(sides, seconds)
    rows = []
    for name, taken in times.items():
        low, median, high = 1e3 * np.quantile(taken, [0.25, 0.5, 0.75])
        reached = PASSES[question] * 4 * size(shapes) / rate / (median / 1e3)
        rows.append(
            (tree, name, f"{median:.3f}", f"{low:.3f} to {high:.3f}", f"{1e3 * taken.min():.3f}", f"{reached:.0%}")
        )
    pairs = (("optax", "ours"), ("optax", "optax, again"))
    # There are no targets for a card.
    return rows, [ratio_row(tree, times, *pair)[:5] for pair in pairs]


def main():
    args = parse_arguments(__doc__, trees=CHOICE, seconds=SECONDS)
    rate, sections = bandwidth(), []
    header = ("tree", "side", "median, ms", "quartiles, ms", "fastest, ms", "of copy bandwidth")
    for question, title in QUESTIONS.items():
        take = functools.partial(measure, question, seconds=args.seconds / 2, rate=rate)
        sections.append(section(title, take, args.trees, header, RATIOS[:5]))
    cpu = jax.default_backend() == "cpu"
    intro = [
        *(["**There was no GPU: these are the CPU's times, a check of the script.**", ""] if cpu else []),
        "Clip by the global norm, Adam, decoupled decay, learning rate, apply, donated. *Of copy bandwidth*: what",
        "must be moved (parameters and both moments read and written, gradients read where they are given) over what a",
        "copy moves in that time.",
        "",
        f"- copy bandwidth: {rate / 1e9:,.0f} GB/s, read and written",
    ]
    write(args.results / "step" / ("gpu_on_cpu.md" if cpu else "gpu.md"), "Steps on a GPU", intro, *sections)


if __name__ == "__main__":
    main()
