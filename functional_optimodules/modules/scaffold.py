"""SCAFFOLD: clients whose drift is corrected by control variates.

    client                                      server
      Init: local = 0; correction = 0             Init: total = 0; clients = 0
            total = 0; steps = 0; joined = 0
      Step(g): total += g; steps += 1             Step(g): g
               g - correction
      Send: delta = total / steps - local         Send: variate = total / N
            joined = 1 for the first time only    Receive(sums over clients):
      Commit: local = total / steps                 total += delta; clients += joined
      Receive(variate):
            correction = local - variate
            total = 0; steps = 0

This is option II of algorithm 1 of Karimireddy et al., for which the mean of
the raw gradients is c_i - c + (x - y_i) / (K lr) where local steps are plain
gradient descent. N is the number of all clients, `num_clients`; where it is not
given, of those that have sent something so far.

A client's variate moves when its message is known to have arrived: the server's
is then always the mean of the clients'.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import FromClients, FromServer, Newcomer
from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, where, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


def divided(total: PyTree, count: jax.Array) -> PyTree:
    """Return a sum divided by the number of its terms."""
    return jax.tree.map(lambda t: t / count.astype(t.dtype), total)


class ScaffoldDelta(FromClients):
    """What a client sends: summed over clients.

    Attributes:
      delta: by how much its control variate moves, shaped like the parameters.
      joined: 1 if it never sent anything before, else 0.
    """

    delta: Params
    joined: Newcomer


class ScaffoldVariate(FromServer):
    """What the server sends to every client.

    Attributes:
      variate: the mean of the clients' control variates, shaped like the parameters.
    """

    variate: Params


class ScaffoldClientState(NamedTuple):
    """State of `ScaffoldClientModule`; trees are shaped like the parameters, in at least float32.

    Attributes:
      local: the client's control variate, c_i.
      correction: what is subtracted from gradients, c_i - c.
      total: sum of the raw gradients since the server's variate was received.
      steps: int32 scalar, how many these are.
      joined: int32 scalar, 1 once a message has arrived.
    """

    local: PyTree
    correction: PyTree
    total: PyTree
    steps: jax.Array
    joined: jax.Array


class ScaffoldClientModule(OptiModule[ScaffoldClientState]):
    """g − cᵢ + c, the client's side (Karimireddy et al. 2020, algorithm 1, option II).

    Put it first among the modules: it needs the raw gradients. Without a step it
    sends a delta of 0, and nothing of it is committed.

    References:
      Karimireddy et al., "SCAFFOLD: stochastic controlled averaging for federated
      learning", ICML 2020, arXiv:1910.06378.
    """

    name: ClassVar[str] = "scaffold-client"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "scaffold"
    sends = ScaffoldDelta
    receives = ScaffoldVariate

    def init(self, params: Params) -> ScaffoldClientState:
        zero = jnp.zeros((), jnp.int32)
        trees = zeros_wide(params), zeros_wide(params), zeros_wide(params)
        return ScaffoldClientState(*trees, steps=zero, joined=jnp.copy(zero))

    def update(
        self, updates: Updates, state: ScaffoldClientState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, ScaffoldClientState]:
        total = jax.tree.map(lambda t, g: t + wide(g), state.total, updates)
        corrected = jax.tree.map(lambda g, c: wide(g) - c, updates, state.correction)
        return cast_like(corrected, updates), state._replace(total=total, steps=state.steps + 1)

    def collect(self, state: ScaffoldClientState) -> ScaffoldDelta:
        delta = jax.tree.map(jnp.subtract, self._next_local(state), state.local)
        new = (state.steps > 0) & (state.joined == 0)
        return ScaffoldDelta(delta=delta, joined=new.astype(jnp.int32))

    def commit(self, state: ScaffoldClientState) -> ScaffoldClientState:
        joined = jnp.where(state.steps > 0, 1, state.joined).astype(jnp.int32)
        return state._replace(local=self._next_local(state), joined=joined)

    def process(self, aux: ScaffoldVariate, state: ScaffoldClientState) -> ScaffoldClientState:
        return state._replace(
            correction=jax.tree.map(jnp.subtract, state.local, aux.variate),
            total=zeros_wide(state.total),
            steps=jnp.zeros((), jnp.int32),
        )

    def _next_local(self, state: ScaffoldClientState) -> PyTree:
        return where(state.steps > 0, divided(state.total, jnp.maximum(state.steps, 1)), state.local)


class ScaffoldServerState(NamedTuple):
    """State of `ScaffoldServerModule`.

    Attributes:
      total: sum of the clients' control variates, shaped like the parameters, in
        at least float32.
      clients: int32 scalar, how many clients have sent something.
    """

    total: PyTree
    clients: jax.Array


class ScaffoldServerModule(OptiModule[ScaffoldServerState]):
    """c = Σcᵢ / N, the server's side (Karimireddy et al. 2020, algorithm 1).

    Attributes:
      num_clients: N, the number of all clients, as in the paper; `None` for those
        that have sent something so far.

    References:
      Karimireddy et al., "SCAFFOLD: stochastic controlled averaging for federated
      learning", ICML 2020, arXiv:1910.06378.
    """

    name: ClassVar[str] = "scaffold-server"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "scaffold"
    sends = ScaffoldVariate
    receives = ScaffoldDelta
    num_clients: int | None = hyperparameter(default=None, within="[1, 2147483647]")

    def init(self, params: Params) -> ScaffoldServerState:
        return ScaffoldServerState(total=zeros_wide(params), clients=jnp.zeros((), jnp.int32))

    def update(
        self, updates: Updates, state: ScaffoldServerState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, ScaffoldServerState]:
        return updates, state

    def collect(self, state: ScaffoldServerState) -> ScaffoldVariate:
        count = jnp.maximum(state.clients, 1) if self.num_clients is None else jnp.asarray(self.num_clients)
        return ScaffoldVariate(divided(state.total, count))

    def process(self, aux: ScaffoldDelta, state: ScaffoldServerState) -> ScaffoldServerState:
        total = jax.tree.map(lambda t, d: t + d.astype(t.dtype), state.total, aux.delta)
        return ScaffoldServerState(total, state.clients + aux.joined.astype(jnp.int32))

    def forget(self, state: ScaffoldServerState, *, aux: ScaffoldDelta) -> ScaffoldServerState:  # type: ignore[override]
        total = jax.tree.map(lambda t, d: t - d.astype(t.dtype), state.total, aux.delta)
        return ScaffoldServerState(total, state.clients - aux.joined.astype(jnp.int32))
