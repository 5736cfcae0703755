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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from functional_optimodules.core.entropy import shapes_only
from functional_optimodules.federated.client import Batches, given, shuffled, work
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.liveness import kept_leaves
from functional_optimodules.federated.mapping import Mapping, place_bank, run_participants
from functional_optimodules.federated.reduction import Totals
from functional_optimodules.optimizer import Optimizer


class FederationState(NamedTuple):
    """State of a federation.

    Attributes:
      params: the parameters.
      server: state of the server's optimizer.
      bank: what each client's optimizer keeps between rounds: a list of arrays
        with a leading axis of slots, empty for clients that keep nothing.
      round: int32 scalar, how many rounds were run.
      key: typed PRNG key that every draw comes from, by round and client.
    """

    params: Any
    server: Any
    bank: list[jax.Array]
    round: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Federation:
    """A server and its clients.

    Attributes:
      loss_fn: `(params, batch) -> loss` or `(params, batch, key) -> loss`, where
        the loss is a scalar or one value per example, alone or in a pair with a
        dict of metrics of either form.
      client: the clients' optimizer.
      server: the server's optimizer. It steps on the mean of `params - y_i` as its
        gradient; a learning rate of 1 and no module is federated averaging.
      batch_size: examples in a batch of `FederatedData`; `None` for all of the
        client's.
      epochs: local passes over `FederatedData` in a round.
      remainder: what becomes of a last, partial batch: it is filled up and the
        filling masked, dropped, or filled with the pass's first examples.
      weighting: how clients count in the mean: alike, or by their examples.
      mapping: how participants are run: `"scan"` one by one, `"vmap"` all at once,
        a number in chunks of that many, a mesh with an axis `clients` each on its
        own device; `None` for what suits the backend.
      on_nonfinite: what becomes of a client that sends a value that is not finite:
        an error after the round, or it is left out like one that dropped out.

    Raises:
      ValueError: if a client's module with auxiliary variables has no counterpart
        in the server's optimizer, or the reverse.
    """

    loss_fn: Callable[..., Any]
    client: Optimizer
    server: Optimizer = Optimizer(1.0)
    batch_size: int | None = None
    epochs: int = 1
    remainder: Literal["mask", "drop", "wrap"] = "mask"
    weighting: Literal["uniform", "examples"] = "uniform"
    mapping: Mapping = None
    on_nonfinite: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        for name, options in (
            ("remainder", ("mask", "drop", "wrap")),
            ("weighting", ("uniform", "examples")),
            ("on_nonfinite", ("error", "skip")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"Federation: {name}={getattr(self, name)!r} should be one of {options}")
        for name, least in (("epochs", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if not (value is None and name == "batch_size") and (type(value) is not int or value < least):
                raise ValueError(f"Federation: {name}={value!r} should be an integer of at least {least}")
        clients, servers = self.client.channels(), self.server.channels()
        for name in sorted(clients.keys() | servers.keys()):
            mine, theirs = clients.get(name), servers.get(name)
            if mine is None or theirs is None or mine.sends is not theirs.receives or mine.receives is not theirs.sends:
                raise ValueError(
                    f"Federation: the auxiliary variables {name!r} have {mine!r} on the clients' side and {theirs!r} "
                    "on the server's: expected a module and its counterpart"
                )

    def init(self, params: Any, clients: int | FederatedData, seed: int = 0) -> FederationState:
        """Make the state of a federation, before any round.

        Args:
          params: the parameters, a pytree of arrays, which are copied.
          clients: their number, or their data.
          seed: where all draws of batches come from.
        """
        client_state = self.client.init(params)
        kept = kept_leaves(self.client, self.server, params)
        ids = clients.ids if isinstance(clients, FederatedData) else jnp.arange(clients, dtype=jnp.int32)

        def rows(ids: jax.Array) -> list[jax.Array]:
            def row(identity: jax.Array) -> list[jax.Array]:
                leaves = jax.tree.leaves(self.client.fold_in(client_state, identity))
                return [leaf for leaf, keep in zip(leaves, kept, strict=True) if keep]

            return jax.vmap(row)(ids)

        return FederationState(
            params=jax.tree.map(jnp.array, params),
            server=self.server.init(params),
            bank=place_bank(rows, ids, self.mapping),
            round=jnp.zeros((), jnp.int32),
            key=jax.random.key(seed),
        )

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
            x B examples.
          participants: int32[S], different clients.
          num_steps: int32[S], how many of the K given steps each takes; all if `None`.
          mask: bool[S, K, B], which of the given examples are real; all if `None`.
          weights: float[S], how much each counts in the mean; by `weighting` if `None`.
          dropped: bool[S], who drops out in mid-round: nothing of it remains.

        Returns:
          The new state, and metrics: `participants`, and by participant the
          average of the loss and its metrics over the local steps, `examples` and
          `finite`.

        Raises:
          ValueError: if participants are out of range or repeated, or the data is
            not of that many; checked where they are not traced.
        """
        participants = self._checked(state, data, participants)
        count = participants.shape[0]
        key = jax.random.fold_in(state.key, state.round)
        server = self.server.begin_round(state.server, state.params)
        broadcast = self.server.collect_channels(server)
        if num_steps is None and not isinstance(data, FederatedData):
            num_steps = jnp.full(count, jax.tree.leaves(data)[0].shape[1], jnp.int32)
        options = {"num_steps": num_steps, "mask": mask, "weights": weights, "dropped": dropped}
        totals, bank = run_participants(self, state, data, participants, broadcast, key, options)
        server = self.server.process_channels(totals.auxes, server)
        mean = jax.tree.map(lambda d: -d / jnp.maximum(totals.weight, 1e-30).astype(d.real.dtype), totals.delta)
        gradient = jax.tree.map(lambda d, p: d.astype(p.dtype), mean, state.params)
        updates, server = self.server.update(gradient, server, state.params)
        new = FederationState(optax.apply_updates(state.params, updates), server, bank, state.round + 1, state.key)
        metrics = {
            "participants": participants,
            "examples": totals.examples,
            "finite": totals.finite > 0,
            **totals.metrics,
        }
        return _unless(totals.joined == 0, new, state._replace(round=state.round + 1)), metrics

    def work(
        self, state: FederationState, row: list[jax.Array], broadcast: Any, batches: Batches, key: jax.Array
    ) -> tuple[Any, list[jax.Array]]:
        """Take one client's round, from its row of the bank to its report and its new row."""
        with shapes_only():
            fresh = self.client.init(state.params)
        kept = kept_leaves(self.client, self.server, state.params)
        leaves, treedef = jax.tree.flatten(fresh)
        stored = iter(row)
        start = jax.tree.unflatten(
            treedef, [next(stored) if keep else leaf for leaf, keep in zip(leaves, kept, strict=True)]
        )
        report, end = work(self.client, self.loss_fn, state.params, start, broadcast, batches, key)
        return report, [leaf for leaf, keep in zip(jax.tree.leaves(end), kept, strict=True) if keep]

    def batches(self, data: Any, slot: jax.Array, index: jax.Array, options: dict[str, Any]) -> Batches:
        """Return the batches of a participant: of its slot's rows, or of its index among the given ones."""
        if isinstance(data, FederatedData):
            return shuffled(data, data.examples, slot, self.batch_size, self.epochs, self.remainder)
        pick = lambda tree: jax.tree.map(lambda leaf: leaf[index], tree)  # noqa: E731
        mask = None if options["mask"] is None else pick(options["mask"])
        return given(pick(data), options["num_steps"][index], mask)

    def run(
        self,
        state: FederationState,
        data: FederatedData,
        num_rounds: int,
        key: jax.Array | None = None,
        *,
        participants: int | None = None,
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
          evaluate: `(params) -> metrics`, called after each round.

        Returns:
          The new state, and the history: the metrics of `round` and of `evaluate`
          with a leading axis of rounds.
        """
        size = data.num_clients if participants is None else participants
        if not 1 <= size <= data.num_clients:
            raise ValueError(f"Federation: participants={size} should be from 1 to the {data.num_clients} clients")
        state = state if key is None else state._replace(key=key)

        def body(state: FederationState, _: None) -> tuple[FederationState, dict[str, jax.Array]]:
            state, metrics = self.round(state, data, self.sample(state, data.num_clients, size))
            return state, metrics | ({} if evaluate is None else evaluate(state.params))

        return jax.lax.scan(body, state, None, length=num_rounds)

    def sample(self, state: FederationState, num_clients: int, size: int) -> jax.Array:
        """Draw the participants of the next round: int32[size], without replacement."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.round), num_clients)
        return jax.random.permutation(key, num_clients)[:size].astype(jnp.int32)

    def _checked(self, state: FederationState, data: Any, participants: Any) -> jax.Array:
        participants = jnp.asarray(participants, jnp.int32)
        if participants.ndim != 1 or participants.shape[0] == 0:
            raise ValueError(f"Federation: participants of shape {participants.shape}: expected one axis of clients")
        slots = state.bank[0].shape[0] if state.bank else None
        known = data.num_clients if isinstance(data, FederatedData) else slots
        if isinstance(data, FederatedData):
            if slots is not None and slots != data.sizes.shape[0]:
                raise ValueError(f"Federation: data of {data.sizes.shape[0]} slots, and a state made for {slots}")
        else:
            for leaf in jax.tree.leaves(data):
                if leaf.shape[0] != participants.shape[0]:
                    raise ValueError(
                        f"Federation: batches of {leaf.shape[0]} clients for {participants.shape[0]} participants"
                    )
        if not isinstance(participants, jax.core.Tracer):
            chosen = np.asarray(participants)
            wrong = [int(c) for c in chosen if c < 0 or (known is not None and c >= known)]
            if wrong:
                raise ValueError(f"Federation: participants {wrong} are out of range: there are {known} clients")
            if len(set(chosen.tolist())) < len(chosen):
                raise ValueError(f"Federation: participants {chosen.tolist()} are repeated: each takes part once")
        return participants


def _unless(condition: jax.Array, new: Any, old: Any) -> Any:
    def pick(a: Any, b: Any) -> Any:
        return jnp.where(condition, b, a)

    # The bank already holds the old rows of those who did not take part.
    return jax.tree.map(pick, new._replace(bank=[]), old._replace(bank=[]))._replace(bank=new.bank)
