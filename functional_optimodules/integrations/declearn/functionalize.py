"""declearn's modules as bricks: what they do with Vectors is traced, and what they remember is the state.

A module of declearn remembers by attributes. A count is a number from the beginning; what is
shaped like the parameters is a number or `None` at first, and a Vector after the first step.
The module is run on traced Vectors to see which attributes change. Of a step two programs are
then traced, by copies whose attributes are set to the state's values: one from what the module
has at first, and one from Vectors.
"""

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from declearn.model.api import Vector
from declearn.optimizer.modules import NoiseModule
from declearn.optimizer.modules import OptiModule as DeclearnModule

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.outside import quote
from functional_optimodules.integrations.declearn.plugins import ModuleAdapter
from functional_optimodules.numerics import cast_like, wide
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.paths import leaf_paths


class TracedVector(Vector[jax.Array]):
    """A Vector of JAX's arrays, which may be traced: it does arithmetic, and nothing that needs their values."""

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, tree: PyTree) -> Self:
        """Return the leaves of a tree, by path."""
        return cls(dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)))

    def tree(self, like: PyTree) -> PyTree:
        """Return the coefficients as a tree in the container of another, of whose paths they bear the names."""
        return jax.tree.unflatten(jax.tree.structure(like), [self.coefs[path] for path in leaf_paths(like)])

    def sign(self) -> Self:
        return self.apply_func(jnp.sign)

    def minimum(self, other: Self | float) -> Self:
        return self._apply_operation(other, jnp.minimum)

    def maximum(self, other: Self | float) -> Self:
        return self._apply_operation(other, jnp.maximum)

    def sum(self) -> Self:
        return self.apply_func(jnp.sum)

    def __eq__(self, other: object) -> bool:
        raise TypeError("it compares Vectors, whose values are not known while tracing")

    def pack(self) -> dict[str, Any]:
        raise TypeError("it takes a Vector to the host")

    def flatten(self) -> Any:
        raise TypeError("it takes a Vector to the host")

    @classmethod
    def unflatten(cls, values: Any, v_spec: Any) -> Self:
        raise TypeError("it makes a Vector of numbers from the host")


Step = Callable[[PyTree, Mapping[str, PyTree]], tuple[PyTree, dict[str, PyTree]]]
"""From gradients, and values by attribute, to what becomes of both."""


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """A module of declearn as it was given: only copies of it are run. Two of equal attributes are equal.

    Attributes:
      module: the module.
      counts: the attributes that are numbers and change, as dotted names: `steps`, `ewma_1.count`.
      shaped: those that come to be Vectors.
    """

    module: DeclearnModule[Any]
    counts: tuple[str, ...] = ()
    shaped: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and _signature(self.module) == _signature(other.module)

    def __hash__(self) -> int:
        return hash(_signature(self.module))

    def first(self, gradients: PyTree, values: Mapping[str, PyTree]) -> tuple[PyTree, dict[str, PyTree]]:
        """Take a step from what the module has at first, but for the counts."""
        return self._step(gradients, {name: values[name] for name in self.counts})

    def later(self, gradients: PyTree, values: Mapping[str, PyTree]) -> tuple[PyTree, dict[str, PyTree]]:
        """Take a step from what was remembered."""
        return self._step(gradients, values)

    def begin_round(self, values: Mapping[str, PyTree]) -> tuple[bool, dict[str, PyTree]]:
        """Begin a round.

        Returns:
          Whether all that is shaped like the parameters is as at first, and the values.

        Raises:
          TypeError: if a value becomes what is neither as at first nor a Vector.
        """
        module = self._copy(values)
        module.on_round_start()
        new = {name: _scalar(_get(module, name)) for name in self.counts}
        reset = {name: _get(self.module, name) for name in self.shaped}
        for name in self.shaped:
            value = _get(module, name)
            if isinstance(value, TracedVector):
                new[name] = value.tree(values[name])
                del reset[name]
            elif _same(value, reset[name]):
                new[name] = _filled(values[name], value)
            else:
                raise TypeError(f"`on_round_start` sets {name!r} to {quote(value)}, which it is not at first")
        whole = len(reset) == len(self.shaped) > 0
        if None in reset.values() and not whole:
            raise TypeError(f"`on_round_start` forgets {sorted(reset)}, and not all of {sorted(self.shaped)}")
        return whole, new

    def _step(self, gradients: PyTree, values: Mapping[str, PyTree]) -> tuple[PyTree, dict[str, PyTree]]:
        module, vector = self._copy(values), TracedVector.of(gradients)
        output = module.run(vector)
        if not isinstance(output, TracedVector) or output.shapes() != vector.shapes():
            raise TypeError(f"`run` gives {type(output).__name__}, and not a Vector like the gradients")
        new: dict[str, PyTree] = {name: _scalar(_get(module, name)) for name in self.counts}
        for name in self.shaped:
            value = _get(module, name)
            if not isinstance(value, TracedVector) or value.coefs.keys() != vector.coefs.keys():
                raise TypeError(f"it remembers {name!r}, which is not always a Vector of the parameters' names")
            new[name] = value.tree(gradients)
        return output.tree(gradients), new

    def _copy(self, values: Mapping[str, PyTree]) -> Any:
        module = copy.deepcopy(self.module)
        for name, value in values.items():
            *owners, last = name.split(".")
            setattr(_get(module, ".".join(owners)), last, TracedVector.of(value) if name in self.shaped else value)
        return module


class Remembered(NamedTuple):
    """State of `FunctionalizedModule`.

    Attributes:
      started: boolean scalar, whether what is shaped like the parameters is other than at first.
      values: what the module remembers, by attribute: scalars, and trees in the parameters'
        container, in at least float32.
    """

    started: jax.Array
    values: dict[str, PyTree]


class FunctionalizedModule(OptiModule[Remembered], register=False):
    """What a module of declearn does, as pure functions; `functionalize` makes it.

        Init(module):
            started = false; values = the module's counts, and 0 for what is shaped like the parameters
        Round():
            values = on_round_start(values); started = false if nothing is left
        Step(grads):
            grads, values = run(grads, values if started else what the module has at first)
            started = true

    It computes in at least float32. A configuration cannot hold it: it is given as an instance.

    Attributes:
      template: the module.
    """

    name: ClassVar[str] = "declearn"
    template: Template

    def state_name(self) -> str:
        return f"{self.name} {self.template.module.name}"

    def init(self, params: Params) -> Remembered:
        template = self.template
        counts = {name: _scalar(_get(template.module, name)) for name in template.counts}
        with jax.numpy_dtype_promotion("standard"):
            _, after = jax.eval_shape(template.first, jax.tree.map(wide, params), counts)
        shaped = {name: _filled(after[name], 0) for name in template.shaped}
        return Remembered(jnp.array(False), counts | shaped)

    def update(
        self, updates: Updates, state: Remembered, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, Remembered]:
        template, gradients = self.template, jax.tree.map(wide, updates)

        def kept(step: Step) -> Step:
            def run(gradients: PyTree, values: Mapping[str, PyTree]) -> tuple[PyTree, dict[str, PyTree]]:
                output, new = step(gradients, values)
                return cast_like(output, updates), cast_like(new, values)

            return run

        with jax.numpy_dtype_promotion("standard"):
            if template.shaped:
                steps = kept(template.later), kept(template.first)
                output, values = jax.lax.cond(state.started, *steps, gradients, state.values)
            else:
                output, values = kept(template.first)(gradients, state.values)
        return output, Remembered(jnp.array(bool(template.shaped)), values)

    def begin_round(self, state: Remembered, params: Params = None) -> Remembered:
        with jax.numpy_dtype_promotion("standard"):
            reset, values = self.template.begin_round(state.values)
        return Remembered(state.started & (not reset), cast_like(values, state.values))


def functionalize(module: DeclearnModule[Any]) -> OptiModule[Any]:
    """Return a module of declearn as a brick, which `init, update = brick` unpacks, pure and compiled.

    It chains with other bricks and with optax's, and has a facade. It starts as a new module of
    the same attributes, `round_reset` included. What `to_declearn` made becomes the brick again.

    Args:
      module: any module that does only arithmetic of Vectors and numbers, and that has not run.

    Raises:
      TypeError: if it is no module, or does more: it draws random numbers, exchanges auxiliary
        variables, takes values to the host, or decides by them.
      ValueError: if it has run.
    """
    if isinstance(module, ModuleAdapter):
        return module.brick
    if not isinstance(module, DeclearnModule):
        raise TypeError(f"functionalize takes an `OptiModule` of declearn, not {type(module).__name__}")
    what, kind = f"functionalize: {type(module).__name__}", type(module)
    if ran := [name for name, value in _attributes(module) if isinstance(value, Vector)]:
        raise ValueError(
            f"{what} has run, and remembers {ran}: give a new one; of a saved one see `from_declearn_state`"
        )
    if isinstance(module, NoiseModule):
        raise TypeError(
            f"{what} draws noise on the host, which would be the same in each step: use GaussianNoiseModule"
        )
    if any(getattr(kind, name) is not getattr(DeclearnModule, name) for name in ("collect_aux_var", "process_aux_var")):
        raise TypeError(f"{what} exchanges auxiliary variables, for which a pure pair has no place")
    try:
        brick = FunctionalizedModule(_inspected(module))
        one, other = (jax.make_jaxpr(lambda gradients: _trial(brick, gradients))(_GRADIENTS) for _ in range(2))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise TypeError(f"{what} does more than arithmetic of Vectors: {type(error).__name__}: {reason}") from error
    if _text(one) != _text(other) or not all(map(np.array_equal, one.consts, other.consts)):
        raise TypeError(f"{what} is another function each time that it is traced: does it draw random numbers?")
    return brick


_GRADIENTS = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}


def _trial(brick: FunctionalizedModule, gradients: PyTree) -> PyTree:
    state = brick.begin_round(brick.init(gradients))
    for _ in range(2):
        gradients, state = brick.update(gradients, state)
    return brick.update(gradients, brick.begin_round(state))


def _text(program: Any) -> str:
    return re.sub("0x[0-9a-f]+", "", str(program))  # where functions lie


def _inspected(module: DeclearnModule[Any]) -> Template:
    """Return a module with the names of the attributes that change in rounds and steps."""
    at_first = dict(_attributes(module))
    became: dict[str, list[Any]] = {}

    def trace(gradients: PyTree) -> None:
        twin, before = copy.deepcopy(module), at_first
        for call in (twin.on_round_start, *2 * [lambda: twin.run(TracedVector.of(gradients))], twin.on_round_start):
            call()
            after = dict(_attributes(twin))
            for name, value in after.items():
                if not _same(value, before.get(name)):
                    became.setdefault(name, []).append(value)
            before = after

    jax.eval_shape(trace, _GRADIENTS)
    shaped = tuple(name for name, values in became.items() if any(isinstance(value, Vector) for value in values))
    counts = tuple(name for name, values in became.items() if all(map(_is_scalar, [at_first.get(name), *values])))
    if others := sorted(became.keys() - {*shaped, *counts}):
        raise TypeError(f"it remembers {others}, which are neither Vectors nor numbers")
    return Template(copy.deepcopy(module), counts, shaped)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, jax.Array) and value.ndim == 0)


def _scalar(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.result_type(value))  # of a type of its own, as that of the next step


def _filled(tree: PyTree, value: float | None) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value or 0, leaf.dtype), tree)


def _same(value: Any, other: Any) -> bool:
    plain = bool | int | float | str | bytes | None
    return value is other or (isinstance(value, plain) and isinstance(other, plain) and value == other)


def _attributes(module: DeclearnModule[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values; of what may change in itself, such as a list or a generator, what pickle makes of it."""
    for name, value in vars(module).items():
        if isinstance(value, DeclearnModule):
            yield from _attributes(value, f"{prefix}{name}.")
        elif isinstance(value, Vector | jax.Array):
            yield f"{prefix}{name}", value
        else:
            try:
                yield f"{prefix}{name}", value if _same(value, copy.copy(value)) else pickle.dumps(value)
            except Exception:  # it holds what is traced, or is a thing of the system
                yield f"{prefix}{name}", value


def _signature(module: DeclearnModule[Any]) -> tuple[Any, ...]:
    """Return what tells a module from others: hashable, where its attributes are."""
    values = vars(module).items()
    return type(module), tuple(
        (name, type(value), _signature(value) if isinstance(value, DeclearnModule) else value) for name, value in values
    )


def _get(module: Any, name: str) -> Any:
    for part in filter(None, name.split(".")):
        module = getattr(module, part)
    return module
