"""Who takes part in a round: some clients, drawn without replacement."""

import jax
import jax.numpy as jnp


def round_key(key: jax.Array, number: jax.Array, num_clients: int) -> jax.Array:
    """Return what the participants of a round are drawn from, by its number: clients fold in theirs, which is less."""
    return jax.random.fold_in(jax.random.fold_in(key, number), num_clients)


def draw(key: jax.Array, num_clients: int, size: int) -> jax.Array:
    """Draw clients, each subset with the same probability, in an order of no meaning.

    Returns:
      int32[size].

    References:
      Bentley and Floyd, "Programming pearls: a sample of brilliance", Communications
      of the ACM 30(9), 1987.
    """
    if size == num_clients:
        return jax.random.permutation(key, num_clients).astype(jnp.int32)
    if size**2 > 64 * num_clients:
        return jax.lax.top_k(jax.random.bits(key, (num_clients,), jnp.uint32), size)[1].astype(jnp.int32)
    # Floyd's way looks at the chosen ones only, however many clients there are.
    highest = jnp.arange(num_clients - size, num_clients, dtype=jnp.int32)
    picks = jax.random.randint(key, (size,), 0, highest + 1, jnp.int32)

    def choose(index: jax.Array, chosen: jax.Array) -> jax.Array:
        taken = jnp.any(chosen == picks[index])
        return chosen.at[index].set(jnp.where(taken, highest[index], picks[index]))

    return jax.lax.fori_loop(0, size, choose, jnp.full(size, -1, jnp.int32))


def draw_by_shard(key: jax.Array, slots: jax.Array, per_shard: int, num_shards: int, size: int) -> jax.Array:
    """Draw clients, the same number from each shard to within one, in random order within a shard.

    Every client is as likely as the others of its shard, and as all others where
    the shards have equally many.

    Args:
      key: what to draw from.
      slots: int32[N], the slot of each client.
      per_shard: slots of a shard.
      num_shards: the number of shards.
      size: how many to draw.

    Returns:
      int32[size].
    """
    num_clients = slots.shape[0]
    empty = jnp.full(num_shards * per_shard, num_clients, jnp.int32)
    ids = empty.at[slots].set(jnp.arange(num_clients, dtype=jnp.int32)).reshape(num_shards, per_shard)
    first, second = jax.random.split(key)
    # Slots without a client come last, with the lowest of scores.
    scores = jnp.where(ids < num_clients, 1 + (jax.random.bits(first, ids.shape, jnp.uint32) >> 1), 0)
    most = -(-size // num_shards)
    scores, places = jax.lax.top_k(scores, most)
    chosen = jnp.take_along_axis(ids, places, axis=1)
    # Not every shard may be asked for one more, and not every one has one more.
    more = jnp.where(scores[:, -1] > 0, 1 + (jax.random.bits(second, (num_shards,), jnp.uint32) >> 1), 0)
    last = chosen[jax.lax.top_k(more, num_shards)[1], -1]
    return jnp.concatenate([chosen[:, :-1].T.reshape(-1), last])[:size]
