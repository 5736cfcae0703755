"""Mime and MimeLite: clients that step with the server's statistics, which stay as they are for a round.

    client                                      server
      Init: momentum = 0; divisor = fresh = 1     Init: first = 0; second = initial
      Step(g):                                    Receive(sums over clients):
          mime only: g += c - anchor                  mean = gradient / weight
          (fresh * g + momentum) / divisor            first = beta_1 * first + (1 - beta_1) * mean
      End(full_gradient, weight)                      second = beta_2 * second + (1 - beta_2) * mean ** 2
      Send: weight; gradient = weight * full      Step(g): g
      Receive(momentum, divisor, fresh)           Send: momentum = beta_1 * first; fresh = 1 - beta_1
                                                        divisor = sqrt(second) + eps, or 1

This is algorithm 1 of Karimireddy et al. with the base algorithms of its table: the
statistics s, the step U and what moves the statistics, V, are

    sgd with momentum   s = m;     U = (1 - beta_1) g + beta_1 m
    adam                s = m, v;  U = ((1 - beta_1) g + beta_1 m) / (sqrt(v) + eps)
                        V: m = (1 - beta_1) g + beta_1 m;  v = (1 - beta_2) g^2 + beta_2 v

with plain descent and RMSProp for beta_1 = 0, and no bias correction. What the server
sends is U itself, so that only it knows the base algorithm and its coefficients. A client
that was told nothing takes plain steps: a deployed server is to know the parameters
(`setup`) before the first round, for its first message to say how to step.

V takes the participants' mean gradient over all their data, at the server's
parameters x: each client sends its own with its move, as in the paper. The mean is by
the clients' weights. Mime besides steps on

    g(y) - g(x) + c

with both gradients of the same batch (`anchor_gradient` is the second), and c that same
mean gradient, which clients are told before their first step (`mean_gradient`): it needs a
first exchange in each round, which MimeLite does without.

x becomes the mean of the clients' parameters: the server's learning rate is 1.
"""

from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import Amount, FromClients, FromServer, Scalar
from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.modules.adaptive import squares
from functional_optimodules.modules.momentum import ewma
from functional_optimodules.numerics import cast_like, safe_sqrt, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


class MimeReport(FromClients):
    """What a client sends: summed over clients.

    Attributes:
      gradient: its gradient over all its data at the server's parameters, times its
        weight; shaped like the parameters.
      weight: its weight in the mean.
    """

    gradient: Params
    weight: Amount


class MimeStatistics(FromServer):
    """What the server sends to every client: a step (fresh * g + momentum) / divisor.

    Attributes:
      momentum: shaped like the parameters.
      divisor: likewise, real and positive.
      fresh: the weight of a client's own gradient.
    """

    momentum: Params
    divisor: Params
    fresh: Scalar


class MimeClientState(NamedTuple):
    """State of `MimeClientModule` and `MimeLiteClientModule`; trees are as the parameters, in at least float32.

    Attributes:
      momentum: what is added to the gradients.
      divisor: what these are then divided by; real.
      fresh: float32 scalar, what they are first multiplied by.
      gradient: the gradient over all data, times the weight; set at a round's end.
      weight: float32 scalar, the client's weight in the mean; set at a round's end.
    """

    momentum: PyTree
    divisor: PyTree
    fresh: jax.Array
    gradient: PyTree
    weight: jax.Array


def _init_client(params: Params) -> MimeClientState:
    divisor = jax.tree.map(jnp.ones_like, zeros_wide(params, real=True))
    one, zero = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    return MimeClientState(zeros_wide(params), divisor, one, zeros_wide(params), zero)


def _mimicked(gradients: PyTree, state: MimeClientState, like: Updates) -> Updates:
    """Return the server's step on a client's gradients, in the dtypes of a tree."""

    def step(g: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
        return (state.fresh.astype(m.dtype) * g + m) / d.astype(m.dtype)

    return cast_like(jax.tree.map(step, gradients, state.momentum, state.divisor), like)


def _ended(state: MimeClientState, full_gradient: PyTree, weight: jax.Array) -> MimeClientState:
    weight = jnp.asarray(weight, jnp.float32)
    gradient = jax.tree.map(lambda g: weight.astype(wide(g).dtype) * wide(g), full_gradient)
    return state._replace(gradient=cast_like(gradient, state.gradient), weight=weight)


def _report(state: MimeClientState) -> MimeReport:
    return MimeReport(gradient=state.gradient, weight=state.weight)


def _told(aux: MimeStatistics, state: MimeClientState) -> MimeClientState:
    return state._replace(
        momentum=cast_like(aux.momentum, state.momentum),
        divisor=cast_like(aux.divisor, state.divisor),
        fresh=aux.fresh.astype(jnp.float32),
    )


class MimeClientModule(OptiModule[MimeClientState]):
    """U(g(y) − g(x) + c, s), the client's side of Mime (Karimireddy et al. 2021, algorithm 1).

    Put it first among the modules: it needs the raw gradients.

    References:
      Karimireddy et al., "Breaking the centralized barrier for cross-device federated
      learning", NeurIPS 2021, arXiv:2008.03606.
    """

    name: ClassVar[str] = "mime-client"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "mime"
    sends = MimeReport
    receives = MimeStatistics

    def init(self, params: Params) -> MimeClientState:
        return _init_client(params)

    def update(  # type: ignore[override]
        self,
        updates: Updates,
        state: MimeClientState,
        params: Params = None,
        *,
        anchor_gradient: PyTree,
        mean_gradient: PyTree,
        **extra_args: PyTree,
    ) -> tuple[Updates, MimeClientState]:
        corrected = jax.tree.map(
            lambda g, anchor, c: wide(g) - wide(anchor) + wide(c), updates, anchor_gradient, mean_gradient
        )
        return _mimicked(corrected, state, updates), state

    def end_round(  # type: ignore[override]
        self, state: MimeClientState, *, full_gradient: PyTree, weight: jax.Array, **known: PyTree
    ) -> MimeClientState:
        return _ended(state, full_gradient, weight)

    def collect(self, state: MimeClientState) -> MimeReport:
        return _report(state)

    def process(self, aux: MimeStatistics, state: MimeClientState) -> MimeClientState:
        return _told(aux, state)


class MimeLiteClientModule(OptiModule[MimeClientState]):
    """U(g, s), the client's side of MimeLite (Karimireddy et al. 2021, algorithm 1).

    References:
      Karimireddy et al., "Breaking the centralized barrier for cross-device federated
      learning", NeurIPS 2021, arXiv:2008.03606.
    """

    name: ClassVar[str] = "mimelite-client"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "mime"
    sends = MimeReport
    receives = MimeStatistics

    def init(self, params: Params) -> MimeClientState:
        return _init_client(params)

    def update(
        self, updates: Updates, state: MimeClientState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, MimeClientState]:
        return _mimicked(jax.tree.map(wide, updates), state, updates), state

    def end_round(  # type: ignore[override]
        self, state: MimeClientState, *, full_gradient: PyTree, weight: jax.Array, **known: PyTree
    ) -> MimeClientState:
        return _ended(state, full_gradient, weight)

    def collect(self, state: MimeClientState) -> MimeReport:
        return _report(state)

    def process(self, aux: MimeStatistics, state: MimeClientState) -> MimeClientState:
        return _told(aux, state)


class MimeServerState(NamedTuple):
    """State of `MimeServerModule`; trees are shaped like the parameters, in at least float32.

    Attributes:
      first: average of the mean gradients, m.
      second: average of their squares, v; `None` without Adam.
    """

    first: PyTree
    second: PyTree


class MimeServerModule(OptiModule[MimeServerState]):
    """s ← V(mean of ∇fᵢ(x), s), the server's side of Mime and MimeLite (Karimireddy et al. 2021, algorithm 1).

    The server's learning rate is 1.

    Attributes:
      base: what the clients mimic: gradient descent with momentum, or Adam.
      beta_1: weight of the past first moment; with 0, descent without momentum, or
        RMSProp.
      beta_2: weight of the past second moment, of Adam.
      eps: added to Adam's divisor.
      initial: what Adam's second moment starts from, which the paper leaves open.
        From 0 the first round's steps would be divided by `eps` alone.

    References:
      Karimireddy et al., "Breaking the centralized barrier for cross-device federated
      learning", NeurIPS 2021, arXiv:2008.03606.
    """

    name: ClassVar[str] = "mime-server"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "mime"
    sends = MimeStatistics
    receives = MimeReport
    base: Literal["momentum", "adam"] = "momentum"
    beta_1: float = hyperparameter(default=0.9, within="[0, 1)")
    beta_2: float = hyperparameter(default=0.99, within="[0, 1)")
    eps: float = hyperparameter(default=1e-3, within="(0, inf)")
    initial: float = hyperparameter(default=1.0, within="[0, inf)")

    def init(self, params: Params) -> MimeServerState:
        second = None
        if self.base == "adam":
            second = jax.tree.map(lambda v: v + self.initial, zeros_wide(params, real=True))
        return MimeServerState(zeros_wide(params), second)

    def update(
        self, updates: Updates, state: MimeServerState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, MimeServerState]:
        return updates, state

    def collect(self, state: MimeServerState) -> MimeStatistics:
        if state.second is None:
            divisor = jax.tree.map(lambda m: jnp.ones_like(m.real), state.first)
        else:
            divisor = jax.tree.map(lambda v: safe_sqrt(v) + self.eps, state.second)
        return MimeStatistics(
            momentum=jax.tree.map(lambda m: self.beta_1 * m, state.first),
            divisor=divisor,
            fresh=jnp.asarray(1 - self.beta_1, jnp.float32),
        )

    def process(self, aux: MimeReport, state: MimeServerState) -> MimeServerState:
        weight = jnp.where(aux.weight > 0, aux.weight, 1)
        mean = jax.tree.map(lambda g: wide(g) / weight.astype(wide(g).dtype), aux.gradient)
        first = ewma(state.first, mean, self.beta_1)
        second = None if state.second is None else ewma(state.second, squares(mean), self.beta_2)
        return MimeServerState(first, second)
