"""The stateful facade of bricks: what federated-learning code calls.

It is written once: a brick's author writes pure functions, and none of this.
The state is kept outside of the fields, so that a brick whose facade has run is
still equal to a new one, and may be chained: its pure methods never read it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from functional_optimodules.core.compiled import Form
from functional_optimodules.core.packing import is_packed, unpack
from functional_optimodules.core.paths import Specs, unwrapped
from functional_optimodules.core.plugin import Plugin
from functional_optimodules.core.session import Session

FACADE = frozenset({"setup", "run", "on_round_start", "get_state", "set_state", "state", "reset", "save", "load"})
AUX_FACADE = frozenset({"collect_aux_var", "retract_aux_var", "process_aux_var"})
CONFIG = frozenset({"get_config", "from_config", "from_specs", "bare"})


class Facade(Plugin, kind="facade"):
    """`setup`, `run`, `get_state` and their kin, over the pure methods of a brick."""

    @property
    def _session(self) -> Session:
        session = self.__dict__.get("_facade")
        if session is None:
            session = Session(self.bare())
            object.__setattr__(self, "_facade", session)
        return session

    def state_name(self) -> str:
        """Return the name that saved states bear, for another plug-in to refuse them."""
        return self.name

    def setup(self, params: Any, identity: int | None = None) -> None:
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

    def run(self, gradients: Any, params: Any = None, **extra_args: Any) -> Any:
        """Transform gradients by one compiled `update`, and keep the new state.

        Args:
          gradients: a pytree of arrays. They are left intact.
          params: the parameters, for bricks that need them, in the same container.
          **extra_args: what else the brick's `update` takes: arrays.

        Returns:
          The transformed gradients, of the same shapes and dtypes.

        Raises:
          ValueError: if the structure, a shape or a dtype is not that of the
            state; the state stays as it was.
          RuntimeError: if called while tracing.
        """
        return self._session.step(gradients, params, extra_args)

    def on_round_start(self) -> None:
        """Begin a round, also before the first `run`."""
        self._session.begin_round()

    def get_state(self) -> dict[str, Any]:
        """Return the state as JSON values: arrays by variable and path, bit by bit."""
        return self._session.save()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned, also before the first `run`.

        Raises:
          KeyError: if a key or a variable is missing or unknown.
          TypeError: if it is no mapping.
          ValueError: if it is the state of another plug-in or of other
            parameters, or an array is malformed. The state stays as it was.
        """
        self._session.load(state)

    def save(self, state: Any, params: Any) -> dict[str, Any]:
        """Write a state of the pure methods, such as `TrainState.opt_state`, as `get_state` writes the facade's.

        Args:
          state: the state; the facade's own is neither read nor changed.
          params: the parameters that it was made for, or their shapes.
        """
        session = Session(self.bare())
        # The state of `nnx.Optimizer` has other wrappers around its leaves than the parameters.
        session.state, session.form = unwrapped(unpack(state)), Form(Specs.of(unwrapped(unpack(params))))
        return session.save()

    def load(self, saved: Mapping[str, Any], params: Any) -> Any:
        """Read a state of the pure methods that `save`, or `get_state`, wrote.

        Of a facade's, a message that is out is taken to have arrived, and rounds
        that wait are begun.

        Args:
          saved: what was written.
          params: the parameters to hang it on, or their shapes, in any container.

        Raises:
          KeyError, TypeError, ValueError: as `set_state` does.
        """
        session = Session(self.bare())
        session.form = Form(Specs.of(params.shapes() if is_packed(params) else params))
        session.load(saved)
        if session.form is None:
            raise ValueError(
                f"{type(self).__name__}: there is nothing to load: no parameters were known when it was saved"
            )
        # A pure state does not remember that a message is out: it is taken to have arrived.
        return session.settled(params)

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


def _restore(cls: type[Facade], fields: dict[str, Any], state: dict[str, Any] | None) -> Facade:
    brick = cls(**fields)
    if state is not None:
        brick.set_state(state)
    return brick
