"""FedCM: clients that step along the last round's mean direction too.

    client                                      server
      Init: direction = 0                         Init: direction = 0; span = 0
      Round: span = 0                             Receive(sums over clients):
      Step(g, lrate): span += lrate                   span = span / weight
          alpha * g + (1 - alpha) * direction     Step(g): direction = g / span
      Send: weight; span = weight * span          Send: direction
      Receive(direction)

In Xu et al. the direction is the mean of (x - y_i) / (K lr) over the participants, K the
number of their steps; the span is the mean of what stands there for K lr, the sum of
the rates of a client's steps. A server with learning rate 1 takes the mean of the
clients' parameters; the paper's server rate is its rate times the span.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import Amount, FromClients, FromServer
from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.modules.momentum import ewma
from functional_optimodules.numerics import cast_like, where, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


class FedCMReport(FromClients):
    """What a client sends: summed over clients.

    Attributes:
      weight: its weight in the mean.
      span: this weight times the sum of the rates of its steps.
    """

    weight: Amount
    span: Amount


class FedCMDirection(FromServer):
    """What the server sends to every client.

    Attributes:
      direction: the last round's mean move as a gradient, shaped like the parameters.
    """

    direction: Params


class FedCMClientState(NamedTuple):
    """State of `FedCMClientModule`.

    Attributes:
      direction: the last round's mean move as a gradient, shaped like the
        parameters, in at least float32.
      span: float32 scalar, the sum of the rates of this round's steps.
      weight: float32 scalar, the client's weight in the mean; 0 before the round's end.
    """

    direction: PyTree
    span: jax.Array
    weight: jax.Array


class FedCMClientModule(OptiModule[FedCMClientState]):
    """α·g + (1 − α)·Δ, the client's side (Xu et al. 2021, algorithm 2).

    Attributes:
      alpha: weight of the client's own gradient.

    References:
      Xu et al., "FedCM: federated learning with client-level momentum",
      arXiv:2106.10874.
    """

    name: ClassVar[str] = "fedcm-client"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "fedcm"
    sends = FedCMReport
    receives = FedCMDirection
    alpha: float = hyperparameter(default=0.1, within="[0, 1]")

    def init(self, params: Params) -> FedCMClientState:
        return FedCMClientState(zeros_wide(params), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def begin_round(self, state: FedCMClientState, params: Params = None) -> FedCMClientState:
        return FedCMClientState(state.direction, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def update(  # type: ignore[override]
        self,
        updates: Updates,
        state: FedCMClientState,
        params: Params = None,
        *,
        lrate: jax.Array,
        **extra_args: PyTree,
    ) -> tuple[Updates, FedCMClientState]:
        blended = ewma(state.direction, jax.tree.map(wide, updates), 1 - self.alpha)
        return cast_like(blended, updates), state._replace(span=state.span + jnp.asarray(lrate, jnp.float32))

    def end_round(  # type: ignore[override]
        self, state: FedCMClientState, *, weight: jax.Array, **known: PyTree
    ) -> FedCMClientState:
        return state._replace(weight=jnp.asarray(weight, jnp.float32))

    def collect(self, state: FedCMClientState) -> FedCMReport:
        return FedCMReport(weight=state.weight, span=state.weight * state.span)

    def process(self, aux: FedCMDirection, state: FedCMClientState) -> FedCMClientState:
        return state._replace(direction=cast_like(aux.direction, state.direction))


class FedCMServerState(NamedTuple):
    """State of `FedCMServerModule`.

    Attributes:
      direction: the last round's mean move as a gradient, shaped like the
        parameters, in at least float32.
      span: float32 scalar, the mean of the clients' spans by weight.
    """

    direction: PyTree
    span: jax.Array


class FedCMServerModule(OptiModule[FedCMServerState]):
    """Δ = g / (K·lr), the server's side (Xu et al. 2021, algorithm 2).

    References:
      Xu et al., "FedCM: federated learning with client-level momentum",
      arXiv:2106.10874.
    """

    name: ClassVar[str] = "fedcm-server"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "fedcm"
    sends = FedCMDirection
    receives = FedCMReport

    def init(self, params: Params) -> FedCMServerState:
        return FedCMServerState(zeros_wide(params), jnp.zeros((), jnp.float32))

    def update(
        self, updates: Updates, state: FedCMServerState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedCMServerState]:
        moved = state.span > 0
        span = jnp.where(moved, state.span, 1)
        direction = jax.tree.map(lambda g: wide(g) / span.astype(wide(g).dtype), updates)
        return updates, state._replace(direction=where(moved, direction, state.direction))

    def collect(self, state: FedCMServerState) -> FedCMDirection:
        return FedCMDirection(direction=state.direction)

    def process(self, aux: FedCMReport, state: FedCMServerState) -> FedCMServerState:
        weight = jnp.where(aux.weight > 0, aux.weight, 1)
        return state._replace(span=(aux.span / weight).astype(jnp.float32))
