"""The stateful facade of plug-ins: what federated-learning code calls.

It is written once: a brick's author writes pure functions, and none of this.
The state is kept outside of the fields, so that a brick whose facade has run is
still equal to a new one, and may be chained: its pure methods never read it.
"""

import abc
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax

from functional_optimodules.config.plugin import Plugin
from functional_optimodules.contract import Contract
from functional_optimodules.packing.tree import shapes, unpack
from functional_optimodules.stateful.session import Session
from functional_optimodules.types import Json, Params, PyTree, State, Updates
from functional_optimodules.wire.paths import Specs, unwrapped

FACADE = frozenset(
    {
        "setup",
        "run",
        "on_round_start",
        "on_round_end",
        "get_state",
        "set_state",
        "state",
        "reset",
        "save",
        "load",
        "restore",
    }
)
AUX_FACADE = frozenset({"collect_aux_var", "retract_aux_var", "process_aux_var"})
CONFIG = frozenset({"get_config", "from_config", "from_specs", "bare"})


class Stateful(Plugin, kind="stateful"):
    """A plug-in that remembers a state between calls, which is saved, copied and forgotten with it.

    Threads that call it at once take turns. Copies, pickles and spawned processes get a
    state of their own.
    """

    @abc.abstractmethod
    def _begin(self) -> Session:
        """Return a session without a state."""

    @property
    def _session(self) -> Session:
        # Of several threads that come first, all get the session of one.
        return self.__dict__.get("_facade") or self.__dict__.setdefault("_facade", self._begin())

    def on_round_start(self) -> None:
        """Begin a round, also before the first step.

        Raises:
          RuntimeError: if 1000 rounds were begun that wait for the parameters.
        """
        self._session.begin_round()

    def get_state(self) -> dict[str, Json]:
        """Return the state as JSON values: arrays by variable and path, bit by bit."""
        return self._session.save()

    def set_state(self, state: Mapping[str, Json]) -> None:
        """Restore what `get_state` returned, also before the first step.

        Raises:
          KeyError: if a key or a variable is missing or unknown.
          TypeError: if it is no mapping.
          ValueError: if it is the state of another plug-in or of other parameters, an
            array is malformed, a number not finite, or a count negative or of 2**30
            or more. The state stays as it was.
        """
        self._session.load(state)

    @property
    def state(self) -> Any:
        """A copy of the state as a pytree, or `None` before there is one."""
        return self._session.snapshot()

    def reset(self) -> None:
        """Forget the state, as if the plug-in were new."""
        self.__dict__.pop("_facade", None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles carry the state in its JSON form: a copy that shared
        # buffers would lose them to the next step of the original.
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return _restore, (type(self), fields, self.get_state() if "_facade" in self.__dict__ else None)


def _restore(cls: type[Stateful], fields: dict[str, PyTree], state: dict[str, Json] | None) -> Stateful:
    plugin = cls(**fields)
    if state is not None:  # its own, whatever it has come to
        plugin._session.load({**plugin._session.save(), **state}, checked=False)
    return plugin


class Facade(Stateful, Contract[State], kind="facade"):
    """`setup`, `run`, `save` and their kin, over the pure methods of a brick."""

    def _begin(self) -> Session:
        return Session(self.bare())

    def setup(self, params: Params, identity: int | None = None) -> None:
        """Make the state now, where the parameters are known; otherwise the first `run` does.

        Args:
          params: the parameters, a pytree of arrays.
          identity: a number that no other client has. It is folded into the PRNG
            keys of the state, so that clients of one seed draw different noise.

        Raises:
          RuntimeError: if an identity is given and there is a state already.
          ValueError: if there is a state, of other parameters, or the identity is
            no integer in [0, 2**32).
        """
        if identity is not None and (type(identity) is not int or not 0 <= identity < 2**32):
            raise ValueError(f"{type(self).__name__}: identity={identity!r} should be an integer in [0, 2**32)")
        self._session.setup(params, identity)

    def run(self, gradients: Updates, params: Params = None, **extra_args: PyTree) -> PyTree:
        """Transform gradients by one compiled `update`, and keep the new state.

        Args:
          gradients: a pytree of arrays. They are left intact.
          params: the parameters, for bricks that need them, in the same container.
          **extra_args: what else the brick's `update` takes: arrays.

        Returns:
          The transformed gradients, of the same shapes and dtypes.

        Raises:
          TypeError: if an extra argument is a function: those are for `update`.
          ValueError: if the structure, a shape or a dtype is not that of the
            state; the state stays as it was.
          RuntimeError: if called while tracing.
        """
        return self._session.step(gradients, params, extra_args)

    def on_round_end(self, **known: PyTree) -> None:
        """End a client's round, before its messages are collected, where the brick asks for what is known of it.

        Args:
          **known: what `end_round` asks for, such as `delta`, the parameters after the
            round less those before it, and `num_steps`.

        Raises:
          RuntimeError: if there was no step, and so no round, or while tracing.
          TypeError: if the brick asks for something else.
          ValueError: if a tree is not like the parameters. The state stays as it was.
        """
        self._session.end_round(known)

    def save(self, state: PyTree, params: Params) -> dict[str, Json]:
        """Write a state of the pure methods, such as `TrainState.opt_state`, as `get_state` writes the facade's.

        Args:
          state: the state; the facade's own is neither read nor changed.
          params: the parameters that it was made for, or their shapes.
        """
        session = self._begin()
        # The state of `nnx.Optimizer` has other wrappers around its leaves than the parameters.
        session.take(unwrapped(unpack(unwrapped(state))), Specs.of(unwrapped(shapes(params))))
        return session.save()

    def load(self, saved: Mapping[str, Json], params: Params) -> Any:
        """Read a state of the pure methods that `save`, or `get_state`, wrote.

        Of a facade's, a message that is out is taken to have arrived, and rounds
        that wait are begun.

        Args:
          saved: what was written.
          params: the parameters to hang it on, or their shapes, in any container.

        Raises:
          KeyError, TypeError, ValueError: as `set_state` does.
        """
        session = self._begin()
        session.take(None, Specs.of(shapes(params)))
        session.load(saved)
        return session.settled(params)

    def restore(self, optimizer: Any, saved: Mapping[str, Json], model: PyTree) -> None:
        """Put a state that `save`, or `get_state`, wrote into an `nnx.Optimizer`, in place.

        Args:
          optimizer: the `nnx.Optimizer`, whose `tx` is an equal brick.
          saved: what was written.
          model: the `nnx.Module` that it optimizes.

        Raises:
          KeyError, TypeError, ValueError: as `set_state` does.
          TypeError: if it is no `nnx.Optimizer`.
        """
        nnx = sys.modules.get("flax.nnx")
        if nnx is None or not isinstance(optimizer, nnx.Optimizer):
            raise TypeError(
                f"{type(self).__name__}.restore: {type(optimizer).__name__} is no `nnx.Optimizer`: use `load` for the "
                "states of others"
            )
        state = self.load(saved, nnx.as_pure(nnx.state(model, optimizer.wrt)))
        variables = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        leaves = [variable for variable in variables if jax.tree.leaves(variable)]  # and not of a parameter left out
        values = jax.tree.leaves(state)
        if optimizer.tx != self or [leaf.shape for leaf in leaves] != [value.shape for value in values]:
            raise ValueError(
                f"{type(self).__name__}.restore: the `nnx.Optimizer` has another state: its `tx` is {optimizer.tx!r}, "
                f"expected {self!r}, over the same model"
            )
        for variable, value in zip(leaves, values, strict=True):
            variable[...] = value
