"""Which inputs of a function its outputs may depend on, read off its program."""

from collections.abc import Callable
from typing import Any

import jax

from functional_optimodules.core.entropy import shapes_only


def sources(function: Callable[..., Any], first: Any, *args: Any) -> list[set[int]]:
    """Return, for each leaf of a function's output, the leaves of its first argument that it may depend on."""
    with shapes_only():
        closed = jax.make_jaxpr(function)(first, *args)
    count = len(jax.tree.leaves(first))
    inputs = [{index} if index < count else set() for index in range(len(closed.jaxpr.invars))]
    return _flow(closed.jaxpr, inputs)


def reads_values(function: Callable[..., Any], tree: Any) -> bool:
    """Whether a function's output may depend on the values in a tree, and not only on its shapes."""
    return any(sources(function, tree))


def _flow(jaxpr: Any, inputs: list[set[int]]) -> list[set[int]]:
    found = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: Any) -> set[int]:
        return set() if hasattr(atom, "val") else found.get(atom, set())

    for eqn in jaxpr.eqns:
        given = [of(atom) for atom in eqn.invars]
        inner = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params), None)
        inner = getattr(inner, "jaxpr", inner)
        if eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call") and inner is not None:
            made = _flow(inner, given)
        else:
            made = [set().union(*given)] * len(eqn.outvars)
        found.update(zip(eqn.outvars, made, strict=True))
    return [of(atom) for atom in jaxpr.outvars]
