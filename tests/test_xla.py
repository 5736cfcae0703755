"""What is written for one platform's compiler comes to the same by the way of every other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functional_optimodules import xla


@pytest.mark.parametrize("lead", [(), (3,)])
def test_vectors_end_to_end_are_the_same_by_the_way_of_every_platform(lead, monkeypatch):
    sizes = (5, 128, 128, 0, 0, 256, 128, 1, 384, 384)
    vectors = [jnp.arange(math.prod(lead) * size, dtype=jnp.float32).reshape(*lead, size) for size in sizes]
    expected = np.concatenate(vectors, axis=-1)
    weights = np.random.default_rng(0).normal(size=expected.shape).astype(np.float32)

    def weighted(vectors):
        return jnp.sum(xla.end_to_end(vectors) * weights)

    for platform in ("tpu", "default"):
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, p=platform, **ways: ways[p](*operands))
        np.testing.assert_array_equal(xla.end_to_end(vectors), expected)
        slopes = jax.grad(weighted)(vectors)
        np.testing.assert_array_equal(np.concatenate(slopes, axis=-1), weights)


def test_vectors_that_fill_rows_of_tiles_are_joined_as_rows_for_a_tpu():
    vectors = [jnp.ones(256)] * 3 + [jnp.ones(100)] * 3
    traced = jax.jit(xla.end_to_end).trace(vectors)
    rows = {name: "tensor<3x256xf32>" in traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert rows == {"cpu": False, "tpu": True}
