"""The server of a federation between machines.

    Broadcast(clients): to each the parameters, auxiliary variables, and which of its reports count
    Receive(client, report): checked, and kept until the round ends
    Finish: the step of a `Federation`'s round, over what arrived; each of these reports counts

It takes the same steps as a simulated round: `share`, `totals_of` and `step_server`. A report
that is lost, late, repeated or refused is one that did not arrive: see `delivery`.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.aux_var import FromClients
from functional_optimodules.config.fields import require_keys
from functional_optimodules.config.outside import quote
from functional_optimodules.federated import sampling, saving
from functional_optimodules.federated.aggregation import WeightedSum
from functional_optimodules.federated.checks import Given
from functional_optimodules.federated.loss import RESERVED, Metrics
from functional_optimodules.federated.options import History
from functional_optimodules.federated.participant import Sent, Shared, learns, totals_of
from functional_optimodules.federated.protocol.alone import Alone, alone
from functional_optimodules.federated.protocol.coding import Coded
from functional_optimodules.federated.protocol.delivery import Call, Gathering, Ledger, StaleMessageError, draw_ticket
from functional_optimodules.federated.protocol.message import Carried, Message, opened
from functional_optimodules.federated.protocol.travel import Down, Shapes, Up
from functional_optimodules.federated.round import share, step_server
from functional_optimodules.federated.sides import sides_of
from functional_optimodules.federated.state import FederationState, start
from functional_optimodules.federated.totals import Totals
from functional_optimodules.optimizer import Optimizer, OptimizerState
from functional_optimodules.types import HostArray, Json, Params, PyTree
from functional_optimodules.wire.checkpoint import Checkpoint, write_checkpoint
from functional_optimodules.wire.limits import limits
from functional_optimodules.wire.paths import Specs, by_path

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation

_MOST_METRICS = 64


class Contribution(NamedTuple):
    """What a client has given, of what the server's bricks may have to forget.

    Attributes:
      delta: the sum of its deltas; `None` if no brick recalls it.
      auxes: its auxiliary variables, merged, of those bricks that recall them.
    """

    delta: PyTree
    auxes: dict[str, FromClients]

    @classmethod
    def of(cls, up: Up, server: Optimizer) -> "Contribution":
        """Return what of a report the server's bricks may have to forget."""
        channels = server.channels()
        auxes = {name: aux for name, aux in up.auxes.items() if "aux" in channels[name].recalls()}
        return cls(up.delta if "delta" in server.recalls() else None, auxes)

    def add(self, other: "Contribution") -> "Contribution":
        """Return what both come to."""
        auxes = {name: aux.merge(other.auxes[name]) for name, aux in self.auxes.items()}
        return Contribution(jax.tree.map(jnp.add, self.delta, other.delta), auxes)


class Arrived(NamedTuple):
    """A report that arrived.

    Attributes:
      lost: whether its client says that it has lost its state.
      up: what it holds; `None` if that is lost, or not finite.
      examples: how many the client has.
      metrics: what it measured.
    """

    lost: bool
    up: Up | None
    examples: float
    metrics: Mapping[str, float]


@dataclass
class Round:
    """A round under way.

    Attributes:
      reports: those that arrived in this pass, and who is to report.
      weights: how much each counts, where that is given.
      server: the server's state in this round.
      shared: what all participants share.
      common: of what they are sent, what is the same for all, as it travels.
    """

    reports: Gathering[Arrived]
    weights: Mapping[str, float] | None
    server: OptimizerState
    shared: Shared
    common: Mapping[str, Coded]


@dataclass(frozen=True)
class Bounds:
    """What of a client's report is refused, whatever else it says.

    Attributes:
      most_examples: how many examples a client may say it has.
      most_bytes: how many bytes a message may have; `None` for twice what an uncompressed report takes, and 1 MiB.
    """

    most_examples: float = math.inf
    most_bytes: int | None = None


class Server(Alone):
    """The server of a federation between machines.

        server = Server(federation, params, ["a", "b", "c"])
        while server.round < 10:
            for name, message in server.broadcast().items():
                ...                                   # to the client, by any means; and back
                server.receive(name, report)
            history = server.finish_round()

    Several threads may call it: one call waits for another.

    Attributes:
      federation: what it was made from; how that maps participants does not matter here.
      bounds: what is refused.
      ledger: which reports count.
      names: the clients' names, by number.
    """

    def __init__(
        self,
        federation: "Federation",
        params: Params,
        clients: int | Sequence[str],
        seed: int = 0,
        *,
        stats: PyTree = None,
        bounds: Bounds | None = None,
    ) -> None:
        """Make a server, before any round.

        Args:
          federation: the federation.
          params: the parameters, as for `Federation.init`.
          clients: the names of all clients, in the order of their numbers; or how many there are, whose
            names then become known as they take part.
          seed: as for `Federation.init`.
          stats: likewise.
          bounds: what is refused of a client's report.

        Raises:
          ValueError: as `Federation.init` does; or if a name is repeated.
        """
        super().__init__()
        names = [] if isinstance(clients, int) else list(clients)
        if len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"Server: clients={quote(names)} should be different names")
        total = clients if isinstance(clients, int) else len(names)
        if isinstance(clients, bool) or total < 1:
            raise ValueError(f"Server: clients={clients!r} should be their names, or their number of at least 1")
        self.federation = dataclasses.replace(federation, mapping=None)
        self.bounds = bounds or Bounds()
        self.ledger: Ledger[Contribution] = Ledger()
        self.names: list[str] = names
        state, _, _ = start(self.federation, params, total, seed, stats)
        self._programs = _programs(self.federation, Specs.of((state.params, state.stats)))
        kept = self.federation.aggregation.init(self._programs.sides.params.shared(state.params))
        self.state: FederationState = state._replace(packing=None, aggregation=kept)
        shapes = self._programs.shapes
        # What one begins anew from, however late.
        self._initial = None if shapes.down.initial is None else (state.params, state.stats)
        # For bricks that take in what came of a report: the round after each client's, and its parameters.
        self._following: dict[str, int] = {}
        self._after: dict[int, Params] = {}
        self._open: Round | None = None
        self._era = draw_ticket()
        plain = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.report.leaves)
        self._most_bytes = self.bounds.most_bytes or 2 * plain + 2**20

    @property
    def round(self) -> int:
        """The number of rounds that were finished."""
        return int(self.state.round)

    @property
    def params(self) -> Params:
        """The parameters; of those that each client keeps for itself, what one starts from."""
        return self.model()

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""
        return int(self.state.num_clients)

    @alone
    def model(self) -> Any:
        """Return the model; see `Federation.model`."""
        return self.federation.model(self.state)

    @alone
    def sample(self, size: int) -> list[str]:
        """Draw the participants of the next round, as `Federation.fit` does.

        Raises:
          ValueError: if there are fewer clients, or not all names are known.
        """
        total = self.num_clients
        if not isinstance(size, int) or not 1 <= size <= total:
            raise ValueError(f"Server: size={size!r} should be from 1 to the {total} clients")
        if len(self.names) < total:
            raise ValueError(
                f"Server: of {total} clients, {len(self.names)} are known by name: give `clients` their names"
            )
        drawn = sampling.draw(sampling.round_key(self.state.key, self.state.round, total), total, size)
        return [self.names[index] for index in np.asarray(drawn).tolist()]

    @alone
    def broadcast(
        self, clients: Collection[str] | None = None, weights: Mapping[str, float] | None = None
    ) -> dict[str, Message]:
        """Begin a round, and return what each participant is to be sent; or that again, while the round is under way.

        A method whose clients need the participants' mean gradient (Mime) has two passes: after the first,
        `finish_round` ends no round, and the next broadcast is to the same clients.

        Args:
          clients: the participants; all whose names are known if `None`. While a round is under way, some of its.
          weights: how much each counts, by name; as the federation says if `None`.

        Returns:
          The messages, by client.

        Raises:
          ValueError: if a name is repeated or unknown, there are more names than clients, or none; if a weight
            is missing, negative or not finite, or all are 0; or if a round is under way with others.
        """
        if self._open is not None:
            there = self._open.reports.clients
            chosen = there if clients is None else tuple(clients)
            if others := [name for name in chosen if name not in there]:
                raise ValueError(
                    f"Server: round {self.round} is under way, and {quote(others)} take no part in it: `finish_round` "
                    "first"
                )
            return {name: self._message(name) for name in chosen}
        chosen = tuple(self.names) if clients is None else tuple(clients)
        if not chosen or len(set(chosen)) < len(chosen) or not all(isinstance(name, str) for name in chosen):
            raise ValueError(f"Server: clients={quote(list(chosen))} should be different names, at least one")
        new = [name for name in chosen if name not in self.names]
        if len(self.names) + len(new) > self.num_clients:
            raise ValueError(
                f"Server: {quote(new)} are new, and of the {self.num_clients} clients {len(self.names)} are known: "
                f"{quote(self.names)}"
            )
        if weights is not None:
            values = np.array([weights.get(name, math.nan) for name in chosen], float)
            if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
                raise ValueError(f"Server: weights={quote(dict(weights))} should be >= 0, one for each, and not all 0")
        self.names += new
        server, shared = self._programs.begin(self.state)
        call = Call(self._era, self.round, draw_ticket(), first=self._programs.shapes.passes == 2)
        if learns(self.federation) and self.round in self._following.values():
            self._after[self.round] = shared.params
        self._open = Round(Gathering(call, chosen), weights, server, shared, _common(shared))
        return {name: self._message(name) for name in chosen}

    @alone
    def save(self, folder: str | Path) -> None:
        """Keep the server in a folder, in the place of what it had: the old or the new, whenever this process dies.

        Of a round under way nothing is kept: it begins anew, and what was sent in it is stale.

        Raises:
          OSError: if the disk is full, or fails; the folder has what it had before.
        """
        about = {
            "federation": saving.describe(self.federation),
            "names": list(self.names),
            "num_clients": self.num_clients,
            "taken": dict(self.ledger.taken),
            "gave": sorted(self.ledger.given),
            "following": dict(self._following),
        }
        write_checkpoint(folder, "server", about, self._saved(sorted(self.ledger.given), self._after))

    def _saved(self, gave: Sequence[str], after: Collection[int]) -> dict[str, PyTree]:
        """Return what is kept of a server, to which some clients gave something."""
        state = self.state
        whole = {
            "params": state.params,
            "server": state.server,
            "stats": state.stats,
            "aggregation": state.aggregation,
            "round": state.round,
            "key": state.key,
            "initial": self._initial,
            "after": {str(number): self._after.get(number, self._programs.shared(state.params)) for number in after},
            "given": {name: self.ledger.given.get(name, self._programs.no_contribution()) for name in gave},
        }
        return {name: tree for name, tree in whole.items() if jax.tree.leaves(tree)}

    @alone
    def load(self, folder: str | Path, *, only: Sequence[str] = (), changed: Collection[str] = ()) -> None:
        """Take over what was saved in a folder. A round under way is given up.

        Args:
          folder: the folder.
          only: patterns over the paths of what to take over, such as `params/**` or
            `server/modules/adam/**`: the rest stays, who the clients are and what they gave included.
          changed: fields in which the federation may differ from the saved one, as the errors name them.

        Raises:
          FileNotFoundError: if there is no checkpoint.
          ValueError: if it is damaged, of another federation, or of other shapes: it names each difference.
            The server stays as it was.
        """
        what = f"Server: the checkpoint in {folder}"
        found = Checkpoint.open(folder)
        about = found.about
        if found.kind != "server":
            raise ValueError(f"{what} is that of a {quote(found.kind)}")
        require_keys(about, ("federation", "names", "num_clients", "taken", "gave", "following"), what)
        if not only:
            saving.require_alike(about["federation"], self.federation, changed, what)
            if about["num_clients"] != self.num_clients:
                raise ValueError(f"{what} is of {quote(about['num_clients'])} clients: expected {self.num_clients}")
        names, taken, gave, following = (about[name] for name in ("names", "taken", "gave", "following"))
        if (
            not _are_names(names)
            or not _are_names(gave)
            or not set(gave) <= set(names)
            or len(names) > self.num_clients
        ):
            raise ValueError(f"{what} has clients named {quote(names)}, of which {quote(gave)} gave something")
        for told in (taken, following):
            if not isinstance(told, Mapping) or not all(name in names and type(t) is int for name, t in told.items()):
                raise ValueError(f"{what} has {quote(told)}: expected a number for each of some of its clients")
        # Of a round that was not begun yet there are no parameters.
        after = {number for number in following.values() if f"after/{number}" in _folders(found.arrays)}
        tree = found.tree(self._saved(*(([], ()) if only else (gave, after))), tuple(only))
        tree = jax.tree.map(jnp.asarray, tree)
        self.state = self.state._replace(**{name: tree[name] for name in self.state._fields if name in tree})
        if not only:
            self.names = list(names)
            self._initial = tree.get("initial")
            self.ledger = Ledger(dict(taken), tree.get("given", {}))
            self._following = dict(following)
            self._after = {int(number): params for number, params in tree.get("after", {}).items()}
        self._open, self._era = None, draw_ticket()

    def _message(self, name: str) -> Message:
        """Return what a participant is sent."""
        under_way = self._open
        assert under_way is not None
        taken, index = self.ledger.tell(name), self.names.index(name)
        own = {name: aux.narrow(index) for name, aux in under_way.shared.broadcast.items() if aux.is_per_client()}
        weight = None if under_way.weights is None else jnp.float32(under_way.weights[name])
        initial = None if taken else self._initial
        following = self._following.get(name, self.round)
        after = self._after.get(following) if following < self.round else None
        mine = Message.of({}, _NOTHING._replace(broadcast=own, weight=weight, after=after, initial=initial))
        call = under_way.reports.call
        about: dict[str, Json] = {
            "kind": "first" if call.first else "round",
            "era": call.era,
            "round": call.round,
            "id": call.id,
            "to": name,
            "client": index,
            "clients": self.num_clients,
            "taken": taken,
        }
        return Message(about, {**under_way.common, **mine.arrays})

    @alone
    def receive(self, name: str, message: Carried) -> bool:
        """Take in what a client reports. Of several reports of a client in a round, the last one stands.

        Args:
          name: who sent it, as whatever carries messages knows.
          message: the report, in any form.

        Returns:
          Whether it was new: what arrives twice is taken in once.

        Raises:
          StaleMessageError: if it is of another round than that under way; a `ValueError`.
          FloatingPointError: if it has a number that is not finite, unless `on_nonfinite="skip"`: it then
            takes part, and does not join.
          KeyError, TypeError, ValueError: if it is malformed, is another's, or exceeds the bounds. Whatever
            is refused did not arrive.
        """
        what = f"Server: the report of {quote(name)}"
        size = len(message) if isinstance(message, bytes | bytearray) else 0
        if size > self._most_bytes:
            raise ValueError(f"{what} has {size} bytes: expected at most {self._most_bytes}")
        report = opened(message)
        if self._open is None:
            raise StaleMessageError(
                f"{what} is of round {quote(report.about.get('round'))}: expected none, as none is under way"
            )
        reports = self._open.reports
        reports.require(name, report.about, what)
        ticket, examples, metrics = _read_about(report, what, self.bounds)
        lost, up = report.about["kind"] == "lost", None
        if not lost:
            shapes = self._programs.shapes
            up = report.tree(shapes.gradient if reports.call.first else shapes.report, what)
            bound = limits().magnitude
            beyond = {path: most for path, leaf in by_path(up).items() if (most := _beyond(leaf, bound))}
            for path, most in beyond.items():
                if math.isfinite(most):
                    raise ValueError(f"{what}: {path!r} has {most}: expected at most {bound}, which `set_limits` sets")
                if self.federation.on_nonfinite == "error":
                    raise FloatingPointError(
                        f"{what}: {path!r} has values that are not finite: lower the learning rates, look at its "
                        "data, or leave such clients out with on_nonfinite='skip'"
                    )
            if beyond:
                up = None
            else:
                given = self.ledger.given.get(name)
                for aux_name, aux in up.auxes.items():
                    _require_marks(aux, None if given is None else given.auxes.get(aux_name), f"{what}, {aux_name!r}")
        return reports.stand(name, ticket, Arrived(lost, up, examples, metrics))

    @alone
    def finish_round(self) -> History | None:
        """End the round with what arrived, and let each report count that is in it.

        Returns:
          What is known of the round, as `Federation.round` returns it, of NumPy arrays: those who did
          not report have dropped out. `None` after the first of two passes, which ends no round.

        Raises:
          ValueError: if no round is under way.
        """
        under_way = self._open
        if under_way is None:
            raise ValueError("Server: no round is under way: `broadcast` begins one")
        reports = under_way.reports
        if reports.call.first and (gradient := self._mean_gradient(under_way)) is not None:
            under_way.shared = under_way.shared._replace(mean_gradient=gradient)
            under_way.common = _common(under_way.shared)
            # Who said in this pass that it has lost its state has said it for the round.
            lost = {name: told for name, told in reports.arrived.items() if told[1].lost}
            under_way.reports = Gathering(dataclasses.replace(reports.call, first=False), reports.clients, lost)
            return None
        history = self._step(under_way)
        self._open = None
        return history

    def _mean_gradient(self, under_way: Round) -> PyTree:
        """Return the mean of the gradients that arrived; `None` if there is none."""
        total: WeightedSum | None = None
        for name, one in _in_order(under_way.reports):
            if one is not None and one.up is not None:
                weighted = self._programs.weigh(one.up.delta, self._weight(under_way, name, one))
                total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
        return None if total is None else total.mean()

    def _weight(self, under_way: Round, name: str, one: Arrived) -> np.float32:
        if under_way.weights is not None:
            return np.float32(under_way.weights[name])
        return np.float32(1 if self.federation.weighting == "uniform" else one.examples)

    def _step(self, under_way: Round) -> History:
        programs, ledger, state, server = self._programs, self.ledger, self.state, under_way.server
        reports = _in_order(under_way.reports)
        gone = [name for name, one in reports if one is not None and one.lost]
        if gone and learns(self.federation):
            # What such bricks have sums to zero over the clients: where one has lost its own, all begin anew.
            gone = [*gone, *ledger.taken.keys() - set(gone)]
        for name in gone:
            if name in ledger.given:
                server, old = (programs.forget(each, ledger.given[name]) for each in (server, state.server))
                state = state._replace(server=old)
        totals = programs.nothing(len(reports), state.aggregation)
        for index, (name, one) in enumerate(reports):
            if one is not None and one.up is not None:
                numbers = self._weight(under_way, name, one), np.float32(one.examples), self.names.index(name), index
                totals = programs.add(totals, one.up, *numbers, state.aggregation)
        # Nothing is noted before the step is done: a ledger that is half written would be wrong for good.
        after, told = jax.block_until_ready(programs.step(state, server, totals, under_way.shared))
        history = self._history(under_way, told)
        recalled = self.federation.server.recalls()
        for name in gone:
            ledger.forget(name)
            self._following.pop(name, None)
        for name, (ticket, one) in under_way.reports.arrived.items():
            if one.up is not None and name not in gone:
                given = Contribution.of(one.up, self.federation.server) if recalled else None
                # Copies, for what arrived may be a view of a whole message.
                ledger.take(name, ticket, jax.tree.map(jnp.array, given), Contribution.add)
                self._following[name] = self.round + 1
        needed = set(self._following.values()) if learns(self.federation) else set[int]()
        self._after = {number: params for number, params in self._after.items() if number in needed}
        self.state = after
        return history

    def _history(self, under_way: Round, told: Mapping[str, jax.Array]) -> History:
        reports = under_way.reports
        each = [one for _, one in _in_order(reports)]
        names = sorted({name for one in each if one is not None for name in one.metrics})
        metrics = {name: [0.0 if one is None else one.metrics.get(name, 0.0) for one in each] for name in names}
        return {
            **{name: np.array(values, np.float32) for name, values in metrics.items()},
            "examples": np.array([0 if one is None else one.examples for one in each], np.float32),
            "round": np.asarray(np.int32(reports.call.round)),
            "participants": np.array([self.names.index(name) for name in reports.clients], np.int32),
            "finite": np.array([one is None or one.up is not None or one.lost for one in each]),
            "joined": np.array([one is not None and one.up is not None for one in each]),
            **{name: np.asarray(value) for name, value in told.items()},
        }


_NOTHING = Down(None, None, {}, None, None, None, None, None, None, None)


def _common(shared: Shared) -> Mapping[str, Coded]:
    """Return what all participants are sent alike, as it travels."""
    down = _NOTHING._replace(
        params=shared.params,
        stats=shared.stats,
        broadcast={name: aux for name, aux in shared.broadcast.items() if not aux.is_per_client()},
        key=jax.random.key_data(shared.key),
        coin=shared.coin,
        steps=shared.steps,
        mean_gradient=shared.mean_gradient,
    )
    return Message.of({}, down).arrays


def _in_order(reports: Gathering[Arrived]) -> list[tuple[str, Arrived | None]]:
    """Return what arrived from each participant, in their order, whatever that of arrival was."""
    return [(name, reports.arrived[name][1] if name in reports.arrived else None) for name in reports.clients]


class _Programs:
    """The compiled parts of a server, for one federation and one kind of parameters.

    Attributes:
      sides: both sides, of which nothing is packed here.
      shapes: what messages must hold.
      begin: `(state) -> server, shared`.
      weigh: `(delta, weight) -> WeightedSum`.
      add: `(totals, up, weight, examples, who, index, kept) -> totals`; the totals are donated.
      step: `(state, server, totals, shared) -> state, metrics`.
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

    def shared(self, params: Params) -> Params:
        """Return what is shared of parameters."""
        return self.sides.params.shared(params)

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
    ) -> tuple[FederationState, Metrics]:
        known = {"coin": shared.coin}
        if self.shapes.passes == 2:
            gradient = self.shapes.gradient.tree(self.shapes.gradient.by_path).delta
            zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), gradient)
            known["mean_gradient"] = zeros if shared.mean_gradient is None else shared.mean_gradient
        return step_server(self.federation, self.sides, state, server, totals, known)

    def no_contribution(self) -> Contribution:
        """Return what a client has given that gave nothing."""
        up = self.shapes.report.tree(self.shapes.report.by_path)
        like = Contribution.of(up, self.federation.server)
        return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), like)

    def _forget(self, server: OptimizerState, given: Contribution) -> OptimizerState:
        return self.sides.server.forget(server, given.delta, given.auxes)


@functools.lru_cache(maxsize=32)
def _programs(federation: "Federation", specs: Specs) -> _Programs:
    return _Programs(federation, *jax.tree.unflatten(specs.treedef, specs.leaves))


def _beyond(leaf: HostArray, bound: float) -> float:
    """Return the largest modulus of an array's real numbers, if that is not finite or beyond a bound; else 0."""
    if not leaf.size or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return 0.0
    numbers = leaf.reshape(-1).view(leaf.real.dtype)
    with np.errstate(all="ignore"):
        # None is larger than the root of the sum of squares, which takes one fast pass.
        if numbers.dtype.kind == "f" and float(np.dot(numbers, numbers)) <= min(bound**2, 1e38):
            return 0.0
        largest = float(np.maximum(abs(float(numbers.max())), abs(float(numbers.min()))))
    return 0.0 if math.isfinite(largest) and largest <= bound else largest


def _require_marks(aux: FromClients, given: FromClients | None, what: str) -> None:
    """Raise a `ValueError` for a variable out of its range, or a client that says again that it is new."""
    for name, variable in aux.variables().items():
        value = getattr(aux, name)
        if (variable.flag and value not in (0, 1)) or (variable.amount and value < 0):
            raise ValueError(f"{what} has {name}={value}: expected {'0 or 1' if variable.flag else 'at least 0'}")
        if variable.newcomer and value == 1 and given is not None and getattr(given, name) >= 1:
            raise ValueError(f"{what} has {name}=1, of a client that has taken part: expected 0")


def _folders(paths: Collection[str]) -> set[str]:
    """Return the first two segments of paths."""
    return {"/".join(path.split("/")[:2]) for path in paths}


def _are_names(values: Any) -> bool:
    """Whether these are different strings."""
    return isinstance(values, list) and all(isinstance(v, str) for v in values) and len(set(values)) == len(values)


def _is_number(value: Json) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_about(report: Message, what: str, bounds: Bounds) -> tuple[int, float, dict[str, float]]:
    """Return a report's ticket, how many examples its client has, and its metrics.

    Raises:
      ValueError: if one is missing, of another kind or out of bounds.
    """
    about: Mapping[str, Any] = report.about
    ticket, examples, metrics = about.get("ticket"), about.get("examples"), about.get("metrics")
    if not isinstance(ticket, int) or isinstance(ticket, bool) or not 0 < ticket < 2**53:
        raise ValueError(f"{what} has the ticket {quote(ticket)}: expected an integer in [1, 2**53)")
    if not _is_number(examples) or not 0 <= examples <= min(bounds.most_examples, 3e38):
        raise ValueError(f"{what} says it has {quote(examples)} examples: expected 0 to {bounds.most_examples}")
    if not isinstance(metrics, Mapping) or len(metrics) > _MOST_METRICS:
        raise ValueError(f"{what} has the metrics {quote(metrics)}: expected a mapping of at most {_MOST_METRICS}")
    found = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or name in RESERVED[:-1] or not (value is None or _is_number(value)):
            raise ValueError(f"{what} has the metric {quote(name)} of {quote(value)}: expected a number, or null")
        found[name] = math.nan if value is None else float(value)
    return ticket, float(examples), found
