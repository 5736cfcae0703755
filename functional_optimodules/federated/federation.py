"""Federated rounds of many clients as one XLA program.

    Init(params, clients):
        server's state; the bank: what clients keep between rounds, a row a client
    Round(data, participants):
        broadcast = server.collect
        each participant: local steps from the parameters (see `round`)
        server: process(reduced aux); params += server.update(-mean(delta))

The same `Optimizer` objects, bricks and messages as in the stateful facade, with
the participants one by one, all at once, in chunks, or each on the device that
owns it.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import Interval, check_fields, hyperparameter
from functional_optimodules.federated import checks, evaluation, portable, processes, saving
from functional_optimodules.federated.aggregation import Aggregator, MeanAggregator
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.driver import Evaluate, check_rounds, drive, run_piece
from functional_optimodules.federated.loss import LossFn, Metrics
from functional_optimodules.federated.models import LinenLoss, ModelLoss, NnxLoss
from functional_optimodules.federated.options import Execution, History, OnNonfinite, Remainder, Sampling, Weighting
from functional_optimodules.federated.placement import mesh_of, mesh_size
from functional_optimodules.federated.round import drop_out, run_round
from functional_optimodules.federated.state import FederationState, client_model, make_state, with_hyperparameters
from functional_optimodules.groups import Named
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.packing.tree import unpack
from functional_optimodules.types import Json, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Federation:
    """A server and its clients.

    The places of a round, each filled with ordinary bricks:

        client       every local step, on the gradient
        uplink       once a round, on each participant's delta
        aggregation  once a round, of all deltas
        server       once a round, on the aggregate

    `init`, `round` and `run` are pure: they may be jitted, donated and scanned.
    `fit` drives compiled rounds from the host. `encode` and `decode` save a state
    and restore it.

    Attributes:
      loss_fn: `(params, batch) -> loss` or `(params, batch, key) -> loss`, where
        the loss is a scalar or one value per example, alone or in a pair with a
        dict of metrics of either form. A value per example must not depend on the
        other examples of the batch, which may be padding. That of a model with a state,
        such as statistics of batches, is `(params, state, batch[, key]) -> (loss,
        metrics, state)`.
      client: the clients' optimizer.
      server: the server's optimizer. It steps on the aggregate of `params - y_i` as its
        gradient: a learning rate of 1 and no module is federated averaging. The modules
        `fedavgm`, `fedadagrad`, `fedadam` and `fedyogi` are those of the papers; `adam`
        and its kin correct the bias of the moments, start them at 0, and divide by more.
      batch_size: examples in a batch of `FederatedData`; `None` for all of the
        client's.
      epochs: local passes over `FederatedData` in a round.
      steps: local steps in a round, in the place of passes; the data is shuffled anew
        where it ends.
      coin: the probability that a local step is the round's last, by a coin that all
        participants share, in the place of passes: a random number of steps, as ProxSkip
        takes them.
      remainder: what becomes of a last, partial batch: it is filled up and the
        filling masked, dropped, or filled with the pass's first examples.
      weighting: how clients count in the mean: alike, or by their examples.
      sampling: how `run` and `fit` draw participants: uniformly, or as many from
        each device's clients, which evens the devices' loads.
      mapping: how participants are run: `"scan"` one by one, `"vmap"` all at once,
        a number in chunks of that many, a mesh with an axis `clients` each on its
        own device; `None` for what suits the platform.
      on_nonfinite: what becomes of a client that sends a value that is not finite:
        an error after the round (from `check` or `fit`), or it is left out like one
        that dropped out.
      uplink: modules that act on each participant's delta, pointing uphill, once a round:
        instances, names or `(name, config)` pairs. Each client has its own states of
        them.
      aggregation: how deltas become one: an `Aggregator`, its name, or its `(name,
        config)` pair.
      local: patterns over the paths of parameters, and of the model's state, that each
        client keeps for itself: `head/**`, `**/norm*/*`.
      fragments: patterns for each of some parts of the parameters that are shared by
        turns, one in each round, while each client goes on with its own copy of the
        others.
      mixing: how much of its own copy of a fragment a client keeps where the shared one
        comes back.
      sums_only: whether the server may see nothing but sums over clients, as where these
        are summed in secret: other aggregations are refused.
      eval_fn: the loss in its evaluation mode, without dropout and with the model's state
        as it is; `loss_fn` if `None`.

    Raises:
      ValueError: if a client's module with auxiliary variables has no counterpart
        in the server's optimizer, or the reverse; if a brick asks for what its place does
        not know; for options that exclude each other; or for one out of range.

    References:
      McMahan et al., "Communication-efficient learning of deep networks from
      decentralized data", AISTATS 2017, arXiv:1602.05629.
      Reddi et al., "Adaptive federated optimization", ICLR 2021, arXiv:2003.00295.
    """

    loss_fn: LossFn
    client: Optimizer
    server: Optimizer = dataclasses.field(default_factory=lambda: Optimizer(1.0))
    batch_size: int | None = hyperparameter(default=None, within="[1, inf)")
    epochs: int = hyperparameter(default=1, within="[1, inf)")
    remainder: Remainder = "mask"
    weighting: Weighting = "uniform"
    sampling: Sampling = "uniform"
    mapping: Execution = dataclasses.field(default=None, metadata={"within": Interval("[1, inf)")})
    on_nonfinite: OnNonfinite = "error"
    steps: int | None = hyperparameter(default=None, within="[1, 2147483647]")
    coin: float | None = hyperparameter(default=None, within="(0, 1]")
    uplink: tuple[OptiModule, ...] = ()
    aggregation: Aggregator = dataclasses.field(default_factory=MeanAggregator)
    local: tuple[str, ...] = ()
    fragments: tuple[tuple[str, ...], ...] = ()
    mixing: float = hyperparameter(default=0.0, within="[0, 1)")
    sums_only: bool = False
    eval_fn: LossFn | None = None

    if TYPE_CHECKING:  # what is accepted is more than what is stored

        def __init__(
            self,
            loss_fn: LossFn,
            client: Optimizer,
            server: Optimizer = Optimizer(1.0),  # noqa: B008
            batch_size: int | None = None,
            epochs: int = 1,
            remainder: Remainder = "mask",
            weighting: Weighting = "uniform",
            sampling: Sampling = "uniform",
            mapping: Execution = None,
            on_nonfinite: OnNonfinite = "error",
            steps: int | None = None,
            coin: float | None = None,
            uplink: Sequence[OptiModule | Named] = (),
            aggregation: Aggregator | Named = "mean",
            local: Sequence[str] = (),
            fragments: Sequence[Sequence[str]] = (),
            mixing: float = 0.0,
            sums_only: bool = False,
            eval_fn: LossFn | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_fields(self, "Federation", ValueError)
        for side in ("client", "server"):  # rounds pack by themselves, for a client's steps and not for each
            object.__setattr__(self, side, dataclasses.replace(getattr(self, side), packed=False))
        mesh_size(mesh_of(self.mapping))
        checks.require_counterparts(self.client, self.uplink, self.server)
        checks.require_known(self.client, self.uplink, self.server)
        checks.require_together(self)

    @classmethod
    def from_nnx(
        cls, model: Any, loss: Callable[..., PyTree], client: Optimizer, *args: Any, wrt: Any = None, **options: Any
    ) -> Self:
        """Make the federation of an `nnx.Module` as it is: `init` takes the model, `model` gives it back.

        Its parameters are trained, its other state is averaged, its dropout draws from
        the round's key. It is evaluated in its evaluation mode, `model.eval()`.

        Args:
          model: the model, which is not changed.
          loss: `(model, batch) -> loss` or `(loss, metrics)`, each a scalar or one value
            per example.
          client: the clients' optimizer.
          *args: as for `Federation`.
          wrt: the filter of what is trained; `nnx.Param` if `None`.
          **options: as for `Federation`.

        Raises:
          TypeError: if the model is no `nnx.Module`.
        """
        from flax import nnx

        made = NnxLoss.of(model, loss, nnx.Param if wrt is None else wrt)
        return cls(made, client, *args, **{"eval_fn": made.evaluating(model), **options})

    @classmethod
    def from_linen(
        cls,
        module: Any,
        loss: Callable[..., PyTree],
        client: Optimizer,
        *args: Any,
        rngs: Sequence[str] = ("dropout",),
        **options: Any,
    ) -> Self:
        """Make the federation of a linen module as it is: `init` takes its variables, `model` gives them back.

        Its `params` are trained, its other collections averaged.

        Args:
          module: the module.
          loss: `(apply, batch) -> loss` or `(loss, metrics)`, each a scalar or one value
            per example, where `apply` is the module's without variables and keys. One with
            an argument `train` is told whether it is in training.
          client: the clients' optimizer.
          *args: as for `Federation`.
          rngs: the random streams that the module draws from.
          **options: as for `Federation`.
        """
        if not hasattr(module, "apply"):
            raise TypeError(f"Federation: expected a linen module, not {type(module).__name__}")
        made = LinenLoss(module, loss, tuple(rngs), train=True)
        evaluated = dataclasses.replace(made, train=False)
        return cls(made, client, *args, **{"eval_fn": evaluated, **options})

    def model(self, state: FederationState, client: int | None = None) -> Any:
        """Return the model of a state: the shared one, or a client's, with what it keeps for itself.

        Args:
          state: the federation's state.
          client: the client; `None` for the server's, in which what clients keep for
            themselves is what they start from.

        Returns:
          The parameters; the pair of these and of the model's state, where it has one; the
          `nnx.Module` or the linen variables, where the federation was made from such.

        Raises:
          ValueError: if there is no such client.
        """
        # Copies: rounds that donate the state take its memory.
        params, stats = jax.tree.map(jnp.copy, client_model(self, state, client))
        if isinstance(self.loss_fn, ModelLoss):
            return self.loss_fn.put_together(params, stats)
        return params if stats is None else (params, stats)

    def init(
        self, params: Params, clients: int | FederatedData, seed: int = 0, *, stats: PyTree = None
    ) -> FederationState:
        """Make the state of a federation, before any round.

        With several processes, all take the parameters and keys of process 0.

        Args:
          params: the parameters, a pytree of arrays, which are copied. Nothing but
            what is trained: no PRNG keys, counters or statistics of batches. Where the
            federation was made `from_nnx`, the model itself; where `from_linen`, its
            variables.
          clients: their number, or their data, with which the state is laid out.
          seed: where all draws of batches and participants come from.
          stats: the model's state that is no parameter, where it has one. It is averaged
            over the participants as the parameters are, but for what is `local`.

        Raises:
          ValueError: if there is no client, or one has less than a batch where
            partial ones are dropped; if a server's module was given a smaller
            `num_clients`; or for a parameter that cannot be trained.
        """
        return make_state(self, params, clients, seed, stats)

    def round(
        self,
        state: FederationState,
        data: PyTree,
        participants: ArrayLike,
        *,
        num_steps: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        dropped: ArrayLike | None = None,
    ) -> tuple[FederationState, Metrics]:
        """Run one round. Pure: it may be jitted, donated and scanned.

        Args:
          state: the federation's state.
          data: `FederatedData`, or a pytree of batches of S participants x K steps
            x B examples, which every device gets.
          participants: int32[S], different clients, in any order.
          num_steps: int32[S], how many of the K given steps each takes; all if `None`.
          mask: bool[S, K, B], which of the given examples are real; all if `None`.
            Steps without a real example are not taken.
          weights: float[S], >= 0 and not all 0, how much each counts in the mean; by
            `weighting` if `None`.
          dropped: bool[S], who drops out in mid-round: of its contribution and its
            state nothing remains.

        Returns:
          The new state, and metrics: `round`, and by participant `participants`,
          `loss` and the loss's metrics, averaged over the local steps, `examples`
          (how many the client has), `finite` (whether all that it sent is),
          `joined` (whether it took part to the end), and what its bricks say of
          themselves, as `uplink/top-k/bits`; of the server's bricks a scalar, as
          `server/adaptive-clipping/bound`.

        Raises:
          ValueError: if the state was made for another federation, participants are
            out of range or repeated, or an argument is not of their number. Values
            are checked where they are not traced.
        """
        return run_round(self, state, data, checks.Given(jnp.asarray(participants), num_steps, mask, weights, dropped))

    def run(
        self,
        state: FederationState,
        data: FederatedData,
        num_rounds: int,
        key: jax.Array | None = None,
        *,
        participants: int | None = None,
        weights: ArrayLike | None = None,
        drop_rate: ArrayLike | None = None,
        evaluate: Evaluate | None = None,
    ) -> tuple[FederationState, Metrics]:
        """Run rounds, each with a fresh sample of participants. Pure, as `round` is.

        Args:
          state: the federation's state.
          data: the clients' data.
          num_rounds: how many rounds.
          key: replaces the state's key, for other draws.
          participants: how many clients to sample in a round, without
            replacement; all if `None`.
          weights: float[N], >= 0 and not all 0, how much each client counts in the
            mean; by `weighting` if `None`.
          drop_rate: the probability with which a participant drops out in mid-round.
          evaluate: `(params) -> metrics`, called after each round. Where the model has a
            state, it is given what `model` returns.

        Returns:
          The new state, and the history: the metrics of `round` and of `evaluate`
          with a leading axis of rounds.

        Raises:
          ValueError: as `round` does, or if there are not that many clients to
            sample from.
        """
        state = state if key is None else state._replace(key=key)
        advance = self.rounds(data, participants, weights, drop_rate, evaluate)
        return jax.lax.scan(lambda state, _: advance(state), state, None, length=num_rounds)

    def rounds(
        self,
        data: FederatedData,
        participants: int | None,
        weights: ArrayLike | None,
        drop_rate: ArrayLike | None,
        evaluate: Evaluate | None,
    ) -> Callable[[FederationState], tuple[FederationState, Metrics]]:
        """Return the function from a state to the next that `run` and `fit` repeat."""
        size, counts = checks.check_sample(data, participants, weights)
        checks.check_rate(drop_rate)

        def advance(state: FederationState) -> tuple[FederationState, Metrics]:
            chosen = self.sample(state, data, size)
            dropped = None if drop_rate is None else drop_out(state, size, jnp.asarray(drop_rate, jnp.float32))
            heavy = None if counts is None else counts[chosen]
            state, metrics = self.round(state, data, chosen, weights=heavy, dropped=dropped)
            found = {} if evaluate is None else evaluate(self.evaluated(state))
            for name in sorted(metrics.keys() & found.keys()):
                raise ValueError(f"Federation: `evaluate` returns a metric {name!r}, which a round has too: rename it")
            return state, metrics | found

        return advance

    def evaluated(self, state: FederationState) -> Any:
        """Return what `evaluate` of `run` and `fit` is given: the parameters, or the model where it has a state."""
        return state.params if state.stats is None else self.model(state)

    def sample(self, state: FederationState, data: FederatedData, size: int) -> jax.Array:
        """Draw the participants of the next round: int32[size], without replacement."""
        return data.sample(state.key, state.round, size, by_shard=self.sampling == "by-device")

    def evaluate(
        self,
        model: Params | FederationState,
        data: FederatedData,
        *,
        batch_size: int | None = None,
        key: jax.Array | None = None,
        steps: int = 0,
        train: FederatedData | None = None,
    ) -> Metrics:
        """Evaluate a model on each client's data, by one compiled program.

        Each example counts once, whatever `remainder` says. Where a batch is partial and
        the loss, or a metric, is a scalar, each example is evaluated as a batch of one.

        Args:
          model: parameters, or a Flax model, the same for all clients; or the federation's
            state, in which each client has its own part of the model, if it keeps one.
          data: the clients' data.
          batch_size: examples in a batch; all of the client's if `None`.
          key: what a loss that takes a key gets one of, by client and batch.
          steps: how many local steps each client takes first, as it would in a round, of
            which nothing remains.
          train: the data to take these on; `data` if `None`.

        Returns:
          `loss` and the loss's metrics by name, each float32[N].

        Raises:
          ValueError: if the state was made for another federation, the data is not laid
            out as its clients are, or there are no local steps to take.
        """
        key = jax.random.key(0) if key is None else key
        if not isinstance(model, FederationState):
            model = self.init(model, data) if isinstance(self.loss_fn, ModelLoss) else unpack(model)
        return evaluation.evaluate(self, model, data, batch_size, key, steps, train)

    def fit(
        self,
        state: FederationState,
        data: FederatedData,
        num_rounds: int,
        *,
        participants: int | None = None,
        weights: ArrayLike | None = None,
        drop_rate: ArrayLike | None = None,
        evaluate: Evaluate | None = None,
        every: int = 10,
        callback: Callable[[FederationState, History], object] | None = None,
        progress: bool = False,
    ) -> tuple[FederationState, History]:
        """Run rounds from the host, in compiled pieces. The state is donated: it can no longer be used.

        The numbers are the same, bit by bit, however the rounds are cut into pieces
        and calls.

        Args:
          state: the federation's state.
          data: the clients' data.
          num_rounds: how many more rounds.
          participants: as for `run`.
          weights: as for `run`.
          drop_rate: as for `run`.
          evaluate: as for `run`.
          every: rounds of a piece.
          callback: `(state, history) -> stop`, called after each piece with the
            piece's history. It may save the state (`encode`), but not keep it: the
            next piece takes its memory. Where it returns `True`, this piece is the last.
          progress: whether to show a progress bar, which needs `tqdm`.

        Returns:
          The new state, and the history, of NumPy arrays with a leading axis of rounds.

        Raises:
          FloatingPointError: if a client sent a value that is not finite, unless
            `on_nonfinite="skip"`; it names the round and the clients.
          RuntimeError: if another process of the federation is lost.
          ValueError: as `run` does.
        """
        check_rounds(num_rounds, every, callback)
        _, counts = checks.check_sample(data, participants, weights)
        checks.check_rate(drop_rate)
        drops = None if drop_rate is None else jnp.float32(drop_rate)

        def advance(state: FederationState, count: int) -> tuple[FederationState, History]:
            with processes.naming_lost_peers():
                state, rows = run_piece(
                    self, participants, evaluate, every, state, data, counts, drops, np.int32(count)
                )
                history = jax.tree.map(lambda values: np.asarray(values)[:count], rows)
            self.check(history)
            return state, history

        return drive(advance, state, num_rounds, every, callback, progress)

    def check(self, history: Mapping[str, ArrayLike]) -> None:
        """Check what clients sent in rounds that were run.

        Args:
          history: the metrics of `round` or `run`.

        Raises:
          FloatingPointError: if a client sent a value that is not finite, unless
            `on_nonfinite="skip"`; it names the round and the clients.
        """
        if self.on_nonfinite == "error":
            checks.require_finite(history)

    def encode(self, state: FederationState) -> dict[str, Json]:
        """Write a state, with what must not change of the federation, as JSON values.

        With several processes, each writes its own clients' rows.
        """
        return saving.encode(self, state)

    def decode(self, payload: Json, like: FederationState, *, changed: Collection[str] = ()) -> FederationState:
        """Read what `encode` wrote.

        Args:
          payload: the JSON values.
          like: a state of this federation, as `init` makes it: the new one is laid
            out as it is, on any number of devices. It is left intact.
          changed: fields in which this federation may differ from the saved one, as the
            errors name them: `client.lrate`, `batch_size`. What is kept must fit all the same.

        Raises:
          KeyError: if something is missing or unknown.
          ValueError: if the saved federation differs in another field, which is named,
            or an array is not as expected.
        """
        return saving.decode(self, payload, like, changed)

    def with_hyperparameters(
        self,
        state: FederationState,
        client: Mapping[str, float | jax.Array] | None = None,
        server: Mapping[str, float | jax.Array] | None = None,
    ) -> FederationState:
        """Return a state with other values of live hyper-parameters, for which nothing is compiled anew.

        Args:
          state: the state, which is left intact.
          client: numbers by path, for all clients.
          server: numbers by path, for the server.

        Raises:
          TypeError, ValueError: as `Optimizer.with_hyperparameters` does.
        """
        return with_hyperparameters(self, state, client or {}, server or {})

    def to_arrays(self, state: FederationState) -> dict[str, PyTree]:
        """Return a state as plain arrays, for a checkpointer: of any devices, and of no packed trees and PRNG keys.

        Args:
          state: the federation's state, which is left intact.

        Returns:
          `num_clients`, `round`, `key` (its words), `params`, `server`, and `bank`, what each client keeps, with
          a leading axis of clients; `stats` and `aggregation`, where there is such. Rows of clients are spread
          over the devices if their number is a multiple of that of the devices, and otherwise on each.
        """
        return portable.to_arrays(self, state)

    def from_arrays(self, arrays: PyTree, like: FederationState) -> FederationState:
        """Return the state of what `to_arrays` gave.

        Args:
          arrays: what it gave, arrays of JAX or NumPy, in the same containers or in dicts.
          like: a state of this federation, as `init` makes it: the new one is laid out as it is, on any number of
            devices. It is left intact.

        Raises:
          ValueError: if an array is missing, unknown, or of another shape or dtype, which is named by its path; or
            there are other clients.
        """
        return portable.from_arrays(self, arrays, like)
