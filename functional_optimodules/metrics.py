"""What a step tells: norms, rates and what bricks say, computed for what is watched and for nothing else."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.modules.clipping import squared_norm
from functional_optimodules.numerics import safe_sqrt
from functional_optimodules.packing.adapter import Adapter
from functional_optimodules.types import Params, PyTree, Updates

OF_A_GROUP = ("gradient_norm", "update_norm", "param_norm", "update_ratio", "lrate")
"""What may be watched of a step, and of a group's: Euclidean norms of all gradients as they come, of what is added to
the parameters and of these before it, the quotient of the last two, and the learning rate."""
OF_A_STEP = (*OF_A_GROUP, "w_decay", "count")
"""What may be watched of a step: the rate of the decay too, and how many steps have been taken."""
OF_A_BRICK = ("norm_before", "norm_after")
"""What may be watched of any brick: the Euclidean norm of what comes to it, and of what it makes of that."""


class Told:
    """What is watched of a step, as it is found.

    Args:
      watched: what is watched by name, of the step before; what is said replaces it.
      prefix: what the names that are said here begin with.
    """

    def __init__(self, watched: Mapping[str, jax.Array], prefix: str = "") -> None:
        self.watched, self._prefix = dict(watched), prefix

    def under(self, prefix: str) -> "Told":
        """Return the same, for names that begin so."""
        told = Told({}, prefix)
        told.watched = self.watched
        return told

    def say(self, name: str, make: Callable[[], Any]) -> None:
        """Say a number, which is computed where it is watched."""
        if (old := self.watched.get(f"{self._prefix}{name}")) is not None:
            self.watched[f"{self._prefix}{name}"] = jnp.asarray(make()).astype(old.dtype)

    def norms(self, gradients: Updates, updates: Updates, params: Params) -> None:
        """Say how large what came in was, what is added to the parameters, and these."""
        self.say("gradient_norm", lambda: _norm(gradients))
        self.say("update_norm", lambda: _norm(updates))
        self.say("param_norm", lambda: self._norm_of("param_norm", params))
        self.say("update_ratio", lambda: _ratio(_norm(updates), self._norm_of("update_ratio", params)))

    def brick(self, label: str, brick: Adapter, before: Updates, after: Updates, state: PyTree, params: Params) -> None:
        """Say what is known of a brick's step."""
        self.say(f"{label}/norm_before", lambda: _norm(before))
        self.say(f"{label}/norm_after", lambda: _norm(after))
        around = {f"{self._prefix}{label}/{name}" for name in OF_A_BRICK}
        if any(name.startswith(f"{self._prefix}{label}/") for name in self.watched.keys() - around):
            for name, value in brick.measure(before, after, state, params).items():
                self.say(f"{label}/{name}", lambda value=value: value)  # type: ignore[misc]

    def counted(self) -> None:
        """Say that one more step was taken."""
        self.say("count", lambda: optax.safe_increment(self.watched["count"]))

    def _norm_of(self, name: str, params: Params) -> jax.Array:
        if params is None:
            raise ValueError(
                f"Optimizer: {self._prefix + name!r}, which is watched, needs the parameters: pass `params`"
            )
        return _norm(params)


def unsaid(names: Iterable[str]) -> dict[str, jax.Array]:
    """Return what is watched before there is a step: zeros."""
    return {name: jnp.zeros((), jnp.int32 if name == "count" else jnp.result_type(float)) for name in names}


def _norm(tree: PyTree) -> jax.Array:
    return safe_sqrt(squared_norm(tree))


def _ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    return above / jnp.where(below > 0, below, 1)


def flat(said: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return all that was said, each with the prefix of who said it.

    Raises:
      ValueError: if two name one alike.
    """
    found: dict[str, Any] = {}
    for prefix, metrics in said:
        for name, value in metrics.items():
            if f"{prefix}{name}" in found:
                raise ValueError(f"Optimizer: two plug-ins name a metric {prefix + name!r}: rename one")
            found[f"{prefix}{name}"] = value
    return found
