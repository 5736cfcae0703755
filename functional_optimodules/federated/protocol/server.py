"""The server of a federation between machines.

    Broadcast(clients): to each the parameters, auxiliary variables, and which of its reports count
    Receive(client, report): checked, and kept until the round ends
    Finish: the step of a `Federation`'s round, over what arrived; each of these reports counts

It takes the same steps as a simulated round: `share`, `totals_of` and `step_server`. A report
that is lost, late, repeated or refused is one that did not arrive: see `delivery`.
"""

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.config.fields import require_keys
from functional_optimodules.config.outside import quote
from functional_optimodules.federated import sampling, saving
from functional_optimodules.federated.aggregation import WeightedSum
from functional_optimodules.federated.options import History
from functional_optimodules.federated.participant import Shared, learns
from functional_optimodules.federated.protocol.coding import Coded
from functional_optimodules.federated.protocol.delivery import Call, Gathering, Ledger, StaleMessageError, next_era
from functional_optimodules.federated.protocol.message import Carried, Message, opened
from functional_optimodules.federated.protocol.peer import Peer
from functional_optimodules.federated.protocol.programs import server_programs
from functional_optimodules.federated.protocol.reports import Arrived, Bounds, read_report
from functional_optimodules.federated.protocol.travel import Contribution, Down, Up
from functional_optimodules.federated.state import FederationState, start
from functional_optimodules.optimizer import OptimizerState
from functional_optimodules.random.keys import is_key
from functional_optimodules.stateful.alone import alone
from functional_optimodules.types import Json, Params, PyTree
from functional_optimodules.wire.checkpoint import Checkpoint, write_checkpoint
from functional_optimodules.wire.limits import limits
from functional_optimodules.wire.paths import Specs, by_path, matching

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


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


class Server(Peer):
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
        super().__init__(federation)
        names = [] if _is_integer(clients) else list(cast(Sequence[str], clients))
        total = operator.index(cast(int, clients)) if _is_integer(clients) else len(names)
        if isinstance(clients, str | bool) or total < 1 or not _are_names(names):
            raise ValueError(
                f"Server: clients={quote(clients)} should be different names, or how many clients there are: at least 1"
            )
        self.bounds = bounds or Bounds()
        self.ledger: Ledger[Contribution] = Ledger()
        self._numbers = {name: number for number, name in enumerate(names)}
        state, _, _ = start(self.federation, params, total, seed, stats)
        self._programs = server_programs(self.federation, Specs.of((state.params, state.stats)))
        kept = self.federation.aggregation.init(self._programs.sides.params.shared(state.params))
        self.state: FederationState = state._replace(packing=None, aggregation=kept)
        # What one begins anew from, however late.
        self._initial = None if self._programs.shapes.down.initial is None else (state.params, state.stats)
        # For bricks that take in what came of a report: the round after each client's, and its parameters.
        self._following: dict[str, int] = {}
        self._after: dict[int, Params] = {}
        self._open: Round | None = None
        self._era, self._calls = next_era(), 0

    @property
    def round(self) -> int:
        """The number of rounds that were finished."""
        return int(self.state.round)

    @property
    def params(self) -> Params:
        """The parameters; of those that each client keeps for itself, what one starts from."""
        return self.model()

    @property
    def names(self) -> list[str]:
        """The clients' names, by number, as far as they are known."""
        return list(self._numbers)

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
        if not _is_integer(size) or not 1 <= size <= total:
            raise ValueError(f"Server: size={size!r} should be from 1 to the {total} clients")
        names = self.names
        if len(names) < total:
            raise ValueError(f"Server: of {total} clients, {len(names)} are known by name: give `clients` their names")
        drawn = sampling.draw(sampling.round_key(self.state.key, self.state.round, total), total, int(size))
        return [names[index] for index in np.asarray(drawn).tolist()]

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
        if isinstance(clients, str):
            raise ValueError(f"Server: clients={clients!r} should be several names, as in [{clients!r}]")
        if self._open is not None:
            if weights is not None and weights != self._open.weights:
                raise ValueError(f"Server: round {self.round} is under way with weights {quote(self._open.weights)}")
            there = self._open.reports.clients
            chosen = there if clients is None else tuple(clients)
            if others := [name for name in chosen if name not in there]:
                raise ValueError(
                    f"Server: round {self.round} is under way, and {quote(others)} take no part in it: `finish_round` "
                    "first"
                )
            return {name: self._message(name) for name in chosen}
        chosen = tuple(self._numbers) if clients is None else tuple(clients)
        if not chosen or not _are_names(list(chosen)):
            raise ValueError(f"Server: clients={quote(list(chosen))} should be different names, at least one")
        new = [name for name in chosen if name not in self._numbers]
        if len(self._numbers) + len(new) > self.num_clients:
            raise ValueError(
                f"Server: {quote(new)} are new, and of the {self.num_clients} clients {len(self._numbers)} are known: "
                f"{quote(self.names)}"
            )
        if weights is not None:
            values = np.array([weights.get(name, math.nan) for name in chosen], float)
            if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
                raise ValueError(f"Server: weights={quote(dict(weights))} should be >= 0, one for each, and not all 0")
        for name in new:
            self._numbers[name] = len(self._numbers)
        server, shared = self._programs.begin(self.state)
        self._calls += 1
        call = Call(self._era, self._calls, self.round, first=self._programs.shapes.passes == 2)
        if self.round in self._following.values():
            self._after[self.round] = shared.params
        told = None if weights is None else dict(weights)
        self._open = Round(Gathering(call, chosen), told, server, shared, _common(shared))
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
            "names": self.names,
            "num_clients": self.num_clients,
            "taken": dict(self.ledger.taken),
            "gave": sorted(self.ledger.given),
            "following": dict(self._following),
            "era": self._era,
        }
        write_checkpoint(folder, "server", about, self._saved(sorted(self.ledger.given), self._after))

    def _saved(self, gave: Sequence[str], after: Collection[int]) -> dict[str, PyTree]:
        """Return what is kept of a server, to which some clients gave something."""
        state, shapes = self.state, self._programs.shapes
        nothing = Contribution.of(shapes.report.tree(shapes.report.by_path), self.federation.server)
        whole = {
            "params": state.params,
            "server": state.server,
            "stats": state.stats,
            "aggregation": state.aggregation,
            "round": state.round,
            "key": state.key,
            "initial": self._initial,
            "after": {str(number): self._after.get(number, shapes.down.params) for number in after},
            "given": {name: self.ledger.given.get(name, nothing) for name in gave},
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
        names, taken, gave, following = self._read_about(found, changed, bool(only), what)
        era: int = found.about["era"]
        if only:
            self._require_alone(matching(only, found.arrays, what), what)
            tree = found.tree(self._saved([], ()), tuple(only))
        else:
            # Of a round that was not begun yet there are no parameters.
            after = {
                number for number in following.values() if any(p.startswith(f"after/{number}/") for p in found.arrays)
            }
            tree = found.tree(self._saved(gave, after))
        _require_plausible(tree, self._saved([], ()), what)
        self.state = self.state._replace(**{name: tree[name] for name in self.state._fields if name in tree})
        if not only:
            self._numbers = {name: number for number, name in enumerate(names)}
            self._initial = tree.get("initial")
            self.ledger = Ledger(dict(taken), tree.get("given", {}))
            self._following = dict(following)
            self._after = {int(number): params for number, params in tree.get("after", {}).items()}
        self._open, self._era, self._calls = None, next_era(max(self._era, era)), 0

    def _read_about(
        self, found: Checkpoint, changed: Collection[str], partly: bool, what: str
    ) -> tuple[list[str], dict[str, int], list[str], dict[str, int]]:
        """Return the names, what was taken in from whom, who gave something, and who is to be told of which round."""
        about = found.about
        if found.kind != "server":
            raise ValueError(f"{what} is that of a {quote(found.kind)}")
        require_keys(about, ("federation", "names", "num_clients", "taken", "gave", "following", "era"), what)
        if not partly:
            saving.require_alike(about["federation"], self.federation, changed, what)
            if about["num_clients"] != self.num_clients:
                raise ValueError(f"{what} is of {quote(about['num_clients'])} clients: expected {self.num_clients}")
        names, taken, gave, following = (about[name] for name in ("names", "taken", "gave", "following"))
        lists = all(isinstance(each, list) and _are_names(each) for each in (names, gave))
        if not lists or not set(gave) <= set(names) or (not partly and len(names) > self.num_clients):
            raise ValueError(f"{what} has clients named {quote(names)}, of which {quote(gave)} gave something")
        known = set(names)
        for told, least in ((taken, 1), (following, 0)):
            if not isinstance(told, Mapping) or not all(
                name in known and type(number) is int and least <= number < 2**53 for name, number in told.items()
            ):
                raise ValueError(f"{what} has {quote(told)}: expected a number for each of some of its clients")
        if type(about["era"]) is not int or not 0 <= about["era"] < 2**53:
            raise ValueError(f"{what} has the era {quote(about['era'])}: expected a count of microseconds")
        return names, dict(taken), gave, dict(following)

    def _require_alone(self, paths: Collection[str], what: str) -> None:
        """Raise a `ValueError` if paths are of what clients gave, which they would go on from otherwise."""
        for brick in self.federation.server.modules:
            inside = f"server/modules/{brick.name}"
            if brick.recalls() and any(path.startswith(inside) for path in paths):
                raise ValueError(f"{what}: what clients gave stands in {inside!r}: load all of it, or not that")

    def _message(self, name: str) -> Message:
        """Return what a participant is sent."""
        under_way = self._open
        assert under_way is not None
        taken, index = self.ledger.tell(name), self._numbers[name]
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

    def receive(self, name: str, message: Carried) -> bool:
        """Take in what a client reports. Of several reports of a client in a round, the last one stands.

        Args:
          name: who sent it, as whatever carries messages knows.
          message: the report, in any form. Bytes are not copied; those that may change are.

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
        reports, specs = self._expecting(name, what)
        plain = sum(leaf.size * leaf.dtype.itemsize for leaf in specs.leaves)
        most = self.bounds.most_bytes or 2 * plain + 2**20
        # Others need not wait while it is read.
        report = opened(message, most_head=2**16 + 2**10 * len(specs.leaves), most_bytes=most)
        reports.require(name, report.about, what)
        ticket, arrived = read_report(report, specs, self.bounds, self.federation.on_nonfinite, what)
        return self._stand(reports, name, ticket, arrived, what)

    @alone
    def _expecting(self, name: str, what: str) -> tuple[Gathering[Arrived], Specs]:
        """Return the round under way, and what a report in it must hold."""
        if self._open is None:
            raise StaleMessageError(f"{what}: expected none, as no round is under way")
        reports, shapes = self._open.reports, self._programs.shapes
        reports.require_client(name, what)
        return reports, shapes.gradient if reports.call.first else shapes.report

    @alone
    def _stand(self, reports: Gathering[Arrived], name: str, ticket: int, arrived: Arrived, what: str) -> bool:
        if self._open is None or self._open.reports is not reports:
            raise StaleMessageError(f"{what} is of round {reports.call.round}, which ended as it was read")
        return reports.stand(name, ticket, arrived)

    @alone
    def cancel_round(self) -> None:
        """Give up the round under way: nothing of it counts, and the next `broadcast` begins it anew."""
        self._open = None

    @alone
    def finish_round(self) -> History | None:
        """End the round with what arrived, and let each report count that is in it.

        Returns:
          What is known of the round, as `Federation.round` returns it, of NumPy arrays: those who did
          not report have dropped out, and what they measured is NaN. `None` after the first of two passes,
          which ends no round.

        Raises:
          FloatingPointError: if the step gives numbers that are not finite, of reports which are. Nothing
            has changed then: the round may be cancelled, or go on without a client.
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
        totals, ups = programs.nothing(len(reports), state.aggregation), dict[str, Up]()
        for index, (name, one) in enumerate(reports):
            if one is not None and one.up is not None:
                ups[name] = self._told(name, one.up)
                numbers = self._weight(under_way, name, one), np.float32(one.examples), self._numbers[name], index
                totals = programs.add(totals, ups[name], *numbers, state.aggregation)
        after, told, finite = programs.step(state, server, totals, under_way.shared)
        if not finite:
            raise FloatingPointError(
                f"Server: the step of round {self.round} gives numbers that are not finite: its reports are too large "
                "together, or its rates; nothing has changed"
            )
        history = self._history(under_way, told)
        # Copies, for what arrived may be a view of a whole message.
        given = {
            name: jax.tree.map(jnp.array, Contribution.of(up, self.federation.server))
            for name, up in ups.items()
            if name not in gone
        }
        for name in gone:
            ledger.forget(name)
            self._following.pop(name, None)
        for name, each in given.items():
            ledger.take(name, under_way.reports.arrived[name][0], each, Contribution.add)
            if learns(self.federation):
                self._following[name] = self.round + 1
        needed = set(self._following.values())
        self._after = {number: params for number, params in self._after.items() if number in needed}
        self.state = after
        return history

    def _told(self, name: str, up: Up) -> Up:
        """Return a report in which it is the server that says whether its client is new."""
        new = self.ledger.tell(name) == 0
        return up._replace(auxes={aux_name: aux.newcomers(new) for aux_name, aux in up.auxes.items()})

    def _history(self, under_way: Round, told: Mapping[str, jax.Array]) -> History:
        reports = under_way.reports
        each = [one for _, one in _in_order(reports)]
        names = sorted({name for one in each if one is not None for name in one.metrics})
        metrics = {
            name: [math.nan if one is None else one.metrics.get(name, math.nan) for one in each] for name in names
        }
        return {
            **{name: np.array(values, np.float32) for name, values in metrics.items()},
            "examples": np.array([0 if one is None else one.examples for one in each], np.float32),
            "round": np.asarray(np.int32(reports.call.round)),
            "participants": np.array([self._numbers[name] for name in reports.clients], np.int32),
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


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _are_names(values: Sequence[Any]) -> bool:
    """Whether these are different names."""
    return len(set(map(str, values))) == len(values) and all(
        isinstance(name, str) and 0 < len(name) <= limits().name for name in values
    )


def _require_plausible(tree: Mapping[str, PyTree], like: Mapping[str, PyTree], what: str) -> None:
    """Raise a `ValueError` for a number that is not finite, or a negative count, where there is no such in what is."""
    now = by_path(like)
    for path, leaf in by_path(tree).items():
        if is_key(leaf):
            continue
        host = np.asarray(leaf)
        wrong = ~np.isfinite(host) if jnp.issubdtype(host.dtype, jnp.inexact) else host < 0
        if wrong.any() and not (path in now and np.array_equal(np.asarray(now[path]), host, equal_nan=True)):
            raise ValueError(f"{what}: {path!r} holds {host[wrong].flat[0]}")
