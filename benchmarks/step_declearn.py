"""A worker that takes steps with declearn's `Optimizer` on its JaxNumpyVector when asked: JSON in, seconds out.

A case is `["make", kind, shapes, settings]` or `["step"]`. It is a process of its own, since declearn's
vectors of JAX arrays turn on float64 for the whole process; the arrays here are float32.
"""

from importlib.metadata import version
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from declearn.model.haiku import JaxNumpyVector
from declearn.optimizer import Optimizer
from step_worker import answer


def make(_, shapes, settings):
    """Return a function that takes a step, and what holds the parameters."""
    trees = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        arrays = [jnp.asarray(0.1 * rng.standard_normal(shape, np.float32)) for shape in shapes]
        trees.append(JaxNumpyVector({f"leaf_{index:04}": array for index, array in enumerate(arrays)}))
    clip = ("l2-global-clipping", {"max_norm": settings["max_norm"]})
    adam = ("adam", {"beta_2": settings["beta_2"], "eps": settings["eps"]})
    optimizer = Optimizer(lrate=settings["lrate"], w_decay=settings["decay"], modules=[clip, adam])
    holder = SimpleNamespace(weights=trees[0])
    # All that the optimizer asks of a model is its weights.
    model = SimpleNamespace(get_weights=lambda trainable=True: holder.weights)

    def step():
        holder.weights = holder.weights + optimizer.compute_updates_from_gradients(model, trees[1])
        jax.block_until_ready(holder.weights.coefs)

    return step, holder


if __name__ == "__main__":
    answer(
        make,
        f"declearn {version('declearn')}, JAX {jax.__version__}",
        lambda holder: sum(float(jnp.sum(array.astype("float64") ** 2)) for array in holder.weights.coefs.values()),
    )
