"""Scaffnew (ProxSkip): clients that communicate at random, and whose drift is corrected by what they were pulled back.

    Init: local = 0; gain = 0
    Round(params):
        local += gain * (params - reached)
        reached = params; gain = 0
    Step(g, lrate): g - local
    End(delta): reached += delta; due = probability / lrate
    Commit: gain = due

In algorithm 2 of Mishchenko et al. a coin that all clients share says after each step
whether they communicate. A round is what lies between two communications: a number of
steps that is drawn once for all, geometrically. At its end each client is at
z_i = y_i; the server takes the mean, and

    x = mean_i z_i;    h_i += (p / lr) (x - z_i)

which a client does when it is told x, at the start of the next round. The h_i sum to
zero, so that the paper's x = mean_i (z_i - (lr / p) h_i) is the mean too.

There is no server's side. Everyone takes part in each round and counts alike (uniform
weights); the server's learning rate is 1. Where only a client's message is lost, its z_i is in
nobody's mean, its h_i stays, and the h_i still sum to zero; it is told x all the same, if it drops
out of the round that begins with it too. Who is not sampled in that round of a simulation is not told, and
takes a later x for it.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, where, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


class ScaffnewState(NamedTuple):
    """State of `ScaffnewModule`; trees are shaped like the parameters, in at least float32.

    Attributes:
      local: the client's control variate, h_i.
      reached: the parameters at the start of the round; after its end those that
        the client came to, z_i.
      lrate: float32 scalar, the learning rate of the round's last step; 0 before any.
      due: float32 scalar, what `gain` becomes once the round's message has arrived.
      gain: float32 scalar, by how much of the server's move from `reached` the
        variate moves when the next round begins.
      awaits: boolean scalar, whether the round begins with the next step's parameters.
    """

    local: PyTree
    reached: PyTree
    lrate: jax.Array
    due: jax.Array
    gain: jax.Array
    awaits: jax.Array


class ScaffnewModule(OptiModule[ScaffnewState]):
    """g − hᵢ, hᵢ ← hᵢ + (p/lr)·(x − zᵢ) (Mishchenko et al. 2022, algorithm 2).

    It needs the parameters. Put it first among the modules, and let the learning rate
    be constant in a round. A round without a step moves nothing.

    Attributes:
      probability: p, with which a step is the last of its round.

    References:
      Mishchenko et al., "ProxSkip: yes! Local gradient steps provably lead to
      communication acceleration! Finally!", ICML 2022, arXiv:2202.09357.
    """

    name: ClassVar[str] = "scaffnew"
    packable: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    probability: float = hyperparameter(default=0.1, within="(0, 1]")

    def init(self, params: Params) -> ScaffnewState:
        lrate, due, gain = (jnp.zeros((), jnp.float32) for _ in range(3))
        return ScaffnewState(zeros_wide(params), zeros_wide(params), lrate, due, gain, jnp.array(True))

    def begin_round(self, state: ScaffnewState, params: Params = None) -> ScaffnewState:
        state = state._replace(lrate=jnp.zeros((), jnp.float32), due=jnp.zeros((), jnp.float32))
        return state._replace(awaits=jnp.array(True)) if params is None else self._begun(state, params)

    def _begun(self, state: ScaffnewState, params: Params) -> ScaffnewState:
        def pulled(local: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
            return local + state.gain.astype(local.dtype) * (wide(x) - z)

        return state._replace(
            local=jax.tree.map(pulled, state.local, params, state.reached),
            reached=jax.tree.map(lambda x: jnp.copy(wide(x)), params),
            gain=jnp.zeros((), jnp.float32),
            awaits=jnp.array(False),
        )

    def update(  # type: ignore[override]
        self,
        updates: Updates,
        state: ScaffnewState,
        params: Params = None,
        *,
        lrate: jax.Array,
        **extra_args: PyTree,
    ) -> tuple[Updates, ScaffnewState]:
        params = self.require(params)
        state = where(state.awaits, self._begun(state, params), state)
        corrected = jax.tree.map(lambda g, h: wide(g) - h, updates, state.local)
        return cast_like(corrected, updates), state._replace(lrate=jnp.asarray(lrate, jnp.float32))

    def end_round(  # type: ignore[override]
        self, state: ScaffnewState, *, delta: Params, **known: PyTree
    ) -> ScaffnewState:
        moved = state.lrate > 0
        due = jnp.where(moved, self.probability / jnp.where(moved, state.lrate, 1), 0)
        reached = jax.tree.map(lambda x, d: x + d.astype(x.dtype), state.reached, delta)
        return state._replace(reached=reached, due=due.astype(jnp.float32))

    def commit(self, state: ScaffnewState) -> ScaffnewState:
        return state._replace(gain=jnp.copy(state.due))
