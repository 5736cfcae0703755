"""Which inputs of a function its outputs may depend on, read off its program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import PathTree, Spec, is_path_tree


def sources(function: Callable[..., PyTree], first: PyTree, *args: PyTree) -> list[set[int]]:
    """Return, for each leaf of a function's output, the leaves of its first argument that it may depend on."""
    with shapes_only():
        closed = jax.make_jaxpr(function)(first, *args)
    count = len(jax.tree.leaves(first))
    inputs = [{index} if index < count else set() for index in range(len(closed.jaxpr.invars))]
    return _flow(closed.jaxpr, inputs)


def reads_values(function: Callable[..., PyTree], tree: PyTree) -> bool:
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


def params_within(init: Callable[[Params], PyTree], state: PyTree) -> Params:
    """Return a tree shaped like the parameters that is in a state; an empty one if there is none."""
    with shapes_only():
        layout = Layout(jax.eval_shape(init, PathTree({"": Spec((), jnp.float32)})))
    return next((value for _, part, value in layout.split(state) if is_path_tree(part)), PathTree())
