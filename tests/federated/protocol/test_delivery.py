"""Over any network, and whatever crashes, the server has the sum of what its clients have."""

import copy
import itertools
import random

import pytest

from functional_optimodules.federated.protocol.delivery import Call, Gathering, Journal, Ledger, StaleMessageError

SCHEDULES = 2000
ERAS = itertools.count(1)


class Server:
    """A server whose state is a sum over clients of a whole number that each has."""

    def __init__(self):
        self.ledger, self.total, self.round, self.open = Ledger(), 0, 0, None
        self.era, self.calls = next(ERAS), 0

    def broadcast(self, clients):
        if self.open is None:
            self.calls += 1
            self.open = Gathering(Call(self.era, self.calls, self.round, first=False), tuple(clients))
        return {name: (self.open.call, self.ledger.tell(name)) for name in self.open.clients}

    def receive(self, name, about, given):
        if self.open is None:
            raise StaleMessageError("none is under way")
        self.open.require(name, about, "the report")
        return self.open.stand(name, about["ticket"], (about["kind"], given))

    def finish(self):
        for name, (ticket, (kind, given)) in self.open.arrived.items():
            if kind == "lost":
                self.total -= self.ledger.forget(name) or 0
            else:
                self.total += given
                self.ledger.take(name, ticket, given, int.__add__)
        self.open, self.round = None, self.round + 1

    def restored(self):
        twin = copy.deepcopy(self)
        twin.era, twin.calls, twin.open = next(ERAS), 0, None
        return twin


class Client:
    """A client that moves the number that it has, at random: what is done again comes out otherwise."""

    def __init__(self, name, values):
        self.name, self.values, self.journal = name, values, Journal()

    def hear(self, call, taken):
        if not self.journal.is_new(call, "the broadcast"):
            return None
        about = {"from": self.name, "era": call.era, "id": call.id, "round": call.round, "kind": "lost", "ticket": 1}
        how = self.journal.hear(call, taken)
        if how == "lost":
            return about, None
        if how == "anew":
            self.journal.kept = 0
        new = self.journal.kept + random.randint(-9, 9)
        ticket = self.journal.report(new)
        self.values[ticket] = new
        return {**about, "kind": "report", "ticket": ticket}, new - self.journal.kept


class Network:
    """What carries messages: it loses, delays, repeats and reorders them, and both ends crash."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        random.seed(seed)
        self.values = {0: 0}
        self.server = Server()
        self.clients = {name: Client(name, self.values) for name in "abcd"}
        self.late, self.copies = [], {name: [] for name in (*self.clients, "server")}
        self.counts = dict.fromkeys(("stale", "lost", "late", "crash"), 0)

    def consistent(self):
        return self.server.total == sum(self.values[ticket] for ticket in self.server.ledger.taken.values())

    def down(self, name, call, taken):
        try:
            report = self.clients[name].hear(call, taken)
        except StaleMessageError:
            self.counts["stale"] += 1
            return
        if report is not None:
            self.send(("up", name, *report))

    def up(self, name, about, given):
        try:
            self.server.receive(name, about, given)
        except StaleMessageError:
            self.counts["stale"] += 1

    def send(self, message):
        what = self.rng.random()
        if what < 0.15:
            self.counts["lost"] += 1
        elif what < 0.3:
            self.counts["late"] += 1
            self.late.append(message)
        else:
            for _ in range(1 + (what > 0.85)):
                self.deliver(message)

    def deliver(self, message):
        kind, name, *rest = message
        if kind == "up" or name in self.clients:  # what is for one that has left arrives nowhere
            getattr(self, kind)(name, *rest)

    def crash(self):
        name = self.rng.choice([*self.clients, "server"])
        if self.rng.random() < 0.5:
            self.copies[name].append(copy.deepcopy(self.server if name == "server" else self.clients[name].journal))
            return
        self.counts["crash"] += 1
        old = self.rng.choice(self.copies[name]) if self.copies[name] and self.rng.random() < 0.8 else None
        if name == "server":
            self.server = Server() if old is None else old.restored()
        else:
            self.clients[name].journal = Journal() if old is None else copy.deepcopy(old)

    def run_round(self):
        alive = list(self.clients)
        chosen = self.rng.sample(alive, self.rng.randint(1, len(alive)))
        for _ in range(self.rng.randint(1, 2)):
            for name, (call, taken) in self.server.broadcast(chosen).items():
                self.send(("down", name, call, taken))
            if self.rng.random() < 0.3:
                self.crash()
            self.rng.shuffle(self.late)
            while self.late and self.rng.random() < 0.5:
                self.deliver(self.late.pop())
        if self.server.open is not None:
            self.server.finish()
        if self.rng.random() < 0.1 and len(self.clients) > 2:
            del self.clients[self.rng.choice(alive)]
        if self.rng.random() < 0.1:
            name = f"late-{self.server.round}"
            self.clients[name], self.copies[name] = Client(name, self.values), []

    def settle(self):
        """Run three rounds without faults: one to find what was lost, one to begin anew, one to hear of it."""
        self.copies = {"server": []}
        for _ in range(3):
            for name, (call, taken) in self.server.broadcast(self.clients).items():
                if name in self.clients and (report := self.clients[name].hear(call, taken)):
                    self.server.receive(name, *report)
            self.server.finish()


def test_the_server_has_the_sum_of_what_clients_have_over_any_network():
    seen = dict.fromkeys(("stale", "lost", "late", "crash"), 0)
    for seed in range(SCHEDULES):
        network = Network(seed)
        for _ in range(8):
            network.run_round()
            assert network.consistent(), seed
        network.settle()
        assert network.consistent(), seed
        for name, client in network.clients.items():
            ticket = network.server.ledger.tell(name)
            journal = client.journal
            assert network.values[ticket] == {journal.settled: journal.kept, **dict(journal.waiting)}[ticket], seed
        seen = {name: count + network.counts[name] for name, count in seen.items()}
    assert min(seen.values()) > SCHEDULES, seen


def call(number, **options):
    return Call(**{"era": 1, "id": 100 + number, "round": number, "first": False} | options)


def test_what_was_not_taken_in_is_dropped():
    journal = Journal("old", 7, heard=call(0))
    journal.report("moved")
    assert journal.hear(call(1), 7) == "on"
    assert (journal.kept, journal.settled, journal.waiting) == ("old", 7, ())


def test_what_was_taken_in_is_settled():
    journal = Journal("old", 7, heard=call(0))
    ticket = journal.report("moved")
    assert journal.hear(call(3), ticket) == "on"
    assert (journal.kept, journal.settled, journal.waiting) == ("moved", ticket, ())


def test_a_round_that_is_done_again_leaves_both_reports_waiting():
    journal = Journal("old", 7, heard=call(0))
    first = journal.report("moved")
    assert journal.hear(call(0), 7) == "on"
    second = journal.report("moved otherwise")
    for ticket, kept in ((first, "moved"), (second, "moved otherwise")):
        twin = copy.deepcopy(journal)
        assert twin.hear(call(1), ticket) == "on"
        assert twin.kept == kept


@pytest.mark.parametrize("journal", [Journal(), Journal("old", 7), Journal("old", 7, ((8, "moved"),))])
def test_a_ticket_that_a_client_knows_nothing_of_says_that_it_has_lost_its_state(journal):
    before = copy.deepcopy(journal)
    assert journal.hear(call(0), 12345) == "lost"
    assert (journal.kept, journal.settled, journal.waiting) == (before.kept, before.settled, before.waiting)


def test_a_client_whose_server_has_lost_all_begins_anew():
    journal = Journal("old", 7, ((8, "moved"),))
    assert journal.hear(call(0), 0) == "anew"
    assert (journal.kept, journal.settled, journal.waiting) == (None, 0, ())


def test_a_client_that_never_counted_begins_anew_with_another_server():
    journal = Journal("from the old server", 0, heard=call(0))
    assert journal.hear(call(1), 0) == "on"
    assert journal.hear(call(0, era=2), 0) == "anew"


@pytest.mark.parametrize("old", [call(4), call(5, first=True)])
def test_an_older_broadcast_is_refused(old):
    journal = Journal("kept", 0, heard=call(5))
    assert not journal.is_new(call(5), "the broadcast")
    with pytest.raises(StaleMessageError, match="and older than that of round 5, which was heard"):
        journal.is_new(old, "the broadcast")


def test_a_restored_server_s_broadcast_is_taken_and_what_it_sent_before_is_refused():
    journal = Journal("kept", 0, heard=call(5))
    assert journal.is_new(call(4, era=2), "the broadcast")
    journal.hear(call(4, era=2), 0)
    with pytest.raises(StaleMessageError, match="older than"):
        journal.is_new(call(6), "the broadcast")


def test_of_several_reports_in_a_round_the_last_stands():
    gathering = Gathering(call(0), ("a",))
    assert gathering.stand("a", 1, "one")
    assert not gathering.stand("a", 1, "one")
    assert gathering.stand("a", 2, "two")
    assert gathering.arrived == {"a": (2, "two")}


@pytest.mark.parametrize(
    ("about", "client", "error", "words"),
    [
        (
            {"from": "a", "era": 1, "id": 99, "round": 3, "kind": "report"},
            "a",
            StaleMessageError,
            "is of round 3.*expected round 0",
        ),
        ({"from": "b", "era": 1, "id": 100, "round": 0, "kind": "report"}, "a", ValueError, "says that it is from 'b'"),
        (
            {"from": "b", "era": 1, "id": 100, "round": 0, "kind": "report"},
            "b",
            StaleMessageError,
            "expected reports of round 0",
        ),
        (
            {"from": "a", "era": 1, "id": 100, "round": 0, "kind": "gradient"},
            "a",
            StaleMessageError,
            "expected a 'report'",
        ),
    ],
)
def test_a_report_that_answers_no_broadcast_is_refused(about, client, error, words):
    with pytest.raises(error, match=words):
        Gathering(call(0), ("a",)).require(client, about, "the report")
