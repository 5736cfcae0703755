"""Noise for differential privacy without sampling: the sums of gradients get little of it, whatever their length.

    Init(std, seed):
        key = from the seed, or from the operating system
        steps = 0
    Step(grads):
        steps += 1
        grads += noise(steps) - noise(steps - 1)

    noise(t) = sum over the nodes of t of std * normal(key, node)

A node is a run of 2^level steps. Those of t are the runs that its binary digits cut the
first t steps into: 7 has the steps 1 to 4, 5 to 6, and 7. The sum of the first t updates
then has the noise of as many nodes as t has ones, and each gradient is hidden in few
nodes, of one for each level. That is all that DP-FTRL (Kairouz et al.) needs: with a constant
learning rate, the parameters are where they started minus the rate times the noised sum.

Nothing is stored but the key. From t - 1 to t one node begins, and the nodes that it
replaces end; both are drawn again from the key, on average 2 draws a step.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.modules.noise import NoiseState, draw
from functional_optimodules.numerics import wide
from functional_optimodules.random.keys import make_key, typed
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.paths import leaf_paths


class TreeAggregationNoiseModule(OptiModule[NoiseState]):
    """g + N(t) − N(t−1), N(t) the noise of the tree's nodes that make up t (Kairouz et al. 2021).

        Init(std, safe_mode, seed):
            key = make_key(seed); steps = 0
        Step(grads):
            steps += 1
            new = the number of zeros that the binary digits of steps end in
            grads += std * normal(key, (new, steps >> new))
            for level in 0, ..., new - 1:
                grads -= std * normal(key, (level, (steps - 1) >> level))

    For a server whose clients clip; before anything adaptive. `momentum` after it
    gives DP-FTRLM. The learning rate must not change, or the noise of earlier steps is not
    taken away as it was added. The noise is drawn and added in at least float32.

    Attributes:
      std: standard deviation of the noise of a node, in the units of the gradients:
        of the mean of n deltas clipped to c, z * c / n for the paper's multiplier z.
      safe_mode: whether to draw from the key stream of the ChaCha20 cipher,
        rather than from JAX's default generator, which is faster and no cipher.
      seed: where the key comes from: with `None`, from the operating system, so
        that `init` must then be called outside of `jit`, or within `entropy`.

    References:
      Kairouz et al., "Practical and private (deep) learning without sampling or
      shuffling", algorithm 1, ICML 2021, arXiv:2103.00039.
    """

    name: ClassVar[str] = "tree-aggregation-noise"
    std: float = hyperparameter(default=1.0, within="[0, inf)")
    safe_mode: bool = True
    seed: int | None = hyperparameter(default=None, within="[0, 4294967295]")

    def init(self, params: Params) -> NoiseState:
        impl = "chacha20" if self.safe_mode else None
        return NoiseState(make_key(self.seed, params, type(self).__name__, impl), jnp.zeros((), jnp.int32))

    def update(
        self, updates: Updates, state: NoiseState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, NoiseState]:
        leaves, treedef = jax.tree.flatten(updates)
        exact, paths, steps = [wide(leaf) for leaf in leaves], leaf_paths(updates), state.steps + 1
        key, new = typed(state.key), jax.lax.population_count((steps & -steps) - 1)

        def turn(level: jax.Array, total: list[jax.Array]) -> list[jax.Array]:
            begins = level == new
            node = jnp.where(begins, steps, state.steps) >> level
            noise = draw(jax.random.fold_in(jax.random.fold_in(key, level), node), exact, paths)
            return [sum_ + jnp.where(begins, z, -z) for sum_, z in zip(total, noise, strict=True)]

        change = jax.lax.fori_loop(0, new + 1, turn, [jnp.zeros_like(x) for x in exact])
        noisy = [(x + self.std * z).astype(jnp.result_type(g)) for g, x, z in zip(leaves, exact, change, strict=True)]
        return jax.tree.unflatten(treedef, noisy), NoiseState(state.key, steps)
