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
      metrics: by name, float32[S], one value for each participant; 0 for those absent.
      examples: float32[S], how many examples each has.
      joined: float32[S], 1 where a participant took part to the end.
      finite: float32[S], 1 where all that a participant sent is finite.
    """

    delta: Any
    weight: jax.Array
    auxes: dict[str, Any]
    metrics: dict[str, jax.Array]
    examples: jax.Array
    joined: jax.Array
    finite: jax.Array


def fill(aux: FromClients) -> FromClients:
    """Return variables that change nothing when merged with others."""

    def neutral(marks: frozenset[str]) -> Callable[[Any], jax.Array]:
        def make(leaf: Any) -> jax.Array:
            if not marks & {"max", "min"}:
                return jnp.zeros(leaf.shape, leaf.dtype)
            inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
            info = jnp.finfo(leaf.dtype) if inexact else jnp.iinfo(leaf.dtype)
            bound = info.min if "max" in marks else info.max
            return jnp.full(leaf.shape, bound, leaf.dtype)

        return make

    fields = {name: jax.tree.map(neutral(marks), getattr(aux, name)) for name, marks in aux.variables().items()}
    return type(aux)(**fields)


def nothing(like: Totals) -> Totals:
    """Return totals, of such shapes, over no client."""
    zeros: Totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return zeros._replace(auxes={name: fill(aux) for name, aux in like.auxes.items()})


def widened(like: Totals, participants: int) -> Totals:
    """Return the shapes of the totals of a round, from those of one client's."""
    per_client: Callable[[Any], Any] = lambda leaf: jax.ShapeDtypeStruct((participants,), leaf.dtype)  # noqa: E731
    return like._replace(
        metrics=jax.tree.map(per_client, like.metrics),
        examples=per_client(like.examples),
        joined=per_client(like.joined),
        finite=per_client(like.finite),
    )


def add(totals: Totals, one: Totals, index: jax.Array) -> Totals:
    """Add what one participant came to."""
    put: Callable[[Any, Any], Any] = lambda total, value: total.at[index].add(value)  # noqa: E731
    return Totals(
        delta=jax.tree.map(jnp.add, totals.delta, one.delta),
        weight=totals.weight + one.weight,
        auxes={name: aux.merge(one.auxes[name]) for name, aux in totals.auxes.items()},
        metrics=jax.tree.map(put, totals.metrics, one.metrics),
        examples=put(totals.examples, one.examples),
        joined=put(totals.joined, one.joined),
        finite=put(totals.finite, one.finite),
    )


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
