"""Servers and clients: loops of one's own, what is saved, what is refused."""

import copy
import dataclasses
import json
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import Bounds, Client, FederatedData, Federation, Server
from functional_optimodules.federated.protocol.delivery import StaleMessageError
from functional_optimodules.federated.protocol.message import Message

from .peers import DATA, NAMES, feddyn, loss, params, peers, run_round, scaffold

MIME = Federation(
    loss, fo.Optimizer(0.05, modules=["mime-client"]), fo.Optimizer(1.0, modules=["mime-server"]), batch_size=12
)


VERSION_1 = Path(__file__).parent / "version-1"


def gradients(at, data):
    return jax.grad(lambda p: loss(p, data).mean())(at)


@pytest.mark.parametrize("federation", [scaffold(batch_size=None, steps=3), feddyn(batch_size=None, steps=3)])
def test_steps_in_a_loop_of_one_s_own_are_those_of_fit(federation):
    ends = []
    for own in (False, True):
        server, clients = peers(federation)
        for _ in range(3):
            for name, message in server.broadcast().items():
                client = clients[name]
                at = client.begin(message)
                if own:
                    for _ in range(3):
                        at = client.apply_gradients(gradients(at, DATA[name]))
                server.receive(name, client.report(examples=12, metrics={"loss": 1.0}) if own else client.report())
            history = server.finish_round()
        ends.append(server.params)
    assert history["loss"].tolist() == [1, 1, 1]
    for name in ends[0]:
        np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=1e-5, atol=1e-6)


def test_a_loop_of_one_s_own_over_two_passes():
    ends = []
    for own in (False, True):
        server, clients = peers(MIME)
        if own:
            clients = {name: Client(MIME, name) for name in NAMES}
        while server.round < 2:
            for name, message in server.broadcast().items():
                client, data = clients[name], DATA[name]
                at = client.begin(message)
                if own and message.about["kind"] == "first":
                    client.report(gradient=gradients(at, data), examples=12)
                elif own:
                    client.apply_gradients(gradients(at, data), anchor_gradient=gradients(at, data))
                    client.report(full_gradient=gradients(at, data), examples=12)
                server.receive(name, client.report())
            server.finish_round()
        ends.append(server.params)
    for name in ends[0]:
        np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=1e-5, atol=1e-6)


def test_weights_and_samples_are_those_of_the_simulation():
    federation = scaffold()
    data = FederatedData.from_clients(list(DATA.values()))
    server, clients = peers(federation, seed=3)
    state = federation.init(params(), data, seed=3)
    weights = {"a": 1.0, "b": 3.0, "c": 0.5}
    for _ in range(3):
        names = server.sample(2)
        chosen = [NAMES.index(name) for name in names]
        assert chosen == np.asarray(data.sample(state.key, state.round, 2, False)).tolist()
        state, _ = federation.round(state, data, jnp.array(chosen), weights=jnp.array([weights[n] for n in names]))
        for name, message in server.broadcast(names, weights).items():
            clients[name].begin(message)
            server.receive(name, clients[name].report())
        server.finish_round()
    for name in state.params:
        np.testing.assert_allclose(server.params[name], state.params[name], rtol=1e-6, atol=1e-6)


def test_a_client_that_joins_late_begins_where_all_did():
    federation = Federation(loss, fo.Optimizer(0.05), local=["b"], batch_size=4)
    server = Server(federation, params(), 3, seed=0)
    clients = {name: Client(federation, name, DATA[name]) for name in NAMES}
    run_round(server, clients, ["c"])
    run_round(server, clients, ["c", "a"])
    assert server.names == ["c", "a"]
    assert clients["a"].journal.waiting
    with pytest.raises(ValueError, match=r"\['x', 'y'\] are new, and of the 3 clients 2 are known"):
        server.broadcast(["x", "y"])


def test_metrics_that_are_not_finite_travel():
    server, clients = peers(scaffold(batch_size=None, steps=1))
    message = server.broadcast(["a"])["a"]
    clients["a"].apply_gradients(gradients(clients["a"].begin(message), DATA["a"]))
    report = json.loads(json.dumps(clients["a"].report(metrics={"loss": float("nan")}).to_json(), allow_nan=False))
    server.receive("a", report)
    assert np.isnan(server.finish_round()["loss"]).all()


def test_messages_take_little_more_than_what_they_carry():
    federation = Federation(loss, fo.Optimizer(0.05), batch_size=4)
    big = {"w": jnp.zeros((3, 2000)), "b": jnp.zeros(2000)}
    server = Server(federation, big, ["a"])
    y = np.random.default_rng(0).normal(size=(12, 2000)).astype(np.float32)
    client = Client(federation, "a", {"x": DATA["a"]["x"], "y": y})
    message = server.broadcast()["a"]
    client.begin(message)
    report = client.report()
    assert len(report.to_bytes()) < 1.05 * 4 * 8000
    assert report.arrays["delta/w"].nbytes == 4 * 6000


@pytest.mark.parametrize(
    ("uplink", "most"),
    [
        (("top-k", {"fraction": 0.01}), 8 * 80 + 64),
        (("random-k", {"fraction": 0.01, "seed": 0}), 8 * 80 + 64),
        ("sign", 8000 / 8 + 64),
        (("qsgd", {"levels": 7, "seed": 0}), 8000 * 4 / 8 + 200),
    ],
)
def test_a_compressed_uplink_travels_compressed(uplink, most):
    federation = Federation(loss, fo.Optimizer(0.05), batch_size=4, uplink=[uplink])
    big = {"w": jnp.zeros((3, 2000)), "b": jnp.zeros(2000)}
    server = Server(federation, big, ["a"])
    y = np.random.default_rng(0).normal(size=(12, 2000)).astype(np.float32)
    client = Client(federation, "a", {"x": DATA["a"]["x"], "y": y})
    client.begin(server.broadcast()["a"])
    report = client.report()
    assert report.nbytes <= most


@pytest.fixture
def at_work():
    server, clients = peers(scaffold())
    run_round(server, clients)
    for name, message in server.broadcast().items():
        clients[name].begin(message)
    return server, clients


def altered(report, path=None, array=None, **about):
    arrays = dict(report.arrays)
    if path is not None:
        changed = Message.of({}, {"x": array}).arrays["x"]
        arrays[path] = changed
    return Message({**report.about, **about}, arrays)


BAD = np.float32([np.nan, 1])
REFUSED = {
    "NaN": (
        lambda r: altered(r, "delta/b", BAD),
        FloatingPointError,
        "the report of 'a': 'delta/b' has values that are not",
    ),
    "infinity": (
        lambda r: altered(r, "auxes/scaffold/delta/b", np.float32([np.inf, 1])),
        FloatingPointError,
        "not finite",
    ),
    "1e38": (
        lambda r: altered(r, "delta/b", np.float32([1e38, 1])),
        ValueError,
        "'delta/b' has 9.99.*e.37: expected at most",
    ),
    "another shape": (lambda r: altered(r, "delta/b", np.zeros(3, np.float32)), ValueError, r"expected float32\[2\]"),
    "another dtype": (lambda r: altered(r, "delta/b", np.zeros(2, np.int32)), ValueError, r"expected float32\[2\]"),
    "an unknown array": (lambda r: altered(r, "more", np.zeros(2)), ValueError, "has an unknown array 'more'"),
    "another's name": (lambda r: altered(r, **{"from": "b"}), ValueError, "says that it is from 'b'"),
    "an old round": (
        lambda r: altered(r, id=5, round=0),
        StaleMessageError,
        "is of round 0, to broadcast 5 of era",
    ),
    "no kind": (lambda r: altered(r, kind="x"), StaleMessageError, "is a 'x': expected a 'report'"),
    "no ticket": (lambda r: altered(r, ticket=True), ValueError, "has the ticket True"),
    "negative examples": (lambda r: altered(r, examples=-1.0), ValueError, "says it has -1.0 examples"),
    "many examples": (
        lambda r: altered(r, examples=1e30),
        ValueError,
        "says it has 1e.30 examples: expected 0 to 1000",
    ),
    "a thousand metrics": (
        lambda r: altered(r, metrics={str(i): 0.0 for i in range(1000)}),
        ValueError,
        "expected a mapping of at most 64",
    ),
    "a metric that is no number": (
        lambda r: altered(r, metrics={"loss": []}),
        ValueError,
        "expected a number, or null",
    ),
    "a metric of a name that is taken": (
        lambda r: altered(r, metrics={"joined": 1}),
        ValueError,
        "has a metric named 'joined'",
    ),
    "a lie about joined": (
        lambda r: altered(r, "auxes/scaffold/joined", np.int32(10**6)),
        ValueError,
        "'scaffold', has joined=1000000: expected 0 or 1",
    ),
    "a million leaves": (
        lambda r: Message(r.about, {f"delta/{i}": r.arrays["delta/b"] for i in range(10**6)}),
        ValueError,
        "lacks the array 'auxes|has an unknown array",
    ),
    "a metric of 10**400": (lambda r: altered(r, metrics={"loss": 10**400}), ValueError, "has the metric 'loss' of"),
    "a metric that float32 has not": (
        lambda r: altered(r, metrics={"loss": 1e300}),
        ValueError,
        "expected a number, or null",
    ),
    "a weight of next to nothing": (lambda r: altered(r, examples=1e-40), ValueError, "says it has 1e-40 examples"),
    "words that nobody asked for": (lambda r: altered(r, more="x" * 100), KeyError, "has an unknown key 'more'"),
    "bytes after the end": (lambda r: r.to_bytes() + b"\0" * 8, ValueError, "bytes of arrays: expected"),
    "a view of too many bytes": (
        lambda r: memoryview(bytes(10**8)),
        ValueError,
        "has 100000000 bytes: expected at most",
    ),
    "a large head": (
        lambda r: altered(r, metrics={str(i): 0.0 for i in range(10**5)}).to_bytes(),
        ValueError,
        "head cannot be read: 'it is cut short, or longer than",
    ),
    "much text": (
        lambda r: {
            "about": dict(r.about),
            "arrays": {"a": {"dtype": "int8", "shape": [0], "raw": {"data": "A" * 10**8}}},
        },
        ValueError,
        "arrays of 100000000 characters: expected at most",
    ),
    "no message": (lambda r: 5, TypeError, "a message is a Message"),
    "bytes of another": (lambda r: b"abc" * 10, ValueError, "begins with"),
    "a gigabyte": (lambda r: bytearray(10**8), ValueError, "has 100000000 bytes: expected at most"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_report_that_cannot_be_right_is_refused_and_nothing_changes(at_work, name):
    server, clients = at_work
    server.bounds = Bounds(most_examples=1000)
    change, error, words = REFUSED[name]
    good = clients["a"].report()
    with pytest.raises(error, match=words):
        server.receive("a", change(good))
    assert server.receive("a", good.to_bytes())
    assert server.finish_round()["joined"].tolist() == [True, False, False]


def test_a_client_s_number_that_is_not_finite_leaves_it_out_where_that_is_asked_for():
    server, clients = peers(scaffold(on_nonfinite="skip"))
    for name, message in server.broadcast().items():
        clients[name].begin(message)
        report = clients[name].report()
        server.receive(name, altered(report, "delta/b", BAD) if name == "b" else report)
    history = server.finish_round()
    assert history["joined"].tolist() == [True, False, True]
    assert history["finite"].tolist() == [True, False, True]
    assert server.ledger.tell("b") == 0
    assert np.isfinite(server.params["b"]).all()


BROADCASTS = {
    "for another": (lambda m: altered(m, to="b"), "is for 'b'"),
    "no round": (lambda m: altered(m, kind="report"), "is a 'report': expected 'first' or 'round'"),
    "a round before the first": (lambda m: altered(m, round=-1, id=7), "has round=-1: expected an integer in"),
    "a client beyond all": (lambda m: altered(m, client=3, id=7), "says client 3 of 3"),
    "parameters of another shape": (
        lambda m: altered(m, "params/b", np.zeros(3, np.float32), id=7),
        r"expected float32\[2\]",
    ),
    "an unknown array": (lambda m: altered(m, "params/c", np.zeros(2), id=7), "has an unknown array 'params/c'"),
}


@pytest.mark.parametrize("name", BROADCASTS)
def test_a_broadcast_that_cannot_be_right_is_refused_and_nothing_changes(at_work, name):
    server, clients = at_work
    change, words = BROADCASTS[name]
    before = clients["a"].journal.kept, clients["a"].journal.settled, clients["a"].report()
    with pytest.raises(ValueError, match=words):
        clients["a"].begin(change(server.broadcast(["a"])["a"]))
    assert before == (clients["a"].journal.kept, clients["a"].journal.settled, clients["a"].report())


def test_an_old_broadcast_is_refused():
    server, clients = peers(scaffold())
    old = server.broadcast(["a"])["a"].to_bytes()
    clients["a"].begin(old)
    server.receive("a", clients["a"].report())
    server.finish_round()
    clients["a"].begin(server.broadcast(["a"])["a"])
    with pytest.raises(StaleMessageError, match="is of round 0, and older than that of round 1"):
        clients["a"].begin(old)


CALLS = {
    "no client": (lambda: Server(scaffold(), params(), []), "should be different names, or how many clients"),
    "a name twice": (lambda: Server(scaffold(), params(), ["a", "a"]), "should be different names"),
    "fewer than num_clients": (lambda: Server(scaffold(), params(), list("abcd")), "give it num_clients=4"),
    "no round": (lambda: Server(scaffold(), params(), NAMES).finish_round(), "no round is under way"),
    "an unknown client": (lambda: Server(scaffold(), params(), NAMES).broadcast(["x"]), r"\['x'\] are new"),
    "no participants": (lambda: Server(scaffold(), params(), NAMES).broadcast([]), "at least one"),
    "a weight that is missing": (
        lambda: Server(scaffold(), params(), NAMES).broadcast(weights={"a": 1}),
        "one for each",
    ),
    "a sample that is too large": (lambda: Server(scaffold(), params(), NAMES).sample(4), "from 1 to the 3 clients"),
    "a sample of unknown names": (lambda: Server(scaffold(), params(), 3).sample(2), "0 are known by name"),
    "no name": (lambda: Client(scaffold(), ""), "should be a name"),
    "nothing heard": (lambda: Client(scaffold(), "a").report(), "has heard of no round"),
}


def test_a_peer_is_made_of_a_federation():
    for peer, args in ((Server, (params(), NAMES)), (Client, ("a",))):
        with pytest.raises(TypeError, match=f"{peer.__name__}: federation should be a Federation, not str"):
            peer("federation", *args)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_cannot_be_right_says_so(name):
    call, words = CALLS[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_client_without_data_says_what_it_needs(at_work):
    server, _ = at_work
    client = Client(scaffold(), "a")
    client.begin(altered(server.broadcast(["a"])["a"], taken=0))
    with pytest.raises(ValueError, match="has no data: give it some, or call `apply_gradients`"):
        client.fit()
    with pytest.raises(ValueError, match="has done nothing in this round"):
        client.report()
    with pytest.raises(ValueError, match=r"what is given as gradients lacks the leaf 'b'"):
        client.apply_gradients({"w": jnp.zeros((3, 2))})


def test_others_than_the_participants_are_refused_while_a_round_is_under_way():
    server, _clients = peers(scaffold())
    server.broadcast(["a", "b"])
    with pytest.raises(ValueError, match=r"round 0 is under way, and \['c'\] take no part in it"):
        server.broadcast(["c"])
    with pytest.raises(StaleMessageError, match="expected reports of round 0 from"):
        server.receive("c", Message({"from": "c"}, {}))


def test_a_round_in_which_no_one_reports_moves_nothing():
    server, clients = peers(scaffold())
    run_round(server, clients)
    before = server.params
    server.broadcast()
    assert server.finish_round()["joined"].tolist() == [False] * 3
    assert server.round == 2
    assert all((server.params[name] == before[name]).all() for name in before)


def test_a_part_of_a_saved_server_is_taken_over(tmp_path):
    server, clients = peers(scaffold())
    run_round(server, clients)
    server.save(tmp_path)
    other = Server(Federation(loss, fo.Optimizer(0.1), fo.Optimizer(1.0, modules=["adam"])), params(), NAMES)
    with pytest.raises(ValueError, match=r"is of another federation: batch_size was 4"):
        other.load(tmp_path)
    other.load(tmp_path, only=["params/**"])
    assert all((other.params[name] == server.params[name]).all() for name in other.params)
    assert other.round == 0


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    server, clients = peers(scaffold())
    run_round(server, clients)
    server.save(tmp_path / "server")
    clients["a"].save(tmp_path / "a")
    with pytest.raises(ValueError, match="is that of a 'client'"):
        server.load(tmp_path / "a")
    with pytest.raises(ValueError, match="is that of the client 'a'"):
        clients["b"].load(tmp_path / "a")
    with pytest.raises(ValueError, match="is of another federation: epochs was 1, and is 2 here"):
        Client(scaffold(epochs=2), "a").load(tmp_path / "a")
    twin = Client(scaffold(epochs=2), "a")
    twin.load(tmp_path / "a", changed=["epochs"])
    assert twin.journal.waiting[0][0] == clients["a"].journal.waiting[0][0]


def test_a_client_of_a_flax_model():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    federation = Federation.from_nnx(
        model, lambda m, batch: ((m(batch["x"]) - batch["y"]) ** 2).sum(-1), fo.Optimizer(0.05), batch_size=4
    )
    server = Server(federation, model, NAMES)
    clients = {name: Client(federation, name, DATA[name]) for name in NAMES}
    run_round(server, clients)
    assert isinstance(server.model(), nnx.Linear)
    assert isinstance(clients["a"].model(), nnx.Linear)


def test_an_optax_loop_may_stand_on_the_client_s_side():
    federation = Federation(loss, fo.Optimizer(1.0))
    server = Server(federation, params(), ["a"])
    client = Client(federation, "a")
    at = client.begin(server.broadcast()["a"])
    transform = optax.adam(0.1)
    updates, _ = transform.update(gradients(at, DATA["a"]), transform.init(at), at)
    client.apply_gradients(jax.tree.map(jnp.negative, updates))
    server.receive("a", client.report())
    server.finish_round()
    expected = optax.apply_updates(at, updates)
    assert all(jnp.allclose(server.params[name], expected[name]) for name in expected)


def test_reports_may_be_received_by_several_threads():
    server, clients = peers(scaffold())
    for name, message in server.broadcast().items():
        clients[name].begin(message)
    reports = [(name, client.report().to_bytes()) for name, client in clients.items()] * 8
    with ThreadPoolExecutor(8) as pool:
        new = list(pool.map(lambda report: server.receive(*report), reports))
    assert sum(new) == 3
    assert server.finish_round()["joined"].all()


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_peers_are_not_copied(copied):
    server, clients = peers(scaffold())
    for peer in (server, clients["a"]):
        with pytest.raises(TypeError, match="is not pickled or copied: `save` it to a folder"):
            copied(peer)


def test_checkpoints_of_version_1_are_read():
    server, _ = peers(scaffold())
    server.load(VERSION_1 / "server")
    client = Client(scaffold(), "a", DATA["a"])
    client.load(VERSION_1 / "a")
    assert server.round == 2
    assert server.ledger.tell("a") == client.journal.waiting[0][0]
    np.testing.assert_allclose(server.params["b"], [0.06700797, 0.03883688], rtol=1e-5)
    run_round(server, {"a": client}, ["a"])
    np.testing.assert_allclose(server.params["b"], [0.07636885, 0.04280772], rtol=1e-5)


@pytest.mark.parametrize("like", [None, params()], ids=["nested", "like"])
def test_a_client_that_lost_its_disk_says_so_also_where_it_keeps_a_part_of_the_model(like):
    federation = scaffold(local=["b"])
    server, clients = peers(federation)
    run_round(server, clients)
    run_round(server, clients)
    clients["a"] = Client(federation, "a", DATA["a"], like=like)
    for name, message in server.broadcast().items():
        assert (clients[name].begin(message) is None) == (name == "a") == clients[name].lost
        server.receive(name, clients[name].report())
    with pytest.raises(ValueError, match="has reported in this round"):
        clients["a"].apply_gradients(params())
    assert server.finish_round()["joined"].tolist() == [False, True, True]
    assert run_round(server, clients)["joined"].all()
    assert set(clients["a"].params) == {"w", "b"}


def test_a_client_that_has_nothing_to_lose_goes_on_after_its_disk_is_lost():
    federation = Federation(loss, fo.Optimizer(0.05), batch_size=4)
    server, clients = peers(federation)
    run_round(server, clients)
    clients["a"] = Client(federation, "a", DATA["a"])
    assert run_round(server, clients)["joined"].all()


def test_reports_that_are_too_large_together_leave_the_server_as_it_was():
    federation = Federation(loss, fo.Optimizer(0.05), fo.Optimizer(1e30), batch_size=4)
    server, clients = peers(federation)
    for name, message in server.broadcast().items():
        clients[name].begin(message)
        server.receive(name, altered(clients[name].report(), "delta/b", np.full(2, 9e18, np.float32)))
    with pytest.raises(FloatingPointError, match="the step of round 0 gives numbers that are not finite"):
        server.finish_round()
    assert server.round == 0
    assert not server.params["b"].any()
    server.cancel_round()
    server.broadcast(["a"])


def test_a_stranger_is_refused_before_its_message_is_read(monkeypatch):
    server, _ = peers(scaffold())
    server.broadcast()
    monkeypatch.setattr(Message, "from_bytes", lambda *args: pytest.fail("it was read"))
    with pytest.raises(StaleMessageError, match="the report of 'x': expected reports of round 0 from"):
        server.receive("x", b"anything")


def test_a_buffer_that_is_used_again_changes_no_report():
    ends = []
    for again in (False, True):
        server, clients = peers(scaffold())
        for name, message in server.broadcast().items():
            clients[name].begin(message)
            buffer = bytearray(clients[name].report().to_bytes())
            server.receive(name, buffer)
            if again:
                buffer[:] = bytes(len(buffer))
        server.finish_round()
        ends.append(server.params)
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def test_a_late_message_of_a_first_pass_is_refused():
    server, clients = peers(MIME)
    first = server.broadcast()["a"]
    clients["a"].begin(first)
    server.receive("a", clients["a"].report())
    server.finish_round()
    clients["a"].begin(server.broadcast()["a"])
    with pytest.raises(StaleMessageError, match="older than that of round 0"):
        clients["a"].begin(first)


def test_a_round_whose_beginning_fails_is_not_begun(monkeypatch):
    server, clients = peers(scaffold())
    run_round(server, clients)
    client, message = clients["a"], server.broadcast()["a"]
    before = dataclasses.replace(client.journal)
    with monkeypatch.context() as patched:
        patched.setattr(type(client._programs), "shared", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            client.begin(message)
    assert client.journal == before
    client.begin(message)
    assert client.journal.settled == server.ledger.tell("a")


def test_the_server_says_who_is_new():
    server, clients = peers(scaffold())
    for _ in range(2):
        for name, message in server.broadcast().items():
            clients[name].begin(message)
            server.receive(name, altered(clients[name].report(), "auxes/scaffold/joined", np.int32(0)))
        server.finish_round()
    assert int(server.state.server.modules["scaffold-server"].clients) == 3


def test_what_clients_gave_is_not_loaded_without_who_they_are(tmp_path):
    server, clients = peers(scaffold())
    run_round(server, clients)
    server.save(tmp_path)
    with pytest.raises(ValueError, match="what clients gave stands in 'server/modules/scaffold-server'"):
        server.load(tmp_path, only=["server/**"])
    server.load(tmp_path, only=["server/lrate/*", "params/w"])


OWN = {
    "negative examples": ({"examples": -5}, "examples=-5 should be a number of at least 0"),
    "no number of examples": ({"examples": float("nan")}, "examples=nan should be a number"),
    "a metric of a name that is taken": ({"metrics": {"examples": 3}}, "has a metric named 'examples'"),
    "another shape": ({"full_gradient": {"w": np.zeros(3)}}, "what is given as full_gradient"),
}


@pytest.mark.parametrize("name", OWN)
def test_what_cannot_be_right_is_refused_on_the_client_and_may_be_said_again(name):
    server, clients = peers(scaffold(batch_size=None))
    client = clients["a"]
    client.apply_gradients(gradients(client.begin(server.broadcast()["a"]), DATA["a"]))
    given, words = OWN[name]
    with pytest.raises(ValueError, match=words):
        client.report(**given)
    assert server.receive("a", client.report())


def test_how_many_examples_there_are_is_asked_where_they_count():
    server, _ = peers(scaffold(weighting="examples"))
    client = Client(server.federation, "a")
    client.apply_gradients(gradients(client.begin(server.broadcast()["a"]), DATA["a"]))
    with pytest.raises(TypeError, match=r"how many examples it has counts: `report\(examples=...\)`"):
        client.report()
    assert client.report(examples=12).about["examples"] == 12


SAVED = {
    "settled": ("x", "has settled: 'x'"),
    "waiting": ([True], r"has waiting: \[True\]"),
    "heard": ([1, 2], r"has heard: \[1, 2\]"),
    "kept": (1, "has kept: 1"),
    "specs": ([None, None], r"shapes \[None, None\]"),
    "name": ("b", "is that of the client 'b'"),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_that_says_what_cannot_be_is_refused(tmp_path, name):
    server, clients = peers(scaffold())
    run_round(server, clients)
    clients["a"].save(tmp_path)
    text = json.loads((tmp_path / "checkpoint.json").read_text())["checkpoint"]
    text["about"][name], words = SAVED[name]
    whole = json.dumps(text)
    (tmp_path / "checkpoint.json").write_text(f'{{"crc32": {zlib.crc32(whole.encode())}, "checkpoint": {whole}}}')
    with pytest.raises(ValueError, match=words):
        clients["a"].load(tmp_path)


def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(tmp_path):
    server, clients = peers(scaffold())
    run_round(server, clients)
    server.state = server.state._replace(params={"w": server.params["w"], "b": jnp.array([np.nan, 0.0])})
    server.save(tmp_path)
    other, _ = peers(scaffold())
    with pytest.raises(ValueError, match="'params/b' holds nan"):
        other.load(tmp_path)
    assert other.round == 0
