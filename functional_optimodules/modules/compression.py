"""Compression of what a client sends, each with the bits that it takes.

    top-k       the k coordinates of largest modulus
    random-k    k coordinates drawn at random
    sign        mean |u| and one bit for each coordinate
    qsgd        a norm and a few levels for each coordinate, rounded at random

    Init:        error = 0
    Step(D):     u = error + D         # u = D without error feedback
                 error = u - Q(u)
                 Q(u)

A brick returns Q(u) as numbers, as who receives it would decode them. Error
feedback makes up for what Q leaves out, later. It needs Q to be a contraction,
E ||Q(u) - u||² <= (1 - d) ||u||² with d > 0: an unbiased Q whose variance is at most
w ||u||² is then divided by 1 + w, which makes it one.

The error moves with the step, and not when a message is known to have arrived. A
federated round keeps the old state of who dropped out: its error is what it was.
Who sends by hand, and loses what a step returned, goes back to the state before it.

A complex number is two coordinates. Bits are those of a plain coding, in which a
number takes 32; what an entropy coder would save is not taken off.
"""

import functools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from functional_optimodules import xla
from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, total, wide, zeros_wide
from functional_optimodules.order import largest
from functional_optimodules.packing.policy import map_parameters
from functional_optimodules.packing.tree import shapes
from functional_optimodules.random.keys import make_key
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.paths import leaf_paths

NUMBER = 32
"""Bits of a number on the wire."""


def owed(updates: Updates, error: PyTree | None) -> PyTree:
    """Return what should be sent, in at least float32: the updates, and what earlier ones still lack."""
    exact = jax.tree.map(wide, updates)
    return exact if error is None else jax.tree.map(jnp.add, exact, error)


def lacking(due: PyTree, sent: Updates, error: PyTree | None) -> PyTree | None:
    """Return the new error: what should have been sent and was not, the rounding of its dtype included."""
    if error is None:
        return None
    return jax.tree.map(lambda u, s, e: (u - wide(s)).astype(e.dtype), due, sent, error)


def coordinates(array: jax.Array) -> jax.Array:
    """Return the real coordinates of an array, flat."""
    if jnp.iscomplexobj(array):
        return jnp.concatenate([array.real.reshape(-1), array.imag.reshape(-1)])
    return array.reshape(-1)


def from_coordinates(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Return an array, shaped like another, of its real coordinates."""
    if not jnp.iscomplexobj(like):
        return vector.reshape(like.shape)
    real, imag = jnp.split(vector, 2)
    return lax.complex(real, imag).reshape(like.shape)


def count(tree: PyTree) -> int:
    """Return how many real coordinates a tree has."""
    return sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in jax.tree.leaves(tree))


def on_vectors(function: Callable[[list[jax.Array]], list[jax.Array]], tree: PyTree) -> PyTree:
    """Apply a function to the coordinates of all leaves, a vector for each, in the order of the paths."""
    leaves, treedef = jax.tree.flatten(tree)
    order = sorted(range(len(leaves)), key=leaf_paths(tree).__getitem__)
    made = function([coordinates(leaves[index]) for index in order])
    found = {index: from_coordinates(vector, leaves[index]) for index, vector in zip(order, made, strict=True)}
    return jax.tree.unflatten(treedef, [found[index] for index in range(len(leaves))])


def widest(arrays: list[jax.Array]) -> jnp.dtype:
    """Return the widest of the dtypes of some real arrays."""
    return max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)


def keep(tree: PyTree, kept: Callable[[jax.Array], jax.Array]) -> PyTree:
    """Return a tree with 0 wherever a function of the vector of all coordinates says no."""

    def chosen(vectors: list[jax.Array]) -> list[jax.Array]:
        mask = kept(jnp.concatenate([vector.astype(widest(vectors)) for vector in vectors]))
        masks = lax.split(mask, [vector.size for vector in vectors])
        return [jnp.where(mask, vector, 0) for mask, vector in zip(masks, vectors, strict=True)]

    return on_vectors(chosen, tree) if count(tree) else tree


def how_many(fraction: float, size: int) -> int:
    """Return the number nearest to a fraction of some, at least 1 of them."""
    return min(size, max(1, round(fraction * size)))


class CompressionState(NamedTuple):
    """State of `TopKModule` and `SignModule`.

    Attributes:
      error: what was not sent yet, shaped like the parameters, in at least float32;
        `None` without error feedback.
      bits: float32 scalar, what the last update takes on the wire.
    """

    error: PyTree | None
    bits: jax.Array


def init_compression(params: Params, error_feedback: bool) -> CompressionState:
    """Return the state before the first step."""
    return CompressionState(zeros_wide(params) if error_feedback else None, jnp.zeros((), jnp.float32))


class TopKModule(OptiModule[CompressionState]):
    """The k coordinates of largest |u|, others 0 (Stich et al. 2018; Alistarh et al. 2018).

        Init(fraction, error_feedback):
            error = 0
        Step(grads):
            u = error + grads
            grads = u where |u| is among the k largest, else 0
            error = u - grads

    The k largest are those of all parameters together, as in the papers; k is the
    number nearest to `fraction` of the n coordinates, and at least 1. Of equal ones the
    first in the order of the paths are sent; of packed parameters, in their buffers.

    Bits: k (32 + ⌈log₂ n⌉), a number and its place.

    Attributes:
      fraction: of the coordinates, how many are sent.
      error_feedback: whether what is not sent is added to the next updates.

    References:
      Stich, Cordonnier and Jaggi, "Sparsified SGD with memory", NeurIPS 2018,
      arXiv:1809.07599.
      Alistarh et al., "The convergence of sparsified gradient methods", NeurIPS
      2018, arXiv:1809.10505.
    """

    name: ClassVar[str] = "top-k"
    packable: ClassVar[bool] = True
    fraction: float = hyperparameter(default=0.01, within="(0, 1]", static=True)
    error_feedback: bool = True

    def init(self, params: Params) -> CompressionState:
        return init_compression(params, self.error_feedback)

    def update(
        self, updates: Updates, state: CompressionState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, CompressionState]:
        size = count(updates)
        k = how_many(self.fraction, size)
        due = owed(updates, state.error)
        sent = cast_like(keep(due, lambda vector: largest(_modulus_as_integer(vector), k)), updates)
        bits = jnp.float32(k * (NUMBER + _place_bits(size)))
        return sent, CompressionState(lacking(due, sent, state.error), bits)

    def metrics(self, state: CompressionState) -> dict[str, jax.Array]:
        """Return the bits of the last update."""
        return {"bits": state.bits}


def _modulus_as_integer(vector: jax.Array) -> jax.Array:
    # Floating-point numbers >= 0 are ordered as the integers of their bits.
    dtype = jnp.uint64 if vector.dtype.itemsize == 8 else jnp.uint32
    return lax.bitcast_convert_type(jnp.abs(lax.stop_gradient(vector)), dtype)


def _place_bits(size: int) -> int:
    return max(size - 1, 0).bit_length()


class SignModule(OptiModule[CompressionState]):
    """mean |u| · sign(u), one bit a coordinate (Karimireddy et al. 2019).

        Init(per_parameter, error_feedback):
            error = 0
        Step(grads):
            u = error + grads
            for each parameter, or all together: grad = mean(|u|) * sign(u)
            error = u - grads

    The sign of 0 is 1, for it to be one bit.

    Bits: n + 32 for each parameter of n coordinates, or for all together.

    Attributes:
      per_parameter: whether each parameter has a mean of its own.
      error_feedback: whether what is not sent is added to the next updates. Without
        it steps need not lead to a minimum.

    References:
      Karimireddy et al., "Error feedback fixes SignSGD and other gradient
      compression schemes", algorithm 1, ICML 2019, arXiv:1901.09847.
    """

    name: ClassVar[str] = "sign"
    packable: ClassVar[bool] = True
    per_parameter: bool = True
    error_feedback: bool = True

    def init(self, params: Params) -> CompressionState:
        return init_compression(params, self.error_feedback)

    def update(
        self, updates: Updates, state: CompressionState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, CompressionState]:
        due = owed(updates, state.error)
        if self.per_parameter:
            signs = map_parameters(lambda u: _signs(u, _moduli(u) / max(1, count(u))), due)
            groups = sum(leaf.size > 0 for leaf in jax.tree.leaves(shapes(updates)))
        else:
            moduli = total(map(_moduli, jax.tree.leaves(due)))
            signs = jax.tree.map(lambda u: _signs(u, moduli / max(1, count(due))), due)
            groups = 1 if count(due) else 0
        sent = cast_like(signs, updates)
        bits = jnp.float32(count(updates) + NUMBER * groups)
        return sent, CompressionState(lacking(due, sent, state.error), bits)

    def metrics(self, state: CompressionState) -> dict[str, jax.Array]:
        """Return the bits of the last update."""
        return {"bits": state.bits}


def _moduli(array: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(coordinates(array)))


def _signs(array: jax.Array, scale: jax.Array) -> jax.Array:
    vector = coordinates(array)
    scale = scale.astype(vector.dtype)
    return from_coordinates(jnp.where(vector >= 0, scale, -scale), array)


class RandomCompressionState(NamedTuple):
    """State of `RandomKModule` and `QSGDModule`.

    Attributes:
      key: typed PRNG key.
      steps: int32 scalar, how many draws were made.
      error: what was not sent yet, shaped like the parameters, in at least float32;
        `None` without error feedback.
      bits: float32 scalar, what the last update takes on the wire.
    """

    key: jax.Array
    steps: jax.Array
    error: PyTree | None
    bits: jax.Array


def init_random_compression(
    seed: int | None, params: Params, error_feedback: bool, owner: str
) -> RandomCompressionState:
    """Return the state before the first step."""
    key = make_key(seed, params, owner)
    return RandomCompressionState(key, jnp.zeros((), jnp.int32), *init_compression(params, error_feedback))


class RandomKModule(OptiModule[RandomCompressionState]):
    """n/k · u at k of n coordinates drawn at random, others 0 (Konečný & Richtárik 2018).

        Init(fraction, error_feedback, seed):
            key = make_key(seed); steps = 0; error = 0
        Step(grads):
            u = error + grads
            grads = u at k coordinates drawn by fold_in(key, steps), else 0
            steps += 1
            without error feedback: grads = n / k * grads       # the mean is then u
            error = u - grads

    The coordinates are those of all parameters together, drawn without
    replacement; k is the number nearest to `fraction` of them, and at least 1. Clients of
    one seed draw the same ones, unless they fold in an identity each.

    Bits: 32 k. The places are not sent: they follow from a key that both sides know.

    Attributes:
      fraction: of the coordinates, how many are sent.
      error_feedback: whether what is not sent is added to the next updates.
      seed: where the key comes from: with `None`, from the operating system, so
        that `init` must then be called outside of `jit`, or within `entropy`.

    References:
      Konečný and Richtárik, "Randomized distributed mean estimation: accuracy vs.
      communication", Frontiers in Applied Mathematics and Statistics 4, 2018,
      arXiv:1611.07555.
      Stich, Cordonnier and Jaggi, "Sparsified SGD with memory", NeurIPS 2018,
      arXiv:1809.07599.
    """

    name: ClassVar[str] = "random-k"
    fraction: float = hyperparameter(default=0.01, within="(0, 1]", static=True)
    error_feedback: bool = False
    seed: int | None = hyperparameter(default=None, within="[0, 4294967295]")

    def init(self, params: Params) -> RandomCompressionState:
        return init_random_compression(self.seed, params, self.error_feedback, type(self).__name__)

    def update(
        self, updates: Updates, state: RandomCompressionState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, RandomCompressionState]:
        size = count(updates)
        k = how_many(self.fraction, size)
        key = jax.random.fold_in(state.key, state.steps)
        due = owed(updates, state.error)
        drawn = keep(due, lambda vector: largest(jax.random.bits(key, vector.shape, jnp.uint32), k))
        # With n / k, of which the variance is w = n / k - 1, and divided by 1 + w.
        scale = 1 if self.error_feedback else size / max(1, k)
        sent = cast_like(jax.tree.map(lambda u: u * scale, drawn), updates)
        error = lacking(due, sent, state.error)
        return sent, RandomCompressionState(state.key, state.steps + 1, error, jnp.float32(k * NUMBER))

    def metrics(self, state: RandomCompressionState) -> dict[str, jax.Array]:
        """Return the bits of the last update."""
        return {"bits": state.bits}


class QSGDModule(OptiModule[RandomCompressionState]):
    """‖u‖ · sign(u) · ξ(|u| / ‖u‖), ξ one of s + 1 levels with mean its argument (Alistarh et al. 2017).

        Init(levels, per_parameter, error_feedback, seed):
            key = make_key(seed); steps = 0; error = 0
        Step(grads):
            u = error + grads
            for all parameters together, or for each:
                x = levels * |u| / ||u||
                grads = ||u|| * sign(u) * floor(x + uniform(fold_in(key, steps))) / levels
            steps += 1
            with error feedback: grads = grads / (1 + min(n / levels², sqrt(n) / levels))
            error = u - grads

    Clients of one seed draw the same numbers, unless they fold in an identity each.

    Bits: n (1 + ⌈log₂(levels + 1)⌉), a sign and a level of fixed width for each of n
    coordinates, and 32 for each norm. The Elias code of the paper takes fewer where
    most levels are 0.

    Attributes:
      levels: s, how many levels there are above 0.
      per_parameter: whether each parameter has a norm of its own.
      error_feedback: whether what is not sent is added to the next updates.
      seed: where the key comes from: with `None`, from the operating system, so
        that `init` must then be called outside of `jit`, or within `entropy`.

    References:
      Alistarh et al., "QSGD: communication-efficient SGD via gradient quantization
      and encoding", section 3.1 and lemma 3.1, NeurIPS 2017, arXiv:1610.02132.
    """

    name: ClassVar[str] = "qsgd"
    levels: int = hyperparameter(default=127, within="[1, 65535]")
    per_parameter: bool = False
    error_feedback: bool = False
    seed: int | None = hyperparameter(default=None, within="[0, 4294967295]")

    def init(self, params: Params) -> RandomCompressionState:
        return init_random_compression(self.seed, params, self.error_feedback, type(self).__name__)

    def update(
        self, updates: Updates, state: RandomCompressionState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, RandomCompressionState]:
        key = jax.random.fold_in(state.key, state.steps)
        due = owed(updates, state.error)
        sent = cast_like(on_vectors(functools.partial(self._quantized, key), due), updates)
        sizes = [size for leaf in jax.tree.leaves(due) if (size := count(leaf))]
        norms = len(sizes) if self.per_parameter else min(1, len(sizes))
        bits = jnp.float32(sum(sizes) * (1 + self.levels.bit_length()) + NUMBER * norms)
        error = lacking(due, sent, state.error)
        return sent, RandomCompressionState(state.key, state.steps + 1, error, bits)

    def _quantized(self, key: jax.Array, vectors: list[jax.Array]) -> list[jax.Array]:
        sizes = [vector.size for vector in vectors]
        if not sum(sizes):
            return vectors
        # One draw for all: the generator is compiled once.
        uniforms = lax.split(jax.random.uniform(key, (sum(sizes),), widest(vectors)), sizes)
        squares = [jnp.sum(vector * vector) for vector in vectors]
        if not self.per_parameter:
            squares, sizes = [total(squares)] * len(squares), [sum(sizes)] * len(sizes)
        return [
            self._rounded(vector, xla.norm(square).astype(vector.dtype), uniform, size)
            for vector, square, uniform, size in zip(vectors, squares, uniforms, sizes, strict=True)
        ]

    def _rounded(self, vector: jax.Array, norm: jax.Array, uniform: jax.Array, size: int) -> jax.Array:
        exact = jnp.minimum(jnp.abs(vector) / norm * self.levels, self.levels)
        below = jnp.floor(exact)
        level = below + (uniform.astype(exact.dtype) < exact - below).astype(exact.dtype)
        variance = min(size / self.levels**2, math.sqrt(size) / self.levels) if self.error_feedback else 0
        return jnp.sign(vector) * level * (norm / (self.levels * (1 + variance)))

    def metrics(self, state: RandomCompressionState) -> dict[str, jax.Array]:
        """Return the bits of the last update."""
        return {"bits": state.bits}
