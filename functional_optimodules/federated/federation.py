"""Federated rounds of many clients as one XLA program.

    Init(params, clients):
        server's state; the bank: what clients keep between rounds, a row a client
    Round(data, participants):
        broadcast = server.collect
        each participant: local steps from the parameters (see `client`)
        server: process(reduced aux); params += server.update(-mean(delta))

The same `Optimizer` objects, bricks and messages as in the stateful facade, with
the participants one by one, all at once, in chunks, or each on the device that
owns it.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping as Dict
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from functional_optimodules.core.packed import pack_auxes, packed_as
from functional_optimodules.core.packing import unpack
from functional_optimodules.federated import checks, driver, evaluation, saving
from functional_optimodules.federated.batches import Remainder
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.liveness import kept_leaves
from functional_optimodules.federated.mapping import Mapping, run_participants
from functional_optimodules.federated.participant import Shared, participate
from functional_optimodules.federated.reduction import Totals, choose
from functional_optimodules.federated.sampling import draw, draw_by_shard
from functional_optimodules.federated.state import FederationState, make_state
from functional_optimodules.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Federation:
    """A server and its clients.

    `init`, `round` and `run` are pure: they may be jitted, donated and scanned.
    `fit` drives compiled rounds from the host.

    Attributes:
      loss_fn: `(params, batch) -> loss` or `(params, batch, key) -> loss`, where
        the loss is a scalar or one value per example, alone or in a pair with a
        dict of metrics of either form. A value per example must not depend on the
        other examples of the batch, which may be padding.
      client: the clients' optimizer.
      server: the server's optimizer. It steps on the mean of `params - y_i` as its
        gradient: a learning rate of 1 and no module is federated averaging; the
        modules `momentum`, `adagrad`, `adam` and `yogi` make it FedAvgM, FedAdagrad,
        FedAdam and FedYogi.
      batch_size: examples in a batch of `FederatedData`; `None` for all of the
        client's.
      epochs: local passes over `FederatedData` in a round.
      remainder: what becomes of a last, partial batch: it is filled up and the
        filling masked, dropped, or filled with the pass's first examples.
      weighting: how clients count in the mean: alike, or by their examples.
      sampling: how `run` and `fit` draw participants: uniformly, or as many from
        each device's clients, which evens the devices' loads.
      mapping: how participants are run: `"scan"` one by one, `"vmap"` all at once,
        a number in chunks of that many, a mesh with an axis `clients` each on its
        own device; `None` for what suits the backend.
      on_nonfinite: what becomes of a client that sends a value that is not finite:
        an error after the round (from `check` or `fit`), or it is left out like one
        that dropped out.

    Raises:
      ValueError: if a client's module with auxiliary variables has no counterpart
        in the server's optimizer, or the reverse; or for an option out of range.

    References:
      McMahan et al., "Communication-efficient learning of deep networks from
      decentralized data", AISTATS 2017, arXiv:1602.05629.
      Reddi et al., "Adaptive federated optimization", ICLR 2021, arXiv:2003.00295.
    """

    loss_fn: Callable[..., Any]
    client: Optimizer
    server: Optimizer = dataclasses.field(default_factory=lambda: Optimizer(1.0))
    batch_size: int | None = None
    epochs: int = 1
    remainder: Remainder = "mask"
    weighting: Literal["uniform", "examples"] = "uniform"
    sampling: Literal["uniform", "by-device"] = "uniform"
    mapping: Mapping = None
    on_nonfinite: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        checks.check_options(self)
        checks.check_counterparts(self.client, self.server)

    def init(self, params: Any, clients: int | FederatedData, seed: int = 0) -> FederationState:
        """Make the state of a federation, before any round.

        With several processes, all take the parameters and keys of process 0.

        Args:
          params: the parameters, a pytree of arrays, which are copied.
          clients: their number, or their data, with which the state is laid out.
          seed: where all draws of batches and participants come from.

        Raises:
          ValueError: if there is no client, or one has less than a batch where
            partial ones are dropped.
        """
        return make_state(self, params, clients, seed)

    def round(
        self,
        state: FederationState,
        data: Any,
        participants: Any,
        *,
        num_steps: Any = None,
        mask: Any = None,
        weights: Any = None,
        dropped: Any = None,
    ) -> tuple[FederationState, dict[str, jax.Array]]:
        """Run one round. Pure: it may be jitted, donated and scanned.

        Args:
          state: the federation's state.
          data: `FederatedData`, or a pytree of batches of S participants x K steps
            x B examples, which every device gets.
          participants: int32[S], different clients, in any order.
          num_steps: int32[S], how many of the K given steps each takes; all if `None`.
          mask: bool[S, K, B], which of the given examples are real; all if `None`.
            Steps without a real example are not taken.
          weights: float[S], >= 0, how much each counts in the mean; by `weighting`
            if `None`.
          dropped: bool[S], who drops out in mid-round: of its contribution and its
            state nothing remains.

        Returns:
          The new state, and metrics: `round`, and by participant `participants`,
          `loss` and the loss's metrics, averaged over the local steps, `examples`
          (how many the client has), `finite` (whether all that it sent is) and
          `joined` (whether it took part to the end).

        Raises:
          ValueError: if participants are out of range or repeated, or an argument
            is not of their number. Values are checked where they are not traced.
        """
        participants = checks.check_round(self, state, data, participants, num_steps, mask, weights, dropped)
        count = participants.shape[0]
        if num_steps is None and not isinstance(data, FederatedData):
            num_steps = jnp.full(count, np.shape(jax.tree.leaves(data)[0])[1], jnp.int32)
        data, options = jax.tree.map(jnp.asarray, (data, (num_steps, mask, weights, dropped)))
        server = self.server.begin_round(state.server, state.params)
        packed = packed_as(state.params, state.packing)
        broadcast = pack_auxes(self.server.collect_channels(server), state.packing)
        key = jax.random.fold_in(state.key, state.round)
        shared = Shared(packed, participants, broadcast, key, *options)
        slots = data.slots if isinstance(data, FederatedData) else state.slots
        slots = slots[participants] if slots.shape[0] else jnp.arange(count, dtype=jnp.int32)
        kept = kept_leaves(self.client, self.server, packed)

        def one(*args: Any) -> tuple[Totals, list[jax.Array]]:
            return participate(self, kept, *args)

        totals, bank = run_participants(self.mapping, one, shared, data, state.bank, slots)
        totals = unpack(totals)
        server = self.server.process_channels(totals.auxes, server)
        gradient = jax.tree.map(
            lambda d, p: (-d / jnp.maximum(totals.weight, 1e-30).astype(d.real.dtype)).astype(p.dtype),
            totals.delta,
            state.params,
        )
        updates, server = self.server.update(gradient, server, state.params)
        # Where nobody joined there was no round for the server; the bank's rows are the old ones already.
        params, server = choose(
            jnp.any(totals.joined > 0),
            (optax.apply_updates(state.params, updates), server),
            (state.params, state.server),
        )
        metrics = {
            "round": state.round,
            "participants": participants,
            "examples": totals.examples,
            "finite": totals.finite > 0,
            "joined": totals.joined > 0,
            **totals.metrics,
        }
        return state._replace(params=params, server=server, bank=bank, round=state.round + 1), metrics

    def run(
        self,
        state: FederationState,
        data: FederatedData,
        num_rounds: int,
        key: jax.Array | None = None,
        *,
        participants: int | None = None,
        weights: Any = None,
        evaluate: Callable[[Any], dict[str, jax.Array]] | None = None,
    ) -> tuple[FederationState, dict[str, jax.Array]]:
        """Run rounds, each with a fresh sample of participants. Pure, as `round` is.

        Args:
          state: the federation's state.
          data: the clients' data.
          num_rounds: how many rounds.
          key: replaces the state's key, for other draws.
          participants: how many clients to sample in a round, without
            replacement; all if `None`.
          weights: float[N], how much each client counts in the mean; by
            `weighting` if `None`.
          evaluate: `(params) -> metrics`, called after each round.

        Returns:
          The new state, and the history: the metrics of `round` and of `evaluate`
          with a leading axis of rounds.

        Raises:
          ValueError: as `round` does, or if there are not that many clients to
            sample from.
        """
        state = state if key is None else state._replace(key=key)
        advance = self.rounds(data, participants, weights, evaluate)
        return jax.lax.scan(lambda state, _: advance(state), state, None, length=num_rounds)

    def rounds(
        self, data: FederatedData, participants: int | None, weights: Any, evaluate: Callable[..., Any] | None
    ) -> Callable[[FederationState], tuple[FederationState, dict[str, jax.Array]]]:
        """Return the function from a state to the next that `run` and `fit` repeat."""
        size = checks.check_sample(data, participants, weights)

        def advance(state: FederationState) -> tuple[FederationState, dict[str, jax.Array]]:
            chosen = self.sample(state, data, size)
            state, metrics = self.round(state, data, chosen, weights=None if weights is None else weights[chosen])
            found = {} if evaluate is None else evaluate(state.params)
            checks.check_names(metrics, found)
            return state, metrics | found

        return advance

    def sample(self, state: FederationState, data: FederatedData, size: int) -> jax.Array:
        """Draw the participants of the next round: int32[size], without replacement."""
        # Clients fold in their number, which is less.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.round), data.num_clients)
        if self.sampling == "uniform" or data.num_shards == 1:
            return draw(key, data.num_clients, size)
        return draw_by_shard(key, data.slots, data.per_shard, data.num_shards, size)

    def evaluate(
        self, params: Any, data: FederatedData, *, batch_size: int | None = None, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Evaluate parameters on each client's data, by one compiled program.

        Args:
          params: the parameters.
          data: the clients' data.
          batch_size: examples in a batch; all of the client's if `None`.
          key: what a loss that takes a key gets one of, by client and batch.

        Returns:
          `loss` and the loss's metrics by name, each float32[N].
        """
        return evaluation.evaluate(self, unpack(params), data, batch_size, jax.random.key(0) if key is None else key)

    def fit(
        self,
        state: FederationState,
        data: FederatedData,
        num_rounds: int,
        *,
        participants: int | None = None,
        weights: Any = None,
        evaluate: Callable[[Any], dict[str, jax.Array]] | None = None,
        every: int = 10,
        callback: Callable[[FederationState, dict[str, Any]], None] | None = None,
        progress: bool = False,
    ) -> tuple[FederationState, dict[str, Any]]:
        """Run rounds from the host, in compiled pieces. The state is donated: it can no longer be used.

        The numbers are the same, bit by bit, however the rounds are cut into pieces
        and calls.

        Args:
          state: the federation's state.
          data: the clients' data.
          num_rounds: how many more rounds.
          participants: as for `run`.
          weights: as for `run`.
          evaluate: as for `run`.
          every: rounds of a piece.
          callback: `(state, history) -> None`, called after each piece with the
            piece's history. It may save the state (`encode`), but not keep it: the
            next piece takes its memory.
          progress: whether to show a progress bar, which needs `tqdm`.

        Returns:
          The new state, and the history, of NumPy arrays with a leading axis of rounds.

        Raises:
          FloatingPointError: if a client sent a value that is not finite, unless
            `on_nonfinite="skip"`; it names the round and the clients.
          RuntimeError: if another process of the federation is lost.
          ValueError: as `run` does.
        """
        advance = participants, weights, evaluate
        return driver.fit(self, state, data, num_rounds, advance, every, callback, progress)

    def check(self, history: Dict[str, Any]) -> None:
        """Check what clients sent in rounds that were run.

        Args:
          history: the metrics of `round` or `run`.

        Raises:
          FloatingPointError: if a client sent a value that is not finite, unless
            `on_nonfinite="skip"`; it names the round and the clients.
        """
        checks.check_history(self, history)

    def encode(self, state: FederationState) -> dict[str, Any]:
        """Write a state, with what must not change of the federation, as JSON values.

        With several processes, each writes its own clients' rows.
        """
        return saving.encode(self, state)

    def decode(self, payload: Any, like: FederationState) -> FederationState:
        """Read what `encode` wrote.

        Args:
          payload: the JSON values.
          like: a state of this federation, as `init` makes it: the new one is laid
            out as it is, on any number of devices. It is left intact.

        Raises:
          KeyError: if something is missing or unknown.
          ValueError: if the saved federation differs in a field, which is named,
            or an array is not as expected.
        """
        return saving.decode(self, payload, like)
