"""Optax's factories by name, with JSON arguments, and transformations within others."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.calls import (
    MOST_INTEGER,
    argument,
    find,
    members,
    refusal,
    require_names,
    require_small,
)
from functional_optimodules.config.fields import require_keys
from functional_optimodules.config.outside import quote, require_shallow
from functional_optimodules.modules.optax_trees import Choice, axes_of, is_pair, labels, mask
from functional_optimodules.schedulers import step_function
from functional_optimodules.types import Json, Params, PyTree, Updates
from functional_optimodules.wire.paths import read_dtype

# The sign of what a factory makes follows from whether it takes a `learning_rate`, and from its parts. But the first
# name theirs otherwise or take none, and the next calls its first step size so.
_DOWNHILL = frozenset({"polyak_sgd", "scale_by_cocob"})
_UPHILL = frozenset({"scale_by_rprop"})
# These add the updates of their parts to parameters, or leave some gradients as they are: their parts must all
# point to one side, and so do they.
_TURNED = {
    **dict.fromkeys(("lookahead", "mechanize", "sam", "schedule_free"), -1),
    **dict.fromkeys(("masked", "partition"), 1),
}

REFUSED: Mapping[str, str] = {
    "conditionally_mask": "its condition is a function of the step",
    "conditionally_transform": "its condition is a function of the step",
    "differentially_private_aggregate": "it takes gradients of each example, and returns updates of other shapes",
    "dpsgd": "it takes gradients of each example, and returns updates of other shapes",
    "inject_hyperparams": "it takes a factory and makes another",
    "inject_stateful_hyperparams": "it takes a factory and makes another",
    "measure_with_ema": "what it measures is a function",
    "monitor": "what it measures are functions, and its state has other parts after the first step than before",
    "snapshot": "what it measures is a function",
    "stateless": "it is made of a function",
    "stateless_with_tree_map": "it is made of a function",
}
"""Optax's factories that no configuration can call, and why."""

# A configuration may come from a peer: what it can ask for is bounded.
_MOST_LEVELS = 20
_MOST_PARTS = 32
# How often something is done within one step; `sam` unrolls its loop.
_PASSES = {"ns_steps": 1000, "max_linesearch_steps": 1000, "max_backtracking_steps": 1000, "sync_period": 1000}
# Optax would take the rest of a division by them.
_INTERVALS = frozenset({"accumulation_size", "every_k_schedule", "k", "update_interval", "update_proj_gap"})
# What takes part in rounds has one of these of its own.
_OF_ROUNDS = ("begin_round", "end_round", "share", "collect", "commit", "process", "forget")
_OF_THE_STEP = (optax.Schedule, Callable[[jax.Array], jax.Array])


class LookaheadState(NamedTuple):
    """State of `optax.lookahead` over plain parameters, which are the fast ones.

    Attributes:
      slow: the slow parameters, in at least float32.
      inner: optax's own state.
    """

    slow: Params
    inner: PyTree


class Part(NamedTuple):
    """A transformation, 1 if it points uphill or -1 if it points downhill, and what tells its states from others'."""

    transform: optax.GradientTransformationExtraArgs
    sign: int
    label: str

    def turned(self, sign: int) -> optax.GradientTransformationExtraArgs:
        """Return the transformation pointing to a side."""
        if sign == self.sign:
            return self.transform

        def update(
            updates: Updates, state: PyTree, params: Params = None, **extra_args: PyTree
        ) -> tuple[Updates, PyTree]:
            output, state = self.transform.update(updates, state, params, **extra_args)
            return jax.tree.map(jnp.negative, output), state

        return optax.GradientTransformationExtraArgs(self.transform.init, update)


class Builder:
    """What makes one transformation, of a name and a configuration, with all that are within it.

    Attributes:
      anywhere: whether masks and labels are replaced by ones that hold for any parameters: for a step on shapes.
    """

    def __init__(self, anywhere: bool = False) -> None:
        self.anywhere = anywhere
        self._count = 0

    def make(self, name: str, config: Mapping[str, Json]) -> Part:
        """Return what a factory of optax makes.

        Args:
          name: its name within optax.
          config: its keyword arguments; those of `*args` are a list under that name.

        Raises:
          ValueError: if optax has none of the name, it is one of `REFUSED`, it makes something else,
            or an argument is none of it, of a wrong kind, or above what is taken.
        """
        what = f"OptaxModule: optax.{name}"
        found = find(optax, name, "OptaxModule", "gradient transformation")
        factory = _INSTEAD.get(found, found)
        if inspect.isclass(factory):
            raise ValueError(f"{what} makes no gradient transformation: it is {factory}")
        plain, signature = getattr(found, "__name__", name), inspect.signature(factory)
        known, made = signature.parameters, signature.return_annotation
        if plain in REFUSED:
            raise ValueError(f"{what} is made by no configuration: {REFUSED[plain]}")
        if made is not inspect.Signature.empty and "GradientTransformation" not in str(made):
            raise ValueError(f"{what} makes no gradient transformation: it returns {made}")
        require_shallow(config, f"{what}: its configuration", _MOST_LEVELS)
        require_names(config, known, what)
        parts: list[Part] = []

        def part(spec: Json, key: str) -> optax.GradientTransformationExtraArgs:
            parts.append(self._part(spec, f"{what} at {key!r}"))
            return parts[-1].turned(_TURNED.get(plain, parts[-1].sign))

        arguments = {key: self._read(known[key], value, config, what, part) for key, value in config.items()}
        downhill = plain in _DOWNHILL
        if "learning_rate" in known:
            arguments.setdefault("learning_rate", 1.0)
            downhill = plain not in _UPHILL and arguments.get("flip_sign", True)
        sign = _TURNED.get(plain) or math.prod((-1 if downhill else 1, *(each.sign for each in parts)))
        several = next((arguments.pop(key, ()) for key, each in known.items() if each.kind is each.VAR_POSITIONAL), ())
        try:
            transform = factory(*several, **arguments)
            if self.anywhere and plain == "partition":
                transform = optax.chain(*arguments["transforms"].values())
        except Exception as error:
            raise ValueError(f"{what} refuses the arguments {quote(dict(config))}: {error}") from error
        if not isinstance(transform, optax.GradientTransformation):
            raise ValueError(f"{what} makes no gradient transformation, but {quote(transform)}")
        label = f"{name}({', '.join(each.label for each in parts)})" if parts else name
        return Part(optax.with_extra_args_support(transform), sign, label)

    def _part(self, spec: Json, what: str) -> Part:
        self._count += 1
        if self._count > _MOST_PARTS:
            raise ValueError(f"{what}: there are more than {_MOST_PARTS} transformations within one")
        name, config = (spec, {}) if isinstance(spec, str) else spec if is_pair(spec, str, Mapping) else (None, {})
        if name is None:
            raise ValueError(f"{what}: expected a module, such as ['adam', {{}}], not {quote(spec)}")
        try:
            if name == "optax":
                fields = {"config": {}, **config}
                require_keys(fields, ("transform", "config"), what)
                if not isinstance(fields["transform"], str) or not isinstance(fields["config"], Mapping):
                    raise ValueError("a transformation has a name, and a mapping of arguments")
                return self.make(fields["transform"], fields["config"])
            brick = OptiModule.from_specs(name, config)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{what}: {quote(spec)} makes no module: {error.args[0]}") from error
        own = any(getattr(type(brick), method) is not getattr(OptiModule, method) for method in _OF_ROUNDS)
        if own or brick.restarts() or any(brick.asks()):
            raise ValueError(
                f"{what}: {quote(spec)} takes part in rounds, or asks for what is known of a step, and optax does "
                "neither: put it among the modules of an `Optimizer`"
            )
        return Part(brick.to_optax(), 1, brick.state_name())

    def _read(
        self,
        parameter: inspect.Parameter,
        value: Json,
        config: Mapping[str, Json],
        what: str,
        part: Callable[[Json, str], optax.GradientTransformationExtraArgs],
    ) -> Any:
        key, options = parameter.name, members(parameter.annotation)
        require_small(value, key, what, _PASSES.get(key, MOST_INTEGER))
        if key in _INTERVALS and isinstance(value, int | float) and (value < 1 or value != round(value)):
            raise refusal(value, key, what, "a whole number of at least 1")
        if value is None and (parameter.default is None or types.NoneType in options):
            return None
        if "GradientTransformation" in str(parameter.annotation):
            return _transforms(parameter, value, what, part)
        if key.endswith("mask"):
            if isinstance(value, bool):
                return value
            return self._freed(mask(value, key, what), lambda _: key != "freeze_mask")
        if key == "param_labels":
            return self._freed(labels(value, key, what, config.get("transforms")), lambda _: None)
        axes = next((option for option in options if hasattr(option, "_fields")), None)
        if axes is not None:
            return self._freed(axes_of(value, key, what, axes), lambda leaf: axes() if leaf.ndim == 2 else None)
        if "dtype" in key:
            if not isinstance(value, str):
                raise refusal(value, key, what, "the name of a dtype")
            return read_dtype(value, f"{what} at {key!r}")
        if any(option in _OF_THE_STEP for option in options):
            if isinstance(value, str | list):
                return step_function(value, f"{what} at {key!r}")
            return argument(parameter, value, what, "a scheduler")
        return argument(parameter, value, what)

    def _freed(self, choose: Choice, anywhere: Callable[[PyTree], Any]) -> Choice:
        """Return a choice for each parameter, or one that there is for any."""
        return (lambda tree: jax.tree.map(anywhere, tree)) if self.anywhere else choose


def _transforms(
    parameter: inspect.Parameter,
    value: Json,
    what: str,
    part: Callable[[Json, str], optax.GradientTransformationExtraArgs],
) -> Any:
    key, named = parameter.name, typing.get_origin(parameter.annotation)
    if parameter.kind is parameter.VAR_POSITIONAL:
        if not isinstance(value, list) or not value:
            raise refusal(value, key, what, "a list of modules")
        if named is not tuple:
            return [part(each, key) for each in value]
        if not all(isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) for each in value):
            raise refusal(value, key, what, "a list of pairs of a name and a module")
        return [(name, part(each, key)) for name, each in value]
    if named is not Mapping:
        return part(value, key)
    if not isinstance(value, Mapping) or not value:
        raise refusal(value, key, what, "a mapping of labels to modules")
    return {label: part(each, key) for label, each in value.items()}


def _lookahead(
    fast_optimizer: optax.GradientTransformation, sync_period: int, slow_step_size: float, reset_state: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Return `optax.lookahead` for plain parameters: optax keeps the slow ones beside them, and here the state does."""
    pairs = optax.lookahead(fast_optimizer, sync_period, slow_step_size, reset_state)

    def init(params: Params) -> LookaheadState:
        return LookaheadState(params, pairs.init(optax.LookaheadParams(params, params)))

    def update(
        updates: Updates, state: LookaheadState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, LookaheadState]:
        if params is None:
            raise ValueError("lookahead needs the params")
        moved, inner = pairs.update(updates, state.inner, optax.LookaheadParams(params, state.slow))
        return moved.fast, LookaheadState(optax.apply_updates(state.slow, moved.slow), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _selective_transform(
    optimizer: optax.GradientTransformation, freeze_mask: bool | Choice
) -> optax.GradientTransformationExtraArgs:
    """Return `optax.selective_transform` for a mask that is a function of the parameters, as optax's is not."""

    def chosen(tree: PyTree) -> PyTree:
        frozen = freeze_mask(tree) if callable(freeze_mask) else freeze_mask
        return jax.tree.map(lambda each: "freeze" if each else "train", frozen)

    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, chosen)


def _multi_steps(
    opt: optax.GradientTransformation,
    every_k_schedule: int | optax.Schedule,
    use_grad_mean: bool = True,
    accumulator_dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """Return what `optax.MultiSteps` makes; a rate that says how many steps is rounded."""

    def every(step: jax.Array) -> jax.Array:
        number = every_k_schedule(step) if callable(every_k_schedule) else every_k_schedule
        return jnp.maximum(jnp.round(number), 1).astype(jnp.int32)

    steps = optax.MultiSteps(opt, every, use_grad_mean, accumulator_dtype=accumulator_dtype)
    return steps.gradient_transformation()


_INSTEAD = {
    optax.MultiSteps: _multi_steps,
    optax.lookahead: _lookahead,
    optax.selective_transform: _selective_transform,
}
