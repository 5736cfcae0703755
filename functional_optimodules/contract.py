"""The contract of bricks: what an author writes, as pure functions over pytrees.

    Init(params) -> state
    Step(updates, state, params) -> updates, state
    Round(state) -> state;  at its end: End(state, what is known of it) -> state
    Send(state) -> aux;  once delivered: Commit(state) -> state
    Receive(aux, state) -> state
    Forget(state, what a client has given) -> state

Each may be called under `jit`, `vmap`, `scan` and `shard_map`, and reads nothing but
the hyper-parameters and its arguments.
"""

import abc
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple

import jax

from functional_optimodules.aux_var import AuxVar, FromClients, FromServer
from functional_optimodules.config.plugin import Plugin
from functional_optimodules.dependence import params_within, reads_values
from functional_optimodules.random.keys import fold_in_keys, is_key
from functional_optimodules.types import Params, PyTree, State, Updates
from functional_optimodules.wire.paths import ParamsNeeded, Specs

KNOWN: Mapping[str, bool] = {
    "lrate": False,
    "anchor_gradient": True,
    "mean_gradient": True,
    "full_gradient": True,
    "delta": True,
    "num_steps": False,
    "weight": False,
    "examples": False,
    "joined": False,
    "coin": False,
}
"""What a brick may ask for, by name, and whether it is shaped like the parameters.

A brick asks by naming it: keyword-only and without a default, in `update` or `end_round`.
An `Optimizer` knows the `lrate` of the step. A federated round knows the rest:

- in a client's step: `anchor_gradient`, of the same batch at the server's parameters;
  `mean_gradient`, the mean over the round's participants, by their weights, of the
  gradient over all of a client's data at the server's parameters; `coin`, a number in
  [0, 1) that is drawn once a round, the same for all;
- at the end of a client's round, and on the uplink: `delta`, where the parameters went, in
  at least float32; `num_steps`, how many local steps that took; `weight`, how much the
  client counts in the mean; `examples`, how many it has; `full_gradient`, over all its
  data at the server's parameters; `coin`;
- in a server's step: `joined`, how many clients' deltas arrived; `mean_gradient`; `coin`.

All but the shaped ones are float32 scalars, and `num_steps` an int32 one. What no brick
asks for is not computed.
"""


class Asked(NamedTuple):
    """The names of what a brick asks for, in a step and at the end of a round."""

    step: frozenset[str]
    end: frozenset[str]


class Contract(Plugin, Generic[State], kind="contract"):
    """A plug-in that transforms updates by pure methods; a `Brick` has the stateful side too.

    Attributes:
      packable: whether the brick may be given packed trees: it treats elements alike
        wherever they lie, or goes through `map_parameters`. A class says so in its
        own body; one that says nothing gets each parameter as the model has it.
      aux_name: the name that a pair shares, for bricks that exchange auxiliary variables.
      sends: the type of what `collect` returns.
      receives: the type of what `process` takes. A brick that receives what clients
        send is a server's.
      learns: whether a client's `begin_round` takes in what came of its last report: it is
        then called with the parameters of the very next round, also where the client is absent from that.
    """

    packable: ClassVar[bool] = False
    aux_name: ClassVar[str | None] = None
    sends: ClassVar[type[AuxVar] | None] = None
    receives: ClassVar[type[AuxVar] | None] = None
    learns: ClassVar[bool] = False
    _asked: ClassVar[tuple[frozenset[str], ...]] = ()
    _recalled: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What a class says of its methods, it does not say of those that replace them, or that these call.
        cls.packable = vars(cls).get("packable", False)
        if "update" in vars(cls):
            _refuse_optional_arguments(cls)
        cls._asked = tuple(named(method) for method in (cls.update, cls.end_round))
        cls._recalled = named(cls.forget)

    @abc.abstractmethod
    def init(self, params: Params) -> State:
        """Make the state.

        Args:
          params: the parameters, a pytree of arrays.

        Returns:
          A `NamedTuple` of arrays and trees shaped like the parameters, which
          shares no buffer with them.
        """

    @abc.abstractmethod
    def update(
        self, updates: Updates, state: State, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, State]:
        """Take a step.

        Args:
          updates: gradients, or what the brick before made of them. They point
            uphill: only an `Optimizer` multiplies by minus the learning rate.
          state: what `init` or the last step returned.
          params: the parameters, for bricks that need them.
          **extra_args: what other bricks of a chain need. One that this brick needs
            is named, keyword-only and without a default: `*, value, **extra_args`.

        Returns:
          The new updates, of the same dtypes, and the new state.
        """

    def begin_round(self, state: State, params: Params = None) -> State:
        """Return the state at the start of a round: unchanged, or as new if `restarts` says so.

        `params` may be `None`: what needs them then waits for the next `update`.

        Raises:
          ParamsNeeded: a `ValueError`, if it restarts, `init` reads the parameters'
            values, and they are not given. The facade then begins the round with the
            parameters of its next step.
        """
        if not self.restarts():
            return state
        if params is None:
            params = params_within(self.init, state)
            if reads_values(self.init, params):
                raise ParamsNeeded(f"{type(self).__name__}: round_reset restarts from the parameters: pass `params`")
        fresh = self.init(params)
        return jax.tree.map(lambda new, old: new if is_key(old) else new.astype(old.dtype), fresh, state)

    def end_round(self, state: State, **known: PyTree) -> State:
        """Return the state after a client's last local step of a round: unchanged by default.

        What `collect` and `commit` need of `known` is kept in the state: they read
        nothing else.

        Args:
          state: the state.
          **known: what is known of the round, of which a brick names what it asks for,
            keyword-only and without a default: `*, delta, num_steps, **known`. See `KNOWN`.
        """
        return state

    def asks(self) -> Asked:
        """Return the names of what `update` and `end_round` ask for: see `KNOWN`."""
        return Asked(*self._asked)

    def share(self, params: Params, state: State) -> Params:
        """Return the parameters that clients are sent, on a server: its own by default."""
        return params

    def metrics(self, state: State) -> Mapping[str, jax.Array]:
        """Return scalars about the last step, by name, for histories; none by default. Reads only."""
        return {}

    def measure(self, before: Updates, after: Updates, state: State, params: Params = None) -> Mapping[str, jax.Array]:
        """Return scalars about a step, by name, that an `Optimizer` may be told to watch; none by default.

        It is called where one of them is watched, and alone what is watched is computed.

        Args:
          before: what `update` was given.
          after: what it returned.
          state: the state after the step.
          params: the parameters before it, or `None`.
        """
        return {}

    def require_sound(self, state: State) -> None:
        """Raise a `ValueError` for a state from outside that no run should go on from; nothing by default.

        Numbers that are not finite, and counts that no run came to, are refused before.
        """

    def check(self, state: State) -> None:
        """Raise a `FloatingPointError` where a state says that training has failed; nothing by default.

        It runs between steps, on the host: a compiled program cannot raise an error.
        """

    def sharers(self, specs: Specs) -> tuple[Hashable, ...] | None:
        """Return a label for each parameter, where only those of one label may share a buffer; `None` if all may."""
        return None

    def restarts(self) -> bool:
        """Whether each round starts from the state that `init` makes: what a field `round_reset` says."""
        return bool(getattr(self, "round_reset", False))

    def collect(self, state: State) -> AuxVar | Mapping[str, AuxVar] | None:
        """Return what the counterpart should get, or `None`. Reads only."""
        return None

    def commit(self, state: State) -> State:
        """Return what follows once the collected variables are known to have arrived."""
        return state

    def process(self, aux: Any, state: State) -> State:
        """Return the state after receiving what the counterpart collected; reduced over clients on the server.

        Raises:
          NotImplementedError: if the brick receives nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} receives no auxiliary variables")

    def forget(self, state: State, **given: Any) -> State:
        """Return a server's state without what one client has given since it joined: unchanged by default.

        For a server whose state is a sum over clients of what each still has, and where a client
        may lose that: it joins anew, as if it never had taken part.

        Args:
          state: the state.
          **given: the sums over the rounds in which the client's report was taken in, of which a brick
            names what it needs, keyword-only and without a default: `delta`, of its deltas, in
            at least float32, and `aux`, of its auxiliary variables.
        """
        return state

    def recalls(self) -> frozenset[str]:
        """Return the names of what `forget` needs: `aux`, `delta`."""
        return self._recalled

    def fold_in(self, state: State, integer: int | jax.Array) -> State:
        """Fold an integer into every PRNG key of a state, so that equal bricks draw different numbers."""
        return fold_in_keys(state, integer)

    def state_name(self) -> str:
        """Return the name that saved states bear, for another brick to refuse them."""
        return self.name

    def channels(self) -> "Mapping[str, Contract]":
        """Return the bricks that exchange auxiliary variables, by the name of these."""
        return {self.aux_name or self.name: self} if self.sends or self.receives else {}

    def clients(self) -> int | None:
        """How many clients there are, for a server's brick that knows: what a field `num_clients` says."""
        return getattr(self, "num_clients", None)

    def serves(self) -> bool:
        """Whether it is a server's: it receives what clients send, or sends what servers do."""
        pairs = [(each.sends or AuxVar, each.receives or AuxVar) for each in self.channels().values()]
        return any(issubclass(sends, FromServer) or issubclass(receives, FromClients) for sends, receives in pairs)


def named(method: Callable[..., Any]) -> frozenset[str]:
    """Return the keyword-only arguments of a method: how it asks for what is known."""
    parameters = inspect.signature(method).parameters.values()
    return frozenset(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)


def _refuse_optional_arguments(cls: type[Contract]) -> None:
    for name, parameter in list(inspect.signature(cls.update).parameters.items())[4:]:
        if parameter.default is not inspect.Parameter.empty:
            raise TypeError(
                f"{cls.__name__}.update: the extra argument {name}={parameter.default!r} has a default, which would be "
                "taken in silence where a wrapper such as `optax.chain` drops extra arguments\n"
                f"    wrong:  def update(self, updates, state, params=None, *, {name}={parameter.default!r}, **extra)\n"
                f"    right:  def update(self, updates, state, params=None, *, {name}, **extra)"
            )
