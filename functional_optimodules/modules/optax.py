"""Any optax transformation as a brick, by its public name.

Init(transform, config):
    state = optax.<transform>(**config).init(params)
Step(grads):
    grads = optax.<transform>(**config).update(grads, state, params)
    grads = -grads if the transformation descends
"""

import contextlib
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import FrozenConfig, hyperparameter, nearest
from functional_optimodules.config.outside import quote
from functional_optimodules.numerics import cast_like, wide
from functional_optimodules.packing.adapter import Unpacks
from functional_optimodules.packing.tree import unpack
from functional_optimodules.types import Json, Params, PyTree, Updates
from functional_optimodules.wire.paths import keystr, leaf_paths

# The sign of what a factory makes follows from whether it takes a `learning_rate`, but for these:
# the first name theirs otherwise or take none, the last calls its first step size so.
_DOWNHILL = frozenset({"polyak_sgd", "contrib.scale_by_cocob"})
_UPHILL = frozenset({"scale_by_rprop"})

# A configuration may come from a peer: what it can ask for is bounded.
_MOST_COPIES = 1000
_MOST_INTEGER = 2**32
_MOST_PASSES = 1000
_PASSES = frozenset({"ns_steps"})  # how often something is done within one step
_TEXTS = ("str", "Any", "Literal", "dtype", "Precision", "empty")


class OptaxState(NamedTuple):
    """State of `OptaxModule`.

    Attributes:
      inner: the transformation's own state.
    """

    inner: PyTree


class OptaxModule(OptiModule[OptaxState]):
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
      config: its keyword arguments, JSON values. A mask of parameters is nested dicts of
        booleans by key, `{"layer": {"kernel": true, "bias": false}}`, where a boolean
        stands for all that is below it.

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
          ValueError: if optax has no such factory, it refuses the arguments, what it
            makes is no gradient transformation, an integer has more than 32 bits, or a
            state would be larger than 1000 times the parameters.
        """
        _require_small_state(_build(self.transform, self.config)[0], self.transform, self.config)

    def state_name(self) -> str:
        return f"{self.name} {self.transform}"

    def init(self, params: Params) -> OptaxState:
        transform, _ = _build(self.transform, self.config)
        with self._named(), jax.numpy_dtype_promotion("standard"):  # many of optax's own lines need it
            inner = transform.init(jax.tree.map(wide, unpack(params)))
        return OptaxState(jax.tree.map(jnp.array, inner))

    def update(
        self, updates: Updates, state: OptaxState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, OptaxState]:
        transform, sign = _build(self.transform, self.config)
        exact = jax.tree.map(wide, unpack((updates, params)))
        try:
            with self._named(extra_args), jax.numpy_dtype_promotion("standard"):
                output, inner = transform.update(exact[0], state.inner, exact[1], **extra_args)
        except ValueError as error:
            if params is None and "params" in str(error):
                raise ValueError(
                    f"OptaxModule: optax.{self.transform} needs the parameters: pass `params` to `update`, or as the "
                    "second argument of `run(gradients, params)`"
                ) from error
            raise
        output = cast_like(output if sign == 1 else jax.tree.map(jnp.negative, output), unpack(updates))
        return Unpacks(self).free(output, updates), OptaxState(inner)

    @contextlib.contextmanager
    def _named(self, extra_args: Mapping[str, PyTree] = types.MappingProxyType({})) -> Iterator[None]:
        """Say of an error which transformation it comes from: arguments that it was built with may be wrong."""
        try:
            yield
        except Exception as error:
            # What the caller's own function raises is the caller's.
            if isinstance(error, jax.errors.JaxRuntimeError) or any(map(callable, extra_args.values())):
                raise
            raise ValueError(
                f"OptaxModule: optax.{self.transform} with the arguments {quote(dict(self.config))} fails: {error}"
            ) from error


@functools.lru_cache(maxsize=512)
def _build(name: str, config: Any) -> tuple[optax.GradientTransformationExtraArgs, int]:
    factory = _find(name)
    arguments = dict(config)
    signature = inspect.signature(factory)
    parameters, made = signature.parameters, signature.return_annotation
    if made is not inspect.Signature.empty and "GradientTransformation" not in str(made):
        raise ValueError(f"OptaxModule: optax.{name} makes no gradient transformation: it returns {made}")
    for key, value in config.items():
        if key not in parameters:
            raise ValueError(f"OptaxModule: optax.{name} takes no argument {quote(key)}: {nearest(key, parameters)}")
        # optax itself would only stumble over it in the middle of a step, or take a text so many times
        number = isinstance(parameters[key].default, int | float) and isinstance(value, str | list | dict)
        if number or (isinstance(value, str) and not any(kind in str(parameters[key].annotation) for kind in _TEXTS)):
            raise ValueError(f"OptaxModule: optax.{name} takes a number for {key!r}, not {quote(value)}")
        most = _MOST_PASSES if key in _PASSES else _MOST_INTEGER
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(f"OptaxModule: optax.{name} takes at most {most} for {key!r}, not {quote(value)}")
        if key.endswith("mask") and isinstance(value, Mapping):
            arguments[key] = _mask_by_path(value, f"OptaxModule: {key} of optax.{name}")
    descends = name in _DOWNHILL
    if "learning_rate" in parameters:
        arguments.setdefault("learning_rate", 1.0)
        descends = name not in _UPHILL and arguments.get("flip_sign", True)
    try:
        transform = factory(**arguments)
    except Exception as error:
        raise ValueError(f"OptaxModule: optax.{name} refuses the arguments {quote(arguments)}: {error}") from error
    if not isinstance(transform, optax.GradientTransformation):
        raise ValueError(f"OptaxModule: optax.{name} makes no gradient transformation, but {transform!r}")
    return optax.with_extra_args_support(transform), -1 if descends else 1


@functools.lru_cache(maxsize=512)
def _require_small_state(transform: optax.GradientTransformation, name: str, config: Any) -> None:
    mask = next((value for key, value in config.items() if key.endswith("mask") and isinstance(value, Mapping)), None)
    like = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    params = {"matrix": like, "vector": jax.ShapeDtypeStruct((8,), jnp.float32)}
    if mask is not None:
        params = jax.tree.map(lambda _: like, dict(mask))
    try:
        with jax.numpy_dtype_promotion("standard"):
            state = jax.eval_shape(transform.init, params)
    except Exception:  # it wants other parameters: what it says of the user's own names it
        return
    size, of_params = (sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (state, params))
    if size > _MOST_COPIES * of_params:
        raise ValueError(
            f"OptaxModule: optax.{name} with the arguments {quote(dict(config))} has a state of {size} numbers for "
            f"{of_params} parameters: at most {_MOST_COPIES} times as many are taken"
        )


def _mask_by_path(mask: Json, what: str) -> Callable[[PyTree], PyTree]:
    """Return a mask, for any container of the parameters, that was written as nested dicts of booleans by key.

    Raises:
      ValueError: if a value is no boolean; the mask itself raises it for parameters that
        it does not cover, and for what it names and is not there.
    """
    nodes = jax.tree.leaves_with_path(mask, is_leaf=lambda node: not isinstance(node, Mapping))
    entries = {keystr(path): node for path, node in nodes}
    for path, node in entries.items():
        if not isinstance(node, bool):
            raise ValueError(f"{what} should be a boolean at {quote(path)}, not {quote(node)}")

    def call(tree: PyTree) -> PyTree:
        chosen = []
        for path in leaf_paths(tree):
            entry = next((entry for entry in entries if f"{path}/".startswith(f"{entry}/")), None)
            if entry is None:
                raise ValueError(f"{what} says nothing of the parameter {path!r}: it names {quote(sorted(entries))}")
            chosen.append(entry)
        if unused := sorted(entries.keys() - set(chosen)):
            raise ValueError(f"{what} names {quote(unused[0])}, and there are the parameters {quote(leaf_paths(tree))}")
        return jax.tree.unflatten(jax.tree.structure(tree), [entries[entry] for entry in chosen])

    return call


def _find(name: str) -> PyTree:
    place: Any = optax
    for part in name.split("."):
        if part.startswith("_") or not hasattr(place, part):
            known = [each for each in dir(place) if not each.startswith("_")]
            raise ValueError(f"OptaxModule: optax has no public {quote(name)}: {nearest(part, known)}")
        place = getattr(place, part)
        function = place.func if isinstance(place, functools.partial) else place
        home = getattr(inspect.getmodule(function), "__name__", "")
        foreign = home.split(".")[0] != "optax"
        # A configuration may come from a peer: it must not reach what optax happens to import.
        if foreign:
            break
    if foreign or not inspect.isfunction(function):
        raise ValueError(f"OptaxModule: optax.{name} makes no gradient transformation: it is {place!r}")
    return place
