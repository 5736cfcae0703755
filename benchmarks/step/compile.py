"""How long a training step takes to trace and to compile, ours packed beside optax, in turn.

    python -m benchmarks.step.compile

Three questions, a table each: with a loss over named leaves; with gradients that are
packed already, where there is nothing to unpack; and a model of 1,000 layers, each with
a kernel and a bias of its own name. Every function is new, and JAX forgets between two
what it has traced and compiled.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from benchmarks.report import parse_arguments, section, write
from benchmarks.step.trees import CHOICE, TREES, given_step, loss_fn, normal, optax_chain, our_optimizer, trained_step
from benchmarks.timing import at_least, at_most

LAYERS, WIDTH, BATCH = 1000, 8, 4
DEEP = "1,000 layers"
QUESTIONS = {
    "loss": ("Loss included", {"1,000 x 100": (7.0, 5.0)}),
    "given": ("Nothing to unpack: gradients given, ours packed already", {"1,000 x 100": (20.0, None)}),
    "deep": (f"A residual network of {LAYERS:,} layers of {WIDTH} units, {2 * LAYERS:,} leaves", {}),
}


def deep_shapes():
    """The shapes of a residual network, a kernel and a bias each layer."""
    layers = [f"layer_{index:04}" for index in range(LAYERS)]
    return {f"{at}/{name}": shape for at in layers for name, shape in (("w", (WIDTH, WIDTH)), ("b", (WIDTH,)))}


def deep_loss(params, inputs):
    hidden = inputs
    for index in range(LAYERS):
        kernel, bias = params[f"layer_{index:04}/w"], params[f"layer_{index:04}/b"]
        hidden = hidden + 0.01 * jnp.tanh(hidden @ kernel + bias)
    return jnp.mean(hidden**2)


def cases(question, tree):
    """Return for each side the function that makes its step, and the step's arguments."""
    params = normal(deep_shapes() if question == "deep" else TREES[tree])
    packed, theirs, ours = fo.pack(params), optax_chain(), our_optimizer()
    states = theirs.init(params), ours.init(packed)
    if question == "given":
        make, batches = given_step, (params, packed)
    else:
        make = lambda tx: trained_step(tx, deep_loss if question == "deep" else loss_fn)  # noqa: E731
        batches = (jnp.ones((BATCH, WIDTH)),) * 2 if question == "deep" else (jnp.float32(1),) * 2
    return {
        "optax": (lambda: make(theirs), (params, states[0], batches[0])),
        "ours": (lambda: make(ours), (packed, states[1], batches[1])),
    }


def seconds(make, arguments):
    """Return the seconds to trace and lower, and to compile."""
    jax.clear_caches()
    begin = time.perf_counter()
    lowered = jax.jit(make(), donate_argnums=(0, 1)).lower(*arguments)
    traced = time.perf_counter()
    lowered.compile()
    return traced - begin, time.perf_counter() - traced


def measure(question, tree, repeats):
    """Return the rows of both tables of one question on one tree."""
    sides = cases(question, tree)
    taken = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            taken[name].append(seconds(*side))
    rows, medians = [], {}
    for name, pairs in taken.items():
        both = np.array([(trace, built, trace + built) for trace, built in pairs])
        medians[name] = np.median(both, axis=0)
        low, high = both[:, 2].min(), both[:, 2].max()
        shown = [f"{value:.2f}" for value in medians[name]]
        rows.append((tree, name, *shown, f"{low:.2f} to {high:.2f}", repeats))
    times = medians["optax"] / medians["ours"]
    compiled, together = QUESTIONS[question][1].get(tree, (None, None))
    ratios = []
    for what, value, target in (("compile", times[1], compiled), ("trace and compile", times[2], together)):
        if target:
            judged = at_least(target)
            ratios.append((tree, f"optax / ours, {what}", f"{value:.2f}", judged["target"], judged["reached"](value)))
        else:
            judged = at_most(1.0)
            ratios.append((tree, f"ours / optax, {what}", f"{1 / value:.2f}", "<= 1", judged["reached"](1 / value)))
    return rows, [(*row[:-1], "reached" if row[-1] else "missed") for row in ratios]


def main():
    args = parse_arguments(
        __doc__,
        trees=CHOICE,
        repeats=(3, "times that each is compiled"),
        questions=(tuple(QUESTIONS), "only these tables"),
    )
    seconds(lambda: jnp.add, (jnp.ones(3), jnp.ones(3)))  # the compiler's own start
    header = ("tree", "side", "trace, s", "compile, s", "together, s", "smallest to largest", "repeats")
    titles = ("tree", "ratio", "of medians", "target", "")
    sections = []
    for question in args.questions:
        take = functools.partial(measure, question, repeats=args.repeats)
        trees = [DEEP] if question == "deep" else args.trees
        sections.append(section(QUESTIONS[question][0], take, trees, header, titles))
    intro = [
        "Clip by the global norm, Adam, decoupled decay, learning rate, apply. A new jitted, donated step each time:",
        "*trace* ends with the lowered program, *compile* begins with it. No cache on disk.",
    ]
    write(args.results / "step" / "compile.md", "Compile time of a training step beside optax", intro, *sections)


if __name__ == "__main__":
    main()
