"""Rounding at random: fair, independent over elements, leaves and keys, and the same wherever the numbers lie."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.wrappers.rounding import round_at_random

COUNT = 2**18
UNIT = 2.0**-7  # of bfloat16 between 1 and 2


def ups(key=0, name="w", part=0.5, count=COUNT):
    """Return which of many equal numbers, a part of a unit above 1, were rounded up, as +1 and -1."""
    tree = {name: jnp.full(count, 1 + part * UNIT)}
    rounded = np.asarray(round_at_random(jax.random.key(key), tree)[name], np.float64)
    assert set(np.unique(rounded)) == {1.0, 1 + UNIT}
    return np.where(rounded > 1, 1.0, -1.0)


def is_noise(signs):
    """Whether the mean of fair signs is within four standard deviations of 0."""
    return abs(signs.mean()) * np.sqrt(signs.size) < 4


@pytest.mark.parametrize("part", [2.0**-9, 0.1, 0.5, 0.75, 1 - 2.0**-9])
def test_a_number_is_rounded_up_as_often_as_it_lies_above(part):
    up = (ups(part=part) + 1) / 2
    assert abs(up.mean() - part) < 4 * np.sqrt(part * (1 - part) / COUNT)


def test_draws_of_elements_near_and_far_of_leaves_and_of_keys_are_independent():
    signs = ups()
    for shift in (1, 2, 3, 8, 64, 128, 1024, 4096, 65536):
        assert is_noise(signs[shift:] * signs[:-shift]), shift
    for other in (ups(name="v"), ups(name="w2"), ups(name="layers/1"), ups(key=1), ups(key=2)):
        assert is_noise(signs * other)
    rows = signs.reshape(512, 512)
    assert is_noise(rows[:, :1] * rows[:, 1:])
    # The spread of counts of blocks, by which runs that are too even or too uneven would show.
    blocks = signs.reshape(-1, 256).sum(axis=1) ** 2 / 256
    assert abs(blocks.mean() - 1) < 4 * np.sqrt(2 / blocks.size)


def test_keys_over_steps_are_independent():
    keys, halves = jax.random.split(jax.random.key(0), 4000), jnp.full(64, 1 + UNIT / 2)
    rounded = jax.vmap(round_at_random, in_axes=(0, None))(keys, halves)
    signs = np.where(np.asarray(rounded, np.float64) > 1, 1.0, -1.0)
    assert is_noise(signs[1:] * signs[:-1])
    assert (np.abs(signs.mean(axis=0)) * np.sqrt(4000) < 4.5).all()


def test_each_number_becomes_one_of_its_two_neighbours_in_bfloat16():
    numbers = np.random.default_rng(0).normal(size=1000).astype(np.float32) * np.logspace(
        -30, 30, 1000, dtype=np.float32
    )
    found = np.asarray(round_at_random(jax.random.key(0), jnp.asarray(numbers)))
    towards_zero = (numbers.view(np.uint32) & 0xFFFF0000).view(np.float32)
    away = ((numbers.view(np.uint32) & 0xFFFF0000) + 0x10000).astype(np.uint32).view(np.float32)
    assert ((found.astype(np.float32) == towards_zero) | (found.astype(np.float32) == away)).all()
    assert found.dtype == ml_dtypes.bfloat16


def test_packed_or_not_under_vmap_or_not_the_draws_are_the_same():
    shapes = [(3, 2), (2,), (3, 2), (), (2,), (40, 40)]
    tree = {f"l{index}": jnp.full(shape, 1 + 0.3 * UNIT) for index, shape in enumerate(shapes)}
    key = jax.random.key(3)
    plain = round_at_random(key, {"state": tree})
    packed = {"state": fo.pack(tree, small=100)}
    assert packed["state"].large
    found = fo.unpack(round_at_random(key, packed))
    mapped = jax.vmap(round_at_random, in_axes=(0, None))(key[None], {"state": tree})
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), mapped, plain)


def test_what_is_not_finite_and_what_bfloat16_holds_stay():
    numbers = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0, -0.0, 1.0, -1.5, 2.0**-126])
    for key in range(5):
        found = round_at_random(jax.random.key(key), numbers).astype(jnp.float32)
        np.testing.assert_array_equal(found, np.asarray(numbers))
    payload = jnp.asarray(np.array([0x7FFFFFFF], np.uint32).view(np.float32))  # a NaN that would carry over
    assert jnp.isnan(round_at_random(jax.random.key(0), payload)).all()


def test_no_generator_runs_over_the_elements():
    """It is cheap since two words are drawn, whatever the size: a loop, or a call, of the generator would be of its."""
    text = jax.jit(round_at_random).lower(jax.random.key(0), jnp.ones(12345)).as_text()
    lines = [line for line in text.splitlines() if "threefry" in line and "12345" in line]
    assert "threefry" in text
    assert lines == []
