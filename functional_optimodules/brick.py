"""Bricks: the contract that an author fills in, with the stateful side that comes for free."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import optax

from functional_optimodules.packing.adapter import adapted
from functional_optimodules.stateful.facade import AUX_FACADE, CONFIG, FACADE, Facade
from functional_optimodules.types import Json, Params, PyTree, State, Updates


class Brick(Facade[State], kind="brick"):
    """A plug-in that transforms updates, pure and stateful.

    `init, update = brick` unpacks it, and it is accepted wherever optax and Flax
    read `.init` and `.update`. The facade of `run` and its kin comes for free.
    """

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter(self.to_optax())

    def to_optax(self) -> optax.GradientTransformationExtraArgs:
        """Return an optax transformation, the same for equal bricks.

        In a chain it gets extra arguments, and a brick that is not `packable` each
        parameter as the model has it; optax drops the former for what is none of its
        own transformations.
        """
        try:
            return _to_optax(self.bare())
        except TypeError:  # hyper-parameters that are being traced cannot be hashed, nor shared
            return _as_optax(self)

    def require(self, params: Params) -> Params:
        """Return the parameters, or raise a `ValueError` where there are none."""
        if params is None:
            run = "weights" if self._kind == "regularizer" else "params"
            raise ValueError(f"{type(self).__name__} needs the parameters: pass `params` to `update`, `{run}` to `run`")
        return params


def _as_optax(brick: Brick) -> optax.GradientTransformationExtraArgs:
    adapter = adapted(brick)
    return optax.GradientTransformationExtraArgs(adapter.init, adapter.update)


_to_optax = functools.lru_cache(maxsize=512)(_as_optax)


class OptiModule(Brick[State], kind="module"):
    """A brick that transforms gradients, and may exchange auxiliary variables with a counterpart."""

    _final: ClassVar[frozenset[str]] = CONFIG | FACADE | AUX_FACADE

    @classmethod
    def _elsewhere(cls, name: str) -> str:
        for place, prefix in ((optax, ""), (optax.contrib, "contrib.")):
            if not name.startswith("_") and inspect.isfunction(getattr(place, name, None)):
                return f"\n    of optax: ['optax', {{'transform': '{prefix}{name}'}}]"
        return ""

    def collect_aux_var(self) -> dict[str, Json] | None:
        """Return a message for the counterpart, in JSON values, or `None`; the same again if asked again.

        A server's may be `{"per_client": {client: message}}`, of which each
        client is handed its own, and sending it begins the round. What the message
        says is committed by the next `run`, `on_round_start` or `process_aux_var`,
        unless it is retracted, or says numbers that are not finite: these are refused
        where they arrive, and count as lost.
        """
        return next(iter(self._session.collect().values()), None)

    def retract_aux_var(self) -> None:
        """Say that the last collected message is known to be lost: it will not be committed.

        Raises:
          RuntimeError: if there is none, or what came since has committed it.
        """
        self._session.retract()

    def process_aux_var(self, aux_var: Mapping[str, Json]) -> None:
        """Take what the counterpart's `collect_aux_var` gave; on a server, a dict of these keyed by client.

        Raises:
          KeyError: if a variable is missing or unknown.
          NotImplementedError: if the module receives nothing.
          TypeError: if a variable is of the wrong kind, or from the wrong side.
          ValueError: if a shape is wrong, a value is not finite, out of its range or above
            `Limits`, there is no client, or one too many. Each names the variable, and on
            a server the client. The state stays as it was.
        """
        if self.receives is None:
            raise NotImplementedError(f"{type(self).__name__} receives no auxiliary variables")
        self._session.process({self.aux_name or self.name: aux_var})


class Regularizer(Brick[State], kind="regularizer"):
    """A brick that adds a penalty's gradient, and needs the parameters for it.

    Its contract is that of a module, without auxiliary variables.
    """

    _final: ClassVar[frozenset[str]] = CONFIG | FACADE

    def run(self, gradients: Updates, weights: Params) -> PyTree:  # type: ignore[override]
        """Add the penalty's gradient by one compiled `update`, and keep the new state.

        Args:
          gradients: a pytree of arrays. They are left intact.
          weights: the parameters, in the same container.

        Returns:
          The regularized gradients, of the same shapes and dtypes.

        Raises:
          ValueError: if the weights are `None`, or the structure, a shape or a
            dtype is not that of the state; the state stays as it was.
          RuntimeError: if called while tracing.
        """
        self.require(weights)
        return super().run(gradients, weights)


def list_optim_modules() -> dict[str, type[OptiModule]]:
    """Return the registered modules by name."""
    return dict(sorted(OptiModule._registry.items()))


def list_optim_regularizers() -> dict[str, type[Regularizer]]:
    """Return the registered regularizers by name."""
    return dict(sorted(Regularizer._registry.items()))
