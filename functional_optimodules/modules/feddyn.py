"""FedDyn: clients whose losses are tilted until they agree on a stationary point.

    client                                      server
      Init: local = 0                             Init: excess = 0
      Round(params): reference = params           Step(g = -mean of the clients' moves):
      Step(g, params):                                excess += (joined / N) * g
          g - local + alpha * (params - reference)    g + excess
      End(delta): pending = local - alpha * delta
      Commit: local = pending

This is algorithm 1 of Acar et al. with S the participants, D_i = y_i - x and N all clients:

    L_i -= alpha D_i;    h -= (alpha / N) sum_S D_i;    x = mean_S y_i - h / alpha

On the server g is -mean_S D_i, so that `excess` is h / alpha and the step x - (g + excess):
its learning rate is 1, and it need not know alpha. The mean is the paper's where all count alike
(uniform weights). The two sides exchange no auxiliary variables.

A client's L_i moves when its message is known to have arrived, so that h is the sum of
the clients' -alpha D_i, as L_i are, and stays the mean of the L_i.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, where, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


class FedDynClientState(NamedTuple):
    """State of `FedDynClientModule`; trees are shaped like the parameters.

    Attributes:
      local: the client's estimate of its gradient, L_i, in at least float32.
      pending: what it becomes once the round's message has arrived, likewise.
      reference: the parameters at the start of the round, of their dtypes.
      awaits: boolean scalar, whether the next step's parameters become the reference.
    """

    local: PyTree
    pending: PyTree
    reference: PyTree
    awaits: jax.Array


class FedDynClientModule(OptiModule[FedDynClientState]):
    """g − Lᵢ + α·(w − w_ref), the client's side (Acar et al. 2021, algorithm 1).

    It needs the parameters. Put it first among the modules: it needs the raw
    gradients. The paper minimizes the tilted loss exactly; some steps do here.

    Attributes:
      alpha: weight of the penalty, and of what a round adds to the tilt.

    References:
      Acar et al., "Federated learning based on dynamic regularization", ICLR 2021,
      arXiv:2111.04263.
    """

    name: ClassVar[str] = "feddyn-client"
    packable: ClassVar[bool] = True
    alpha: float = hyperparameter(default=0.01, within="(0, inf)")

    def init(self, params: Params) -> FedDynClientState:
        reference = jax.tree.map(jnp.zeros_like, params)
        return FedDynClientState(zeros_wide(params), zeros_wide(params), reference, jnp.array(True))

    def begin_round(self, state: FedDynClientState, params: Params = None) -> FedDynClientState:
        # What a lost round left is forgotten.
        state = state._replace(pending=jax.tree.map(jnp.copy, state.local))
        if params is None:
            return state._replace(awaits=jnp.array(True))
        return state._replace(reference=jax.tree.map(jnp.copy, params), awaits=jnp.array(False))

    def update(
        self, updates: Updates, state: FedDynClientState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedDynClientState]:
        params = self.require(params)
        reference = where(state.awaits, params, state.reference)

        def tilted(g: jax.Array, local: jax.Array, w: jax.Array, ref: jax.Array) -> jax.Array:
            return wide(g) - local + self.alpha * (wide(w) - wide(ref))

        output = cast_like(jax.tree.map(tilted, updates, state.local, params, reference), updates)
        return output, state._replace(reference=reference, awaits=jnp.array(False))

    def end_round(  # type: ignore[override]
        self, state: FedDynClientState, *, delta: Params, **known: PyTree
    ) -> FedDynClientState:
        pending = jax.tree.map(lambda local, d: local - self.alpha * d.astype(local.dtype), state.local, delta)
        return state._replace(pending=pending)

    def commit(self, state: FedDynClientState) -> FedDynClientState:
        return state._replace(local=jax.tree.map(jnp.copy, state.pending))


class FedDynServerState(NamedTuple):
    """State of `FedDynServerModule`.

    Attributes:
      excess: h / alpha, shaped like the parameters, in at least float32.
    """

    excess: PyTree


class FedDynServerModule(OptiModule[FedDynServerState]):
    """g + h/α, h/α ← h/α + (|S|/N)·g, the server's side (Acar et al. 2021, algorithm 1).

    The server's learning rate is 1 and the clients' weights are uniform.

    Attributes:
      num_clients: N, the number of all clients.

    References:
      Acar et al., "Federated learning based on dynamic regularization", ICLR 2021,
      arXiv:2111.04263.
    """

    name: ClassVar[str] = "feddyn-server"
    packable: ClassVar[bool] = True
    num_clients: int = hyperparameter(within="[1, 2147483647]")

    def init(self, params: Params) -> FedDynServerState:
        return FedDynServerState(excess=zeros_wide(params))

    def update(  # type: ignore[override]
        self,
        updates: Updates,
        state: FedDynServerState,
        params: Params = None,
        *,
        joined: jax.Array,
        **extra_args: PyTree,
    ) -> tuple[Updates, FedDynServerState]:
        share = joined / self.num_clients
        excess = jax.tree.map(lambda e, g: e + share.astype(e.dtype) * wide(g), state.excess, updates)
        output = jax.tree.map(lambda g, e: wide(g) + e, updates, excess)
        return cast_like(output, updates), FedDynServerState(excess)

    def forget(self, state: FedDynServerState, *, delta: PyTree) -> FedDynServerState:  # type: ignore[override]
        return FedDynServerState(
            jax.tree.map(lambda e, d: e + d.astype(e.dtype) / self.num_clients, state.excess, delta)
        )
