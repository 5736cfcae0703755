"""What a round costs: the bytes that go down and up, and the local steps, from the shapes alone."""

from typing import NamedTuple

import jax
import numpy as np

from functional_optimodules.experiments.config import Experiment
from functional_optimodules.federated import FederatedData, Federation, FederationState, StagedData
from functional_optimodules.federated.state import own_sides
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import PyTree


class Traffic(NamedTuple):
    """Bytes that go to one participant and come from it in a round.

    Attributes:
      params: those of the shared parameters, in each of the turns by which they are shared.
      down: of what goes down with them: auxiliary variables, the model's state.
      up: of what comes up with them.
      total: of all parameters, whoever has them.
    """

    params: tuple[int, ...]
    down: int
    up: int
    total: int

    @classmethod
    def of(cls, federation: Federation, state: FederationState) -> "Traffic":
        """Return the bytes of a federation; of its state the shapes are enough."""
        sides = own_sides(federation, state)
        shared, stats = sides.params.shared(state.params), sides.stats.shared(state.stats)
        with shapes_only():
            server = jax.eval_shape(sides.server.init, shared)
            sent = jax.eval_shape(lambda s: {k: aux.narrow(0) for k, aux in sides.broadcast(s).items()}, server)
            own = jax.eval_shape(sides.fresh, state.params, state.stats)
            reported = jax.eval_shape(sides.report, own)
        leaves = [_bytes(leaf) for leaf in jax.tree.leaves(shared)]
        turns: tuple[int | None, ...] = (None,) * len(leaves) if sides.turns is None else sides.turns.turns
        count = 1 if sides.turns is None else sides.turns.count
        params = tuple(
            sum(size for size, turn in zip(leaves, turns, strict=True) if turn in (None, now)) for now in range(count)
        )
        return cls(params, _bytes(stats) + _bytes(sent), _bytes(stats) + _bytes(reported), _bytes(state.params))

    def bytes_down(self, number: int, participants: int) -> int:
        """Return what goes down in the round of that number."""
        return participants * (self.params[number % len(self.params)] + self.down)

    def bytes_up(self, number: int, joined: int, bits: float | None = None) -> int:
        """Return what comes up: of parameters as many bits as the compressing bricks of all participants say."""
        params = joined * self.params[number % len(self.params)] if bits is None else -(-int(bits) // 8)
        return params + joined * self.up


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def local_steps(experiment: Experiment, data: FederatedData | StagedData) -> tuple[float, float]:
    """Return the fewest and the most local steps that a participant takes in a round; with a coin, the mean."""
    rounds = experiment.rounds
    if rounds.coin is not None:
        return 1 / rounds.coin, 1 / rounds.coin
    if rounds.steps is not None:
        return rounds.steps, rounds.steps
    sizes = np.asarray(data.sizes)
    sizes = sizes[sizes > 0]
    batch = min(rounds.batch_size or data.largest, data.largest)
    steps = rounds.epochs * (sizes // batch if rounds.remainder == "drop" else -(-sizes // batch))
    return int(steps.min()), int(steps.max())
