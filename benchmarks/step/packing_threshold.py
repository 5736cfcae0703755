"""From which leaf size packing stops to pay, on the device at hand.

    python -m benchmarks.step.packing_threshold

For leaves of 64 to 1,048,576 elements, as many as give about 4 M together and at most 500:
a training step on a packed state beside the same step on the tree, and an update that packs
gradients and parameters, and unpacks what it gives, beside one that does not. Both sides are ours,
in turn. The last line is the threshold that the two tables speak for.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functional_optimodules as fo
from benchmarks.report import SECONDS, parse_arguments, section, write
from benchmarks.step.trees import Stepper, copy, given_step, normal, our_optimizer, require_same, trained_step, uniform
from benchmarks.timing import interleave, ratio

SIZES = tuple(2**exponent for exponent in (6, 8, 10, 11, 12, 13, 14, 16, 18, 20))
TOTAL, MOST = 2**22, 500


def in_and_out(optimizer):
    """Return a step with trees in and out, packed in between; the state stays packed."""

    def step(params, state, gradients):
        packed = fo.pack(params, small=4 * TOTAL)
        updates, state = optimizer.update(fo.pack(gradients, small=4 * TOTAL), state, packed)
        return optax.apply_updates(params, fo.unpack(updates)), state

    return step


def make_sides(question, leaves, elements):
    params, optimizer = normal(uniform(leaves, elements)), our_optimizer()
    packed = fo.pack(copy(params), small=4 * TOTAL)
    given = jnp.float32(1) if question == "training" else normal(uniform(leaves, elements), seed=1)
    plain, other = (trained_step,) * 2 if question == "training" else (given_step, in_and_out)
    donate = {"donate_argnums": (0, 1)}
    kept = packed if question == "training" else copy(params)
    return {
        "plain": Stepper(jax.jit(plain(optimizer), **donate), copy(params), optimizer.init(params), given),
        "packed": Stepper(jax.jit(other(optimizer), **donate), kept, optimizer.init(packed), given),
    }


def measure(elements, question, seconds, pays):
    """Return the row of one size, and add the size to `pays` if packing does."""
    leaves = max(4, min(MOST, TOTAL // elements))
    sides = make_sides(question, leaves, elements)
    require_same(sides, steps=2)
    times = interleave(sides, seconds)
    value, low, high = ratio(times["plain"], times["packed"])
    if value > 1:
        pays.append(elements)
    medians = [f"{1e3 * np.median(times[name]):.3f}" for name in ("plain", "packed")]
    return ([(f"{elements:,}", leaves, *medians, f"{value:.2f}", f"{low:.2f} to {high:.2f}")],)


def threshold(sizes, pays):
    """Return the largest size up to which packing pays without a gap, or 0."""
    return max(itertools.takewhile(pays.__contains__, sorted(sizes)), default=0)


def main():
    args = parse_arguments(__doc__, seconds=SECONDS, sizes=(SIZES, "only these sizes of a leaf"))
    questions = {
        "training": "A training step, loss included: packed state beside tree",
        "in and out": "Gradients given, trees in and out: packed inside beside not",
    }
    sections, found = [], {}
    header = ("elements a leaf", "leaves", "plain, ms", "packed, ms", "plain / packed", "90 % interval")
    for question, title in questions.items():
        pays = []
        take = functools.partial(measure, question=question, seconds=args.seconds / 4, pays=pays)
        sections.append(section(title, take, args.sizes, header))
        found[question] = threshold(args.sizes, pays)
    # What the library does by itself must not slow anybody down: the smaller of the two.
    verdict = [f"- {question}: packing pays up to {size:,} elements a leaf" for question, size in found.items()]
    sections.append([*verdict, "", f"Threshold: {min(found.values()):,} elements, {4 * min(found.values()):,} bytes."])
    intro = ["Clip by the global norm, Adam, decoupled decay, learning rate, apply, donated; leaves of one size."]
    write(
        args.results / "step" / f"packing_threshold_{jax.default_backend()}.md", "Where packing pays", intro, *sections
    )


if __name__ == "__main__":
    main()
