"""A small GPT over bytes, with LayerNorm before attention and MLP, as in GPT-2."""

import jax
import jax.numpy as jnp
from flax import nnx

VOCABULARY = 256
normal = nnx.initializers.normal(0.02)


class Attention(nnx.Module):
    """Causal self-attention. Each of its four kernels is one matrix."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, use_bias=False, kernel_init=normal, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (layer(x).reshape(*x.shape[:-1], self.heads, -1) for layer in (self.query, self.key, self.value))
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class Block(nnx.Module):
    """Attention, then an MLP, each of which adds to its input."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.norm_1, self.norm_2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs)
        self.up = nnx.Linear(width, 4 * width, kernel_init=normal, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=normal, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class GPT(nnx.Module):
    """Bytes, `(batch, length)` integers, to logits of the next ones, `(batch, length, 256)`."""

    def __init__(self, rngs: nnx.Rngs, layers: int = 4, width: int = 128, heads: int = 4, context: int = 128) -> None:
        self.context = context
        self.tokens = nnx.Embed(VOCABULARY, width, embedding_init=normal, rngs=rngs)
        self.positions = nnx.Embed(context, width, embedding_init=normal, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCABULARY, use_bias=False, kernel_init=normal, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
