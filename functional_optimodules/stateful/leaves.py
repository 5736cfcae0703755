"""What kinds of leaves a tree has, found faster than by flattening it."""

import functools
from collections.abc import Iterable

import jax
import numpy as np

from functional_optimodules.packing.tree import Packed
from functional_optimodules.types import PyTree

NUMBERS = frozenset({bool, int, float, complex})


@functools.cache
def _arrays() -> frozenset[type]:
    # Whatever is being traced as it is first asked for, and without a program to compile.
    with jax.ensure_compile_time_eval():
        return frozenset({np.ndarray, type(jax.device_put(np.zeros(())))})


def leaf_types(tree: PyTree) -> set[type]:
    """Return the types of a tree's leaves.

    JAX sorts and looks up each key of a dict, which took twice as long as all else that
    a stateful step does around its compiled function.
    """
    arrays = _arrays()
    found: set[type] = set()
    pending: list[Iterable[PyTree]] = [(tree,)]
    while pending:
        nodes = pending.pop()
        kinds = set(map(type, nodes))
        found |= kinds & arrays
        if kinds <= arrays:
            continue
        for node in nodes:
            kind = type(node)
            if kind is dict:
                pending.append(node.values())
            elif kind is list or kind is tuple:
                pending.append(node)
            elif kind is Packed:
                pending.append(node.parts)
            elif kind not in arrays:
                found.update(map(type, jax.tree.leaves(node)))
    return found


def any_traced(kinds: Iterable[type]) -> bool:
    """Whether one of some types is that of traced values."""
    return any(issubclass(kind, jax.core.Tracer) for kind in kinds)


def traced(tree: PyTree) -> bool:
    """Whether a leaf of a tree is traced."""
    return any_traced(leaf_types(tree))
