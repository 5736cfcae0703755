"""Sums over clients, kept in the carry of a loop so that memory does not grow with their number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from functional_optimodules.core.aux_var import FromClients


class Totals(NamedTuple):
    """What the clients of a round came to together.

    Attributes:
      delta: weighted sum of their deltas, shaped like the parameters.
      weight: sum of their weights.
      auxes: their auxiliary variables, reduced, by name.
      joined: how many took part to the end.
      metrics: by name, float32[S], one value for each participant; 0 for those absent.
      examples: float32[S], how many examples each stepped over.
      finite: float32[S], 1 where all that a participant sent is finite.
    """

    delta: Any
    weight: jax.Array
    auxes: dict[str, Any]
    joined: jax.Array
    metrics: dict[str, jax.Array]
    examples: jax.Array
    finite: jax.Array


def fill(aux: FromClients, batch: tuple[int, ...] = ()) -> FromClients:
    """Return variables that change nothing when merged with others."""

    def neutral(marks: frozenset[str]) -> Callable[[Any], jax.Array]:
        def make(leaf: Any) -> jax.Array:
            if not marks & {"max", "min"}:
                return jnp.zeros(batch + leaf.shape, leaf.dtype)
            inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
            info = jnp.finfo(leaf.dtype) if inexact else jnp.iinfo(leaf.dtype)
            bound = info.min if "max" in marks else info.max
            return jnp.full(batch + leaf.shape, bound, leaf.dtype)

        return make

    fields = {name: jax.tree.map(neutral(marks), getattr(aux, name)) for name, marks in aux.variables().items()}
    return type(aux)(**fields)


def is_finite(tree: Any) -> jax.Array:
    """Whether all values of a tree are finite; an empty tree is."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)


def choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Return one tree or another, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def all_reduce(totals: Totals, axis: str) -> Totals:
    """Add up the totals of all devices by one all-reduce.

    Fields that reduce to a maximum or a minimum take one each besides.
    """
    extremes = {
        (name, field): marks
        for name, aux in totals.auxes.items()
        for field, marks in aux.variables().items()
        if marks & {"max", "min"}
    }
    reduced = {
        (name, field): jax.tree.map(
            lambda leaf, reduce=jax.lax.pmax if "max" in marks else jax.lax.pmin: reduce(leaf, axis),
            getattr(totals.auxes[name], field),
        )
        for (name, field), marks in extremes.items()
    }
    vector, restore = _ravel(totals)
    totals = restore(jax.lax.psum(vector, axis))
    auxes = {}
    for name, aux in totals.auxes.items():
        fields = {field: reduced.get((name, field), getattr(aux, field)) for field in aux.variables()}
        auxes[name] = type(aux)(**fields)
    return totals._replace(auxes=auxes)


def _ravel(tree: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Make one vector of a tree of several dtypes; integers go through float32 exactly below 2**24."""
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(tree)))
    vector, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), tree))
    return vector, lambda flat: jax.tree.map(lambda new, old: new.astype(old.dtype), unravel(flat), tree)
