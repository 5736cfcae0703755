"""What the facade of a plug-in remembers between calls, and how it changes.

Every method either succeeds or leaves the session as it was: what it computes is
remembered at its end, all at once. A step donates the session's own state and
nothing else.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import AuxVar, FromClients
from functional_optimodules.contract import KNOWN, Contract
from functional_optimodules.numerics import all_finite
from functional_optimodules.packing.adapter import adapted, fitted
from functional_optimodules.packing.tree import shapes, unpack
from functional_optimodules.stateful import exchange
from functional_optimodules.stateful.alone import alone
from functional_optimodules.stateful.compiled import Compiled, compiled, layout_of, starts_from_values
from functional_optimodules.stateful.leaves import NUMBERS, any_traced, leaf_types, traced
from functional_optimodules.stateful.placement import Homes, is_sharded, put_beside
from functional_optimodules.stateful.plausible import require_plausible
from functional_optimodules.types import Json, Params, PyTree, Updates
from functional_optimodules.wire.paths import ParamsNeeded, Specs, by_path


class Fit(NamedTuple):
    """What a state was made for.

    Attributes:
      specs: the parameters' container, paths, shapes and dtypes.
      compiled: the brick as it acts on them.
    """

    specs: Specs
    compiled: Compiled


class Memory(NamedTuple):
    """All that is remembered.

    Attributes:
      fit: what the state was made for, or `None` while nothing is known of the parameters.
      state: the brick's state, in the form that it holds.
      rounds_begun: how many rounds were begun that wait for a state, or for the
        parameters, and so for the next step.
      message_out: whether a message was collected that is neither committed nor retracted.
      clients: on a server, the clients heard of, in order; their place is their index.
      round: on a server, whether the round of the next step was begun: by its caller,
        or by the broadcast that was sent; on a client whose brick asks for what is known
        at a round's end, whether a step was taken since the last one.
    """

    fit: Fit | None = None
    state: PyTree = None
    rounds_begun: int = 0
    message_out: bool = False
    clients: tuple[str, ...] = ()
    round: Literal["begun", "sent", "open"] | None = None

    def committed(self) -> PyTree:
        """Return the state once what was sent has arrived."""
        return self.fit.compiled.commit(self.state) if self.fit is not None and self.message_out else self.state


class Session:
    """The stateful side of one plug-in. Threads that call it at once take turns.

    Args:
      brick: the plug-in as a brick, without a facade's state.
      owner: how errors name it; by its class if not given.
      pure: what errors say to use in its place under a trace.

    Attributes:
      memory: what is remembered. It is replaced, in one place, and never changed.
    """

    def __init__(self, brick: Contract, owner: str = "", pure: str = "`update(updates, state, params)`") -> None:
        self.brick = brick
        self.owner = owner or type(brick).__name__
        self.pure = pure
        self.asked = brick.asks().end
        self.memory = Memory()
        self._lock = threading.RLock()
        try:
            self.plain: Compiled = compiled(adapted(brick), None)
        except TypeError as error:
            raise TypeError(
                f"{self.owner}: the facade needs hyper-parameters that are hashable and not traced ({error}): "
                f"use the pure {pure}"
            ) from error

    def _remember(self, memory: Memory, output: PyTree = None) -> None:
        # Whatever a compiled function makes under a trace is traced: one leaf tells, and the state has fewer.
        leaves = jax.tree.leaves(memory.state)
        if traced(leaves if output is None else (leaves or jax.tree.leaves(output))[:1]):
            raise self._under_trace()
        self.memory = memory

    def _under_trace(self) -> RuntimeError:
        return RuntimeError(
            f"{self.owner}: the facade keeps its state outside of JAX and cannot be called under jit, grad, vmap or "
            f"scan: use the pure {self.pure} there"
        )

    def _hung(self, memory: Memory, like: PyTree, params: Params, identity: int | None = None) -> Memory:
        """Return the memory with the state over a container like the parameters', made if there is none."""
        if traced(like):
            raise self._under_trace()
        specs = Specs.of(shapes(like))
        adapter, homes = fitted(self.brick, like), None
        sharded = any(map(is_sharded, jax.tree.leaves(like)))
        if memory.fit is None:
            if params is None and starts_from_values(self.brick, specs):
                raise ValueError(f"{self.owner}: the state starts from the parameters' values: pass `params`")
            if not sharded:
                new = compiled(adapter, None)
                return memory._replace(fit=Fit(specs, new), state=new.init(specs, like, identity))
            state = self.plain.adapter.portable(self.plain.init(specs, unpack(like), identity))
        else:
            memory.fit.specs.require_same(specs, f"{self.owner}: the tree of parameters")
            if memory.fit.specs.hung and memory.fit.specs != specs:
                raise ValueError(f"{self.owner}: the parameters are in another container than before: {specs.treedef}")
            state = memory.fit.compiled.adapter.portable(memory.state)
            state = layout_of(self.brick, specs.flat()).rehang(state, memory.fit.specs, specs)
        if sharded:
            state = put_beside(unpack(like), specs, layout_of(self.brick, specs.flat()), state)
        state = adapter.adopt(state, adapter.model(like))
        if sharded:
            homes = Homes.of(like, state)
        return memory._replace(fit=Fit(specs, compiled(adapter, homes)), state=state)

    def _settled(self, memory: Memory, params: Params) -> Memory:
        """Return the memory with what is outstanding done: what was sent is committed, rounds that wait are begun."""
        if memory.fit is None or not (memory.message_out or memory.rounds_begun):
            return memory
        state = memory.committed()
        for _ in range(memory.rounds_begun):
            state = memory.fit.compiled.begin_round(state, params)
        return memory._replace(state=state, rounds_begun=0, message_out=False)

    @alone
    def setup(self, params: Params, identity: int | None = None) -> None:
        """Make the state, or hang the one that there is on the parameters."""
        if self.memory.fit is not None and identity is not None:
            raise RuntimeError(f"{self.owner} has a state already: an identity is folded in when it is made")
        memory = self._hung(self.memory, params, params, identity)
        begun = self._settled(memory._replace(message_out=False), params)
        self._remember(begun._replace(message_out=memory.message_out))

    @alone
    def step(self, gradients: Updates, params: Params, extra_args: dict[str, PyTree]) -> PyTree:
        """Run `update` and keep its state."""
        like = params if params is not None else gradients
        return self._donate(lambda new: new.step, like, params, gradients, params, extra_args)

    @alone
    def apply(self, params: Params, gradients: Updates, extra_args: dict[str, PyTree], donate: bool) -> Params:
        """Run `update`, keep its state, and return the new parameters."""
        method: Callable[[Compiled], Any] = lambda new: new.apply_donated if donate else new.apply  # noqa: E731
        return self._donate(method, params, params, params, gradients, extra_args)

    def _donate(self, method: Callable[[Compiled], Any], like: PyTree, params: Params, *args: PyTree) -> PyTree:
        # Under grad or vmap any one leaf may be the traced one, and the call would donate the state.
        kinds = leaf_types(args)
        if any_traced(kinds):
            raise self._under_trace()
        if kinds & NUMBERS:
            args = jax.tree.map(_as_array, args)
        memory = self.memory
        if memory.fit is None or not memory.fit.specs.hung:
            memory = self._hung(memory, like, params)
        assert memory.fit is not None
        if not all(map(memory.fit.compiled.adapter.fits, args)):
            misfit = next(tree for tree in args if not memory.fit.compiled.adapter.fits(tree))
            memory = self._hung(memory, misfit, params)
        memory = self._settled(memory, params)
        assert memory.fit is not None
        specs, new = memory.fit
        new.adapter.brick.check(memory.state)
        try:
            state, output = method(new)(specs, memory.state, *args)
        except Exception as error:
            if traced(memory.state):
                raise self._under_trace() from error
            self._require_arrays(args[-1], error)
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(memory.state)):
                raise RuntimeError(
                    f"{self.owner}: the device failed in the middle of a step, and the state given to it is lost: "
                    "restore a saved one after `reset()`"
                ) from error
            raise
        # Who begins rounds himself may take several steps in one: only a round that a message began ends with a step.
        begun = "open" if self.asked else None if memory.round == "sent" else memory.round
        self._remember(Memory(memory.fit, state, clients=memory.clients, round=begun), output)
        return output

    def _require_arrays(self, extra_args: dict[str, PyTree], error: Exception) -> None:
        for name, value in extra_args.items():
            if any(map(callable, jax.tree.leaves(value))):
                raise TypeError(
                    f"{self.owner}: the extra argument {name!r} is a function, which a compiled step cannot be given: "
                    "use the pure `update(updates, state, params, ...)`, inside of `jax.jit`"
                ) from error

    @alone
    def begin_round(self) -> None:
        """Begin a round now, or remember that one was begun."""
        memory = self.memory
        if memory.round == "sent":  # by the broadcast: it is this round
            self._remember(memory._replace(round="begun"))
        else:
            self._remember(self._begun(memory)._replace(round="begun" if self.brick.serves() else None))

    @alone
    def end_round(self, known: dict[str, PyTree]) -> None:
        """Tell the brick what is known of the round at its end."""
        if missing := sorted(self.asked - known.keys()):
            raise TypeError(f"{self.owner}: at the end of a round it asks for {', '.join(map(repr, missing))}")
        memory = self.memory
        if memory.fit is None or (self.asked and memory.round != "open"):
            raise RuntimeError(f"{self.owner}: there was no step yet, and so no round to end")
        specs, new = memory.fit
        for name in filter(KNOWN.get, known):
            specs.require_shapes(unpack(known[name]), f"{self.owner}: {name}")
        told = {name: known[name] for name in self.asked}
        if not specs.hung:  # restored since the last step, and so over paths
            told = {name: by_path(unpack(tree)) if KNOWN[name] else tree for name, tree in told.items()}
        state = new.end_round(memory.committed(), told)
        self._remember(memory._replace(state=state, message_out=False, round=None))

    @alone
    def share(self, params: Params) -> Params:
        """Return the parameters that clients are sent."""
        memory = self._hung(self.memory, params, params)
        assert memory.fit is not None
        shared = memory.fit.compiled.share(params, memory.state)
        self._remember(memory, shared)
        return shared

    def _begun(self, memory: Memory) -> Memory:
        if memory.rounds_begun == exchange.MOST_ROUNDS:
            raise RuntimeError(
                f"{self.owner}: {memory.rounds_begun} rounds were begun that wait for the parameters: call "
                "`setup(params)` first"
            )
        if memory.fit is None:
            return memory._replace(rounds_begun=memory.rounds_begun + 1)
        state = memory.committed()
        try:
            begun, waiting = memory.fit.compiled.begin_round(state, None), memory.rounds_begun
        except ParamsNeeded:
            begun, waiting = state, memory.rounds_begun + 1
        return memory._replace(state=begun, rounds_begun=waiting, message_out=False)

    def _opened(self, memory: Memory) -> Memory:
        """Return a server's memory in the round of its next step, which the first message to or from it begins."""
        if memory.fit is None or memory.round is not None or not self.brick.serves():
            return memory
        return self._begun(memory)._replace(round="sent")

    @alone
    def collect(self) -> dict[str, Json]:
        """Return the messages by `aux_name`; what they say is committed later."""
        # A client of another server tells what its last round came to, before a new one begins.
        if self.memory.round == "open":
            known = ", ".join(f"{name}=..." for name in sorted(self.asked))
            raise RuntimeError(
                f"{self.owner}: the round has not ended: call `on_round_end({known})` after its last step"
            )
        reports = any(issubclass(each.sends or AuxVar, FromClients) for each in self.brick.channels().values())
        memory = self.memory if reports else self._opened(self.memory)
        if memory.fit is None:
            return {}
        specs, new = memory.fit
        auxes = new.collect(memory.state)
        if traced(auxes):
            raise self._under_trace()
        sent = {name: aux.map_shaped(new.adapter.free) for name, aux in jax.device_get(auxes).items()}
        messages = exchange.outgoing(sent, specs, memory.clients)
        # Who was told of a round's end has something to commit, also where it has nothing to say.
        out = memory.message_out or bool(messages) or bool(self.asked)
        self._remember(memory._replace(message_out=out))
        return messages

    @alone
    def retract(self) -> None:
        """Forget that a message is out."""
        memory = self.memory
        sends = any(each.sends for each in self.brick.channels().values())
        if sends and memory.fit is not None and not memory.message_out:
            raise RuntimeError(
                f"{self.owner}: there is no message to retract: none was collected, or a step, a round or a message "
                "since then has committed it"
            )
        self._remember(memory._replace(message_out=False))

    @alone
    def process(self, messages: Mapping[str, Json]) -> None:
        """Take messages by `aux_name`."""
        memory = self.memory
        received = exchange.incoming(self.brick, messages, memory.fit and memory.fit.specs, memory.clients)
        if received is not None:
            self.receive(received)

    @alone
    def receive(self, received: exchange.Received) -> None:
        """Take what messages came to."""
        memory = self.memory
        # The state is made after the messages were read: shapes that their bytes do not bear out get no memory.
        if memory.fit is None:
            made = self.plain.init_from_specs(received.specs)
            memory = self._settled(memory._replace(fit=Fit(received.specs, self.plain), state=made), None)
        memory = self._opened(memory)
        before, fit = memory.committed(), memory.fit or Fit(received.specs, self.plain)
        state = fit.compiled.process(received.auxes, before)
        if received.senders and not traced(state) and not all_finite(state) and all_finite(before):
            who = ", ".join(received.senders)
            raise ValueError(f"{self.owner}: what {who} sent makes the state infinite, or not a number")
        self._remember(memory._replace(state=state, message_out=False, clients=received.clients))

    def existing(self) -> PyTree:
        """Return the state.

        Raises:
          ValueError: if there is none yet.
        """
        if self.memory.fit is None:
            raise ValueError(f"{self.owner}: there is no state yet: call `setup(params)` first")
        return self.memory.state

    @alone
    def change(self, function: Callable[[PyTree], PyTree]) -> None:
        """Replace the state by what a function makes of it."""
        self._remember(self.memory._replace(state=function(self.existing())))

    @alone
    def snapshot(self) -> PyTree:
        """Return a copy of the state, which later steps do not touch."""
        fit, state = self.memory.fit, jax.tree.map(jnp.copy, self.memory.state)
        return state if fit is None else fit.compiled.adapter.portable(state)

    def take(self, state: PyTree, specs: Specs) -> None:
        """Remember a state of the pure methods, over the parameters' own container; `None` for their specs alone."""
        self._remember(Memory(Fit(specs, self.plain), state))

    def settled(self, params: Params) -> PyTree:
        """Return the state of the pure methods, with what is outstanding done, over parameters or their shapes."""
        memory = self.memory
        if memory.fit is None:
            raise ValueError(f"{self.owner}: there is nothing to load: no parameters were known when it was saved")
        known = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
        state = self._settled(memory, unpack(params) if known else None).state
        adapter = adapted(self.brick, getattr(params, "packing", None))
        return adapter.adopt(state, adapter.model(params))

    @alone
    def save(self) -> dict[str, Json]:
        """Return everything that is remembered as JSON values."""
        memory, variables = self.memory, None
        if memory.fit is not None:
            # On the host, where nothing is to be compiled for it.
            state = memory.fit.compiled.adapter.portable(jax.device_get(memory.state))
            variables = layout_of(self.brick, memory.fit.specs.flat()).encode(state, memory.fit.specs)
        return {
            "name": self.brick.state_name(),
            "params": None if memory.fit is None else memory.fit.specs.to_json(),
            "variables": variables,
            "rounds_begun": memory.rounds_begun,
            "message_out": memory.message_out,
            "clients": list(memory.clients),
            **({} if memory.round is None else {"round": memory.round}),
        }

    @alone
    def load(self, saved: Json, checked: bool = True) -> None:
        """Restore what `save` returned; of one's own, without a check of the values."""
        fit, state = self.memory.fit, None
        found, life = exchange.read_life(saved, self.brick, self.owner, fit and fit.specs)
        if found is None:
            fit = None
        else:
            fit = fit or Fit(found, self.plain)
            fit.specs.require_same(found, f"{self.owner}: the state")
            layout = layout_of(self.brick, fit.specs.flat())
            state = layout.decode(saved["variables"], fit.specs, self.owner)
            if traced(jax.tree.leaves(state)[:1]):
                raise self._under_trace()
            if checked:
                require_plausible(self.plain, layout, state, fit.specs, self.owner)
                self.brick.require_sound(state)
            if self.memory.state is not None:
                state = fit.compiled.adapter.adopt(state, self.memory.state)
                state = jax.tree.map(_beside, state, self.memory.state)
        self._remember(Memory(fit, state, **life))


def _beside(new: jax.Array, old: jax.Array) -> jax.Array:
    return new if new.sharding == old.sharding else jax.device_put(new, old.sharding)


def _as_array(leaf: Any) -> Any:
    # A number would be traced again where there was an array, as it promotes otherwise.
    return jnp.array(leaf, jnp.result_type(leaf)) if type(leaf) in NUMBERS else leaf
