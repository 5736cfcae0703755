"""What a state from outside may hold: numbers that are finite, and counts that some run could have come to."""

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.stateful.compiled import Compiled
from functional_optimodules.types import HostArray, PyTree
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import Specs, keystr

# A count in int32 that steps and rounds may still be added to.
_MOST_COUNT = 2**30


def require_plausible(compiled: Compiled, layout: Layout, state: PyTree, specs: Specs, owner: str) -> None:
    """Check the values of a state that was read.

    Args:
      compiled: the brick, which makes a new state to compare with.
      layout: that of its state.
      state: what was read, over the specs' container.
      specs: of the parameters.
      owner: how errors name the brick.

    Raises:
      ValueError: if a number is not finite, or a count negative or of 2**30 or more,
        and a new state does not have that very value there.
    """
    if all(_plausible(leaf).all() for leaf in jax.tree.leaves(state)):
        return
    zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in specs.by_path.items()}
    new = compiled.adapter.portable(compiled.init(specs, specs.tree(zeros)))
    for (name, _, part), (_, _, fresh) in zip(layout.split(state), layout.split(new), strict=True):
        for (path, leaf), like in zip(jax.tree.leaves_with_path(part), jax.tree.leaves(fresh), strict=True):
            wrong = ~_plausible(leaf)
            if wrong.any() and not np.array_equal(np.asarray(leaf)[wrong], np.asarray(like)[wrong], equal_nan=True):
                at = f" at {keystr(path)!r}" if path else ""
                what = "finite numbers" if jnp.issubdtype(leaf.dtype, jnp.inexact) else f"counts below {_MOST_COUNT}"
                found = np.asarray(leaf)[wrong].flat[0]
                raise ValueError(f"{owner}: variable {name!r}{at} holds {found}: expected {what}")


def _plausible(leaf: jax.Array) -> HostArray:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return np.asarray(jnp.isfinite(leaf))
    if jnp.issubdtype(leaf.dtype, jnp.signedinteger):
        host = np.asarray(leaf)
        return (host >= 0) & (host < _MOST_COUNT)
    return np.ones((), bool)
