"""Flower carries the messages of a federation between machines.

    ClientApp: load the client; begin, fit and report; save it; answer with the report
    Strategy:  broadcast; receive what comes back in time; finish the round; save the server

A message travels in its binary form, as the bytes of one Flower `Array`. Flower cuts these into
chunks of 5 MiB, so that no limit on a request's size bounds a model, and does not send the SuperLink
again a chunk that it has from a message to another client. What comes back is read by the protocol's
own reader, which bounds and checks it. Flower's tools that change arrays on their way have nothing to
change: clipping, noise and compression are bricks.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from functional_optimodules.config.outside import quote
from functional_optimodules.federated import Client, Server
from functional_optimodules.federated.loss import RESERVED
from functional_optimodules.federated.options import History
from functional_optimodules.federated.protocol.message import Message as Carried
from functional_optimodules.types import HostArray, PyTree
from functional_optimodules.wire.paths import by_path

LocalWork: TypeAlias = Callable[[Client, Context], Carried]
"""What a client does in a round, once it has begun: it returns its report."""

_RECORD = "functional_optimodules"
_NAME = "name"
_MOST_SECONDS_TO_SAY_A_NAME = 60.0
_log = logging.getLogger("flwr")


def client_app(
    make: Callable[[Context], Client],
    folder: Callable[[Context], str | Path],
    work: LocalWork = lambda client, context: client.report(),
) -> ClientApp:
    """Return what runs on each node: Flower starts a process for each message, and the client lives on in a folder.

    Args:
      make: makes the client, from the configuration of its node and of the run: `context.node_config["partition-id"]`,
        `context.run_config`.
      folder: where the client is kept between messages, likewise: a folder of its own on the node's disk. What is
        relative is so to where the SuperNode was started.
      work: what the client does in a round; for a loop of one's own, `apply_gradients` and `report`.

    Returns:
      The app, for `train` messages and for the question for its name. More may be added to it.
    """
    app = ClientApp()

    @app.query(_NAME)
    def say_name(message: Message, context: Context) -> Message:
        return Message(RecordDict({_RECORD: ConfigRecord({_NAME: make(context).name})}), reply_to=message)

    @app.train()
    def take_part(message: Message, context: Context) -> Message:
        client, kept = make(context), folder(context)
        with contextlib.suppress(FileNotFoundError):
            client.load(kept)
        client.begin(_carried(message))
        # Who has lost what the server reckons with has nothing to begin from, and says so.
        report = client.report() if client.lost else work(client, context)
        # Before the report is sent: a client that dies in between goes on from here.
        client.save(kept)
        return Message(_records(report), reply_to=message)

    return app


class ProtocolStrategy(Strategy):
    """A strategy of Flower that runs a server's rounds.

        strategy = ProtocolStrategy(Server(federation, params, ["0", "1", "2"]), folder="server")
        result = strategy.start(grid, num_rounds=10)

    A client that does not answer in time, or whose answer is refused, has dropped out of the round; the log
    says which and why. Clients are not asked to evaluate, unless a subclass does so.

    Attributes:
      server: the server.
      folder: where it is kept.
      participants: how many clients take part in a round.
      min_available_nodes: how many clients have to be connected before a round begins.
      history: what is known of each round that was run here; see `Server.finish_round`.
    """

    def __init__(
        self,
        server: Server,
        folder: str | Path | None = None,
        *,
        participants: int | None = None,
        min_available_nodes: int = 2,
        names: Mapping[int, str] | None = None,
    ) -> None:
        """Make a strategy of a server, which goes on from what its folder has.

        Args:
          server: the server, as it is before any round.
          folder: where it is saved after each round, and found again; `None` for nowhere.
          participants: how many clients are drawn for a round, as `Federation.fit` draws them: those who are not
            connected then have dropped out. `None` for all who are connected.
          min_available_nodes: how many clients have to be connected before a round begins.
          names: the clients' names by node id, of nodes that Flower authenticates. `None` to ask each node for
            the name of its client, and believe it.

        Raises:
          ValueError: if `participants` or `min_available_nodes` is out of range, or the folder has another server's
            state; see `Server.load`.
        """
        for what, value in (("participants", participants), ("min_available_nodes", min_available_nodes)):
            if value is not None and (not isinstance(value, int) or not 1 <= value <= server.num_clients):
                raise ValueError(f"{what}={value!r} should be from 1 to the {server.num_clients} clients")
        self.server, self.folder = server, folder
        self.participants, self.min_available_nodes = participants, min_available_nodes
        self.history: list[History] = []
        if folder is not None:
            with contextlib.suppress(FileNotFoundError):
                server.load(folder)
        self._ask = names is None
        # Of a node whose name is refused, it is `None`.
        self._names: dict[int, str | None] = dict(names or {})
        self._timeout = 3600.0
        self._ended: History | None = None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run rounds until the server has finished some number of them, those before it was restored included.

        Args:
          grid: the nodes.
          initial_arrays: `None`: the server has the parameters.
          num_rounds: how many rounds the server is to have finished. Flower's log, its result and `evaluate_fn` count
            those of this run.
          timeout: how many seconds a round, or each of its two passes, waits for reports.
          train_config: `None`: the federation says how to train.
          evaluate_config: for subclasses that ask clients to evaluate.
          evaluate_fn: `(round, parameters) -> metrics`, on the server.

        Returns:
          Flower's result. Its arrays are the parameters by path, bfloat16 as float32.

        Raises:
          ValueError: if parameters or a configuration are given.
        """
        for what, given in (("initial_arrays", initial_arrays), ("train_config", train_config)):
            if given:
                raise ValueError(f"{what}: expected none: a `Server` has its parameters and its federation")
        self._timeout = timeout
        left = max(num_rounds - self.server.round, 0)
        result = super().start(grid, self._arrays(), left, timeout, None, evaluate_config, evaluate_fn)
        result.arrays = self._arrays()
        return result

    def summary(self) -> None:
        """Log what the strategy is."""
        chosen = "all who are connected" if self.participants is None else self.participants
        _log.info("\t├──> Clients: %d, of whom %s take part in a round", self.server.num_clients, chosen)
        _log.info("\t├──> Connected at least: %d", self.min_available_nodes)
        _log.info("\t└──> Rounds finished before: %d", self.server.round)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages of a round's last pass; if it has a first one, run that.

        Raises:
          ValueError: if `participants` are to be drawn before all clients are known by name.
        """
        connected = self._connected(grid)
        self._ended = None
        messages, first = self._messages(self._chosen(connected), connected)
        if first:
            self._receive(grid.send_and_receive(messages, timeout=self._timeout))
            self._ended = self.server.finish_round()
            messages = [] if self._ended is not None else self._messages(None, connected)[0]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take in what came back, and finish the round.

        Returns:
          The parameters by path; and the means of the metrics over the examples of who took part, with
          `num-examples` and `num-clients`.
        """
        self._receive(replies)
        history = self._ended if self._ended is not None else self.server.finish_round()
        assert history is not None
        self.history.append(history)
        absent = [self.server.names[index] for index in history["participants"][~history["joined"]]]
        if absent:
            _log.warning("round %d: %s did not take part", history["round"], quote(absent))
        if self.folder is not None:
            self.server.save(self.folder)
        return self._arrays(), _means(history)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no message."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing."""
        return None

    def _chosen(self, connected: Mapping[str, int]) -> list[str]:
        if self.participants is not None:
            return self.server.sample(self.participants)
        # In the order of their numbers, so that a sum rounds alike whichever node was there first.
        known = self.server.names
        return [name for name in known if name in connected] + [name for name in connected if name not in known]

    def _messages(self, names: list[str] | None, connected: Mapping[str, int]) -> tuple[list[Message], bool]:
        """Return what those who are connected are to be sent, and whether it asks for the first of two passes."""
        broadcast = self.server.broadcast(names)
        # What nobody waits for any more is not to reach a client, either.
        sent = [
            Message(_records(message), connected[name], MessageType.TRAIN, ttl=self._timeout)
            for name, message in broadcast.items()
            if name in connected
        ]
        return sent, any(message.about["kind"] == "first" for message in broadcast.values())

    def _receive(self, replies: Iterable[Message]) -> None:
        for reply in replies:
            node = reply.metadata.src_node_id
            name = self._names.get(node)
            try:
                data = _carried(reply)
                if name is None:
                    raise ValueError("it is none of those who were asked")
                self.server.receive(name, data)
            except (KeyError, TypeError, ValueError, FloatingPointError) as error:
                _log.warning("node %d, client %s: %s", node, quote(name), error)

    def _connected(self, grid: Grid) -> dict[str, int]:
        """Return the nodes of the clients that are connected, by their names, as soon as there are enough of them."""
        while True:
            # A node that was started anew may have another id, while Flower still holds the old one for alive.
            nodes = [node.node_id for node in sorted(grid.get_nodes(), key=lambda node: node.last_activated_at)]
            self._meet([node for node in nodes if node not in self._names], grid)
            found = {name: node for node in nodes if (name := self._names.get(node)) is not None}
            if len(found) >= self.min_available_nodes:
                return found
            _log.info("Waiting: %d clients are connected, of at least %d", len(found), self.min_available_nodes)
            time.sleep(1)

    def _meet(self, nodes: list[int], grid: Grid) -> None:
        """Find the names of the clients on new nodes, where they say."""
        answers: Iterable[Message] = []
        if self._ask and nodes:
            asked = [Message(RecordDict(), node, f"{MessageType.QUERY}.{_NAME}") for node in nodes]
            answers = grid.send_and_receive(asked, timeout=min(self._timeout, _MOST_SECONDS_TO_SAY_A_NAME))
        elif nodes:
            _log.warning("Nodes %s are not among those that have names", nodes)
            self._names |= dict.fromkeys(nodes)
        for answer in answers:
            node = answer.metadata.src_node_id
            try:
                self._names[node] = self._admitted(_content(answer)[_NAME])
            except (KeyError, TypeError, ValueError) as error:
                _log.warning("node %d does not say who its client is: %s", node, error)

    def _admitted(self, name: object) -> str | None:
        """Return the name that a node says, if there is room for it."""
        known = {*self.server.names, *filter(None, self._names.values())}
        if isinstance(name, str) and (name in known or len(known) < self.server.num_clients):
            return name
        _log.warning("%s is none of the %d clients: %s", quote(name), self.server.num_clients, quote(sorted(known)))
        return None

    def _arrays(self) -> ArrayRecord:
        """Return the parameters by path, as Flower's users expect them."""
        return ArrayRecord({path: Array(_plain(leaf)) for path, leaf in by_path(self.server.state.params).items()})


def _records(message: Carried) -> RecordDict:
    data = message.to_bytes()
    # A serialization of its own, so that nothing takes the bytes for an array's.
    array = Array(dtype="uint8", shape=(len(data),), stype=_RECORD, data=data)
    return RecordDict({_RECORD: ArrayRecord({"message": array})})


def _carried(message: Message) -> bytes:
    """Return the message of the protocol in one of Flower.

    Raises:
      ValueError: if there is none.
    """
    record = _content(message)
    array = record.get("message") if isinstance(record, ArrayRecord) else None
    if not isinstance(array, Array) or array.stype != _RECORD:
        raise ValueError(f"the record {_RECORD!r} should be an ArrayRecord of one `message`, not {quote(record)}")
    return array.data


def _content(message: Message) -> ArrayRecord | MetricRecord | ConfigRecord:
    """Return the record of this library in a message.

    Raises:
      ValueError: if it reports an error, or has no such record.
    """
    if message.has_error():
        raise ValueError(f"it reports the error {message.error.code}: {quote(message.error.reason)}")
    if _RECORD not in message.content:
        raise ValueError(f"it has the records {quote(sorted(message.content))}: expected {_RECORD!r}")
    return message.content[_RECORD]


def _plain(leaf: PyTree) -> HostArray:
    """Return an array of a dtype that NumPy's own format knows."""
    array = np.asarray(leaf)
    return array if array.dtype.kind in "biufc" else array.astype(np.float32)


def _means(history: History) -> MetricRecord:
    joined = history["joined"]
    examples = history["examples"][joined]
    means = MetricRecord({"num-examples": float(examples.sum()), "num-clients": int(joined.sum())})
    for name, values in history.items():
        if name in RESERVED[:-1]:
            continue
        if values.ndim == 0:
            means[name] = float(values)
        elif values.shape == joined.shape and examples.any():
            means[name] = float(np.average(values[joined], weights=examples))
    return means
