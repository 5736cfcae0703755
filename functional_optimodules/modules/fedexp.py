"""FedExP: a server that steps further the more its clients' deltas point apart.

    uplink                                       server
      Init: total = 0; weight = 0                  Init: total = 0; weight = 0; rate = 1
      Step(g): total = weight * ||g||²             Step(g):
               g                                     rate = max(1, total / (2 * weight * (||g||² + eps)))
      Send: total, weight                            g = rate * g
                                                   Receive(sums over clients):
                                                     total, weight

With all weights at 1 this is the server's step size of Jhunjhunwala et al.,
max(1, sum ||D_i||² / (2 |S| (||D||² + eps))), D the mean of the D_i. Other weights count
in it as they do in that mean, as in the authors' code (commit 56dfaf9). That code has
|S| eps where the paper has eps, lets eps decay with the square of the clients' rate, and
evaluates the mean of the last two rounds' parameters.

The client's brick measures what it passes on. At the end of the uplink that is
what the server averages, also where other bricks have clipped or compressed it.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import Amount, FromClients
from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.modules.clipping import squared_norm
from functional_optimodules.numerics import cast_like, wide
from functional_optimodules.types import Params, PyTree, Updates


class FedExPReport(FromClients):
    """What a client sends: summed over clients.

    Attributes:
      total: the squared norm of its delta, times its weight.
      weight: how much it counts in the mean.
    """

    total: Amount
    weight: Amount


class FedExPClientState(NamedTuple):
    """State of `FedExPClientModule`.

    Attributes:
      total: float32 scalar, the squared norm of the last delta, times its weight.
      weight: float32 scalar, that weight.
    """

    total: jax.Array
    weight: jax.Array


class FedExPClientModule(OptiModule[FedExPClientState]):
    """‖Δᵢ‖², the client's side, for the uplink (Jhunjhunwala et al. 2023).

    Put it last on the uplink: what it measures should be what is averaged.

    References:
      Jhunjhunwala, Wang and Joshi, "FedExP: speeding up federated averaging via
      extrapolation", algorithm 1, ICLR 2023, arXiv:2301.09604.
    """

    name: ClassVar[str] = "fedexp-client"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "fedexp"
    sends = FedExPReport

    def init(self, params: Params) -> FedExPClientState:
        return FedExPClientState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def update(  # type: ignore[override]
        self,
        updates: Updates,
        state: FedExPClientState,
        params: Params = None,
        *,
        weight: jax.Array,
        **extra_args: PyTree,
    ) -> tuple[Updates, FedExPClientState]:
        weight = jnp.asarray(weight, jnp.float32)
        return updates, FedExPClientState(weight * squared_norm(updates).astype(jnp.float32), weight)

    def collect(self, state: FedExPClientState) -> FedExPReport:
        return FedExPReport(total=state.total, weight=state.weight)


class FedExPServerState(NamedTuple):
    """State of `FedExPServerModule`, in float32 scalars.

    Attributes:
      total: the sum of the clients' squared norms, times their weights.
      weight: the sum of these weights.
      rate: what the last update was multiplied by.
    """

    total: jax.Array
    weight: jax.Array
    rate: jax.Array


class FedExPServerModule(OptiModule[FedExPServerState]):
    """g · max(1, Σ‖Δᵢ‖² / (2|S|(‖g‖² + ε))), the server's side (Jhunjhunwala et al. 2023).

    Put it first among the modules: it needs the mean of the deltas. Its factor
    multiplies the server's learning rate, which is 1 in the paper. It is the metric `rate`.

    Attributes:
      eps: added to the squared norm of the mean.

    References:
      Jhunjhunwala, Wang and Joshi, "FedExP: speeding up federated averaging via
      extrapolation", algorithm 1, ICLR 2023, arXiv:2301.09604.
    """

    name: ClassVar[str] = "fedexp-server"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "fedexp"
    receives = FedExPReport
    eps: float = hyperparameter(default=1e-3, within="(0, inf)")

    def init(self, params: Params) -> FedExPServerState:
        return FedExPServerState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))

    def update(
        self, updates: Updates, state: FedExPServerState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedExPServerState]:
        weight = jnp.where(state.weight > 0, state.weight, 1)
        rate = jnp.maximum(1, state.total / weight / (2 * (squared_norm(updates).astype(jnp.float32) + self.eps)))
        scaled = jax.tree.map(lambda g: wide(g) * rate.astype(wide(g).dtype), updates)
        return cast_like(scaled, updates), state._replace(rate=rate.astype(jnp.float32))

    def process(self, aux: FedExPReport, state: FedExPServerState) -> FedExPServerState:
        return state._replace(total=aux.total.astype(jnp.float32), weight=aux.weight.astype(jnp.float32))

    def metrics(self, state: FedExPServerState) -> dict[str, jax.Array]:
        return {"rate": state.rate}
