"""Scenarios: who takes part in each round, with how many steps, and whose message is lost."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .problem import Problem, quadratics


@dataclass(frozen=True)
class RoundPlan:
    """What happens in one round.

    Attributes:
      participants: the clients that are asked to work, by index.
      steps: local steps of each of the problem's clients, by index, whether it takes part or not.
      dropped: participants whose message never arrives. All is then as if they had not been asked: the server
        counts them nowhere, and the client goes on with what it had before the round.
      staleness: for `fedbuff` alone, where a round is one update of the server: how many updates ago each
        participant, in their order, downloaded the parameters that it started from; empty if none is stale.
    """

    participants: tuple[int, ...]
    steps: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    staleness: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        lost = set(self.dropped)
        if not lost < set(self.participants):
            raise ValueError(
                f"RoundPlan.dropped is {self.dropped}; expected some of the participants, {self.participants}, not all"
            )
        if min(self.steps) < 1:
            raise ValueError(f"RoundPlan.steps is {self.steps}; expected at least 1 for each client")
        if self.staleness and len(self.staleness) != len(self.participants):
            raise ValueError(f"RoundPlan.staleness is {self.staleness}; expected one for each of {self.participants}")

    @property
    def arrived(self) -> tuple[int, ...]:
        """Participants whose message arrives, in their order."""
        return tuple(client for client in self.participants if client not in self.dropped)


@dataclass(frozen=True)
class Scenario:
    """A problem, hyper-parameters and some rounds.

    Attributes:
      name: how `check` calls it.
      plans: its rounds.
      weights: whole numbers, examples of each client.
      num_batches: batches of each client; with 1, gradients are those of all its data.
      hyper: hyper-parameters that are not the algorithm's defaults.
    """

    name: str
    plans: tuple[RoundPlan, ...]
    weights: tuple[int, ...] = (1, 1, 1, 1, 1)
    num_batches: int = 1
    hyper: Mapping[str, float] = field(default_factory=dict, hash=False)

    def problem(self) -> Problem:
        """Return the problem, in which five clients disagree."""
        return quadratics(self.weights, self.num_batches)


_ALL = (0, 1, 2, 3, 4)
_EQUAL = (3, 3, 3, 3, 3)
_UNEQUAL = (1, 2, 5, 3, 4), (2, 5, 1, 4, 3), (4, 1, 3, 2, 5)
# Each client is away for a while, and comes back.
_SAMPLED = (0, 1), (2, 3), (1, 4), (0, 3), (2, 4), (0, 1), (1, 2), (3, 4)


def _rounds(participants: tuple[tuple[int, ...], ...], steps: tuple[tuple[int, ...], ...]) -> tuple[RoundPlan, ...]:
    return tuple(RoundPlan(who, steps[r % len(steps)]) for r, who in enumerate(participants))


_FULL = _rounds((_ALL,) * 6, (_EQUAL,))
_UNEQUAL_STEPS = _rounds((_ALL,) * 6, _UNEQUAL)
_DROP_OUTS = (
    RoundPlan(_ALL, _EQUAL, dropped=(1,)),
    RoundPlan(_ALL, _EQUAL),
    RoundPlan((0, 2, 3), _EQUAL, dropped=(0,)),
    RoundPlan((1, 2, 4), _EQUAL, dropped=(1, 4)),
    RoundPlan(_ALL, _EQUAL, dropped=(0, 3)),
    RoundPlan((0, 1, 3), _EQUAL),
)
_MIXED = (
    RoundPlan((0, 1, 3), _UNEQUAL[0]),
    RoundPlan((1, 2, 4), _UNEQUAL[1], dropped=(4,)),
    RoundPlan((0, 4), _UNEQUAL[2]),
    RoundPlan((1, 2, 3, 4), _UNEQUAL[0], dropped=(1, 3)),
    RoundPlan((0, 1, 2), _UNEQUAL[1]),
    RoundPlan((2, 3, 4), _UNEQUAL[2]),
)
# Local steps before a coin falls on its side are geometric; the same for all, since the coin is.
_COINS = _rounds((_ALL,) * 6, tuple((k,) * 5 for k in (1, 4, 2, 7, 1, 3)))
_EVENTS = (
    RoundPlan((0, 1, 2), _EQUAL, staleness=(0, 0, 0)),
    RoundPlan((3, 0, 1), _EQUAL, staleness=(1, 0, 0)),
    RoundPlan((4, 0, 2), _EQUAL, staleness=(2, 0, 1)),
    RoundPlan((1, 3, 2), _EQUAL, staleness=(1, 1, 0)),
    RoundPlan((0, 4, 3), _EQUAL, staleness=(2, 1, 0)),
    RoundPlan((2, 1, 0), _EQUAL, staleness=(1, 2, 0)),
)

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("full", _FULL),
        Scenario("one-step", _rounds((_ALL,) * 6, ((1,) * 5,))),
        Scenario("partial", _rounds(_SAMPLED, (_EQUAL,))),
        Scenario("unequal-steps", _UNEQUAL_STEPS),
        Scenario("unequal-weights", _FULL, weights=(5, 1, 3, 2, 4)),
        Scenario("drop-outs", _DROP_OUTS),
        Scenario("batches", _FULL, num_batches=3),
        Scenario("server-rate", _FULL, hyper={"server_lrate": 0.6}),
        Scenario("local-momentum", _UNEQUAL_STEPS, hyper={"momentum": 0.9, "lrate": 0.05}),
        Scenario("proximal", _UNEQUAL_STEPS, hyper={"mu": 0.7}),
        Scenario("mixed", _MIXED, num_batches=2),
        Scenario("mixed-weights", _MIXED, weights=(5, 1, 3, 2, 4), num_batches=2),
        Scenario("coins", _COINS),
        Scenario("events", _EVENTS),
    )
}
