"""A small transformer that learns to say a sequence backwards, in any precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, LENGTH, WIDTH, HEADS = 12, 8, 32, 4


def init(seed=0):
    """Return the parameters in float32: two blocks of attention and a layer, behind embeddings."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    block = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH)}
    return {
        "tokens": normal(VOCABULARY, WIDTH),
        "places": normal(LENGTH, WIDTH),
        "blocks": [{name: normal(*shape) for name, shape in block.items()} for _ in range(2)],
        "head": normal(WIDTH, VOCABULARY),
    }


def _normed(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.asarray(1e-5, x.dtype))


def _attention(block, x):
    q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in jnp.split(x @ block["qkv"], 3, axis=-1))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH // HEADS).astype(x.dtype)
    weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ block["out"]


def loss(params, tokens):
    """Return the mean cross-entropy of the reversed sequence, computed in the parameters' dtype."""
    x = params["tokens"][tokens] + params["places"]
    for block in params["blocks"]:
        x = x + _attention(block, _normed(x))
        x = x + jax.nn.gelu(_normed(x) @ block["up"]) @ block["down"]
    logits = (_normed(x) @ params["head"]).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, ::-1]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def curve(optimizer, dtype, steps):
    """Return the loss before each step of training in some dtype."""
    params = jax.tree.map(lambda p: p.astype(dtype), init())

    def step(carry, key):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, jax.random.randint(key, (32, LENGTH), 0, VOCABULARY))
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]
