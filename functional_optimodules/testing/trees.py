"""Small trees to run bricks on, and how two trees are found equal."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import chex  # type: ignore[import-untyped]
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from functional_optimodules.brick import Brick, OptiModule
from functional_optimodules.contract import KNOWN
from functional_optimodules.numerics import wide
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.packing.adapter import Adapter
from functional_optimodules.packing.tree import unpack
from functional_optimodules.random.keys import is_any_key, words
from functional_optimodules.types import HostArray, Json, Leaf, PyTree
from functional_optimodules.wire.paths import keystr


class Pair(NamedTuple):
    """Parameters in a `NamedTuple`, whose order is not that of their paths."""

    b: Any
    a: Any


@chex.dataclass(frozen=True)
class PairDataclass:
    """Parameters in a chex dataclass."""

    a: Any
    b: Any


def containers() -> dict[str, Callable[[Any, Any], Any]]:
    """Return, by name, functions that put two leaves into a container."""
    return {
        "dict": lambda a, b: {"a": a, "b": b},
        "list": lambda a, b: [a, b],
        "tuple": lambda a, b: (a, b),
        "NamedTuple": lambda a, b: Pair(a=a, b=b),
        "FrozenDict": lambda a, b: FrozenDict(a=a, b=b),
        "chex.dataclass": lambda a, b: PairDataclass(a=a, b=b),  # type: ignore[call-arg]
        "nnx.State": lambda a, b: nnx.State({"a": nnx.Param(a), "b": nnx.Param(b)}),
    }


def parameters(dtype: Any = None) -> PyTree:
    """Return nested parameters with a matrix, a vector and a scalar."""
    shapes = {"layer": {"bias": (3,), "kernel": (2, 3)}, "scale": ()}
    return randoms(jax.tree.map(lambda shape: jnp.zeros(shape, dtype), shapes, is_leaf=lambda x: type(x) is tuple), 99)


def randoms(like: PyTree, seed: int) -> PyTree:
    """Return normal numbers in the shapes and dtypes of a tree, other ones for each seed."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape), leaf.dtype), like)


_NUMBERS = {"num_steps": jnp.int32(3), "examples": 6.0, "weight": 2.0, "joined": 2.0, "coin": 0.25, "lrate": 0.1}


def known(names: Iterable[str], params: PyTree) -> dict[str, PyTree]:
    """Return what a brick may ask for by these names, about some parameters: always the same."""
    like = jax.tree.map(wide, unpack(params))
    return {name: randoms(like, 7) if KNOWN.get(name) else jnp.asarray(_NUMBERS.get(name, 1.0)) for name in names}


def update(brick: Brick | Adapter, updates: PyTree, state: PyTree, params: PyTree) -> PyTree:
    """Run a brick's `update`, with what it asks for."""
    asked = (brick.brick if isinstance(brick, Adapter) else brick).asks()
    return brick.update(updates, state, params, **known(asked.step, params))


def end_round(brick: Brick | Adapter, state: PyTree, params: PyTree) -> PyTree:
    """Run a brick's `end_round`, with what it asks for."""
    asked = (brick.brick if isinstance(brick, Adapter) else brick).asks()
    return brick.end_round(state, **known(asked.end, params))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def donating_step(brick: Brick | Adapter, updates: PyTree, state: PyTree, params: PyTree) -> PyTree:
    """Run a brick's `update`, which may write over the state; the checks of a brick share its compilation."""
    return update(brick, updates, state, params)


def compiled_step(brick: Brick | Adapter, updates: PyTree, state: PyTree, params: PyTree) -> PyTree:
    """Run a brick's `update`, compiled, and leave the state alone."""
    return donating_step(brick, updates, jax.tree.map(jnp.copy, state), params)


def stepped(brick: Brick, state: PyTree, params: PyTree, seeds: Iterable[int]) -> tuple[list[PyTree], PyTree]:
    """Take a step for each seed; return the outputs and the last state."""
    outputs = []
    for seed in seeds:
        output, state = compiled_step(brick.bare(), randoms(params, seed), state, params)
        outputs.append(output)
    return outputs, state


def ran(brick: Brick, gradients: PyTree, params: PyTree) -> PyTree:
    """Call a brick's `run`. An `Optimizer` takes the parameters by name, a regularizer calls them `weights`."""
    asked = known(brick.asks().step, params)
    if isinstance(brick, Optimizer):
        return brick.run(gradients, params=params, **asked)
    return brick.run(gradients, params, **asked) if isinstance(brick, OptiModule) else brick.run(gradients, params)


def collected(brick: Brick, params: PyTree) -> dict[str, Json]:
    """Return what a brick's facade sends by `aux_name`, once it was told of its round's end what it asks for."""
    finish(brick, params)
    return brick._session.collect()


def finish(brick: Brick, params: PyTree) -> None:
    """Tell a brick's facade what it asks for at a round's end."""
    if names := brick.asks().end:
        brick.on_round_end(**known(names, params))


def leaves_without_keys(state: PyTree) -> list[PyTree]:
    """Return the leaves of a state that are no PRNG keys."""
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=is_any_key) if not is_any_key(leaf)]


def assert_same(found: PyTree, expected: PyTree, broken: str, close: bool = False, size: float = 0.0) -> None:
    """Raise an `AssertionError` that names the first leaf in which two trees differ.

    Args:
      found: a tree.
      expected: the tree that it should be.
      broken: what is broken if they differ, and how to mend it.
      close: whether rounding may differ.
      size: of the numbers that are rounded, where it is above what the tree has.
    """
    assert_same_structure(found, expected, broken)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, leaf), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        assert_same_leaf(leaf, other, f"{broken}\n  at {keystr(path)!r}", close, size)


def assert_same_structure(found: PyTree, expected: PyTree, broken: str) -> None:
    """Raise an `AssertionError` if two trees differ in structure."""
    a: Any = jax.tree.structure(found)
    b: Any = jax.tree.structure(expected)
    assert a == b, f"{broken}\n  found the structure {a}, expected {b}"


def assert_same_specs(found: PyTree, expected: PyTree, broken: str) -> None:
    """Raise an `AssertionError` if two trees differ in structure, shapes or dtypes."""
    assert_same_structure(found, expected, broken)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_same_spec(leaf, other, broken)


def assert_untouched(tree: PyTree, flat: tuple[list[PyTree], PyTree], broken: str) -> None:
    """Raise an `AssertionError` if a tree has no longer the structure and the leaves that it was flattened to."""
    leaves, treedef = jax.tree.flatten(tree)
    assert treedef == flat[1], f"{broken}\n  found the structure {treedef}, expected {flat[1]}"
    assert all(a is b for a, b in zip(leaves, flat[0], strict=True)), broken


def assert_same_leaf(found: Leaf, expected: Leaf, broken: str, close: bool, size: float) -> None:
    """Raise an `AssertionError` if two arrays differ in shape, dtype or value."""
    assert_same_spec(found, expected, broken)
    a, b = to_numpy(found), to_numpy(expected)
    same = np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if close and not same and np.issubdtype(a.dtype, np.inexact):
        size = np.max(np.abs(b), initial=size, where=np.isfinite(b))
        same = np.allclose(a, b, rtol=1e-5, atol=1e-6 * size)
    assert same, f"{broken}: found {a}, expected {b}"


def assert_same_spec(found: PyTree, expected: PyTree, broken: str) -> None:
    """Raise an `AssertionError` if two arrays, or what describes them, differ in shape or dtype."""
    a, b = (f"{leaf.dtype}{list(leaf.shape)}" for leaf in (found, expected))
    assert a == b, f"{broken}: found {a}, expected {b}"


def to_numpy(leaf: Any) -> HostArray:
    """Return an array, or the words of PRNG keys, as NumPy's; bfloat16 and its kin as float32."""
    values = np.asarray(words(leaf) if is_any_key(leaf) else leaf)
    return values if values.dtype.kind in "biufc" else values.astype(np.float32)
