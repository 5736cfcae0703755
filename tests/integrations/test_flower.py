"""Over Flower a federation has the numbers of the simulation, whatever becomes of nodes and messages."""

import contextlib
import importlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'functional_optimodules[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import functional_optimodules as fo
from functional_optimodules.federated import Client, FederatedData, Federation, Server
from functional_optimodules.integrations.flower import ProtocolStrategy, client_app
from functional_optimodules.wire.paths import by_path

ROOT = Path(__file__).parents[2]
APP = Path(__file__).parent / "flower_app"


def imported(name, folder):
    """Import a module of a Flower app, as Flower does, from the app's own folder."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


OVER_FLOWER = imported("over_flower", APP)
DATA, FEDERATION, NAMES = OVER_FLOWER.DATA, OVER_FLOWER.FEDERATION, OVER_FLOWER.NAMES
loss, params = OVER_FLOWER.loss, OVER_FLOWER.params
EVERYONE = FederatedData.from_clients(list(DATA.values()))


def app_of(tmp_path, federation=FEDERATION, **options):
    def make(context):
        name = str(context.node_config["partition-id"])
        return Client(federation, name, DATA.get(name))

    return client_app(make, lambda context: tmp_path / str(context.node_config["partition-id"]), **options)


class Nodes(Grid):
    """Nodes within this process."""

    def __init__(self, app, **config):
        self.app, self.config = app, config
        self.clients = {node: partition for partition, node in enumerate((10, 11, 12))}
        self.since = {}  # by node: when it was activated
        self.spoil = {}  # by node: what becomes of an answer
        self.asked = []

    run = None

    def set_run(self, run): ...

    def create_message(self, *args, **kwargs): ...

    def push_messages(self, messages): ...

    def pull_messages(self, message_ids): ...

    def get_node_ids(self):
        return list(self.clients)

    def get_nodes(self):
        return [NodeInfo(node_id=node, last_activated_at=self.since.get(node, "")) for node in reversed(self.clients)]

    def send_and_receive(self, messages, *, timeout=None):
        return [answer for message in messages if (answer := self.answer(message)) is not None]

    def answer(self, message):
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        self.asked.append((node, kind))
        answer = self.app(message, self.context({"partition-id": self.clients[node]}, node))
        return self.spoil[node](message, answer) if kind == "train" and node in self.spoil else answer

    def context(self, node_config, node=0):
        return Context(run_id=1, node_id=node, node_config=node_config, state=RecordDict(), run_config=self.config)


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Messages are made as by a task of Flower's."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def log():
    """Return the warnings of Flower's logger."""
    lines, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("flwr").addHandler(handler)
    yield lines
    logging.getLogger("flwr").removeHandler(handler)


def strategy_of(federation=FEDERATION, folder=None, **options):
    server = Server(federation, params(), NAMES, seed=1)
    return ProtocolStrategy(server, folder, **{"min_available_nodes": 3} | options)


def simulated(rounds, federation=FEDERATION, **options):
    state, history = federation.fit(federation.init(params(), EVERYONE, seed=1), EVERYONE, rounds, **options)
    return state, history


def assert_close(arrays, tree):
    for path, leaf in by_path(tree).items():
        np.testing.assert_allclose(arrays[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)


MIME = Federation(
    loss, fo.Optimizer(0.05, modules=["mime-client"]), fo.Optimizer(1.0, modules=["mime-server"]), batch_size=4
)


@pytest.mark.parametrize(
    ("federation", "options"),
    [
        pytest.param(FEDERATION, {}, id="everyone"),
        pytest.param(FEDERATION, {"participants": 2}, id="some"),
        pytest.param(MIME, {}, id="two passes"),
    ],
)
def test_rounds_over_flower_have_the_numbers_of_the_simulation(federation, options, tmp_path):
    strategy = strategy_of(federation, **options)
    result = strategy.start(Nodes(app_of(tmp_path, federation)), num_rounds=3)
    state, history = simulated(3, federation, **options)
    assert_close({path: array.numpy() for path, array in result.arrays.items()}, state.params)
    means = [
        float(np.average(row, weights=count)) for row, count in zip(history["loss"], history["examples"], strict=True)
    ]
    assert [record["loss"] for record in result.train_metrics_clientapp.values()] == pytest.approx(means, rel=1e-5)
    chosen = [sorted(each["participants"].tolist()) for each in strategy.history]
    assert chosen == np.sort(history["participants"]).tolist()


def test_a_server_goes_on_from_its_folder(tmp_path):
    nodes = Nodes(app_of(tmp_path))
    strategy_of(folder=tmp_path / "server").start(nodes, num_rounds=2)
    resumed = strategy_of(folder=tmp_path / "server")
    assert resumed.server.round == 2
    result = resumed.start(nodes, num_rounds=3)
    assert len(resumed.history) == 1
    assert_close({path: array.numpy() for path, array in result.arrays.items()}, simulated(3)[0].params)


def carrying(message, record):
    return Message(RecordDict({"functional_optimodules": record}), reply_to=message)


def as_message(data):
    array = Array(dtype="uint8", shape=(len(data),), stype="functional_optimodules", data=data)
    return ArrayRecord({"message": array})


def from_nobody(message, answer):
    return Message(answer.content, reply_to=Message(message.content, 99, "train"))


BAD = {
    "nothing": (lambda message, answer: None, r"\['1'\] did not take part"),
    "an error": (lambda message, answer: Message(Error(2, "it broke"), reply_to=message), "error 2: 'it broke'"),
    "no record": (lambda message, answer: Message(RecordDict(), reply_to=message), r"has the records \[\]: expected"),
    "another record": (
        lambda message, answer: carrying(message, ConfigRecord({"message": b""})),
        "should be an ArrayRecord",
    ),
    "an array": (
        lambda message, answer: carrying(message, ArrayRecord({"message": Array(np.zeros(3))})),
        "should be an ArrayRecord",
    ),
    "noise": (lambda message, answer: carrying(message, as_message(b"x" * 99)), "the message begins with"),
    "the server's own message": (
        lambda message, answer: Message(message.content, reply_to=message),
        "says that it is from",
    ),
    "a node that was not asked": (from_nobody, "node 99, client None: it is none of those who were asked"),
}


@pytest.mark.parametrize("spoil", BAD)
def test_a_round_goes_on_without_a_client_whose_answer_is_bad(spoil, tmp_path, log):
    nodes, strategy = Nodes(app_of(tmp_path)), strategy_of()
    nodes.spoil[11], said = BAD[spoil]
    strategy.start(nodes, num_rounds=1)
    assert strategy.history[0]["joined"].tolist() == [True, False, True]
    assert any(re.search(said, line) for line in log)
    assert re.search(r"round 0: \['1'\] did not take part", log[-1])


@pytest.mark.parametrize("federation", [pytest.param(FEDERATION, id="one pass"), pytest.param(MIME, id="two passes")])
def test_a_round_in_which_nobody_answers_moves_nothing(federation, tmp_path):
    nodes, strategy = Nodes(app_of(tmp_path, federation)), strategy_of(federation)
    nodes.spoil = dict.fromkeys(nodes.clients, lambda message, answer: None)
    result = strategy.start(nodes, num_rounds=1)
    assert strategy.server.round == 1
    assert not strategy.history[0]["joined"].any()
    assert result.train_metrics_clientapp[1]["num-clients"] == 0
    assert_close({path: array.numpy() for path, array in result.arrays.items()}, params())


def test_a_report_of_an_older_round_is_refused(tmp_path, log):
    nodes, strategy, kept = Nodes(app_of(tmp_path)), strategy_of(), []

    def older(message, answer):
        kept.append(answer.content)
        return Message(kept[0], reply_to=message)

    nodes.spoil[12] = older
    strategy.start(nodes, num_rounds=2)
    assert [history["joined"].tolist() for history in strategy.history] == [[True] * 3, [True, True, False]]
    assert any("node 12, client '2': Server: the report of '2' is of round 0" in line for line in log)


def own_loop(client, context):
    assert client.params is not None
    return client.report()


@pytest.mark.parametrize("options", [{}, {"work": own_loop}], ids=["fit", "a loop of one's own"])
def test_a_client_without_its_folder_begins_anew(tmp_path, options):
    nodes, strategy = Nodes(app_of(tmp_path, **options)), strategy_of()
    strategy.start(nodes, num_rounds=2)
    shutil.rmtree(tmp_path / "1")
    strategy.start(nodes, num_rounds=4)
    assert [history["joined"].all() for history in strategy.history] == [True, True, False, True]
    assert strategy.server.ledger.taken.keys() == set(NAMES)
    assert_variate_is_the_mean(strategy.server, {name: tmp_path / name for name in NAMES})


def test_the_client_of_a_node_that_was_started_anew_is_found_there(tmp_path):
    nodes, strategy = Nodes(app_of(tmp_path)), strategy_of()
    strategy.start(nodes, num_rounds=1)
    nodes.clients[3], nodes.since[3] = 0, "2026-01-01T00:00:00"  # Flower holds the old one for alive
    strategy.start(nodes, num_rounds=2)
    train = [node for node, kind in nodes.asked if kind == "train"]
    assert train == [10, 11, 12, 3, 11, 12]
    assert strategy.history[1]["joined"].all()


def test_a_name_for_which_there_is_no_room_is_refused(tmp_path, log):
    nodes, strategy = Nodes(app_of(tmp_path)), strategy_of()
    nodes.clients[5] = "invented"
    strategy.start(nodes, num_rounds=2)
    assert [node for node, kind in nodes.asked if node == 5] == [5]
    assert any("'invented' is none of the 3 clients: ['0', '1', '2']" in line for line in log)


def test_nodes_that_flower_authenticates_are_not_asked_for_names(tmp_path, log):
    nodes = Nodes(app_of(tmp_path))
    names, nodes.clients[5] = {node: str(number) for node, number in nodes.clients.items()}, 0
    strategy_of(names=names).start(nodes, num_rounds=1)
    assert nodes.asked == [(10, "train"), (11, "train"), (12, "train")]
    assert any("Nodes [5] are not among those that have names" in line for line in log)


def test_a_round_waits_for_enough_clients(tmp_path, monkeypatch):
    nodes, strategy, waits = Nodes(app_of(tmp_path)), strategy_of(), []
    del nodes.clients[11]

    def sleep(seconds):
        waits.append(seconds)
        nodes.clients[11] = 1

    monkeypatch.setattr("time.sleep", sleep)
    strategy.start(nodes, num_rounds=1)
    assert waits == [1]
    assert strategy.history[0]["joined"].all()


def test_what_the_server_has_is_not_given_again(tmp_path):
    strategy = strategy_of()
    with pytest.raises(ValueError, match="initial_arrays: expected none"):
        strategy.start(Nodes(app_of(tmp_path)), ArrayRecord({"w": Array(np.zeros(3))}))
    with pytest.raises(ValueError, match="train_config: expected none"):
        strategy.start(Nodes(app_of(tmp_path)), train_config=ConfigRecord({"lr": 0.1}))


@pytest.mark.parametrize("options", [{"participants": 0}, {"participants": 4}, {"min_available_nodes": 2.0}])
def test_numbers_of_clients_are_checked(options):
    with pytest.raises(ValueError, match="should be from 1 to the 3 clients"):
        strategy_of(**options)


@pytest.mark.slow
def test_the_example_learns_and_goes_on(tmp_path, monkeypatch):
    example = ROOT / "examples" / "flower"
    config = tomllib.loads((example / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    monkeypatch.chdir(tmp_path)
    client, server = (imported(f"digits.{side}_app", example) for side in ("client", "server"))
    for rounds in (3, 5):
        nodes = Nodes(client.app, **config | {"num-rounds": rounds})
        server.app(nodes, nodes.context({}))
    found = Server(server.task.federation(3), server.task.params(), NAMES)
    found.load(config["folder"])
    assert found.round == 5
    arrays = {name: Array(np.asarray(leaf)) for name, leaf in found.params.items()}
    assert server.evaluate(5, arrays)["accuracy"] > 0.85


def assert_variate_is_the_mean(server, folders):
    """Check that SCAFFOLD's variate is the mean of what the clients keep, as of the reports that count."""
    kept = []
    for name, folder in folders.items():
        client = Client(FEDERATION, name, DATA[name])
        client.load(folder)
        journal, taken = client.journal, server.ledger.tell(name)
        if taken == 0:
            continue
        row = {journal.settled: journal.kept, **dict(journal.waiting)}[taken]
        kept.append(np.concatenate([np.ravel(leaf) for leaf in row if leaf.dtype != np.int32][:2]))
    total = server.state.server.modules["scaffold-server"].total
    total = np.concatenate([np.ravel(total[name]) for name in ("b", "w")])
    assert np.abs(total).max() > 1e-3
    np.testing.assert_allclose(total, sum(kept), rtol=1e-5, atol=1e-6)


class Deployment:
    """A SuperLink and a SuperNode for each client, as processes that talk over the loopback."""

    def __init__(self, folder):
        self.folder, self.processes, self.ports = folder, {}, iter(free_ports(8))
        self.port = next(self.ports)
        home = folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(f'[superlink.loop]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n')
        settings = {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        }
        # What these start they find on the path.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, **settings, "PATH": path}

    def start(self, name, *command):
        with open(self.folder / f"{name}.log", "a") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def start_link(self):
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--disable-runtime-dependency-installation"]
        self.start("link", "flower-superlink", "--insecure", *options)
        for _ in range(600):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.1)
        raise TimeoutError(self.logs())

    def start_node(self, name):
        options = ["--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", str(next(self.ports))]
        self.start(f"node-{name}", "flower-supernode", "--insecure", *options, "--node-config", f"partition-id={name}")

    def kill(self, name):
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def flwr(self, *arguments, seconds=60):
        done = subprocess.run(
            ["flwr", *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def begin(self, **config):
        """Begin a run, and return its id."""
        settings = " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in config.items())
        told = json.loads(self.flwr("run", str(APP), "loop", "--format", "json", "--run-config", settings))
        assert told["success"], told
        return str(told["run-id"])

    def finish(self, run):
        """Wait until a run has ended well."""
        self.await_file("ended", seconds=300)
        (self.folder / "ended").unlink()
        status = ""
        while not status.startswith("finished"):
            runs = json.loads(self.flwr("list", "loop", "--format", "json"))["runs"]
            status = {str(each["run-id"]): each["status"] for each in runs}[run]
        assert status == "finished:completed", self.logs()

    def await_file(self, name, seconds=100):
        end = time.monotonic() + seconds
        while not (self.folder / name).exists():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    def logs(self):
        return "\n".join(f"{path.name}:\n{path.read_text()[-5000:]}" for path in sorted(self.folder.glob("*.log")))


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def deployment(tmp_path):
    deployed = Deployment(tmp_path)
    try:
        deployed.start_link()
        for name in NAMES:
            deployed.start_node(name)
        yield deployed
    finally:
        for name in list(deployed.processes):
            deployed.kill(name)


# One test, because starting all this is most of what it takes.
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills groups of processes")
def test_processes_over_the_loopback_have_the_numbers_of_the_simulation_and_outlive_kills(deployment):
    folder = deployment.folder
    deployment.finish(deployment.begin())
    server = Server(FEDERATION, params(), NAMES)
    server.load(folder / "server")
    assert server.round == 3
    assert_close(by_path(server.params), simulated(3)[0].params)

    # A new process of the server goes on from the checkpoint; in its first round two nodes are killed.
    for name in ("1", "2"):
        (folder / f"hang-{name}").touch()
    run = deployment.begin(num_rounds=5, faults=True)
    for name in ("1", "2"):
        deployment.await_file(f"hangs-{name}")
        deployment.kill(f"node-{name}")
    shutil.rmtree(folder / "client-2")
    for name in ("1", "2"):
        deployment.start_node(name)
    deployment.finish(run)
    server.load(folder / "server")
    assert server.round == 5
    joined = [json.loads(line) for line in (folder / "joined.json").read_text().splitlines()]
    assert joined == [
        *[[True] * 3] * 3,
        [True, False, False],
        [True, True, False],  # the last one says that its disk was lost
    ]
    assert server.ledger.taken.keys() == {"0", "1"}
    assert_variate_is_the_mean(server, {name: folder / f"client-{name}" for name in NAMES})
