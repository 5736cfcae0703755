"""Schedulers of learning rates and weight decays.

With u the index of the step, or of the round where `step_level` is false:

    exponential-decay               base * rate ** u
    inverse-scaling                 base / (u + 1) ** rate
    linear-decay                    base * max(0, 1 - rate * u)
    piecewise-decay                 base * rate ** floor(u / step_size)
    polynomial-decay                base * (1 - min(1, u / limit)) ** power
    cosine-annealing                base + (max_lr - base) * (1 + cos(pi * u / duration)) / 2
    cosine-annealing-warm-restarts  the same over each period, max_lr scaled by t_mult each time
    sgdr                            the same over each period, the period scaled by t_mult each time
    cyclic-triangular               base + (max_lr - base) * triangle(step)
    cyclic-exp-range                the same, times decay ** step
    warmup, warmup-rounds           a linear climb, then a constant or another scheduler
    optax                           optax.<schedule>(**config)(u)

As pure functions:

    Init() -> clock
    Value(clock) -> rate
    Advance(clock) -> clock         # a step has been taken
    Round(clock) -> clock           # a round begins

The first step and the first round have index 0, whether or not anybody begins a
round. A rate is computed when it is used: it is that of the step it serves.
"""

import abc
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from functional_optimodules.config.calls import argument, find, refusal, require_names, require_small
from functional_optimodules.config.fields import FrozenConfig, hyperparameter, require_keys
from functional_optimodules.config.outside import quote, require_shallow
from functional_optimodules.contract import Contract
from functional_optimodules.dependence import reads_values
from functional_optimodules.numerics import power, real, where
from functional_optimodules.stateful.facade import CONFIG, Stateful
from functional_optimodules.stateful.session import Session
from functional_optimodules.types import HostArray, Json, Params, PyTree, Updates


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


class Scheduler(Stateful, kind="scheduler"):
    """A rate that changes with time.

    Simple schedulers only write `compute_value`; one that wraps another holds
    the other's clock within its own. All of it also works on traced values.
    """

    _final: ClassVar[frozenset[str]] = CONFIG | {"get_next_rate", "on_round_start", "get_state", "set_state"}

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        """Return the rate at a step of a round, both int32 scalars counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} should define `compute_value`, or `value`")

    def init(self) -> PyTree:
        """Return the clock before the first step."""
        return Clock(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def value(self, clock: PyTree) -> jax.Array:
        """Return the rate at a time, a scalar of JAX's default precision."""
        return real(self.compute_value(clock.steps, clock.round_))

    def _first(self) -> jax.Array:
        """Return the rate before the first step."""
        return self.value(self.init())

    def _at(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        """Return the rate at a step and in a round that are counted elsewhere, both int32 scalars from 0."""
        if type(self).value is not Scheduler.value or type(self).advance is not Scheduler.advance:
            raise ValueError(f"{type(self).__name__} keeps a clock of its own: it is no function of the step")
        return real(self.compute_value(step, round_))

    def advance(self, clock: PyTree) -> PyTree:
        """Return the clock after one more step."""
        return clock._replace(steps=optax.safe_increment(clock.steps))

    def begin_round(self, clock: PyTree) -> PyTree:
        """Return the clock as one more round begins."""
        return clock._replace(rounds=clock.rounds + 1)

    def state_name(self) -> str:
        """Return the name that saved clocks bear, for another scheduler to refuse them."""
        return self.name

    def get_next_rate(self) -> float:
        """Return the rate of the next step, and count that step."""
        return float(self._session.step(_rate(), None, {}))

    def get_state(self) -> dict[str, Json]:
        """Return the clock as JSON values."""
        saved = super().get_state()
        return {key: saved[key] for key in _STATE_KEYS}

    def set_state(self, state: Mapping[str, Json]) -> None:
        """Restore what `get_state` returned.

        Raises:
          KeyError: if a key or a variable is missing or unknown.
          TypeError: if it is no mapping.
          ValueError: if it is another scheduler's, or malformed.
        """
        owner = type(self).__name__
        if not isinstance(state, Mapping):
            raise TypeError(f"{owner}: a state is a mapping, not {type(state).__name__}")
        require_keys(state, _STATE_KEYS, f"{owner}: the state")
        super().set_state({**super().get_state(), **state})

    def _begin(self) -> Session:
        session = Session(_Ticking(self.bare()), type(self).__name__, "`value(clock)` and `advance(clock)`")
        session.setup(_rate(), None)
        return session


_STATE_KEYS = ("name", "variables")


def _rate() -> HostArray:
    return np.zeros((), jnp.result_type(float))


class _Ticking(Contract, register=False):
    """A scheduler as a brick, whose only update is the rate and whose state is the clock."""

    scheduler: Scheduler

    def init(self, params: Params) -> PyTree:
        return self.scheduler.init()

    def update(
        self, updates: Updates, state: PyTree, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, PyTree]:
        return self.scheduler.value(state), self.scheduler.advance(state)

    def begin_round(self, state: PyTree, params: Params = None) -> PyTree:
        return self.scheduler.begin_round(state)

    def state_name(self) -> str:
        return self.scheduler.state_name()


def list_rate_schedulers() -> dict[str, type[Scheduler]]:
    """Return the registered schedulers by name."""
    return dict(sorted(Scheduler._registry.items()))


def _ratio(index: ArrayLike, count: ArrayLike) -> jax.Array:
    return real(index) / real(count)


class ExponentialDecay(Scheduler):
    """base·rateᵘ.

    Attributes:
      base: the first rate.
      rate: factor from one unit to the next.
      step_level: whether the unit is a step, rather than a round.
    """

    name: ClassVar[str] = "exponential-decay"
    base: float = hyperparameter(within="[0, inf)")
    rate: float = hyperparameter(within="[0, inf)")
    step_level: bool = True

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        return self.base * power(self.rate, step if self.step_level else round_)


class InverseScaling(Scheduler):
    """base / (u + 1)^rate.

    Attributes:
      base: the first rate.
      rate: power of the index.
      step_level: whether the unit is a step, rather than a round.
    """

    name: ClassVar[str] = "inverse-scaling"
    base: float = hyperparameter(within="[0, inf)")
    rate: float = hyperparameter(within="(-inf, inf)")
    step_level: bool = True

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        index = step if self.step_level else round_
        return self.base / (real(index) + 1) ** self.rate


class LinearDecay(Scheduler):
    """base·max(0, 1 − rate·u).

    Attributes:
      base: the first rate.
      rate: share of `base` that is taken away at each unit.
      step_level: whether the unit is a step, rather than a round.
    """

    name: ClassVar[str] = "linear-decay"
    base: float = hyperparameter(within="[0, inf)")
    rate: float = hyperparameter(within="[0, inf)")
    step_level: bool = True

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        index = step if self.step_level else round_
        return self.base * jnp.maximum(1 - self.rate * real(index), 0)


class PiecewiseDecay(Scheduler):
    """base·rate^⌊u / step_size⌋.

    Attributes:
      base: the first rate.
      rate: factor from one piece to the next.
      step_size: units in a piece.
      step_level: whether the unit is a step, rather than a round.
    """

    name: ClassVar[str] = "piecewise-decay"
    base: float = hyperparameter(within="[0, inf)")
    rate: float = hyperparameter(within="[0, inf)")
    step_size: int = hyperparameter(within="[1, 1073741823]")
    step_level: bool = True

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        index = step if self.step_level else round_
        return self.base * power(self.rate, index // self.step_size)


class PolynomialDecay(Scheduler):
    """base·(1 − min(1, u / limit))^power.

    Attributes:
      base: the first rate.
      power: order of the polynomial.
      limit: units after which the rate is 0.
      step_level: whether the unit is a step, rather than a round.
    """

    name: ClassVar[str] = "polynomial-decay"
    base: float = hyperparameter(within="[0, inf)")
    power: float = hyperparameter(within="[0, inf)")
    limit: int = hyperparameter(within="[1, 1073741823]")
    step_level: bool = True

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        index = step if self.step_level else round_
        return self.base * (1 - jnp.minimum(_ratio(index, self.limit), 1)) ** self.power


def _anneal(low: float, high: float | jax.Array, position: jax.Array) -> jax.Array:
    return low + 0.5 * (high - low) * (1 + jnp.cos(position * jnp.pi))


class CosineAnnealing(Scheduler):
    """From max_lr down to base along half a cosine (Loshchilov & Hutter 2016).

    Attributes:
      base: the last rate, kept for ever after.
      max_lr: the first rate.
      duration: units from the first to the last.
      step_level: whether the unit is a step, rather than a round.

    References:
      Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm
      restarts", equation 5, arXiv:1608.03983.
    """

    name: ClassVar[str] = "cosine-annealing"
    base: float = hyperparameter(within="[0, inf)")
    max_lr: float = hyperparameter(within="[0, inf)")
    duration: int = hyperparameter(within="[1, 1073741823]")
    step_level: bool = True

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        index = step if self.step_level else round_
        return _anneal(self.base, self.max_lr, jnp.minimum(_ratio(index, self.duration), 1))


class CosineAnnealingWarmRestarts(Scheduler):
    """Cosine annealing that starts anew each period from t_mult times the last max_lr, as in declearn: see `SGDR`.

    In the paper of that name it is the period that `t_mult` multiplies, which is what
    `SGDR` does. Here a `t_mult` above 1 makes rates grow without a bound.

    Attributes:
      base: the rate at the end of each period.
      max_lr: the rate at the start of the first period.
      period: units in a period.
      t_mult: factor of `max_lr` from one period to the next.
      step_level: whether the unit is a step, rather than a round.

    References:
      declearn, `CosineAnnealingWarmRestarts`, https://gitlab.inria.fr/magnet/declearn.
      Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm
      restarts", arXiv:1608.03983.
    """

    name: ClassVar[str] = "cosine-annealing-warm-restarts"
    base: float = hyperparameter(within="[0, inf)")
    max_lr: float = hyperparameter(within="[0, inf)")
    period: int = hyperparameter(within="[1, 1073741823]")
    t_mult: float = hyperparameter(default=1.0, within="[0, inf)")
    step_level: bool = True

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        cycle, position = jnp.divmod(step if self.step_level else round_, self.period)
        return _anneal(self.base, self.max_lr * power(self.t_mult, cycle), _ratio(position, self.period))


class SGDR(Scheduler):
    """Cosine annealing that starts anew each period, t_mult times as long as the last (Loshchilov & Hutter 2017).

    Attributes:
      base: the rate at the end of each period.
      max_lr: the rate at the start of each period.
      period: units in the first period.
      t_mult: factor of the period from one to the next.
      step_level: whether the unit is a step, rather than a round.

    References:
      Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts",
      section 3 and equation 5, ICLR 2017, arXiv:1608.03983.
    """

    name: ClassVar[str] = "sgdr"
    base: float = hyperparameter(within="[0, inf)")
    max_lr: float = hyperparameter(within="[0, inf)")
    period: int = hyperparameter(within="[1, 1073741823]")
    t_mult: int = hyperparameter(default=1, within="[1, 1073741823]")
    step_level: bool = True

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        index = step if self.step_level else round_
        whole = jnp.where(self.t_mult == 1, index // self.period * self.period, 0)
        most = jnp.iinfo(index.dtype).max

        # Where a period begins is an integer, which is exact. In int32 no more than 30 periods that double have an
        # end: the last may be longer than any integer, and is so as a real number.
        def later(_: int, current: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            begin, length, real_length = current
            over = index - begin >= length
            longer = jnp.where(length > most // self.t_mult, most, length * self.t_mult)
            longest = real_length * real(self.t_mult)
            return tuple(
                jnp.where(over, new, old) for new, old in zip((begin + length, longer, longest), current, strict=True)
            )

        start = (whole, jnp.full_like(index, self.period), real(self.period))
        begin, _, length = jax.lax.fori_loop(0, 31, later, start)
        return _anneal(self.base, self.max_lr, _ratio(index - begin, length))


def _triangle(step: jax.Array, stepsize: ArrayLike) -> jax.Array:
    return 1 - jnp.abs(_ratio(step % (2 * stepsize), stepsize) - 1)


class CyclicTriangular(Scheduler):
    """Up from base to max_lr and down again, over and over (Smith 2015).

    Attributes:
      base: the lowest rate.
      max_lr: the highest rate.
      stepsize: steps from one to the other.
      decay: whether the range is halved at the end of each cycle ("triangular2").

    References:
      Smith, "Cyclical learning rates for training neural networks", arXiv:1506.01186.
    """

    name: ClassVar[str] = "cyclic-triangular"
    base: float = hyperparameter(within="[0, inf)")
    max_lr: float = hyperparameter(within="[0, inf)")
    stepsize: int = hyperparameter(within="[1, 1073741823]")
    decay: bool = False

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        scale = _triangle(step, self.stepsize)
        if self.decay:
            scale = scale * power(0.5, step // (2 * self.stepsize))
        return self.base + scale * (self.max_lr - self.base)


class CyclicExpRange(Scheduler):
    """The triangular cycle, times decayˢᵗᵉᵖ (Smith 2015).

    Attributes:
      base: the lowest rate of the first cycle.
      max_lr: the highest rate of the first cycle.
      stepsize: steps from one to the other.
      decay: factor of both from one step to the next.

    References:
      Smith, "Cyclical learning rates for training neural networks", arXiv:1506.01186.
    """

    name: ClassVar[str] = "cyclic-exp-range"
    base: float = hyperparameter(within="[0, inf)")
    max_lr: float = hyperparameter(within="[0, inf)")
    stepsize: int = hyperparameter(within="[1, 1073741823]")
    decay: float = hyperparameter(within="[0, inf)")

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        value = self.base + _triangle(step, self.stepsize) * (self.max_lr - self.base)
        return value * power(self.decay, step)


class WarmupClock(NamedTuple):
    """The time of a warm-up.

    Attributes:
      steps: int32 scalar, how many steps have been taken.
      rounds: int32 scalar, how many rounds have begun.
      inner: the clock of the wrapped scheduler, which runs once the climb is over.
    """

    steps: jax.Array
    rounds: jax.Array
    inner: PyTree


class _Warmup(Scheduler, register=False):
    """What the two warm-ups share: all but when the climb is over."""

    base: float | Scheduler | tuple[str, Mapping[str, Json]] = hyperparameter(within="[0, inf)")
    warmup: int = hyperparameter(within="[0, 1073741823]")

    def _first(self) -> jax.Array:
        # A climb within a climb within a climb would otherwise compute each of them twice.
        return self._wrapped._first() * _ratio(1, jnp.maximum(self.warmup, 1))

    @abc.abstractmethod
    def _unit(self, clock: WarmupClock) -> jax.Array:
        """Return the index of the current unit of the climb."""

    @property
    def _wrapped(self) -> Scheduler:
        return as_scheduler(self.base)

    def init(self) -> WarmupClock:
        return WarmupClock(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), self._wrapped.init())

    def value(self, clock: WarmupClock) -> jax.Array:
        return self._climb(self._unit(clock), self._wrapped.value(clock.inner))

    def _climb(self, unit: jax.Array, after: jax.Array) -> jax.Array:
        climb = self._wrapped._first() * _ratio(unit + 1, jnp.maximum(self.warmup, 1))
        return jnp.where(unit < self.warmup, climb, after)

    def advance(self, clock: WarmupClock) -> WarmupClock:
        moved = self._wrapped.advance(clock.inner)
        inner = where(self._unit(clock) < self.warmup, clock.inner, moved)
        return clock._replace(steps=optax.safe_increment(clock.steps), inner=inner)


class Warmup(_Warmup):
    """A linear climb over steps, then a constant or another scheduler.

    It climbs to the wrapped scheduler's first value. Rounds that begin during the
    climb are not counted by the wrapped scheduler, whose round 0 is the one in
    which the climb ends.

    Attributes:
      base: the rate to climb to, or the scheduler to follow then.
      warmup: steps of the climb.
    """

    name: ClassVar[str] = "warmup"

    def _unit(self, clock: WarmupClock) -> jax.Array:
        return clock.steps

    def _at(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        return self._climb(step, self._wrapped._at(jnp.maximum(step - self.warmup, 0), round_))

    def begin_round(self, clock: WarmupClock) -> WarmupClock:
        start = where(clock.steps < self.warmup, self._wrapped.init(), clock.inner)
        return clock._replace(rounds=clock.rounds + 1, inner=self._wrapped.begin_round(start))


class WarmupRounds(_Warmup):
    """A linear climb over rounds, then a constant or another scheduler.

    It climbs to the wrapped scheduler's first value, whose steps and rounds are
    counted from the end of the climb.

    Attributes:
      base: the rate to climb to, or the scheduler to follow then.
      warmup: rounds of the climb.
    """

    name: ClassVar[str] = "warmup-rounds"

    def _unit(self, clock: WarmupClock) -> jax.Array:
        return Clock(clock.steps, clock.rounds).round_

    def _at(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        return self._climb(round_, self._wrapped._at(step, round_))

    def begin_round(self, clock: WarmupClock) -> WarmupClock:
        begun = self._wrapped.begin_round(clock.inner)
        inner = where(clock.rounds < self.warmup, clock.inner, begun)
        return clock._replace(rounds=clock.rounds + 1, inner=inner)


_MOST_LEVELS = 20  # a configuration may come from a peer, and a climb computes twice what it climbs to
_COSINE = {"init_value": 0, "peak_value": 1, "warmup_steps": 2, "decay_steps": 4}


class OptaxSchedule(Scheduler):
    """Any optax schedule, by name and JSON arguments.

    The `schedules` of `join_schedules` are numbers and schedulers by name, of optax's or
    of ours, that count steps: `[["warmup", {"base": 0.1, "warmup": 10}], 0.01]`. The keys
    of `boundaries_and_scales` are written as JSON writes keys: `{"1000": 0.1}`.

    Attributes:
      schedule: the factory's name in optax, such as `"warmup_cosine_decay_schedule"`.
      config: its keyword arguments, JSON values.
      step_level: whether the unit is a step, rather than a round.

    References:
      DeepMind, "optax", https://optax.readthedocs.io.
    """

    name: ClassVar[str] = "optax"
    examples: ClassVar[tuple[Mapping[str, Json], ...]] = (
        {"schedule": "cosine_decay_schedule", "config": {"init_value": 0.5, "decay_steps": 6}},
        {
            "schedule": "join_schedules",
            "config": {
                "schedules": [
                    ["warmup", {"base": 0.5, "warmup": 3}],
                    ["optax", {"schedule": "sgdr_schedule", "config": {"cosine_kwargs": [_COSINE]}}],
                    0.25,
                ],
                "boundaries": [3, 6],
            },
        },
        {
            "schedule": "piecewise_constant_schedule",
            "config": {"init_value": 1.0, "boundaries_and_scales": {"1": 0.5, "2": 0.5}},
            "step_level": False,
        },
    )
    schedule: str
    config: Mapping[str, Any] = hyperparameter(default=FrozenConfig({}))
    step_level: bool = True

    def validate(self) -> None:
        """Build the schedule once.

        Raises:
          ValueError: if optax has no such schedule, it refuses an argument, the configuration
            nests more than 20 levels deep, or an integer has more than 32 bits.
        """
        _optax_schedule(self.schedule, self.config)

    def state_name(self) -> str:
        return f"{self.name} {self.schedule}"

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # many of optax's own lines need it
            return _optax_schedule(self.schedule, self.config)(step if self.step_level else round_)


@functools.lru_cache(maxsize=512)
def _optax_schedule(name: str, config: Any) -> Callable[[jax.Array], jax.Array]:
    factory, what = find(optax, name, "OptaxSchedule", "schedule"), f"OptaxSchedule: optax.{name}"
    require_shallow(config, f"{what}: its configuration", _MOST_LEVELS)
    signature = inspect.signature(factory)
    if signature.return_annotation != optax.Schedule:
        raise ValueError(f"{what} makes no schedule: it returns {signature.return_annotation}")
    require_names(config, signature.parameters, what)
    arguments = {key: _read(signature.parameters[key], value, what) for key, value in config.items()}
    try:
        schedule = factory(**arguments)
        if factory is optax.join_schedules and len(arguments["boundaries"]) != len(arguments["schedules"]) - 1:
            raise ValueError("it takes one boundary between each two schedules")
        with jax.numpy_dtype_promotion("standard"):
            rate = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
        if rate.shape:
            raise ValueError(f"it makes rates of the shape {rate.shape}")
    except Exception as error:
        raise ValueError(f"{what} refuses the arguments {quote(dict(config))}: {error}") from error
    return schedule


def _read(parameter: inspect.Parameter, value: Json, what: str) -> Any:
    key = parameter.name
    require_small(value, key, what)
    if key == "schedules":
        if not isinstance(value, list):
            raise refusal(value, key, what, "a list of schedulers and numbers")
        return [step_function(each, f"{what} at {key!r}") for each in value]
    if key == "boundaries_and_scales":
        if not isinstance(value, Mapping) or not all(each.isdecimal() for each in value):
            raise refusal(value, key, what, "a mapping of steps to numbers, such as {'1000': 0.1},")
        number = parameter.replace(annotation=float, default=0.0)
        return {int(step): argument(number, scale, what) for step, scale in value.items()}
    if key == "cosine_kwargs":
        if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
            raise refusal(value, key, what, "a list of mappings")
        within = inspect.signature(optax.warmup_cosine_decay_schedule).parameters
        for each in value:
            require_names(each, within, f"{what} at {key!r}")
        return [{name: argument(within[name], one, what) for name, one in each.items()} for each in value]
    return argument(parameter, value, what)


def step_function(rate: Json, what: str) -> Callable[[jax.Array], jax.Array]:
    """Return the function of the step that a number, or a scheduler's name or `(name, config)` pair, stands for.

    Raises:
      ValueError: if it is neither, no scheduler can be made of it, or that counts rounds.
    """
    if isinstance(rate, int | float) and not isinstance(rate, bool):
        return optax.constant_schedule(float(rate))
    if not isinstance(rate, str | list):
        raise ValueError(f"{what}: expected a number or a scheduler, such as ['warmup', ...], not {quote(rate)}")
    try:
        scheduler = Scheduler.from_specs(*([rate] if isinstance(rate, str) else rate))
        start = jnp.zeros((), jnp.int32)
        rounds = reads_values(lambda round_: scheduler._at(start, round_), start)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{what}: {quote(rate)} makes no scheduler: {error.args[0]}") from error
    if rounds:
        raise ValueError(f"{what}: {quote(rate)} counts rounds, and optax counts steps alone")
    return lambda step: scheduler._at(step, start)


class Constant(Scheduler, register=False):
    """The same rate for ever: what a number stands for."""

    name: ClassVar[str] = "constant"
    base: float = hyperparameter(within="[0, inf)")

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        return real(self.base)


class StepFunction(Scheduler, register=False):
    """A function of the step, such as an optax schedule: it cannot be written in a configuration."""

    name: ClassVar[str] = "step-function"
    function: Callable[[jax.Array], jax.Array]

    def compute_value(self, step: jax.Array, round_: jax.Array) -> jax.Array:
        return self.function(step)


def as_scheduler(rate: Any) -> Scheduler:
    """Return the scheduler that a number, a scheduler or a function of the step stands for."""
    if isinstance(rate, Scheduler):
        return rate
    return StepFunction(rate) if callable(rate) else Constant(rate)
