"""A small problem that wrappers are run on, and how it is walked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

PARAMS = {"b": jnp.array([0.5, -1.0, 2.0]), "w": jnp.array([[1.0, 2.0], [-3.0, 0.5]])}


def gradients(count, seed=7, dtype=np.float32):
    """Return gradients by step, stacked."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(count, *p.shape)).astype(np.float32), dtype), PARAMS)


def walk(optimizer, grads, params=PARAMS):
    """Take a step for each gradient, in one compiled loop; return the parameters after each, and the last state."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda grads: jax.lax.scan(step, (params, optimizer.init(params)), grads))
    (_, state), each = run(grads)
    return each, state


def exact(tree):
    """Return a tree as NumPy's float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    """Compare two trees."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def assert_equal(found, expected):
    """Compare two trees bit by bit."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)
