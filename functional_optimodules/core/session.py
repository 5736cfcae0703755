"""What the facade of a brick remembers between calls, and how it changes.

Every method either succeeds or leaves the session as it was: what it computes
is assigned at its end. A step donates the session's own state and nothing else.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functional_optimodules.core.aux_var import AuxVar, FromServer
from functional_optimodules.core.compiled import Compiled, Form, compiled
from functional_optimodules.core.encoding import is_sharded
from functional_optimodules.core.fields import nearest, require_keys
from functional_optimodules.core.leaves import NUMBERS, any_traced, leaf_types, traced
from functional_optimodules.core.messages import decode_message, encode_message, open_envelopes
from functional_optimodules.core.numerics import is_finite
from functional_optimodules.core.packed import automatic
from functional_optimodules.core.packing import is_packed, unpack
from functional_optimodules.core.paths import ParamsNeeded, Specs, specs_from_json

# Rounds begun before the first step are replayed at it: a number read from a file must not hang it.
_MOST_ROUNDS = 10**6
_STATE_KEYS = ("name", "params", "variables", "rounds_begun", "message_out", "clients")


class Session:
    """The stateful side of one brick.

    Attributes:
      state: the brick's state, or `None` while nothing is known of the parameters.
      form: the parameters' specs, known when the state is, how both are packed, and
        where they lie on a mesh.
      rounds_begun: how many rounds were begun that wait for a state, or for the
        parameters, and so for the next step.
      message_out: whether a message was collected that is neither committed nor retracted.
      clients: on a server, the clients heard of, in order; their place is their index.
    """

    def __init__(self, brick: Any) -> None:
        self.brick = brick
        self.owner = type(brick).__name__
        try:
            self.compiled: Compiled = compiled(brick)
        except TypeError as error:
            raise TypeError(
                f"{self.owner}: the facade needs hyper-parameters that are hashable and not traced ({error}): "
                "use the pure `update(updates, state, params)`"
            ) from error
        self.state: Any = None
        self.form: Form | None = None
        self.rounds_begun = 0
        self.message_out = False
        self.clients: tuple[str, ...] = ()

    @property
    def specs(self) -> Specs | None:
        """The parameters' paths, shapes and dtypes, known when the state is."""
        return None if self.form is None else self.form.specs

    def _assign(self, state: Any, form: Form, rounds_begun: int = 0, output: Any = None) -> None:
        # Whatever a compiled function makes under a trace is traced: one leaf tells, and the state has fewer.
        if traced(state if output is None else (jax.tree.leaves(state) or jax.tree.leaves(output))[:1]):
            raise self._under_trace()
        self.state, self.form = form.homed(state), form
        self.rounds_begun, self.message_out = rounds_begun, False

    def _committed(self, state: Any) -> Any:
        return self.compiled.commit(state) if self.message_out else state

    def _on(self, like: Any, params: Any, identity: int | None = None) -> tuple[Any, Form]:
        """Return the state over a container like the parameters', made if there is none, and its form."""
        if traced(like):
            raise self._under_trace()
        packing = like.packing if is_packed(like) else automatic(like)
        specs = Specs.of(like.shapes() if is_packed(like) else like)
        sharded = any(map(is_sharded, jax.tree.leaves(like)))
        if self.specs is None:
            if params is None and self.compiled.starts_from_values(specs):
                raise ValueError(f"{self.owner}: the state starts from the parameters' values: pass `params`")
            if packing is not None and not sharded:
                return self.compiled.init_packed(packing, like, identity), Form(specs, packing)
            like = unpack(like)
            state = self.compiled.init(like, identity)
        else:
            self.specs.require_same(specs, f"{self.owner}: the tree of parameters")
            if self.specs.hung and self.specs != specs:
                raise ValueError(f"{self.owner}: the parameters are in another container than before: {specs.treedef}")
            state = self.compiled.layout(specs.flat()).rehang(unpack(self.state), self.specs, specs)
        if sharded:
            like = unpack(like)
            state = self.compiled.layout(specs.flat()).place(state, specs, like)
        state = state if packing is None else self.compiled.pack(packing, state)
        return state, Form.of(specs, packing, like, state)

    def _begun(self, state: Any, params: Any) -> Any:
        for _ in range(self.rounds_begun):
            state = self.compiled.begin_round(state, params)
        return state

    def setup(self, params: Any, identity: int | None) -> None:
        """Make the state, or hang the one that there is on the parameters."""
        if self.specs is not None and identity is not None:
            raise RuntimeError(f"{self.owner} has a state already: an identity is folded in when it is made")
        out = self.message_out
        state, form = self._on(params, params, identity)
        self._assign(self._begun(state, params), form)
        self.message_out = out

    def step(self, gradients: Any, params: Any, extra_args: dict[str, Any]) -> Any:
        """Run `update` and keep its state."""
        like = params if params is not None else gradients
        return self._donate(self.compiled.step, like, params, gradients, params, extra_args)

    def apply(self, params: Any, gradients: Any, extra_args: dict[str, Any], donate: bool) -> Any:
        """Run `update`, keep its state, and return the new parameters."""
        function = self.compiled.apply_donated if donate else self.compiled.apply
        return self._donate(function, params, params, params, gradients, extra_args)

    def _donate(self, function: Any, like: Any, params: Any, *args: Any) -> Any:
        # Under grad or vmap any one leaf may be the traced one, and the call would donate the state.
        kinds = leaf_types(args)
        if any_traced(kinds):
            raise self._under_trace()
        if kinds & NUMBERS:
            args = jax.tree.map(_as_array, args)
        if self.form is not None and self.form.specs.hung:
            state, form = self.state, self.form
        else:
            state, form = self._on(like, params)
        if self.message_out or self.rounds_begun:
            state = form.homed(self._begun(self._committed(state), params))
        packing = next((tree.packing for tree in args if is_packed(tree)), form.packing)
        if packing is not None and packing != form.packing:
            form.specs.require_tree(packing.model().shapes(), f"{self.owner}: the tree of what is packed")
            state = self.compiled.pack(packing, state)
            form = form.repacked(packing, state)
        try:
            new, output = function(form, state, *args)
        except Exception as error:
            if traced(state):
                raise self._under_trace() from error
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                raise RuntimeError(
                    f"{self.owner}: the device failed in the middle of a step, and the state given to it is lost: "
                    "restore a saved one after `reset()`"
                ) from error
            raise
        self._assign(new, form, output=output)
        return output

    def _under_trace(self) -> RuntimeError:
        return RuntimeError(
            f"{self.owner}: the facade keeps its state outside of JAX and cannot be called under jit, grad, vmap or "
            "scan: use the pure `update(updates, state, params)` there"
        )

    def begin_round(self) -> None:
        """Begin a round now, or remember that one was begun."""
        if self.form is None:
            self.rounds_begun += 1
        else:
            state = self._committed(self.state)
            try:
                self._assign(self.compiled.begin_round(state, None), self.form, self.rounds_begun)
            except ParamsNeeded:
                self._assign(state, self.form, self.rounds_begun + 1)

    def collect(self) -> dict[str, Any]:
        """Return the messages by `aux_name`; what they say is committed later."""
        if self.specs is None:
            return {}
        specs = self.specs
        auxes = self.compiled.collect(self.state)
        if traced(auxes):
            raise self._under_trace()
        messages = {name: self._encode(unpack(aux), name, specs) for name, aux in jax.device_get(auxes).items()}
        self.message_out = self.message_out or bool(messages)
        return messages

    def _encode(self, aux: AuxVar, name: str, specs: Specs) -> dict[str, Any]:
        sends = self.brick.channels()[name].sends
        if type(aux) is not sends:
            declared = "nothing" if sends is None else sends.__name__
            raise TypeError(f"{self.owner}.collect returned {type(aux).__name__}, and `sends` declares {declared}")
        if isinstance(aux, FromServer) and any("per-client" in marks for marks in aux.variables().values()):
            own = {client: aux.narrow(index) for index, client in enumerate(self.clients)}
            return {"per_client": {client: encode_message(mine, name, specs) for client, mine in own.items()}}
        return encode_message(aux, name, specs)

    def retract(self) -> None:
        """Forget that a message is out."""
        self.message_out = False

    def process(self, messages: Mapping[str, Any]) -> None:
        """Take messages by `aux_name`."""
        channels = self.brick.channels()
        if not isinstance(messages, Mapping):
            raise TypeError(
                f"{self.owner}: auxiliary variables are a mapping by name, as `collect_aux_var` gives, "
                f"not {type(messages).__name__}"
            )
        for name in messages:
            if name not in channels:
                raise KeyError(
                    f"{self.owner}: no module takes auxiliary variables named {name!r}: {nearest(name, channels)}"
                )
        if not messages:
            return
        opened = {
            name: open_envelopes(payload, name, channels[name].receives, self.owner)
            for name, payload in messages.items()
        }
        envelopes = [envelope for each in opened.values() for envelope in each]
        specs = self.specs or envelopes[0].specs
        for envelope in envelopes:
            specs.require_same(envelope.specs, envelope.what)
        clients = self.clients
        auxes = {}
        for name, each in opened.items():
            with jax.ensure_compile_time_eval():  # under a trace, what is refused is the call, below
                decoded = {e.client: decode_message(e, channels[name].receives, specs) for e in each}
                clients += tuple(who for who in decoded if who is not None and who not in clients)
                auxes[name] = self._reduce(decoded, clients, channels[name])
        # The state is made after the messages were read: shapes that their bytes do not bear out get no memory.
        if self.specs is not None:
            state = self._committed(self.state)
        else:
            state = self._begun(self.compiled.init_from_specs(specs), None)
        new = self.compiled.process(auxes, state)
        senders = sorted({envelope.client for envelope in envelopes if envelope.client is not None})
        if senders and not traced(new) and is_finite(state) and not is_finite(new):
            raise ValueError(f"{self.owner}: what {', '.join(senders)} sent makes the state infinite, or not a number")
        self._assign(new, self.form or Form(specs), 0 if self.form is None else self.rounds_begun)
        self.clients = clients

    def _reduce(self, decoded: dict[str | None, Any], clients: tuple[str, ...], module: Any) -> AuxVar:
        if None in decoded:
            return decoded[None]
        wide = any("per-client" in marks for marks in module.receives.variables().values())
        total = getattr(module, "num_clients", None)
        if wide and total is None:
            raise ValueError(f"{self.owner}: {type(module).__name__} needs `num_clients` for what it keeps per client")
        if total is not None and len(clients) > total:
            raise ValueError(f"{self.owner}: num_clients={total} is less than the {len(clients)} clients heard of")
        reduced: Any = None
        for client, aux in decoded.items():
            aux = aux.widen(clients.index(client), total) if wide else aux
            reduced = aux if reduced is None else _merge(reduced, aux)
        for variable in reduced.variables():
            if not is_finite(getattr(reduced, variable)):
                raise ValueError(f"{self.owner}: variable {variable!r}, reduced over clients, is not finite any more")
        return reduced

    def settled(self, params: Any) -> Any:
        """Return the state with what is outstanding done."""
        like = params if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)) else None
        state = self._begun(self._committed(self.state), like)
        return self.compiled.pack(params.packing, state) if is_packed(params) else state

    def snapshot(self) -> Any:
        """Return a copy of the state, which later steps do not touch."""
        return unpack(jax.tree.map(jnp.copy, self.state))

    def save(self) -> dict[str, Any]:
        """Return everything that is remembered as JSON values."""
        specs, variables = self.specs, None
        if specs is not None:
            # Unpacked on the host, where nothing is to be compiled for it.
            packed = self.form is not None and self.form.packing is not None
            state = unpack(jax.device_get(self.state)) if packed else self.state
            variables = self.compiled.layout(specs.flat()).encode(state, specs)
        return {
            "name": self.brick.state_name(),
            "params": None if specs is None else specs.to_json(),
            "variables": variables,
            "rounds_begun": self.rounds_begun,
            "message_out": self.message_out,
            "clients": list(self.clients),
        }

    def load(self, saved: Any) -> None:
        """Restore what `save` returned."""
        if not isinstance(saved, Mapping):
            raise TypeError(f"{self.owner}: a state is a mapping, not {type(saved).__name__}")
        require_keys(saved, _STATE_KEYS, f"{self.owner}: the state")
        if saved["name"] != self.brick.state_name():
            raise ValueError(
                f"{self.owner}: the state is that of {saved['name']!r}, not of {self.brick.state_name()!r}"
            )
        rounds, out, clients = saved["rounds_begun"], saved["message_out"], saved["clients"]
        if type(rounds) is not int or not 0 <= rounds <= _MOST_ROUNDS:
            raise ValueError(f"{self.owner}: 'rounds_begun' should be a count of rounds, not {rounds!r}")
        if type(out) is not bool:
            raise ValueError(f"{self.owner}: 'message_out' should be true or false, not {out!r}")
        if not isinstance(clients, list) or not all(isinstance(client, str) for client in clients):
            raise ValueError(f"{self.owner}: 'clients' should be a list of names, not {clients!r}")
        if len(set(clients)) < len(clients):
            raise ValueError(f"{self.owner}: 'clients' names one twice: {clients!r}")
        state, specs = self._read(saved)
        if traced(jax.tree.leaves(state)[:1]):
            raise self._under_trace()
        if specs is not None and self.form is not None and self.state is not None:
            if self.form.packing is not None:
                state = self.compiled.pack(self.form.packing, state)
            state = jax.tree.map(_beside, state, self.state)
        self.state, self.form = state, None if specs is None else self.form or Form(specs)
        self.rounds_begun, self.message_out, self.clients = rounds, out, tuple(clients)

    def _read(self, saved: Mapping[str, Any]) -> tuple[Any, Specs | None]:
        if (saved["params"] is None) != (saved["variables"] is None):
            raise ValueError(f"{self.owner}: 'params' and 'variables' should both be there, or neither")
        if saved["params"] is None:
            return None, None
        specs = specs_from_json(saved["params"], f"{self.owner}: the state")
        if self.specs is not None:
            self.specs.require_same(specs, f"{self.owner}: the state")
            specs = self.specs
        return self.compiled.layout(specs.flat()).decode(saved["variables"], specs, self.owner), specs


def _beside(new: Any, old: Any) -> Any:
    return new if new.sharding == old.sharding else jax.device_put(new, old.sharding)


def _as_array(leaf: Any) -> Any:
    # A number would be traced again where there was an array, as it promotes otherwise.
    return jnp.array(leaf, jnp.result_type(leaf)) if type(leaf) in NUMBERS else leaf


@jax.jit
def _merge(left: Any, right: Any) -> Any:
    return left.merge(right)
