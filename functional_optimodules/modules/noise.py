"""Noise for differential privacy.

    Init(std, seed):
        key = from the seed, or from the operating system
        steps = 0
    Step(grads):
        grads += std * normal(key, steps)
        steps += 1

The key and the position in its stream are state: a run that is saved and
resumed draws what it would have drawn. Clients of one seed must fold in an
identity each (`setup(params, identity)`, or the pure `fold_in`), lest they draw
the same noise.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import wide
from functional_optimodules.random.keys import CipherKey, make_key, typed
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.paths import leaf_paths


class NoiseState(NamedTuple):
    """State of `GaussianNoiseModule`.

    Attributes:
      key: the cipher's key; without `safe_mode`, a typed PRNG key.
      steps: int32 scalar, how many draws were made.
    """

    key: CipherKey | jax.Array
    steps: jax.Array


class GaussianNoiseModule(OptiModule[NoiseState]):
    """g + σ·N(0, 1), independent for every element and step (Abadi et al. 2016).

        Init(std, safe_mode, seed):
            key = make_key(seed); steps = 0
        Step(grads):
            grads += std * normal(fold_in(key, steps))
            steps += 1

    Put it after clipping and before anything adaptive. The noise is drawn in at
    least float32, added there, and the sum rounded to the gradient's dtype.

    Attributes:
      std: standard deviation of the noise, in the units of the gradients.
      safe_mode: whether to draw from the key stream of the ChaCha20 cipher,
        rather than from JAX's default generator, which is faster and no cipher.
      seed: where the key comes from: with `None`, from the operating system, so
        that `init` must then be called outside of `jit`, or within `entropy`. A seed makes runs
        reproducible, and the noise no more secret than the seed.

    References:
      Abadi et al., "Deep learning with differential privacy", algorithm 1,
      arXiv:1607.00133.
      Nir and Langley, "ChaCha20 and Poly1305 for IETF protocols", RFC 8439.
    """

    name: ClassVar[str] = "gaussian-noise"
    std: float = hyperparameter(default=1.0, within="[0, inf)")
    safe_mode: bool = True
    seed: int | None = hyperparameter(default=None, within="[0, 4294967295]")

    def init(self, params: Params) -> NoiseState:
        impl = "chacha20" if self.safe_mode else None
        return NoiseState(make_key(self.seed, params, type(self).__name__, impl), jnp.zeros((), jnp.int32))

    def update(
        self, updates: Updates, state: NoiseState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, NoiseState]:
        noisy = noised(updates, jax.random.fold_in(typed(state.key), state.steps), self.std)
        return noisy, NoiseState(state.key, state.steps + 1)


def noised(updates: Updates, key: jax.Array, std: ArrayLike) -> Updates:
    """Return updates with normal noise of that standard deviation, in their dtypes."""
    leaves, treedef = jax.tree.flatten(updates)
    exact = [wide(leaf) for leaf in leaves]
    noise = draw(key, exact, leaf_paths(updates))
    noisy = [
        (x + jnp.asarray(std).astype(x.dtype) * z).astype(jnp.result_type(g))
        for g, x, z in zip(leaves, exact, noise, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def draw(key: jax.Array, like: list[jax.Array], paths: list[str]) -> list[jax.Array]:
    """Draw standard normals shaped like arrays: one stream per dtype, cut up in the order of the paths.

    A stream for each array would compile the generator once for each.
    """
    drawn: dict[int, jax.Array] = {}
    for rank, dtype in enumerate(sorted({str(array.dtype) for array in like})):
        members = [index for index in sorted(range(len(like)), key=paths.__getitem__) if like[index].dtype == dtype]
        sizes = [like[index].size for index in members]
        stream = jax.random.normal(jax.random.fold_in(key, rank), (sum(sizes),), dtype)
        for index, piece in zip(members, jax.lax.split(stream, sizes), strict=True):
            drawn[index] = piece.reshape(like[index].shape)
    return [drawn[index] for index in range(len(like))]
