"""Which reports count: both sides agree, whatever is lost, late, repeated, or done again after a crash.

    Client                                          Server
      Init: settled = 0; waiting = none               Init: taken[client] = 0 for each client
      Hear(taken):                                    Tell(client): taken[client], with each broadcast
        taken is waiting's: settle what waits         Receive(client, ticket): the last one that arrives
        taken is settled:   drop what waits             in the round stands
        taken is 0:         begin anew                Finish: taken[client] = ticket, of each that stands
        else:               it has lost its state     Lost(client): forget what it gave; taken[client] = 0
      Report: waiting = a new ticket, and what it
        will have once the report is known to count

A ticket is a number drawn at random for each report. So what was done again, by a client that
was restored from an older copy, does not pass for what had arrived; and a server that was
restored tells what it knows of, and no more.

A client that hears a ticket it knows nothing of cannot go on from where the server has it: its disk
was lost, or the server went back by more than a round. It says so, and the server takes out of its sums what
it had from this client, which then begins anew. So a sum over clients of what each has is what the
server has, at any time, up to what is on its way.

Nothing here knows of arrays: what a client has, what it reports and what it gave are any values.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from functional_optimodules.config.outside import quote

Kept = TypeVar("Kept")
Given = TypeVar("Given")
Report = TypeVar("Report")


class StaleMessageError(ValueError):
    """A message of another round than the one under way, or that was not asked for."""


def draw_ticket() -> int:
    """Draw a number that nothing else has: in [1, 2**53), which JSON keeps exactly."""
    return 1 + secrets.randbelow(2**53 - 1)


@dataclass(frozen=True)
class Call:
    """What tells a broadcast from any other.

    Attributes:
      era: drawn when the server was made, or restored.
      round: the number of the round.
      id: drawn when the round began.
      first: whether it asks for the first of two passes.
    """

    era: int
    round: int
    id: int
    first: bool


@dataclass
class Journal(Generic[Kept]):
    """A client's side.

    Attributes:
      kept: what it has, as of the report that is settled; `None` before it ever had anything.
      settled: the ticket of the last report that is known to count; 0 before any.
      waiting: the ticket of the report of which nothing is known yet, and what it has if that counts.
      heard: the last broadcast that it heard.
    """

    kept: Kept | None = None
    settled: int = 0
    waiting: tuple[int, Kept] | None = None
    heard: Call | None = None

    def is_new(self, call: Call, what: str) -> bool:
        """Whether a broadcast is another than the last one.

        Raises:
          StaleMessageError: if it is older.
        """
        heard = self.heard
        if heard is not None and call.era == heard.era and call.round < heard.round:
            raise StaleMessageError(f"{what} is of round {call.round}: expected one of round {heard.round} or later")
        return call != heard

    def hear(self, call: Call, taken: int, fresh: Callable[[], Kept]) -> bool:
        """Hear a broadcast, and settle what the server has taken in.

        Args:
          call: which broadcast.
          taken: the ticket that it tells.
          fresh: makes what a client has that begins anew.

        Returns:
          Whether it can go on; otherwise it has lost what the server reckons with.
        """
        if self.waiting is not None and taken == self.waiting[0]:
            self.settled, self.kept = self.waiting
        elif taken == 0 and (self.settled or self.kept is None):
            self.kept, self.settled = fresh(), 0
        elif taken != self.settled or self.kept is None:
            self.heard = call
            return False
        self.waiting, self.heard = None, call
        return True

    def report(self, kept: Kept) -> int:
        """Return the ticket of a new report, given what the client has if that counts."""
        self.waiting = draw_ticket(), kept
        return self.waiting[0]


@dataclass
class Gathering(Generic[Report]):
    """The reports of a round under way, on the server's side.

    Attributes:
      call: which broadcast they answer.
      clients: those who are to report, in order.
      arrived: the ticket and the report of those who did.
    """

    call: Call
    clients: tuple[str, ...]
    arrived: dict[str, tuple[int, Report]] = field(default_factory=dict)

    def require(self, client: str, about: Mapping[str, Any], what: str) -> None:
        """Check that a report answers this broadcast.

        Raises:
          StaleMessageError: if it does not.
          ValueError: if it says that it is another's.
        """
        call, kind = self.call, "gradient" if self.call.first else "report"
        if client not in self.clients:
            raise StaleMessageError(f"{what}: expected reports of round {call.round} from {quote(self.clients)}")
        if about.get("from") != client:
            raise ValueError(f"{what} says that it is from {quote(about.get('from'))}")
        if about.get("id") != call.id:
            raise StaleMessageError(
                f"{what} is of round {quote(about.get('round'))}, with the id {quote(about.get('id'))}: expected round "
                f"{call.round}, with {call.id}"
            )
        if about.get("kind") not in (kind, "lost"):
            raise StaleMessageError(f"{what} is a {quote(about.get('kind'))}: expected a {kind!r}, or 'lost'")

    def stand(self, client: str, ticket: int, report: Report) -> bool:
        """Let a report stand for a client's; return whether it is another than what stood."""
        before = self.arrived.get(client)
        self.arrived[client] = ticket, report
        return before is None or before[0] != ticket


@dataclass
class Ledger(Generic[Given]):
    """What counts, on the server's side.

    Attributes:
      taken: of each client the ticket of the last report that counts; those of whom none does are absent.
      given: the sum of what each has given since it joined.
    """

    taken: dict[str, int] = field(default_factory=dict)
    given: dict[str, Given] = field(default_factory=dict)

    def tell(self, client: str) -> int:
        """Return the ticket of a client's last report that counts; 0 if none does."""
        return self.taken.get(client, 0)

    def take(self, client: str, ticket: int, given: Given | None, add: Callable[[Given, Given], Given]) -> None:
        """Take in a report, with what it gives, if that is reckoned with."""
        self.taken[client] = ticket
        if given is not None:
            self.given[client] = add(self.given[client], given) if client in self.given else given

    def forget(self, client: str) -> Given | None:
        """Strike out a client that lost its state; return what it had given, to be taken out of what the server has."""
        self.taken.pop(client, None)
        return self.given.pop(client, None)
