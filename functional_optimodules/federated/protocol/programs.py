"""The compiled parts of a server and of a client, for one federation and one kind of parameters.

They are the parts of a simulated round: `share`, `totals_of` and `step_server` on the server,
`take_part` and `send` on a client. Peers of one process that are alike share them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp

from functional_optimodules.federated.aggregation import WeightedSum
from functional_optimodules.federated.checks import Given
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.loss import Averages, Metrics
from functional_optimodules.federated.participant import (
    Sent,
    Shared,
    Walked,
    full_gradient,
    learned,
    send,
    take_part,
    totals_of,
)
from functional_optimodules.federated.protocol.travel import Contribution, Down, Shapes, Up
from functional_optimodules.federated.round import share, step_server
from functional_optimodules.federated.sides import Own, sides_of
from functional_optimodules.federated.state import FederationState, fresh_row
from functional_optimodules.federated.totals import Totals
from functional_optimodules.numerics import is_finite
from functional_optimodules.optimizer import OptimizerState
from functional_optimodules.packing.adapter import packing_for
from functional_optimodules.packing.tree import unpack
from functional_optimodules.random.keys import is_key, shapes_only
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.paths import Specs

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


class ServerPrograms:
    """The compiled parts of a server.

    Attributes:
      sides: both sides, of which nothing is packed here.
      shapes: what messages must hold.
      begin: `(state) -> server, shared`.
      weigh: `(delta, weight) -> WeightedSum`.
      add: `(totals, up, weight, examples, who, index, kept) -> totals`; the totals are donated.
      step: `(state, server, totals, shared) -> state, metrics, finite`.
      forget: `(server, contribution) -> server`.
    """

    def __init__(self, federation: "Federation", params: Params, stats: PyTree) -> None:
        self.federation = federation
        self.sides = sides_of(federation, params, stats, None)
        self.shapes = Shapes.of(federation, self.sides, params, stats)
        self.begin, self.step, self.forget = jax.jit(self._begin), jax.jit(self._step), jax.jit(self._forget)
        self.weigh, self.add = jax.jit(WeightedSum.of), jax.jit(self._add, donate_argnums=0)

    def _begin(self, state: FederationState) -> tuple[OptimizerState, Shared]:
        server = self.sides.server.begin_round(state.server, self.sides.params.shared(state.params))
        return server, share(self.federation, self.sides, state, server, Given(jnp.zeros(0), None, None, None, None))

    def _totals(self, up: Up, weight: jax.Array, examples: jax.Array, who: jax.Array, kept: PyTree) -> Totals:
        sent, here = Sent(*up, weight, examples, {}), jnp.array(True)
        return totals_of(self.federation, sent, who, here, here, kept)

    def nothing(self, count: int, kept: PyTree) -> Totals:
        """Return what no one of some participants comes to."""
        up = jax.tree.unflatten(self.shapes.report.treedef, self.shapes.report.leaves)
        number, index = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        return jax.eval_shape(self._totals, up, number, number, index, kept).nothing((count,))

    def _add(
        self,
        totals: Totals,
        up: Up,
        weight: jax.Array,
        examples: jax.Array,
        who: jax.Array,
        index: jax.Array,
        kept: PyTree,
    ) -> Totals:
        return totals.add(self._totals(up, weight, examples, who, kept), index)

    def _step(
        self, state: FederationState, server: OptimizerState, totals: Totals, shared: Shared
    ) -> tuple[FederationState, Metrics, jax.Array]:
        known = {"coin": shared.coin}
        if self.shapes.passes == 2:
            gradient = self.shapes.gradient.tree(self.shapes.gradient.by_path).delta
            zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), gradient)
            known["mean_gradient"] = zeros if shared.mean_gradient is None else shared.mean_gradient
        after, told = step_server(self.federation, self.sides, state, server, totals, known)
        return after, told, is_finite((after.params, after.server, after.stats))

    def _forget(self, server: OptimizerState, given: Contribution) -> OptimizerState:
        return self.sides.server.forget(server, given.delta, given.auxes)


@functools.lru_cache(maxsize=32)
def server_programs(federation: "Federation", specs: Specs) -> ServerPrograms:
    """Return the compiled parts of a server, given the specs of the pair of parameters and the model's state."""
    return ServerPrograms(federation, *jax.tree.unflatten(specs.treedef, specs.leaves))


class Begun(NamedTuple):
    """A client in the midst of its round.

    Attributes:
      start: the parameters before its steps, as it holds them.
      own: what it has before them.
      walked: where it is.
    """

    start: Params
    own: Own
    walked: Walked


class ClientPrograms:
    """The compiled parts of a client.

    Attributes:
      start: the shapes of the parameters and of the model's state.
      sides: both sides.
      shapes: what messages must hold.
      begin: `(shared, row) -> begun`.
      fit: `(shared, data, row) -> up, metrics, row`.
      gradient: `(shared, data, row) -> up`.
      step: `(gradients, walked, known) -> walked`.
      end: `(shared, begun, examples, steps, full_gradient) -> up, metrics, row`.
    """

    def __init__(self, federation: "Federation", params: Params, stats: PyTree) -> None:
        self.federation, self.start = federation, (params, stats)
        packing = None if federation.local or federation.fragments else packing_for(federation.client, params)
        self.sides = sides_of(federation, params, stats, packing)
        self.shapes = Shapes.of(federation, self.sides, params, stats)
        self.begin, self.fit, self.gradient = jax.jit(self._begin), jax.jit(self._fit), jax.jit(self._gradient)
        self.step, self.end = jax.jit(self._step), jax.jit(self._end)

    def fresh(self, down: Down, who: jax.Array) -> Rows:
        """Return the row of a client that begins anew, from what it was sent."""
        params, stats = down.initial or jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), self.start)
        # Not compiled: keys are drawn from the system's entropy, where nothing says which.
        return fresh_row(self.sides, self.sides.fresh(params, stats), who)

    def saved(self, row: Rows) -> dict[str, PyTree]:
        """Return a row by the names of its parts, over the parameters' own container."""
        return {name: self.sides.client.portable(part) for name, part in self.sides.parts(row).items()}

    def restored(self, parts: Mapping[str, PyTree]) -> Rows:
        """Return the row of what `saved` gave."""
        return self.sides.as_row([self.sides.client.adopt(parts[name], kept) for name, kept in self.sides.kept.items()])

    def saved_like(self) -> dict[str, PyTree]:
        """Return the shapes of what `saved` gives; of PRNG keys, such keys."""
        kept = self.sides.kept

        def keys() -> list[jax.Array]:
            zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), self.start)
            return [leaf for leaf in self.sides.row(self.sides.fresh(*zeros)) if is_key(leaf)]

        with shapes_only():
            made = iter(jax.jit(keys)())
        parts = {
            name: jax.tree.map(lambda spec: next(made) if is_key(spec) else spec, part) for name, part in kept.items()
        }
        # Of keys there is no shape, and nothing that could be packed.
        return {
            name: part if any(map(is_key, jax.tree.leaves(part))) else jax.eval_shape(self.sides.client.portable, part)
            for name, part in parts.items()
        }

    def learned(self, row: Rows, after: Params, now: int) -> Rows:
        """Return the row of a client that was told the parameters of the round after its last report."""
        held = self.sides.client.hold(jax.tree.map(jnp.asarray, after))
        return learned(self.sides, row, held, jnp.int32(now))

    def shared(self, down: Down, number: int, who: jax.Array) -> Shared:
        """Return what the participants of a round share, from what a client was sent."""
        hold = self.sides.client.hold
        arrays: Down = jax.tree.map(jnp.asarray, down)

        def alone(leaf: jax.Array) -> jax.Array:
            return leaf[None]

        return Shared(
            params=hold(arrays.params),
            stats=arrays.stats,
            broadcast={name: aux.map_per_client(alone).map_shaped(hold) for name, aux in arrays.broadcast.items()},
            key=jax.random.wrap_key_data(cast(jax.Array, arrays.key)),
            round=jnp.int32(number),
            coin=arrays.coin,
            steps=arrays.steps,
            mean_gradient=None if arrays.mean_gradient is None else hold(arrays.mean_gradient),
            aggregation=(),
            given=Given(who[None], None, None, None if arrays.weight is None else arrays.weight[None], None),
            place=jnp.int32(0),
        )

    def told(self, gradient: PyTree) -> Up:
        """Return a gradient of a client's own in the form in which it travels."""
        shared = self.sides.shared(gradient) if self.sides.params.own else gradient
        like = self.shapes.gradient.tree(self.shapes.gradient.by_path).delta
        return Up(jax.tree.map(lambda leaf, spec: jnp.asarray(leaf, spec.dtype), shared, like), {}, None)

    def _begin(self, shared: Shared, row: Rows) -> Begun:
        sides = self.sides
        own = sides.restored(row, shared.params)
        start = sides.whole(shared.params, own, shared.round)
        own = sides.hear(shared.broadcast, jnp.int32(0), own, start)
        stats = sides.stats.whole(shared.stats, own.stats)
        return Begun(start, own, Walked(start, own.client, stats, Averages({}, jnp.float32(0))))

    def _fit(self, shared: Shared, data: FederatedData, row: Rows) -> tuple[Up, Metrics, Rows]:
        zero = jnp.int32(0)
        sent, ended = take_part(self.federation, self.sides, shared, data, zero, zero, row)
        return Up.of(self.sides, sent), sent.each, self.sides.row(self.sides.commit(ended))

    def _gradient(self, shared: Shared, data: FederatedData, row: Rows) -> Up:
        zero, sides = jnp.int32(0), self.sides
        own = sides.restored(row, shared.params)
        gradient = full_gradient(self.federation, sides, own, shared, data, zero, zero)
        return Up(sides.client.free(sides.shared(gradient)), {}, None)

    def _step(self, gradients: Updates, walked: Walked, known: Mapping[str, PyTree]) -> Walked:
        y, state = self.sides.client.apply(self.sides.client.hold(gradients), walked.state, walked.y, **known)
        return walked._replace(y=y, state=state)

    def _end(
        self, shared: Shared, begun: Begun, examples: jax.Array, steps: jax.Array, full_gradient: PyTree
    ) -> tuple[Up, Metrics, Rows]:
        sides = self.sides
        uniform = self.federation.weighting == "uniform"
        weight = jnp.float32(1) if uniform else jnp.float32(examples)
        if shared.given.weights is not None:
            weight = jnp.asarray(shared.given.weights)[0]
        known: dict[str, Callable[[], PyTree]] = {
            "num_steps": lambda: jnp.int32(steps),
            "full_gradient": lambda: sides.client.hold(full_gradient),
        }
        sent, ended = send(sides, shared, *begun, weight, jnp.float32(examples), known)
        return Up.of(sides, sent), sent.each, sides.row(sides.commit(ended))


@functools.lru_cache(maxsize=32)
def client_programs(federation: "Federation", specs: Specs) -> ClientPrograms:
    """Return the compiled parts of a client, given the specs of the pair of parameters and the model's state."""
    return ClientPrograms(federation, *jax.tree.unflatten(specs.treedef, specs.leaves))


def params_of(begun: Begun) -> Params:
    """Return where a client is, in the parameters' own container."""
    return unpack(begun.walked.y)
