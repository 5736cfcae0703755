"""ChaCha20 as a generator of JAX: the vectors of RFC 8439, and what `jax.random` asks of a key."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functional_optimodules.random.chacha import CHACHA20, blocks
from functional_optimodules.wire.arrays import decode_array, encode_array

RFC_KEY = bytes(range(32))


def words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data)


def stream(key: bytes, counters: list[int], nonce: bytes) -> bytes:
    found = blocks(jnp.array(words(key), jnp.uint32), jnp.array(counters, jnp.uint32), words(nonce))
    return np.asarray(found).T.astype("<u4").tobytes()


def data_of(keys: jax.Array) -> set[tuple[int, ...]]:
    return {tuple(row) for row in np.asarray(jax.random.key_data(keys)).reshape(-1, 10).tolist()}


def test_a_block_is_that_of_section_2_3_2() -> None:
    nonce = bytes.fromhex("000000090000004a00000000")
    expected = bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    assert stream(RFC_KEY, [1], nonce) == expected


def test_two_blocks_encrypt_the_message_of_section_2_4_2() -> None:
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    expected = bytes.fromhex(
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
        "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
        "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )
    key_stream = stream(RFC_KEY, [1, 2], bytes.fromhex("000000000000004a00000000"))
    assert bytes(a ^ b for a, b in zip(text, key_stream, strict=False)) == expected


def test_the_null_key_gives_the_first_vector_of_appendix_a_1() -> None:
    expected = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert stream(bytes(32), [0], bytes(12)) == expected


def test_bits_are_the_key_stream_of_a_nonce_of_their_own() -> None:
    key = jax.random.key(7, impl=CHACHA20)
    data = jax.random.key_data(key)
    expected = blocks(data[:8], jnp.arange(2, dtype=jnp.uint32), (0, data[8], data[9]))
    found = jax.random.bits(key, (32,), jnp.uint32)
    assert sorted(found.tolist()) == sorted(expected.reshape(-1).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32])
@pytest.mark.parametrize("shape", [(), (3, 0), (17, 5), (1000,)])
def test_bits_of_each_width_have_the_shape_and_use_the_whole_range(dtype: jnp.dtype, shape: tuple[int, ...]) -> None:
    bits = jax.random.bits(jax.random.key(3, impl=CHACHA20), shape, dtype)
    assert bits.shape == shape
    assert bits.dtype == dtype
    if bits.size == 1000:
        ones = np.unpackbits(np.asarray(bits).view(np.uint8).reshape(1000, -1), axis=1).mean(axis=0)
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(1000)


def test_bits_of_64_are_well_formed_too() -> None:
    with jax.enable_x64(True):
        key = jax.random.key(3, impl=CHACHA20)
        bits = np.asarray(jax.random.bits(key, (1000,), jnp.uint64))
    assert bits.dtype == np.uint64
    assert len(set((bits >> np.uint64(32)).tolist()) | set((bits & np.uint64(2**32 - 1)).tolist())) == 2000


def test_a_draw_of_one_width_differs_from_key_to_key() -> None:
    keys = jax.random.split(jax.random.key(0, impl=CHACHA20), 50)
    drawn = np.asarray(jax.vmap(lambda key: jax.random.bits(key, (4,)))(keys))
    assert len(np.unique(drawn)) == drawn.size


def test_children_by_split_and_fold_in_are_distinct_from_each_other_and_the_parent() -> None:
    parent = jax.random.key(5, impl=CHACHA20)
    families = [
        parent,
        jax.random.split(parent, 20),
        jax.vmap(lambda index: jax.random.fold_in(parent, index))(jnp.arange(20)),
        jax.random.split(jax.random.fold_in(parent, 0), 20),
        jax.random.key(6, impl=CHACHA20),
    ]
    assert len(set().union(*map(data_of, families))) == 1 + 20 + 20 + 20 + 1


def test_split_is_the_same_in_any_shape_and_prefix_stable() -> None:
    parent = jax.random.key(5, impl=CHACHA20)
    flat = jax.random.key_data(jax.random.split(parent, 6))
    np.testing.assert_array_equal(flat.reshape(2, 3, 10), jax.random.key_data(jax.random.split(parent, (2, 3))))
    np.testing.assert_array_equal(flat[:4], jax.random.key_data(jax.random.split(parent, 4)))


def test_draws_under_vmap_and_jit_equal_a_loop() -> None:
    keys = jax.random.split(jax.random.key(1, impl=CHACHA20), 3)
    draw = lambda key: jax.random.bits(jax.random.fold_in(key, 9), (20,))  # noqa: E731
    loop = jnp.stack([draw(key) for key in keys])
    np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), loop)


def test_seeds_give_distinct_keys_and_the_same_seed_the_same() -> None:
    seeds = [0, 1, 2, 2**31, 2**32 - 1]
    keys = [data_of(jax.random.key(seed, impl=CHACHA20)) for seed in seeds]
    assert len(set().union(*keys)) == len(seeds)
    assert data_of(jax.random.key(2**31, impl=CHACHA20)) == keys[3]


def test_it_serves_the_samplers_of_jax() -> None:
    uniform = jax.random.uniform(jax.random.key(11, impl=CHACHA20), (2000,))
    assert 0 <= float(uniform.min()) < 0.01
    assert 0.99 < float(uniform.max()) < 1


def test_keys_survive_json() -> None:
    keys = jax.random.split(jax.random.key(11, impl=CHACHA20), 3)
    payload = encode_array(keys)
    assert payload["dtype"] == "key:chacha20"
    again = decode_array(payload, "keys")
    assert again.dtype == keys.dtype
    assert data_of(again) == data_of(keys)
