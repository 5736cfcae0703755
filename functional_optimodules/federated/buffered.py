"""Buffered asynchronous federated learning, on a virtual clock and in one program.

    Init(C):
        clock = 0; C places, all free
    Update:
        K times:
            if the clock would move on: in each free place a client starts, of those not at work
                place = (client, server's parameters and auxiliary variables, version, duration)
            clock moves on to the first client that is done; its place is free
            delta, aux = its round, from what it started with (see `round`)
            s = discount(version - its version)
            buffer += delta of weight w s, and aux
        delta = aggregation(buffer) * sum of w s / sum of w
        server: process(reduced aux); params += server.update(-delta); version += 1

This is algorithm 1 of Nguyen et al.: with `mean` the last but one line is the sum of
w s delta / sum of w, or sum of s delta / K where clients count alike. What happens at
the same moment happens in the order of the starts, and before anybody starts: with
C = K = N and equal durations it is federated averaging, round by round.

A client is at work once at a time, so that what it keeps in the bank is, when it is
done, what it was when it started: its work is computed only then. What it was sent
is kept meanwhile: C copies of the parameters.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import FromServer
from functional_optimodules.config.fields import check_fields, hyperparameter, nearest
from functional_optimodules.federated.checks import Given, check_round
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.driver import Evaluate
from functional_optimodules.federated.execution import Rows, require_blocks
from functional_optimodules.federated.federation import Federation
from functional_optimodules.federated.loss import Metrics
from functional_optimodules.federated.participant import Shared, participate
from functional_optimodules.federated.placement import mesh_of
from functional_optimodules.federated.round import share, step_server
from functional_optimodules.federated.sides import Sides
from functional_optimodules.federated.state import FederationState, own_sides
from functional_optimodules.federated.totals import Totals
from functional_optimodules.types import Params, PyTree
from functional_optimodules.xla import behind_branch

Duration = Callable[[jax.Array, jax.Array], jax.Array]
"""`(key, client) -> float32`, how long a client takes, >= 0."""
Discount = Callable[[jax.Array], jax.Array]
"""`(staleness) -> float32`, how much a delta counts, >= 0."""

DURATIONS: dict[str, Duration] = {
    "half-normal": lambda key, client: jnp.abs(jax.random.normal(key)),
    "exponential": lambda key, client: jax.random.exponential(key),
    "constant": lambda key, client: jnp.float32(1),
}
"""Distributions of durations by name; `half-normal` is that of the paper."""
DISCOUNTS: dict[str, Discount] = {
    "inverse-sqrt": lambda staleness: 1 / jnp.sqrt(1 + staleness),
    "constant": lambda staleness: jnp.float32(1),
}
"""Discounts of stale deltas by name; `inverse-sqrt` is that of the paper."""

_NOBODY = jnp.iinfo(jnp.int32).max


class Sent(NamedTuple):
    """What a client is sent as it starts, as clients hold it.

    Attributes:
      params: the parameters.
      stats: the model's state.
      broadcast: the server's auxiliary variables by name.
    """

    params: Params
    stats: PyTree
    broadcast: dict[str, FromServer]


class Places(NamedTuple):
    """Who is at work, along a leading axis of C places.

    Attributes:
      client: int32[C]; the largest int32 in a place that is free.
      remaining: float32[C], in how much time it is done; infinite in a place that is free.
      version: int32[C], the server's version that it started from.
      start: int32[C], the number of its start.
      sent: what it started with.
    """

    client: jax.Array
    remaining: jax.Array
    version: jax.Array
    start: jax.Array
    sent: Sent

    def without(self, place: jax.Array) -> "Places":
        """Return the same with a place that is free."""
        return self._replace(client=self.client.at[place].set(_NOBODY), remaining=self.remaining.at[place].set(jnp.inf))


class Held(NamedTuple):
    """What a client's work is done on.

    Attributes:
      sent: what it started with.
      row: what it keeps, its row of the bank.
    """

    sent: Sent
    row: Rows


class BufferedState(NamedTuple):
    """State of a `BufferedFederation` between two updates of the server, when the buffer is empty.

    Attributes:
      federation: the federation's state; its round is the server's version.
      places: who is at work.
      clock: float32 scalar, the time.
      behind: float32 scalar, what the last addition to the clock rounded away.
      starts: int32 scalar, how often a client started.
      key: typed PRNG key that every draw comes from, by start.
    """

    federation: FederationState
    places: Places
    clock: jax.Array
    behind: jax.Array
    starts: jax.Array
    key: jax.Array


class Buffer(NamedTuple):
    """What has arrived since the last update.

    Attributes:
      totals: what those that delivered came to together.
      participants: int32[K], who these are.
      staleness: int32[K], how many updates there were since they started.
      weight: float32 scalar, the sum of their weights, of those that joined.
      counted: float32 scalar, the same with each weight discounted.
    """

    totals: Totals
    participants: jax.Array
    staleness: jax.Array
    weight: jax.Array
    counted: jax.Array


@dataclasses.dataclass(frozen=True)
class BufferedFederation:
    """x ← server(x, −Σ s(τᵢ) Δᵢ / K), once K deltas are there (Nguyen et al. 2022, algorithm 1).

    The federation's optimizers, uplink, aggregation, local parameters and auxiliary
    variables are those of its rounds; the latter count in full, however stale. A client
    whose place is free is followed by one drawn from all that are not at work. One that
    sends a value that is not finite takes its place in the buffer, whether or not it is
    left out.

    `init` and `run` are pure: they may be jitted, donated and scanned. They take the
    memory of C snapshots of the parameters, of the model's state and of the server's auxiliary
    variables, besides that of a round of clients that are run one by one, whatever
    the federation's `mapping` on one device is.

    Attributes:
      federation: the server and its clients. A brick that asks for the round's
        `mean_gradient` or `coin`, which no one shares here, is refused, as is a `coin` for
        the number of local steps, and a mesh.
      concurrency: C, how many clients are at work at a time.
      buffer: K, how many deltas make an update of the server.
      duration: how long clients work: the name of a distribution, `half-normal` (|N(0, 1)|),
        `exponential` (of mean 1) or `constant` (1), or a function `(key, client) -> float32`
        of values that are finite and >= 0. After one that is not, the clock is NaN.
      discount: s, how much a delta counts by its staleness, the number of updates of the
        server since its client started: `inverse-sqrt`, `constant`, or a function
        `(staleness) -> float32` of a float32 scalar, >= 0.

    Raises:
      ValueError: for a field out of range, a name that is none, a function that does not
        return a real scalar, or a federation that has no meaning here.

    References:
      Nguyen et al., "Federated learning with buffered asynchronous aggregation",
      AISTATS 2022, arXiv:2106.06639.
    """

    federation: Federation
    concurrency: int = hyperparameter(within="[1, inf)")
    buffer: int = hyperparameter(within="[1, inf)")
    duration: str | Duration = "half-normal"
    discount: str | Discount = "inverse-sqrt"

    def __post_init__(self) -> None:
        check_fields(self, "BufferedFederation", ValueError)
        _require_apart(self.federation)
        client, staleness = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
        duration, discount = self._duration, self._discount
        _require_scalar("duration", self.duration, lambda client: duration(jax.random.key(0), client), client)
        _require_scalar("discount", self.discount, discount, staleness)

    @property
    def _duration(self) -> Duration:
        return _named("duration", self.duration, DURATIONS)

    @property
    def _discount(self) -> Discount:
        return _named("discount", self.discount, DISCOUNTS)

    def init(self, state: FederationState, data: FederatedData) -> BufferedState:
        """Return the state before the first client starts.

        Args:
          state: the federation's state, new or after rounds. It is part of what is
            returned: to donate that is to donate it.
          data: the clients' data.

        Raises:
          ValueError: if there are fewer clients than work at a time, or as a round does.
        """
        sides = self._sides(state, data)

        def sent(state: FederationState) -> Sent:
            return _sent(_share(self.federation, sides, state))

        sent_rows = jax.tree.map(
            lambda leaf: jnp.zeros((self.concurrency, *leaf.shape), leaf.dtype), jax.eval_shape(sent, state)
        )
        zeros = jnp.zeros(self.concurrency, jnp.int32)
        places = Places(
            client=jnp.full_like(zeros, _NOBODY),
            remaining=jnp.full(self.concurrency, jnp.inf, jnp.float32),
            version=zeros,
            start=jnp.copy(zeros),
            sent=sent_rows,
        )
        # The rounds' own draws fold in numbers up to N + 3.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.round), data.num_clients + 4)
        return BufferedState(
            federation=state,
            places=places,
            clock=jnp.zeros((), jnp.float32),
            behind=jnp.zeros((), jnp.float32),
            starts=jnp.zeros((), jnp.int32),
            key=key,
        )

    def run(
        self, state: BufferedState, data: FederatedData, num_updates: int, *, evaluate: Evaluate | None = None
    ) -> tuple[BufferedState, Metrics]:
        """Run updates of the server. Pure: it may be jitted and donated.

        Args:
          state: the state. It has all that there is, clients at work and draws to come: two
            runs are one, cut in two.
          data: the clients' data.
          num_updates: how many updates.
          evaluate: `(params) -> metrics`, called after each.

        Returns:
          The new state, and the history with a leading axis of updates: `round`, the version that was
          updated; `time`, when; by participant, in the order of their arrival,
          `participants`, `staleness`, and the metrics of a federation's round; those of
          the server's bricks, and of `evaluate`.

        Raises:
          ValueError: if the state was made for another federation or concurrency, or as a
            round does.
        """
        if type(num_updates) is not int or num_updates < 0:
            raise ValueError(f"BufferedFederation: num_updates={num_updates!r} should be an integer of at least 0")
        sides = self._sides(state.federation, data)
        places = state.places.client.shape[0]
        if places != self.concurrency:
            raise ValueError(
                f"BufferedFederation: a state of {places} places for concurrency={self.concurrency}: make one with "
                "`init`"
            )

        def advance(state: BufferedState) -> tuple[BufferedState, Metrics]:
            state, metrics = self._update(sides, state, data)
            found = {} if evaluate is None else evaluate(self.federation.evaluated(state.federation))
            for name in sorted(metrics.keys() & found.keys()):
                raise ValueError(
                    f"BufferedFederation: `evaluate` returns a metric {name!r}, which an update has too: rename it"
                )
            return state, metrics | found

        return jax.lax.scan(lambda state, _: advance(state), state, None, length=num_updates)

    def _sides(self, state: FederationState, data: FederatedData) -> Sides:
        """Return both sides of the federation, after all checks."""
        if not isinstance(data, FederatedData):
            raise TypeError(f"BufferedFederation: data should be FederatedData, not {type(data).__name__}")
        if self.concurrency > data.num_clients:
            raise ValueError(
                f"BufferedFederation: concurrency={self.concurrency} should be at most the {data.num_clients} clients"
            )
        require_blocks(data, self.federation.mapping)
        check_round(self.federation, state, data, _given(jnp.zeros(1, jnp.int32), None))
        return own_sides(self.federation, state)

    def _update(self, sides: Sides, state: BufferedState, data: FederatedData) -> tuple[BufferedState, Metrics]:
        """Take in K deltas, and let the server step on them."""
        shared = _share(self.federation, sides, state.federation)
        task = functools.partial(self._task, sides, shared, data)
        work, held = task(state, jnp.int32(0), jnp.float32(1))
        one = jax.eval_shape(lambda held: work(held)[0], held)

        def deliver(index: jax.Array, carry: tuple[BufferedState, Buffer]) -> tuple[BufferedState, Buffer]:
            state, buffer = carry
            state, place = _next_done(self._fill(state, _sent(shared), data.num_clients))
            client = state.places.client[place]
            slot = data.slots[client]
            staleness = state.federation.round - state.places.version[place]
            weight = jnp.float32(1) if self.federation.weighting == "uniform" else data.sizes[slot].astype(jnp.float32)
            counted = weight * jnp.asarray(self._discount(staleness.astype(jnp.float32)), jnp.float32)
            work, held = task(state, place, counted)
            here, row = behind_branch(client < data.num_clients, work, lambda held: (one.nothing(), held.row), held)
            joined = here.each["joined"]
            buffer = Buffer(
                totals=buffer.totals.add(here, index),
                participants=buffer.participants.at[index].set(client),
                staleness=buffer.staleness.at[index].set(staleness),
                weight=buffer.weight + joined * weight,
                counted=buffer.counted + joined * counted,
            )
            federation = state.federation._replace(bank=_put(state.federation.bank, row, slot))
            return state._replace(federation=federation, places=state.places.without(place)), buffer

        nobody = jnp.zeros(self.buffer, jnp.int32)
        start = Buffer(one.nothing((self.buffer,)), nobody, nobody, jnp.float32(0), jnp.float32(0))
        state, buffer = jax.lax.fori_loop(0, self.buffer, deliver, (state, start))
        before = sides.params.shared(state.federation.params)
        server = sides.server.begin_round(state.federation.server, before)
        scale = buffer.counted / jnp.maximum(buffer.weight, 1e-30)
        federation, told = step_server(self.federation, sides, state.federation, server, buffer.totals, {}, scale)
        each = buffer.totals.each
        for name in sorted({"time", "staleness"} & each.keys()):
            raise ValueError(f"BufferedFederation: the loss has a metric {name!r}, which an update has too: rename it")
        tell = {
            "round": state.federation.round,
            "time": state.clock,
            "participants": buffer.participants,
            "staleness": buffer.staleness,
            "finite": each["finite"] > 0,
            "joined": each["joined"] > 0,
        }
        return state._replace(federation=federation), each | tell | told

    def _fill(self, state: BufferedState, sent: Sent, num_clients: int) -> BufferedState:
        """Let a client start in each place that is free, if the clock is about to move on."""

        def start(_: jax.Array, state: BufferedState) -> BufferedState:
            key = jax.random.fold_in(state.key, state.starts)
            # Clients fold in their number, which is less.
            first, second = (jax.random.fold_in(key, num_clients + number) for number in (0, 3))
            client = _draw_idle(first, state.places.client, num_clients)
            duration = jnp.asarray(self._duration(second, client), jnp.float32)
            duration = jnp.where((duration >= 0) & jnp.isfinite(duration), duration, jnp.nan)
            new = Places(client, duration, state.federation.round, state.starts, sent)
            place = jnp.argmax(state.places.client == _NOBODY)
            return state._replace(places=_put(state.places, new, place), starts=state.starts + 1)

        free = jnp.sum(state.places.client == _NOBODY, dtype=jnp.int32)
        moves_on = jnp.min(state.places.remaining) > 0
        return jax.lax.fori_loop(0, jnp.where(moves_on, free, 0), start, state)

    def _task(
        self,
        sides: Sides,
        shared: Shared,
        data: FederatedData,
        state: BufferedState,
        place: jax.Array,
        weight: jax.Array,
    ) -> tuple[Callable[[Held], tuple[Totals, Rows]], Held]:
        """Return the work of the client of a place, and what it is done on."""
        client = state.places.client[place]
        slot = data.slots[client]
        key = jax.random.fold_in(state.key, state.places.start[place])

        def work(held: Held) -> tuple[Totals, Rows]:
            own = shared._replace(**held.sent._asdict(), key=key, given=_given(client[None], weight[None]))
            return participate(self.federation, sides, own, data, jnp.int32(0), slot, held.row)

        return work, Held(_at(state.places.sent, place), _at(state.federation.bank, slot))


def _require_apart(federation: Federation) -> None:
    """Raise a `ValueError` for a federation whose participants share what they cannot where each starts by itself."""
    if mesh_of(federation.mapping) is not None:
        raise ValueError(
            "BufferedFederation: federation.mapping is a mesh, and clients that arrive one by one run on one device: "
            "leave `mapping` out"
        )
    if federation.coin is not None:
        raise ValueError(
            f"BufferedFederation: federation.coin={federation.coin} is tossed by all participants of a round, and "
            "there are no rounds: give `steps` or `epochs`"
        )
    if federation.fragments:
        raise ValueError("BufferedFederation: federation.fragments go by rounds, and there are none: leave them out")
    bricks = (
        *(brick for side in (federation.client, federation.server) for brick in (*side.regularizers, *side.modules)),
        *federation.uplink,
    )
    for brick in bricks:
        asked = brick.asks()
        for name in sorted({"coin", "mean_gradient"} & (asked.step | asked.end)):
            raise ValueError(
                f"BufferedFederation: {brick!r} asks for {name!r}, which participants of a round share, and there are "
                "no rounds: leave it out"
            )


def _named(field: str, value: Any, known: dict[str, Any]) -> Any:
    if not isinstance(value, str):
        return value
    if value not in known:
        raise ValueError(f"BufferedFederation: {field}={value!r} is not known: {nearest(value, known)}")
    return known[value]


def _require_scalar(field: str, value: object, function: Callable[[Any], Any], argument: jax.ShapeDtypeStruct) -> None:
    found = jax.eval_shape(lambda argument: jnp.asarray(function(argument)), argument)
    if found.shape != () or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"BufferedFederation: {field}={value!r} returns {found.dtype}{list(found.shape)}: expected a float scalar"
        )


def _given(participants: jax.Array, weights: jax.Array | None) -> Given:
    return Given(participants, num_steps=None, mask=None, weights=weights, dropped=None)


def _share(federation: Federation, sides: Sides, state: FederationState) -> Shared:
    """Return what those share that start from a version of the server; the key is of no use."""
    server = sides.server.begin_round(state.server, sides.params.shared(state.params))
    return share(federation, sides, state, server, _given(jnp.zeros(0, jnp.int32), None))


def _sent(shared: Shared) -> Sent:
    return Sent(shared.params, shared.stats, shared.broadcast)


def _at(rows: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), rows)


def _put(rows: Any, row: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0), rows, row)


def _draw_idle(key: jax.Array, busy: jax.Array, num_clients: int) -> jax.Array:
    """Draw a client that is not busy: an int32 scalar, in time and memory of those that are."""
    idle = num_clients - jnp.sum(busy < num_clients, dtype=jnp.int32)
    rank = jax.random.randint(key, (), 0, idle, jnp.int32)
    # How many are idle below each that is busy.
    below = jnp.sort(busy) - jnp.arange(busy.shape[0], dtype=jnp.int32)
    return rank + jnp.sum(below <= rank, dtype=jnp.int32)


def _next_done(state: BufferedState) -> tuple[BufferedState, jax.Array]:
    """Move the clock to the first client that is done, and return its place."""
    remaining = state.places.remaining
    passed = jnp.min(remaining)
    place = jnp.argmin(jnp.where(remaining == passed, state.places.start, _NOBODY))
    # Durations are counted down, and the clock's rounding made up for: a late one, in float32, would stand still.
    step = passed - state.behind
    clock = state.clock + step
    behind = (clock - state.clock) - step
    places = state.places._replace(remaining=remaining - passed)
    return state._replace(places=places, clock=clock, behind=behind), place
