"""The trees that steps are timed on, and one chain, written for optax and for this library.

    clip by the global norm, Adam, decoupled weight decay, learning rate

optax multiplies the decay by the learning rate and this library does not, so optax
gets the quotient, and `require_same` holds both to the same parameters.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import functional_optimodules as fo

LRATE, DECAY, MAX_NORM, BETA_2, EPS = 1e-3, 1e-5, 1.0, 0.99, 1e-7


def uniform(count, size):
    return {f"layer_{index:04}": (size,) for index in range(count)}


def resnet50():
    """The 161 arrays of ResNet-50 on 1,000 classes, 25.6 M parameters, kernels as height, width, in, out."""
    shapes = {"stem/conv": (7, 7, 3, 64), "stem/scale": (64,), "stem/bias": (64,)}
    before = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            kernels = {"1": (1, 1, before, width), "2": (3, 3, width, width), "3": (1, 1, width, 4 * width)}
            if block == 0:
                kernels["shortcut"] = (1, 1, before, 4 * width)
            for name, shape in kernels.items():
                at = f"stage_{stage}/block_{block}/{name}"
                shapes |= {f"{at}/conv": shape, f"{at}/scale": shape[-1:], f"{at}/bias": shape[-1:]}
            before = 4 * width
    return {**shapes, "head/kernel": (before, 1000), "head/bias": (1000,)}


def transformer(layers=12, width=256, vocabulary=50257, context=1024):
    """The 148 arrays of GPT-2's architecture at a third of the width of its smallest, 22.6 M parameters."""
    shapes = {"tokens": (vocabulary, width), "positions": (context, width)}
    for layer in range(layers):
        for name, out in (("attention", 3 * width), ("projection", width), ("expand", 4 * width), ("contract", width)):
            shapes[f"block_{layer:02}/{name}/kernel"] = (4 * width if name == "contract" else width, out)
            shapes[f"block_{layer:02}/{name}/bias"] = (out,)
        for norm in ("norm_1", "norm_2"):
            shapes |= {f"block_{layer:02}/{norm}/scale": (width,), f"block_{layer:02}/{norm}/bias": (width,)}
    return {**shapes, "norm/scale": (width,), "norm/bias": (width,)}


TREES = {
    "1,000 x 100": uniform(1000, 100),
    "200 x 1,000": uniform(200, 1000),
    "ResNet-50": resnet50(),
    "transformer": transformer(),
    "one leaf of 16 M": {"kernel": (4000, 4000)},
}
LARGE = ("ResNet-50", "transformer", "one leaf of 16 M")
CHOICE = (tuple(TREES), "only these trees")


def normal(shapes, seed=0, scale=0.1):
    """Return arrays of these shapes, of normal numbers."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def size(shapes):
    """Return the number of parameters."""
    return sum(int(np.prod(shape)) for shape in shapes.values())


def copy(tree):
    """Return a tree whose buffers may be donated."""
    return jax.tree.map(jnp.copy, tree)


def optax_chain():
    return optax.chain(
        optax.clip_by_global_norm(MAX_NORM),
        optax.scale_by_adam(b2=BETA_2, eps=EPS),
        optax.add_decayed_weights(DECAY / LRATE),
        optax.scale_by_learning_rate(LRATE),
    )


def our_optimizer():
    modules = [("l2-global-clipping", {"max_norm": MAX_NORM}), ("adam", {"beta_2": BETA_2, "eps": EPS})]
    return fo.Optimizer(LRATE, w_decay=DECAY, modules=modules)


def loss_fn(params, target):
    """Half the squared distance of every named leaf to a number: the cheapest loss that reads and moves them all."""
    return sum(jnp.sum((leaf - target) ** 2) for leaf in jax.tree.leaves(params)) / 2


def trained_step(tx, loss=loss_fn):
    """Return a step on the parameters, plain or packed, with the gradient of a loss over named leaves."""

    def step(params, state, batch):
        gradients = jax.grad(lambda params: loss(fo.unpack(params), batch))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def given_step(tx):
    """Return a step that is given the gradients."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def first(tree):
    return jax.tree.leaves(tree)[0]


class Stepper:
    """One side: its own parameters and state, and a compiled step that takes and gives both.

    A call takes a step and returns one array to wait for: all outputs of one program
    are ready at the same time, and waiting for each of a thousand would be timed too.
    """

    def __init__(self, step, params, state, *inputs):
        self.step, self.params, self.state, self.inputs = step, params, state, inputs

    def __call__(self):
        self.params, self.state = self.step(self.params, self.state, *self.inputs)
        return first(self.params)


class Facade:
    """One side: the stateful `Optimizer`, which keeps its state itself."""

    def __init__(self, optimizer, params, gradients, **options):
        self.optimizer, self.params, self.gradients, self.options = optimizer, params, gradients, options

    def __call__(self):
        self.params = self.optimizer.apply_gradients(self.params, self.gradients, **self.options)
        return first(self.params)


def require_same(sides, steps=4):
    """Take some steps on each side, and raise unless all arrive at the same parameters.

    Raises:
      RuntimeError: if two sides differ by more than a thousandth of the way that they went.
    """
    reached = {}
    for name, side in sides.items():
        for _ in range(steps):
            jax.block_until_ready(side())
        reached[name] = jax.device_get(fo.unpack(side.params))
    for (one, left), (other, right) in itertools.pairwise(reached.items()):
        for path in left:
            apart = float(np.max(np.abs(left[path] - right[path])))
            if not apart <= 1e-3 * LRATE * steps:
                raise RuntimeError(f"{one} and {other} differ by {apart} at {path} after {steps} steps")
