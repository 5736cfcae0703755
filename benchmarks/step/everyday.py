"""What groups, packing inside of a step, and live hyper-parameters cost, in turn in one process.

    python -m benchmarks.step.everyday

Three questions, a table each:

- groups: a donated training step with two groups of parameters, kept packed, beside `optax.partition` over the same
  chains, the gradient of a loss over named leaves included. Every second leaf takes momentum, the others Adam.
- inside: a donated training step that has trees in and out, by an optimizer that packs inside of it, beside the same
  one that does not, and beside optax.
- sweep: 20 steps of 32 learning rates and betas in one `vmap`, beside one `vmap` of 32 seeds.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import functional_optimodules as fo
from benchmarks.report import SECONDS, parse_arguments, section, write
from benchmarks.step.trees import (
    BETA_2,
    CHOICE,
    DECAY,
    EPS,
    LRATE,
    MAX_NORM,
    TREES,
    Stepper,
    copy,
    normal,
    optax_chain,
    require_same,
    trained_step,
)
from benchmarks.timing import RATIOS, TIMES, at_least, at_most, interleave, ratio_row, time_rows, within_control

SMALL = ("1,000 x 100", "200 x 1,000")
SWEPT, STEPS = 32, 20
QUESTIONS = {
    "groups": "Two groups, kept packed, beside `optax.partition`",
    "inside": "Trees in and out: packed inside of the step, and not",
    "sweep": f"{SWEPT} configurations, and {SWEPT} seeds",
}
CLIP, ADAM = ("l2-global-clipping", {"max_norm": MAX_NORM}), ("adam", {"beta_2": BETA_2, "eps": EPS})


def stepper(tx, params):
    return Stepper(jax.jit(trained_step(tx), donate_argnums=(0, 1)), params, tx.init(params), jnp.float32(1))


def groups(tree, seconds):
    params = normal(TREES[tree])
    even = [name for at, name in enumerate(params) if at % 2 == 0]
    rules = {
        "even": optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(LRATE)),
        "odd": optax.chain(optax.scale_by_adam(b2=BETA_2, eps=EPS), optax.scale_by_learning_rate(LRATE)),
    }
    labels = {name: "even" if name in even else "odd" for name in params}
    theirs = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.partition(rules, labels))
    momentum = fo.Group(tuple(even), modules=[("momentum", {"beta": 0.9})])
    ours = fo.Optimizer(LRATE, modules=[CLIP], groups=[momentum, fo.Group("**", modules=[ADAM])])
    sides = {"optax": stepper(theirs, copy(params)), "ours": stepper(ours, ours.pack(copy(params)))}
    require_same(sides)
    times = interleave(sides, seconds)
    judge = at_least(8.0) if tree == "1,000 x 100" else {}
    return time_rows(tree, times), [ratio_row(tree, times, "optax", "ours", **judge)]


def inside(tree, seconds):
    params = normal(TREES[tree])
    plain = fo.Optimizer(LRATE, w_decay=DECAY, modules=[CLIP, ADAM])
    packs = fo.Optimizer(LRATE, w_decay=DECAY, modules=[CLIP, ADAM], packed=True)
    sides = {
        "plain": stepper(plain, copy(params)),
        "packed inside": stepper(packs, copy(params)),
        "plain again": stepper(plain, copy(params)),
        "optax": stepper(optax_chain(), copy(params)),
    }
    require_same(sides)
    times = interleave(sides, seconds)
    if tree == "1,000 x 100":
        ratios = [ratio_row(tree, times, "plain", "packed inside", **at_least(2.5))]
    else:
        control = within_control(times, "plain", "plain again")
        ratios = [ratio_row(tree, times, "packed inside", "plain", **control)]
    return time_rows(tree, times), [*ratios, ratio_row(tree, times, "plain", "plain again", target="control")]


def train(tx, state, params, batch):
    """Train a perceptron for some steps on one batch, and return the last parameters."""

    def loss(params):
        hidden = jnp.tanh(batch @ params["in"])
        return ((hidden @ params["out"] - batch[:, :1]) ** 2).mean()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=STEPS)[0][0]


def sweep(tree, seconds):
    batch, live = normal({"x": (128, 64)}, scale=1.0)["x"], ["lrate", "modules/adam/beta_1"]
    start = normal({"in": (64, 128), "out": (128, 1)})
    fixed = fo.Optimizer(LRATE, modules=["adam"])
    swept = fo.Optimizer(LRATE, modules=["adam"], live=live)

    def of_seed(key):
        params = jax.tree.map(lambda leaf: leaf + 0.01 * jax.random.normal(key, leaf.shape), start)
        return train(fixed, fixed.init(params), params, batch)

    def of_configuration(key, values):
        params = jax.tree.map(lambda leaf: leaf + 0.01 * jax.random.normal(key, leaf.shape), start)
        return train(swept, swept.with_hyperparameters(swept.init(params), values), params, batch)

    keys = jax.random.split(jax.random.key(0), SWEPT)
    values = dict(zip(live, (jnp.geomspace(1e-4, 1e-1, SWEPT), jnp.linspace(0.8, 0.99, SWEPT)), strict=True))
    seeds, configurations = jax.jit(jax.vmap(of_seed)), jax.jit(jax.vmap(of_configuration))
    sides = {
        f"{SWEPT} configurations": lambda: configurations(keys, values),
        f"{SWEPT} seeds": lambda: seeds(keys),
    }
    times = interleave(sides, seconds)
    return time_rows(tree, times), [ratio_row(tree, times, *sides, **at_most(1.2))]


def main():
    args = parse_arguments(__doc__, trees=CHOICE, seconds=SECONDS, questions=(tuple(QUESTIONS), "only these tables"))
    trees = {"groups": [tree for tree in args.trees if tree in SMALL], "inside": args.trees, "sweep": ["perceptron"]}
    takes = {"groups": groups, "inside": inside, "sweep": sweep}
    sections = [
        section(title, functools.partial(takes[each], seconds=args.seconds), trees[each], TIMES, RATIOS)
        for each, title in QUESTIONS.items()
        if each in args.questions
    ]
    intro = [
        "Clip by the global norm, Adam, decoupled decay, learning rate, apply, but for what a table says. The loss is",
        "half the squared distance of every leaf to a number. The sides were held to the same parameters before they",
        "were timed. Each call is waited for. The target of other trees is 1.02 times what a side differs from itself",
        "in the same run, by the end of the control's interval.",
    ]
    write(args.results / "step" / "everyday.md", "Groups, packing inside of a step, live numbers", intro, *sections)


if __name__ == "__main__":
    main()
