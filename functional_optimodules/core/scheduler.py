"""Schedulers: plug-ins that map a step and a round to a rate.

    Init() -> clock
    Value(clock) -> rate
    Advance(clock) -> clock         # a step has been taken
    Round(clock) -> clock           # a round begins

The first step and the first round have index 0, whether or not anybody begins a
round. A rate is computed when it is used: it is that of the step it serves.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.core.encoding import Layout
from functional_optimodules.core.facade import CONFIG
from functional_optimodules.core.fields import require_keys
from functional_optimodules.core.numerics import real
from functional_optimodules.core.paths import Specs
from functional_optimodules.core.plugin import Plugin


class Clock(NamedTuple):
    """The time of a scheduler.

    Attributes:
      steps: int32 scalar, how many steps have been taken: the index of the next.
      rounds: int32 scalar, how many rounds have begun: the index of the current
        one plus 1, or 0.
    """

    steps: jax.Array
    rounds: jax.Array

    @property
    def round_(self) -> jax.Array:
        """The index of the current round."""
        return jnp.maximum(self.rounds - 1, 0)


class Scheduler(Plugin, kind="scheduler"):
    """A rate that changes with time.

    Simple schedulers only write `compute_value`; one that wraps another holds
    the other's clock within its own. All of it also works on traced values.
    """

    _final: ClassVar[frozenset[str]] = CONFIG | {"get_next_rate", "on_round_start", "get_state", "set_state"}

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        """Return the rate at a step of a round, both int32 scalars counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} should define `compute_value`, or `value`")

    def init(self) -> Any:
        """Return the clock before the first step."""
        return Clock(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def value(self, clock: Any) -> jax.Array:
        """Return the rate at a time, a scalar of JAX's default precision."""
        return real(self.compute_value(clock.steps, clock.round_))

    def advance(self, clock: Any) -> Any:
        """Return the clock after one more step."""
        return clock._replace(steps=optax.safe_increment(clock.steps))

    def begin_round(self, clock: Any) -> Any:
        """Return the clock as one more round begins."""
        return clock._replace(rounds=clock.rounds + 1)

    def get_next_rate(self) -> float:
        """Return the rate of the next step, and count that step."""
        rate, clock = _compiled(self.bare()).tick(self._clock)
        self._set(clock)
        return float(rate)

    def on_round_start(self) -> None:
        """Begin a round."""
        self._set(self.begin_round(self._clock))

    def get_state(self) -> dict[str, Any]:
        """Return the clock as JSON values."""
        return {"name": self.name, "variables": _compiled(self.bare()).layout.encode(self._clock, _NO_PARAMS)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned.

        Raises:
          KeyError: if a key or a variable is missing or unknown.
          TypeError: if it is no mapping.
          ValueError: if it is another scheduler's, or malformed.
        """
        owner = type(self).__name__
        if not isinstance(state, Mapping):
            raise TypeError(f"{owner}: a state is a mapping, not {type(state).__name__}")
        require_keys(state, ("name", "variables"), f"{owner}: the state")
        if state["name"] != self.name:
            raise ValueError(f"{owner}: the state is that of {state['name']!r}, not of {self.name!r}")
        self._set(_compiled(self.bare()).layout.decode(state["variables"], _NO_PARAMS, owner))

    @property
    def _clock(self) -> Any:
        clock = self.__dict__.get("_time")
        return self.init() if clock is None else clock

    def _set(self, clock: Any) -> None:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(clock)):
            raise RuntimeError(f"{type(self).__name__}: use the pure `value(clock)` and `advance(clock)` under a trace")
        object.__setattr__(self, "_time", clock)


_NO_PARAMS = Specs.of({})


class _Compiled:
    def __init__(self, scheduler: Scheduler) -> None:
        self.tick = jax.jit(lambda clock: (scheduler.value(clock), scheduler.advance(clock)))
        self.layout = Layout(jax.eval_shape(scheduler.init))


@functools.lru_cache(maxsize=512)
def _compiled(scheduler: Scheduler) -> _Compiled:
    return _Compiled(scheduler)


def list_rate_schedulers() -> dict[str, type[Scheduler]]:
    """Return the registered schedulers by name."""
    return dict(sorted(Scheduler._registry.items()))
