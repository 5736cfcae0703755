"""Which reports count: both sides agree, whatever is lost, late, repeated, or done again after a crash.

    Client                                          Server
      Init: settled = 0; waiting = {}                 Init: taken[client] = 0 for each client
      Hear(taken):                                    Tell(client): taken[client], with each broadcast
        taken is one that waits: settle that          Receive(client, ticket): the last one that arrives
        taken is settled:        drop what waits        in the round stands
        taken is 0:              begin anew           Finish: taken[client] = ticket, of each that stands
        else:                    its state is lost    Lost(client): forget what it gave; taken[client] = 0
      Report: waiting[a new ticket] = what it
        will have once the report is known to count

A ticket is a number drawn at random for each report. So what was done again, by a client that
was restored from an older copy, does not pass for what had arrived; and a server that was
restored tells what it knows of, and no more. A client that does a round again waits for either report.

A client that hears a ticket it knows nothing of cannot go on from where the server has it: its disk
was lost, or the server went back by more than a round. It says so, and the server takes out of its sums what
it had from this client, which then begins anew. So a sum over clients of what each has is what the
server has, at any time, up to what is on its way.

Nothing here knows of arrays: what a client has, what it reports and what it gave are any values.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from functional_optimodules.config.outside import quote

Kept = TypeVar("Kept")
Given = TypeVar("Given")
Report = TypeVar("Report")

# Of a round that is done again and again, so many reports are waited for.
_MOST_WAITING = 4


class StaleMessageError(ValueError):
    """A message of another round than the one under way, or that was not asked for."""


def draw_ticket() -> int:
    """Draw a number that nothing else has: in [1, 2**53), which JSON keeps exactly."""
    return 1 + secrets.randbelow(2**53 - 1)


def next_era(last: int = 0) -> int:
    """Return a number for a server that is made, or restored: larger than one before, by the clock in microseconds."""
    return max(time.time_ns() // 1000, last + 1)


@dataclass(frozen=True)
class Call:
    """What tells a broadcast from any other.

    Attributes:
      era: when the server was made, or restored; see `next_era`.
      id: how many rounds it has begun since, this one included.
      round: the number of the round.
      first: whether it asks for the first of two passes.
    """

    era: int
    id: int
    round: int
    first: bool

    def is_before(self, other: "Call") -> bool:
        """Whether it was made before another."""
        return (self.era, self.id, not self.first) < (other.era, other.id, not other.first)


@dataclass
class Journal(Generic[Kept]):
    """A client's side.

    Attributes:
      kept: what it has, as of the report that is settled; `None` before it ever had anything.
      settled: the ticket of the last report that is known to count; 0 before any.
      waiting: the tickets of the reports of which nothing is known yet, each with what it has if that counts.
      heard: the last broadcast that it heard.
    """

    kept: Kept | None = None
    settled: int = 0
    waiting: tuple[tuple[int, Kept], ...] = ()
    heard: Call | None = None

    def is_new(self, call: Call, what: str) -> bool:
        """Whether a broadcast is another than the last one.

        Raises:
          StaleMessageError: if it is older.
        """
        heard = self.heard
        if heard is not None and call.is_before(heard):
            raise StaleMessageError(
                f"{what} is of round {call.round}, and older than that of round {heard.round}, which was heard: "
                "expected a later one"
            )
        return call != heard

    def hear(self, call: Call, taken: int) -> Literal["on", "anew", "lost"]:
        """Hear a broadcast, and settle what the server has taken in.

        Args:
          call: which broadcast.
          taken: the ticket that it tells.

        Returns:
          Whether the client goes on from `kept`; begins anew, and has yet to be given what it then has;
          or has lost what the server reckons with.
        """
        heard, found = self.heard, dict(self.waiting)
        again = heard is not None and (call.era, call.id) == (heard.era, heard.id)
        self.heard = call
        if taken in found:
            self.settled, self.kept, self.waiting = taken, found[taken], ()
        elif taken == 0 and (self.settled or self.kept is None or heard is None or call.era != heard.era):
            self.settled, self.kept, self.waiting = 0, None, ()
            return "anew"
        elif taken != self.settled or self.kept is None:
            return "lost"
        elif not again:
            self.waiting = ()
        return "on"

    def report(self, kept: Kept) -> int:
        """Return the ticket of a new report, given what the client has if that counts."""
        ticket = draw_ticket()
        self.waiting = (*self.waiting, (ticket, kept))[-_MOST_WAITING:]
        return ticket


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

    def require_client(self, client: str, what: str) -> None:
        """Raise a `StaleMessageError` if a client takes no part in the round."""
        if client not in self.clients:
            raise StaleMessageError(f"{what}: expected reports of round {self.call.round} from {quote(self.clients)}")

    def require(self, client: str, about: Mapping[str, Any], what: str) -> None:
        """Check that a report answers this broadcast.

        Raises:
          StaleMessageError: if it does not.
          ValueError: if it says that it is another's.
        """
        call, kind = self.call, "gradient" if self.call.first else "report"
        self.require_client(client, what)
        if about.get("from") != client:
            raise ValueError(f"{what} says that it is from {quote(about.get('from'))}")
        if (about.get("era"), about.get("id")) != (call.era, call.id):
            raise StaleMessageError(
                f"{what} is of round {quote(about.get('round'))}, to broadcast {quote(about.get('id'))} of era "
                f"{quote(about.get('era'))}: expected round {call.round}, to {call.id} of {call.era}"
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
