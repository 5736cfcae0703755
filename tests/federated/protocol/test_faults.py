"""SCAFFOLD's variate stays the mean of the clients', and FedDyn's sum theirs, whatever the network and the disks do."""

import contextlib
import random

import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import Client, Federation, Server
from functional_optimodules.federated.protocol.delivery import StaleMessageError

from .peers import DATA, NAMES, feddyn, loss, params, peers, run_round, scaffold

SCHEDULES = 6


def on_server(server):
    """Return the sum over clients of what each has, as the server has it, flat."""
    state = next(iter(server.state.server.modules.values()))
    tree = state.total if hasattr(state, "total") else state.excess
    scale = 1 if hasattr(state, "total") else 0.5 * 3  # alpha N: h / alpha is the mean of the clients' over alpha
    return np.concatenate([scale * np.ravel(tree[name]) for name in ("b", "w")])


def on_clients(server, clients):
    """Return that sum from the clients' own states, as of the reports that count."""
    total = np.zeros(8)
    for name, client in clients.items():
        journal, taken = client.journal, server.ledger.tell(name)
        if taken:
            row = {journal.settled: journal.kept, **dict(journal.waiting)}[taken]
            total += np.concatenate([np.ravel(leaf) for leaf in row if leaf.dtype != np.int32][:2])
    return total


@pytest.mark.parametrize("federation", [pytest.param(scaffold(), id="scaffold"), pytest.param(feddyn(), id="feddyn")])
@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_sums_over_clients_hold_over_a_network_that_loses_repeats_and_delays_and_peers_that_crash(
    federation, seed, tmp_path
):
    rng = random.Random(seed)
    server, clients = peers(federation, seed=seed)
    late, saved = [], set()

    def deliver(name, report):
        with contextlib.suppress(StaleMessageError):
            server.receive(name, report)

    for _ in range(8):
        for name, message in server.broadcast(rng.sample(NAMES, rng.randint(1, 3))).items():
            if rng.random() < 0.1:
                continue  # the broadcast is lost
            try:
                clients[name].begin(message.to_bytes())
            except StaleMessageError:
                continue
            report = clients[name].report().to_bytes()
            if rng.random() < 0.5:
                clients[name].save(tmp_path / name)
                saved.add(name)
            what = rng.random()
            if what < 0.2:
                late.append((name, report))
            elif what > 0.35:  # else it is lost
                for _ in range(rng.randint(1, 2)):
                    deliver(name, report)
            if rng.random() < 0.2:  # the client dies, and comes back from its disk, or without it
                clients[name] = Client(federation, name, DATA[name])
                if name in saved and rng.random() < 0.7:
                    clients[name].load(tmp_path / name)
        rng.shuffle(late)
        while late and rng.random() < 0.5:
            deliver(*late.pop())
        if rng.random() < 0.2:
            if "server" not in saved or rng.random() < 0.5:
                server.save(tmp_path / "server")
                saved.add("server")
            server = Server(federation, params(), NAMES, seed=seed)
            server.load(tmp_path / "server")
        else:
            server.finish_round()
    for _ in range(3):  # one to find what was lost, one to begin anew, one to hear of it
        run_round(server, clients)
    assert np.abs(on_server(server)).max() > 1e-3
    np.testing.assert_allclose(on_server(server), on_clients(server, clients), rtol=1e-5, atol=1e-5)


def test_a_report_that_is_lost_is_as_if_its_client_had_dropped_out():
    server, clients = peers(scaffold())
    run_round(server, clients)
    for name, message in server.broadcast().items():
        clients[name].begin(message)
        report = clients[name].report()
        if name != "b":
            server.receive(name, report)
    history = server.finish_round()
    assert history["joined"].tolist() == [True, False, True]
    before = clients["b"].journal.kept
    run_round(server, clients)
    assert clients["b"].journal.settled != 0
    assert all((new == old).all() for new, old in zip(clients["b"].journal.kept, before, strict=True))


def test_a_client_that_lost_its_disk_begins_anew_and_what_it_gave_is_taken_back():
    server, clients = peers(scaffold())
    run_round(server, clients)
    run_round(server, clients)
    clients["b"] = Client(scaffold(), "b", DATA["b"])
    history = run_round(server, clients)
    assert history["joined"].tolist() == [True, False, True]
    assert server.ledger.tell("b") == 0
    run_round(server, clients)
    run_round(server, clients)
    np.testing.assert_allclose(on_server(server), on_clients(server, clients), rtol=1e-5, atol=1e-6)


def test_asking_twice_for_a_report_and_beginning_twice_are_once():
    server, clients = peers(scaffold())
    message = server.broadcast()["a"]
    first = clients["a"].begin(message)
    report = clients["a"].report()
    again = clients["a"].begin(message.to_json())
    assert clients["a"].report() is report
    assert all((first[name] == again[name]).all() for name in first)
    assert server.receive("a", report) is True
    assert server.receive("a", report.to_bytes()) is False


def test_a_server_that_was_restored_in_mid_round_asks_again_and_refuses_what_was_sent_to_the_old_one(tmp_path):
    server, clients = peers(scaffold())
    run_round(server, clients)
    server.save(tmp_path)
    for name, message in server.broadcast().items():
        clients[name].begin(message)
    old = clients["a"].report()
    server = Server(scaffold(), params(), NAMES)
    server.load(tmp_path)
    with pytest.raises(StaleMessageError, match="expected none, as no round is under way"):
        server.receive("a", old)
    server.broadcast()
    with pytest.raises(StaleMessageError, match="is of round 1, to broadcast"):
        server.receive("a", old)
    run_round(server, clients)
    run_round(server, clients)
    np.testing.assert_allclose(on_server(server), on_clients(server, clients), rtol=1e-5, atol=1e-6)


def test_a_restored_server_and_restored_clients_go_on_with_the_same_numbers(tmp_path):
    ends = []
    for restart in (False, True):
        server, clients = peers(scaffold(), seed=4)
        for number in range(4):
            run_round(server, clients)
            if restart and number == 1:
                server.save(tmp_path / "server")
                twin = Server(scaffold(), params(), NAMES)
                twin.load(tmp_path / "server")
                server = twin
                for name in NAMES:
                    clients[name].save(tmp_path / name)
                    clients[name] = Client(scaffold(), name, DATA[name])
                    clients[name].load(tmp_path / name)
        ends.append(server.params)
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def begun_variates(clients, server):
    """Return each client's h as of its last report that counts, once it has been told what came of that."""
    found = []
    for name, client in clients.items():
        client.begin(server.broadcast()[name])
        begun = client._programs.begin(client._work.shared, client.journal.kept)
        state = next(iter(client._programs.sides.client.portable(begun.own.client).modules.values()))
        found.append(np.concatenate([np.ravel(state.local[path]) for path in ("b", "w")]))
    return np.array(found)


@pytest.mark.parametrize("seed", range(4))
def test_scaffnew_s_variates_sum_to_zero_whatever_is_lost(seed, tmp_path):
    rng = random.Random(seed)
    federation = Federation(loss, fo.Optimizer(0.05, modules=[("scaffnew", {"probability": 0.3})]), coin=0.3)
    server, clients = peers(federation, seed=seed)
    for number in range(8):
        for name, message in server.broadcast().items():
            if rng.random() < 0.2:
                continue
            clients[name].begin(message)
            report = clients[name].report()
            if rng.random() > 0.2:
                server.receive(name, report)
            if number == 4 and name == "b":  # a disk is lost
                clients[name] = Client(federation, name, DATA[name])
        server.finish_round()
        if rng.random() < 0.3:
            server.save(tmp_path)
            server = Server(federation, params(), NAMES)
            server.load(tmp_path)
    for _ in range(3):
        run_round(server, clients)
    variates = begun_variates(clients, server)
    assert np.abs(variates).max() > 0.05
    np.testing.assert_allclose(variates.sum(0), 0, atol=1e-5)


def test_a_restored_client_still_refuses_an_old_broadcast(tmp_path):
    server, clients = peers(scaffold())
    old = server.broadcast()["a"].to_bytes()
    run_round(server, clients)
    run_round(server, clients)
    clients["a"].save(tmp_path)
    twin = Client(scaffold(), "a", DATA["a"])
    twin.load(tmp_path)
    with pytest.raises(StaleMessageError, match="is of round 0, and older than that of round 1, which was heard"):
        twin.begin(old)
    assert twin.journal.waiting[0][0] == server.ledger.tell("a")
