"""Any optax transformation as a brick, by its public name.

Init(transform, config):
    state = optax.<transform>(**config).init(params)
Step(grads):
    grads = optax.<transform>(**config).update(grads, state, params)
    grads = -grads if the transformation descends
"""

import contextlib
import functools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import FrozenConfig, hyperparameter
from functional_optimodules.config.outside import quote
from functional_optimodules.modules.optax_parts import Builder, Part
from functional_optimodules.numerics import cast_like, wide
from functional_optimodules.packing.adapter import Unpacks
from functional_optimodules.packing.tree import unpack
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree, Updates

_MOST_COPIES = 1000  # a configuration may come from a peer: what it can ask for is bounded


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

    What optax takes as objects has these forms:

    - a schedule: a number, or a scheduler that counts steps, `["warmup", {"base": 0.1, "warmup": 10}]`.
      It is optax that counts.
    - a mask: a glob pattern over paths or a list of them, `"**/kernel"`; or nested dicts of booleans
      by key, `{"layer": {"kernel": true, "bias": false}}`, where a boolean stands for all that is below it.
    - a transformation within another: a module, `["adam", {}]`, or one of optax's,
      `["optax", {"transform": "sgd", "config": {"learning_rate": 0.1}}]`; lists and mappings of them for
      `chain`, whose argument is `args`, `named_chain` and `partition`.
    - the labels of `partition`: `[pattern, label]` pairs, of which the first that matches counts, or nested
      dicts by key; the dimension numbers of Muon and GaLore: patterns, or pairs of
      `[pattern, {"reduction_axis": 0, "output_axis": [1, 2]}]`.
    - a dtype: its name.

    `lookahead`, `schedule_free`, `mechanize` and `sam` add updates to parameters on their own account:
    the rate belongs into the optimizer that they wrap, and that of the `Optimizer` is 1.

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
        {
            "transform": "chain",
            "config": {
                "args": [
                    ["momentum", {"beta": 0.5}],
                    [
                        "optax",
                        {"transform": "sgd", "config": {"learning_rate": ["warmup", {"base": 0.5, "warmup": 3}]}},
                    ],
                ]
            },
        },
    )
    transform: str
    config: Mapping[str, Any] = hyperparameter(default=FrozenConfig({}))

    def validate(self) -> None:
        """Build the transformation once, and try a step of it on shapes.

        Raises:
          ValueError: if optax has no such factory, it or one of its parts refuses an argument, what
            it makes is no gradient transformation, an integer has more than 32 bits, a state would
            be larger than 1000 times the parameters, the configuration nests more than 20
            levels deep, there are more than 32 parts, or one takes part in rounds.
        """
        _try(self.transform, self.config)

    def state_name(self) -> str:
        return f"{self.name} {_build(self.transform, self.config).label}"

    def init(self, params: Params) -> OptaxState:
        transform = _build(self.transform, self.config).transform
        with self._named(), jax.numpy_dtype_promotion("standard"):  # many of optax's own lines need it
            inner = transform.init(jax.tree.map(wide, unpack(params)))
        return OptaxState(jax.tree.map(jnp.array, inner))

    def update(
        self, updates: Updates, state: OptaxState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, OptaxState]:
        transform, sign, _ = _build(self.transform, self.config)
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
            raise _failure(self.transform, self.config, error) from error


def _failure(name: str, config: Any, error: Exception) -> ValueError:
    return ValueError(f"OptaxModule: optax.{name} with the arguments {quote(dict(config))} fails: {error}")


# The shapes that a step is tried on: there are transformations of matrices alone, and arguments that name any axis.
_TRIED = (
    {"matrix": jax.ShapeDtypeStruct((8, 8), jnp.float32), "vector": jax.ShapeDtypeStruct((8,), jnp.float32)},
    {"tensor": jax.ShapeDtypeStruct((2,) * 8, jnp.float32)},
    {"matrix": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
)


class _TooLarge(ValueError):
    """A state is larger than is taken."""


@functools.lru_cache(maxsize=512)
def _build(name: str, config: Any) -> Part:
    return Builder().make(name, config)


@functools.lru_cache(maxsize=512)
def _try(name: str, config: Any) -> None:
    """Take a step on shapes: over some arguments optax itself only stumbles in the middle of a run."""
    _build(name, config)
    transform, errors = Builder(anywhere=True).make(name, config).transform, list[Exception]()
    for params in _TRIED:
        try:
            with shapes_only(), jax.numpy_dtype_promotion("standard"):
                _step(transform, params, f"optax.{name} with the arguments {quote(dict(config))}")
            return
        except _TooLarge:
            raise
        except Exception as error:
            errors.append(error)
    raise _failure(name, config, errors[0]) from errors[0]


def _step(transform: optax.GradientTransformationExtraArgs, params: Params, what: str) -> None:
    state = jax.eval_shape(transform.init, params)
    size, of_params = (sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (state, params))
    if size > _MOST_COPIES * of_params:
        raise _TooLarge(
            f"OptaxModule: {what} has a state of {size} numbers for {of_params} parameters: at most {_MOST_COPIES} "
            "times as many are taken"
        )
    updates, new = _shapes(transform, params, state, frozenset())
    if _specs(updates, jnp.shape) != _specs(params, jnp.shape):
        raise ValueError("the updates are shaped otherwise than the gradients")
    if _specs(new, _shape_and_dtype) != _specs(state, _shape_and_dtype):
        raise ValueError("after a step the state has other shapes or dtypes than before")


def _shapes(
    transform: optax.GradientTransformationExtraArgs, params: Params, state: PyTree, asked: frozenset[str]
) -> tuple[Updates, PyTree]:
    """Return the shapes of what a step returns, given those of the extra arguments that are asked for."""

    def loss(params: Params) -> jax.Array:
        return sum(map(jnp.sum, jax.tree.leaves(params)), jnp.zeros(()))

    def update(updates: Updates, state: PyTree, params: Params) -> tuple[Updates, PyTree]:
        known = {"value": loss(params), "grad": updates, "value_fn": loss, "obj_fn": loss, "grad_fn": lambda at, _: at}
        return transform.update(updates, state, params, **{name: known[name] for name in asked})

    try:
        return jax.eval_shape(update, params, state, params)
    except Exception as error:
        missing = _EXTRA.findall(str(error))
        if asked.issuperset(missing):
            raise
        return _shapes(transform, params, state, asked.union(missing))


# As Python and optax say it: "missing 1 required keyword-only argument: 'value'", "obj_fn must be provided".
_EXTRA = re.compile(r"\b(value|grad|value_fn|obj_fn|grad_fn)(?=' and|'$|', |' ?\n| must be provided)")


def _specs(tree: PyTree, spec: Callable[[jax.Array], Any]) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [spec(leaf) for leaf in leaves]


def _shape_and_dtype(leaf: jax.Array) -> Any:
    return leaf.shape, leaf.dtype
