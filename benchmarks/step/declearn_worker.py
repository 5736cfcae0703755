"""Steps with declearn's `Optimizer` on its JaxNumpyVector, in a process of their own.

declearn's vectors of JAX arrays turn on float64 for the whole process; the arrays here are float32.
"""

from importlib.metadata import version
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from declearn.model.haiku import JaxNumpyVector
from declearn.optimizer import Optimizer

from benchmarks.worker import serve, timed


class Declearn:
    """One case at a time."""

    def make(self, _, shapes, settings):
        """Make the case, and return what the peer is."""
        trees = []
        for seed in (0, 1):
            rng = np.random.default_rng(seed)
            arrays = [jnp.asarray(0.1 * rng.standard_normal(shape, np.float32)) for shape in shapes]
            trees.append(JaxNumpyVector({f"leaf_{index:04}": array for index, array in enumerate(arrays)}))
        clip = ("l2-global-clipping", {"max_norm": settings["max_norm"]})
        adam = ("adam", {"beta_2": settings["beta_2"], "eps": settings["eps"]})
        self.optimizer = Optimizer(lrate=settings["lrate"], w_decay=settings["decay"], modules=[clip, adam])
        self.weights, self.gradients = trees
        # All that the optimizer asks of a model is its weights.
        self.model = SimpleNamespace(get_weights=lambda trainable=True: self.weights)
        return f"declearn {version('declearn')}, JAX {jax.__version__}"

    def take(self):
        self.weights = self.weights + self.optimizer.compute_updates_from_gradients(self.model, self.gradients)
        jax.block_until_ready(self.weights.coefs)

    def step(self):
        """Take a step, and return its seconds."""
        return timed(self.take)[0]

    def squares(self):
        """Return the sum of the squares of the parameters."""
        return sum(float(jnp.sum(array.astype("float64") ** 2)) for array in self.weights.coefs.values())


if __name__ == "__main__":
    serve(Declearn())
