"""What travels in a round, as trees whose leaves' paths name the arrays of messages, and what these must be."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import FromClients, FromServer
from functional_optimodules.dependence import reads_values
from functional_optimodules.federated.participant import Sent, learns
from functional_optimodules.federated.round import asked_of
from functional_optimodules.federated.sides import Sides
from functional_optimodules.numerics import wide
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree
from functional_optimodules.wire.paths import Specs

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


class Down(NamedTuple):
    """What a client is sent.

    Attributes:
      params: the parameters that are shared.
      stats: what is shared of the model's state; `None` if nothing is.
      broadcast: the server's auxiliary variables by name, this client's own of those that differ by client.
      key: uint32[...], the words of the round's key; of what only one client is sent, `None`.
      coin: float32 scalar, in [0, 1); `None` if nobody asks for it.
      steps: int32 scalar, how many local steps it is to take; `None` for those of the epochs.
      weight: float32 scalar, how much it counts; `None` for what the federation says.
      mean_gradient: the participants' mean gradient at the parameters; `None` if nobody asks for it.
      after: the parameters of the round after the client's last report that counts, where that is not this
        one, and a brick takes in what came of its report; else `None`.
      initial: the parameters and the model's state before any round, from which one who begins
        anew makes what it has; `None` where that does not depend on their values, or nobody begins anew.
    """

    params: Params
    stats: PyTree
    broadcast: dict[str, FromServer]
    key: jax.Array | None
    coin: jax.Array | None
    steps: jax.Array | None
    weight: jax.Array | None
    mean_gradient: PyTree
    after: Params
    initial: tuple[Params, PyTree] | None


_OPTIONAL = ("weight", "mean_gradient", "after", "initial")


class Up(NamedTuple):
    """What a client reports.

    Attributes:
      delta: where the shared parameters went, in at least float32; of a first pass, the gradient of its
        mean loss at the parameters.
      auxes: its auxiliary variables by name; none in a first pass.
      stats: what is shared of the model's state; `None` in a first pass, and if nothing is.
    """

    delta: PyTree
    auxes: dict[str, FromClients]
    stats: PyTree

    @classmethod
    def of(cls, sides: Sides, sent: Sent) -> "Up":
        """Return what a client sends in the form in which it travels."""
        free = sides.client.free
        return cls(free(sent.delta), {name: aux.map_shaped(free) for name, aux in sent.auxes.items()}, sent.stats)


class Contribution(NamedTuple):
    """What a client has given, of what the server's bricks may have to forget.

    Attributes:
      delta: the sum of its deltas; `None` if no brick recalls it.
      auxes: its auxiliary variables, merged, of those bricks that recall them.
    """

    delta: PyTree
    auxes: dict[str, FromClients]

    @classmethod
    def of(cls, up: Up, server: Optimizer) -> "Contribution | None":
        """Return what of a report the server's bricks may have to forget; `None` if nothing."""
        channels, recalled = server.channels(), server.recalls()
        if not recalled:
            return None
        auxes = {name: aux for name, aux in up.auxes.items() if "aux" in channels[name].recalls()}
        return cls(up.delta if "delta" in recalled else None, auxes)

    def add(self, other: "Contribution") -> "Contribution":
        """Return what both come to."""
        auxes = {name: aux.merge(other.auxes[name]) for name, aux in self.auxes.items()}
        return Contribution(jax.tree.map(jnp.add, self.delta, other.delta), auxes)


class Shapes(NamedTuple):
    """What messages must hold.

    Attributes:
      down: what a client is sent, with all that it may be; of shapes.
      gradient: what it reports in a first pass.
      report: what it reports at the end of its round.
      passes: 2 if a round has a first pass, for the participants' mean gradient; else 1.
    """

    down: Down
    gradient: Specs
    report: Specs
    passes: int

    def sent(self, optional: Collection[str], last: bool) -> Specs:
        """Return what a client is sent, with some of what it may be, in the last pass or not."""
        there = {*optional, "mean_gradient"} if last else optional
        left_out: dict[str, Any] = {name: None for name in _OPTIONAL if name not in there}
        return Specs.of(self.down._replace(**left_out))

    @classmethod
    def of(cls, federation: "Federation", sides: Sides, params: Params, stats: PyTree) -> "Shapes":
        """Return what messages about such parameters must hold."""
        params, stats = jax.eval_shape(lambda tree: tree, (params, stats))
        names = asked_of(sides)
        two = "mean_gradient" in names

        def report(params: Params, stats: PyTree) -> Up:
            own, shared = sides.fresh(params, stats), sides.params.shared(params)
            auxes: Any = sides.report(own)
            delta = jax.tree.map(wide, sides.client.hold(shared))
            zero = jnp.float32(0)
            return Up.of(sides, Sent(delta, auxes, sides.stats.shared(stats), zero, zero, {}))

        def down(params: Params, stats: PyTree) -> Down:
            shared = sides.params.shared(params)
            broadcast = sides.broadcast(sides.server.init(shared))
            own = {name: aux.map_shaped(sides.client.free).narrow(0) for name, aux in broadcast.items()}
            key, coin = jax.random.key_data(jax.random.key(0)), jnp.float32(0) if "coin" in names else None
            steps = None if federation.steps is None and federation.coin is None else jnp.int32(0)
            gradient = jax.tree.map(wide, shared) if two else None
            initial = (params, stats) if from_values else None
            after, weight = shared if learns(federation) else None, jnp.float32(1)
            return Down(shared, sides.stats.shared(stats), own, key, coin, steps, weight, gradient, after, initial)

        with shapes_only():
            from_values = reads_values(lambda tree: sides.row(sides.fresh(*tree)), (params, stats))
            up, sent = jax.eval_shape(report, params, stats), jax.eval_shape(down, params, stats)
        return cls(sent, Specs.of(Up(up.delta, {}, None)), Specs.of(up), 2 if two else 1)
