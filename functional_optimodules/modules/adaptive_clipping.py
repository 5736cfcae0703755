"""Clipping of clients' deltas by a bound that follows a quantile of their norms.

    uplink                                       server
      Init: bound = 0; inside = 0; joined = 0      Init: key; steps = 0; bound = initial_bound
      Receive: bound                               Send: bound
      Step(g):                                     Receive(sums over clients): inside, joined
        inside = 1 if ||g|| <= bound else 0        Step(g):
        joined = 1                                   g += z_sum * bound / joined * normal(key, steps)
        g = g * min(1, bound / ||g||)                share = (inside + count_std * normal(key, steps)) / joined
      Send: inside, joined                           bound *= exp(-bound_lrate * (share - quantile)); steps += 1

This is algorithm 1 of Andrew et al. The sum of the clipped deltas and the count of those
within the bound are both noised. The multiplier z, `noise_multiplier`, is that of the two
together: an accountant is given z, and the noise of the sum is scaled by
z_sum = (z^-2 - (2 count_std)^-2)^(-1/2), which is a little more than z.

The noise is for an aggregation that is the mean of equally weighted clients, whose sum
no client changes by more than the bound. `gaussian-noise` on the server does not follow
the bound: leave it out where `noise_multiplier` is above 0.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules import xla
from functional_optimodules.aux_var import Flag, FromClients, FromServer, Scalar
from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.modules.clipping import shrink, squared_norm
from functional_optimodules.modules.noise import noised
from functional_optimodules.random.keys import CipherKey, make_key, typed
from functional_optimodules.types import Params, PyTree, Updates


class ClippingReport(FromClients):
    """What a client sends: summed over clients.

    Attributes:
      inside: 1 if the norm of its delta was within the bound, else 0.
      joined: 1.
    """

    inside: Flag
    joined: Flag


class ClippingBound(FromServer):
    """What the server sends to every client.

    Attributes:
      bound: the largest norm of a delta in this round.
    """

    bound: Scalar


class AdaptiveClippingClientState(NamedTuple):
    """State of `AdaptiveClippingClientModule`.

    Attributes:
      bound: float32 scalar, the largest norm that is let through.
      inside: int32 scalar, 1 if the last delta was within it.
      joined: int32 scalar, 1 once there was a delta.
    """

    bound: jax.Array
    inside: jax.Array
    joined: jax.Array


class AdaptiveClippingClientModule(OptiModule[AdaptiveClippingClientState]):
    """Δ · min(1, C / ‖Δ‖₂), C the server's, the client's side, for the uplink (Andrew et al. 2021).

    Put it where the uplink's other modules change norms no more. Until it has received a
    bound, that is 0, and nothing gets through.

    References:
      Andrew et al., "Differentially private learning with adaptive clipping",
      algorithm 1, NeurIPS 2021, arXiv:1905.03871.
    """

    name: ClassVar[str] = "adaptive-clipping-client"
    packable: ClassVar[bool] = True
    aux_name: ClassVar[str] = "adaptive-clipping"
    sends = ClippingReport
    receives = ClippingBound

    def init(self, params: Params) -> AdaptiveClippingClientState:
        return AdaptiveClippingClientState(
            jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        )

    def update(
        self, updates: Updates, state: AdaptiveClippingClientState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, AdaptiveClippingClientState]:
        total = squared_norm(updates)
        norm = xla.norm(total)
        clipped = jax.tree.map(lambda g: shrink(g, norm, state.bound), updates)
        inside = (norm <= state.bound.astype(norm.dtype)).astype(jnp.int32)
        return clipped, state._replace(inside=inside, joined=jnp.ones((), jnp.int32))

    def collect(self, state: AdaptiveClippingClientState) -> ClippingReport:
        return ClippingReport(inside=state.inside, joined=state.joined)

    def process(self, aux: ClippingBound, state: AdaptiveClippingClientState) -> AdaptiveClippingClientState:
        return state._replace(bound=aux.bound.astype(jnp.float32))


class AdaptiveClippingServerState(NamedTuple):
    """State of `AdaptiveClippingServerModule`.

    Attributes:
      key: the cipher's key; without `safe_mode`, a typed PRNG key.
      steps: int32 scalar, how many updates were noised.
      bound: float32 scalar, the bound of the next update's deltas.
      inside: float32 scalar, how many of them were within it.
      joined: float32 scalar, how many there are.
      share: float32 scalar, the noised share of the last ones that were within theirs.
    """

    key: CipherKey | jax.Array
    steps: jax.Array
    bound: jax.Array
    inside: jax.Array
    joined: jax.Array
    share: jax.Array


class AdaptiveClippingServerModule(OptiModule[AdaptiveClippingServerState]):
    """C ← C · exp(−η(b̃ − γ)), and noise in proportion to C, the server's side (Andrew et al. 2021).

    Put it first among the modules: it noises the mean of the clipped deltas. The next
    bound, and the noised share of deltas that were within the last one, are the metrics
    `bound` and `share`. A round that nobody reports leaves the bound.

    Attributes:
      quantile: γ, the share of deltas that should be within the bound.
      bound_lrate: η_C, the rate at which the bound's logarithm moves.
      initial_bound: C⁰, the first bound.
      count_std: σ_b, the standard deviation of the noise on the count of deltas within
        the bound; a twentieth of the clients of a round in the paper, 0 for none.
      noise_multiplier: z, the ratio of noise to sensitivity of both noises together;
        0 for no noise on the mean.
      safe_mode: whether to draw from the key stream of the ChaCha20 cipher,
        rather than from JAX's default generator, which is faster and no cipher.
      seed: where the key comes from: with `None`, from the operating system, so
        that `init` must then be called outside of `jit`, or within `entropy`.

    Raises:
      ValueError: if there is noise on the mean, and too little on the count for both
        together to come to z: `count_std` must be more than half of it.

    References:
      Andrew et al., "Differentially private learning with adaptive clipping",
      algorithm 1, NeurIPS 2021, arXiv:1905.03871.
    """

    name: ClassVar[str] = "adaptive-clipping-server"
    aux_name: ClassVar[str] = "adaptive-clipping"
    sends = ClippingBound
    receives = ClippingReport
    examples = ({"noise_multiplier": 1.0, "count_std": 2.0},)
    quantile: float = hyperparameter(default=0.5, within="[0, 1]")
    bound_lrate: float = hyperparameter(default=0.2, within="[0, inf)")
    initial_bound: float = hyperparameter(default=0.1, within="(0, inf)")
    count_std: float = hyperparameter(default=0.0, within="[0, inf)")
    noise_multiplier: float = hyperparameter(default=0.0, within="[0, inf)")
    safe_mode: bool = True
    seed: int | None = hyperparameter(default=None, within="[0, 4294967295]")

    def validate(self) -> None:
        if self._is_noiseless or any(isinstance(x, jax.core.Tracer) for x in (self.noise_multiplier, self.count_std)):
            return
        if 2 * self.count_std <= self.noise_multiplier:
            raise ValueError(
                f"{type(self).__name__}: count_std={self.count_std!r} with noise_multiplier={self.noise_multiplier!r}: "
                "expected more than half of it, for the count of clipped deltas gives away more than that noise hides"
            )

    @property
    def _is_noiseless(self) -> bool:
        return isinstance(self.noise_multiplier, int | float) and self.noise_multiplier == 0

    def init(self, params: Params) -> AdaptiveClippingServerState:
        key = make_key(self.seed, params, type(self).__name__, "chacha20" if self.safe_mode else None)
        bound = jnp.asarray(self.initial_bound, jnp.float32)
        inside, joined, share = (jnp.zeros((), jnp.float32) for _ in range(3))
        return AdaptiveClippingServerState(key, jnp.zeros((), jnp.int32), bound, inside, joined, share)

    def update(
        self, updates: Updates, state: AdaptiveClippingServerState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, AdaptiveClippingServerState]:
        for_mean, for_count = jax.random.split(jax.random.fold_in(typed(state.key), state.steps))
        joined = jnp.maximum(state.joined, 1)
        if not self._is_noiseless:
            noise = jnp.asarray(self.noise_multiplier)
            share_of_count = jnp.where(noise > 0, noise / (2 * self.count_std), 0)
            multiplier = noise / jnp.sqrt(1 - share_of_count**2)
            updates = noised(updates, for_mean, multiplier * state.bound / joined)
        count = state.inside + self.count_std * jax.random.normal(for_count, (), jnp.float32)
        share = count / joined
        bound = jnp.where(
            state.joined > 0, state.bound * jnp.exp(-self.bound_lrate * (share - self.quantile)), state.bound
        )
        return updates, state._replace(steps=state.steps + 1, bound=bound, share=share)

    def collect(self, state: AdaptiveClippingServerState) -> ClippingBound:
        return ClippingBound(state.bound)

    def process(self, aux: ClippingReport, state: AdaptiveClippingServerState) -> AdaptiveClippingServerState:
        return state._replace(inside=aux.inside.astype(jnp.float32), joined=aux.joined.astype(jnp.float32))

    def metrics(self, state: AdaptiveClippingServerState) -> dict[str, jax.Array]:
        return {"bound": state.bound, "share": state.share}
