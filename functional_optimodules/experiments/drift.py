"""How far participants go in a round, for the history of an experiment."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functional_optimodules.brick import OptiModule
from functional_optimodules.modules.clipping import squared_norm
from functional_optimodules.numerics import safe_sqrt
from functional_optimodules.types import Params, PyTree, Updates


class Drift(OptiModule[jax.Array], register=False):
    """drift = |y_i - x|: what a participant's parameters have moved by; it changes nothing.

    First in an uplink, it sees the delta as local work left it.

    Init(params):
        drift = 0
    Step(updates):
        drift = |updates|
    """

    name = "drift"
    packable = True

    def init(self, params: Params) -> jax.Array:
        return jnp.float32(0)

    def update(
        self, updates: Updates, state: jax.Array, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, jax.Array]:
        return updates, norm(updates)

    def metrics(self, state: jax.Array) -> Mapping[str, jax.Array]:
        return {"norm": state}


def norm(tree: PyTree) -> jax.Array:
    """Return the Euclidean norm of a tree: a float32 scalar."""
    return safe_sqrt(squared_norm(tree)).astype(jnp.float32)
