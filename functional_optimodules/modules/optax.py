"""Any optax transformation as a brick, by its public name.

Init(transform, config):
    state = optax.<transform>(**config).init(params)
Step(grads):
    grads = optax.<transform>(**config).update(grads, state, params)
    grads = -grads if the transformation descends
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.core.brick import OptiModule
from functional_optimodules.core.fields import FrozenConfig, hyperparameter, nearest
from functional_optimodules.core.numerics import cast_like, wide

# The sign of what a factory makes follows from whether it takes a `learning_rate`, but for these:
# the first name theirs otherwise or take none, the last calls its first step size so.
_DOWNHILL = frozenset({"polyak_sgd", "contrib.scale_by_cocob"})
_UPHILL = frozenset({"scale_by_rprop"})


class OptaxState(NamedTuple):
    """State of `OptaxModule`.

    Attributes:
      inner: the transformation's own state.
    """

    inner: Any


class OptaxModule(OptiModule):
    """Any optax transformation, by name and JSON arguments.

        Init(transform, config):
            inner = optax.<transform>(**config).init(params)
        Step(grads):
            grads, inner = optax.<transform>(**config).update(grads, inner, params)
            grads = -grads if they point downhill

    A factory with a `learning_rate` gives updates that point downhill: it gets a
    rate of 1 unless told otherwise, and the brick turns the sign, so that every
    brick points uphill and the `Optimizer` alone applies the rate. Optax is given
    at least float32, so that its norms and moments accumulate in no less. What
    optax differentiates to NaN at a gradient of zero it does here too: give its
    Adam an `eps_root`.

    Attributes:
      transform: the factory's name in optax, such as `"lion"`, `"scale_by_adam"`
        or `"contrib.prodigy"`.
      config: its keyword arguments, JSON values.

    References:
      DeepMind, "optax", https://optax.readthedocs.io.
    """

    name: ClassVar[str] = "optax"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"transform": "lion", "config": {"b1": 0.8}},
        {"transform": "scale_by_adam", "config": {"b2": 0.99, "nesterov": True, "eps_root": 1e-8}},
        {"transform": "sgd", "config": {"momentum": 0.5}},
    )
    transform: str
    config: Mapping[str, Any] = hyperparameter(default=FrozenConfig({}))

    def validate(self) -> None:
        """Build the transformation once.

        Raises:
          ValueError: if optax has no such factory, it refuses the arguments, or
            what it makes is no gradient transformation.
        """
        _build(self.transform, self.config)

    def state_name(self) -> str:
        return f"{self.name} {self.transform}"

    def init(self, params: Any) -> OptaxState:
        with jax.numpy_dtype_promotion("standard"):  # many of optax's own lines need it
            inner = _build(self.transform, self.config)[0].init(jax.tree.map(wide, params))
        return OptaxState(jax.tree.map(jnp.array, inner))

    def update(self, updates: Any, state: OptaxState, params: Any = None, **extra_args: Any) -> tuple[Any, OptaxState]:
        transform, sign = _build(self.transform, self.config)
        exact = jax.tree.map(wide, (updates, params))
        with jax.numpy_dtype_promotion("standard"):
            output, inner = transform.update(exact[0], state.inner, exact[1], **extra_args)
        output = cast_like(output, updates)
        return (output if sign == 1 else jax.tree.map(jnp.negative, output)), OptaxState(inner)


@functools.lru_cache(maxsize=512)
def _build(name: str, config: Any) -> tuple[optax.GradientTransformationExtraArgs, int]:
    factory = _find(name)
    arguments = dict(config)
    signature = inspect.signature(factory)
    parameters, made = signature.parameters, signature.return_annotation
    if made is not inspect.Signature.empty and "GradientTransformation" not in str(made):
        raise ValueError(f"OptaxModule: optax.{name} makes no gradient transformation: it returns {made}")
    for key, value in arguments.items():
        if key not in parameters:
            raise ValueError(f"OptaxModule: optax.{name} takes no argument {key!r}: {nearest(key, parameters)}")
        # optax itself would only stumble over it in the middle of a step
        if isinstance(parameters[key].default, int | float) and isinstance(value, str | list | dict):
            raise ValueError(f"OptaxModule: optax.{name} takes a number for {key!r}, not {value!r}")
    descends = name in _DOWNHILL
    if "learning_rate" in parameters:
        arguments.setdefault("learning_rate", 1.0)
        descends = name not in _UPHILL and arguments.get("flip_sign", True)
    try:
        transform = factory(**arguments)
    except Exception as error:
        raise ValueError(f"OptaxModule: optax.{name} refuses the arguments {arguments}: {error}") from error
    if not isinstance(transform, optax.GradientTransformation):
        raise ValueError(f"OptaxModule: optax.{name} makes no gradient transformation, but {transform!r}")
    return optax.with_extra_args_support(transform), -1 if descends else 1


def _belongs_to_optax(thing: Any) -> bool:
    home = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", None)
    return isinstance(home, str) and home.split(".")[0] == "optax"


def _find(name: str) -> Any:
    place: Any = optax
    for part in name.split("."):
        if part.startswith("_") or not hasattr(place, part):
            known = [each for each in dir(place) if not each.startswith("_")]
            raise ValueError(f"OptaxModule: optax has no public {name!r}: {nearest(part, known)}")
        place = getattr(place, part)
        # A configuration may come from a peer: it must not reach what optax happens to import.
        if not _belongs_to_optax(place):
            break
    if not inspect.isfunction(place) or not _belongs_to_optax(place):
        raise ValueError(f"OptaxModule: optax.{name} makes no gradient transformation: it is {place!r}")
    return place
