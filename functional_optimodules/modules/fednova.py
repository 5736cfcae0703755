"""FedNova: clients that take unequal numbers of steps, averaged without a bias towards the longest.

    client's uplink                             server
      Step(u, steps, weight):                     Init: scale = 1
          norm = |a|_1 of that many steps         Receive(sums over clients):
          u / norm                                    scale = effective / weight
      Send: weight; effective = weight * norm     Step(g): scale * g

A client's move is D_i = -lr G_i a_i: its gradients, each with the weight that it has
in the move. Wang et al. average D_i / |a_i|_1 by p_i, the clients' shares of the data,
and multiply by tau = sum p_i |a_i|_1. A round's mean is by `weight`, so that
p_i = weight_i / sum of weights here, also of those that took part to the end.

After K local steps |a|_1 is

    K                                                       for plain gradient descent
    (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho)           with momentum rho, from rest each round
    (1 - (1 - lr mu)^K) / (lr mu)                           with FedProx of weight mu

A client that took no step sends a move of 0, and counts as one in the mean.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from functional_optimodules.aux_var import Amount, FromClients
from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, one_minus_power, real, wide
from functional_optimodules.types import Params, PyTree, Updates


def total_weight(steps: ArrayLike, momentum: ArrayLike, proximal: ArrayLike) -> jax.Array:
    """Return |a|_1, the sum of the weights that the gradients of some local steps have in the move; 0 for none."""
    count = jnp.maximum(jnp.asarray(steps), 1)
    decayed = momentum * one_minus_power(momentum, count) / (1 - momentum)
    norm = (real(count) - decayed) / (1 - momentum)
    if isinstance(proximal, int | float):
        norm = one_minus_power(1 - proximal, count) / proximal if proximal else norm
    else:
        pulls = jnp.asarray(proximal) > 0
        near = jnp.where(pulls, proximal, 1)
        norm = jnp.where(pulls, one_minus_power(1 - near, count) / near, norm)
    return jnp.where(jnp.asarray(steps) > 0, norm, 0).astype(jnp.float32)


class FedNovaReport(FromClients):
    """What a client sends: summed over clients.

    Attributes:
      weight: its weight in the mean.
      effective: this weight times |a|_1.
    """

    weight: Amount
    effective: Amount


class FedNovaClientState(NamedTuple):
    """State of `FedNovaClientModule`.

    Attributes:
      weight: float32 scalar, the client's weight in the mean.
      effective: float32 scalar, this weight times |a|_1.
    """

    weight: jax.Array
    effective: jax.Array


class FedNovaClientModule(OptiModule[FedNovaClientState]):
    """D / ‖a‖₁, of a client's uplink (Wang et al. 2020, section 4).

    Put it on the uplink: it acts once a round, on the whole move.

    Attributes:
      momentum: rho, of the clients' `momentum` module, which is to start each round
        from rest (`round_reset`).
      proximal: the learning rate times the weight of the clients' `fedprox`
        regularizer: their product, which is to be constant in a round.

    Raises:
      ValueError: if both are given: the paper has no |a|_1 for it.

    References:
      Wang et al., "Tackling the objective inconsistency problem in heterogeneous
      federated optimization", NeurIPS 2020, arXiv:2007.07481.
    """

    name: ClassVar[str] = "fednova-client"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "fednova"
    sends = FedNovaReport
    momentum: float = hyperparameter(default=0.0, within="[0, 1)")
    proximal: float = hyperparameter(default=0.0, within="[0, 1]")

    def validate(self) -> None:
        both = self.momentum, self.proximal
        if all(isinstance(each, float) and each > 0 for each in both):
            raise ValueError(
                f"FedNovaClientModule: momentum={self.momentum!r} and proximal={self.proximal!r}: the paper says what "
                "a move weighs for either alone; leave the other at 0"
            )

    def init(self, params: Params) -> FedNovaClientState:
        return FedNovaClientState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def update(  # type: ignore[override]
        self,
        updates: Updates,
        state: FedNovaClientState,
        params: Params = None,
        *,
        num_steps: jax.Array,
        weight: jax.Array,
        **extra_args: PyTree,
    ) -> tuple[Updates, FedNovaClientState]:
        norm = total_weight(num_steps, self.momentum, self.proximal)
        divisor = jnp.where(norm > 0, norm, 1)
        normalized = jax.tree.map(lambda u: wide(u) / divisor.astype(wide(u).dtype), updates)
        weight = jnp.asarray(weight, jnp.float32)
        return cast_like(normalized, updates), FedNovaClientState(weight, weight * norm)

    def collect(self, state: FedNovaClientState) -> FedNovaReport:
        return FedNovaReport(weight=state.weight, effective=state.effective)


class FedNovaServerState(NamedTuple):
    """State of `FedNovaServerModule`.

    Attributes:
      scale: float32 scalar, the mean of |a_i|_1 by weight.
    """

    scale: jax.Array


class FedNovaServerModule(OptiModule[FedNovaServerState]):
    """g · Σpᵢ‖aᵢ‖₁, the server's side (Wang et al. 2020, section 4).

    References:
      Wang et al., "Tackling the objective inconsistency problem in heterogeneous
      federated optimization", NeurIPS 2020, arXiv:2007.07481.
    """

    name: ClassVar[str] = "fednova-server"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "fednova"
    receives = FedNovaReport

    def init(self, params: Params) -> FedNovaServerState:
        return FedNovaServerState(jnp.ones((), jnp.float32))

    def update(
        self, updates: Updates, state: FedNovaServerState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedNovaServerState]:
        scaled = jax.tree.map(lambda g: state.scale.astype(wide(g).dtype) * wide(g), updates)
        return cast_like(scaled, updates), state

    def process(self, aux: FedNovaReport, state: FedNovaServerState) -> FedNovaServerState:
        weight = jnp.where(aux.weight > 0, aux.weight, 1)
        return FedNovaServerState((aux.effective / weight).astype(jnp.float32))
