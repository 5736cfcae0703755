"""The JSON encoding: bit by bit for every dtype, and mutilated payloads refused with nothing changed."""

import copy
import functools
import json
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import functional_optimodules as fo
from functional_optimodules.numerics import all_finite
from functional_optimodules.random.chacha import CHACHA20
from functional_optimodules.testing.trees import ran
from functional_optimodules.wire.arrays import decode_array, encode_array
from functional_optimodules.wire.layout import decode_tree, encode_tree
from functional_optimodules.wire.paths import Specs, specs_from_json

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

NARROW = ("int2", "uint2", "int4", "uint4", "float4_e2m1fn")
FLOATS = tuple(
    name
    for name in (
        "bfloat16", "float16", "float32",
        "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz",
        "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    )
    if hasattr(jnp, name)
)  # fmt: skip
INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32")
DTYPES = (*NARROW, *FLOATS, *INTEGERS, "bool", "complex64")
WIDE = ("float64", "int64", "uint64", "complex128")
GENERATORS = ("threefry2x32", "rbg", "unsafe_rbg", "chacha20")

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def read_back(payload: Any) -> Any:
    again = json.loads(json.dumps(payload, allow_nan=False))
    assert again == payload
    return again


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(np.asarray(array)).tobytes()


def assert_same_bits(found: jax.Array, array: jax.Array) -> None:
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        found, array = jax.random.key_data(found), jax.random.key_data(array)
    assert bits(found) == bits(array)


@st.composite
def arrays(draw: Callable[..., Any], names: tuple[str, ...] = DTYPES) -> jax.Array:
    """Any array: of any bits, so that NaNs of any payload, infinities and subnormal numbers are among them."""
    name, shape = draw(st.sampled_from(names)), draw(SHAPES)
    dtype, size = jnp.dtype(name), int(np.prod(shape))
    if name in NARROW:
        values = np.array(draw(st.lists(st.integers(-2 if name[0] != "u" else 0, 1), min_size=size, max_size=size)))
        return jnp.array(values.reshape(shape).astype(dtype))
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    values = np.frombuffer(raw, np.uint8) % 2 if name == "bool" else np.frombuffer(raw, np.uint8)
    return jnp.array(np.frombuffer(values.tobytes(), dtype).reshape(shape))


def key_of(generator: str, seed: int, shape: tuple[int, ...]) -> jax.Array:
    impl: Any = CHACHA20 if generator == "chacha20" else generator
    words = jax.random.key_data(jax.random.key(0, impl=impl)).shape
    rng = np.random.default_rng(seed)
    return jax.random.wrap_key_data(jnp.array(rng.integers(0, 2**32, (*shape, *words), np.uint32)), impl=impl)


KEYS = st.builds(key_of, st.sampled_from(GENERATORS), st.integers(0, 99), SHAPES)


@pytest.mark.slow
@quick
@given(st.one_of(arrays(), KEYS))
def test_any_array_comes_back_bit_by_bit(array: jax.Array) -> None:
    assert_same_bits(decode_array(read_back(encode_array(array)), "x"), array)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0)])
def test_each_dtype_comes_back(name: str, shape: tuple[int, ...]) -> None:
    array = jnp.ones(shape, name)
    payload = read_back(encode_array(array))
    assert payload["dtype"] == name
    assert payload["shape"] == list(shape)
    assert_same_bits(decode_array(payload, "x"), array)


@pytest.mark.parametrize("name", NARROW)
def test_every_value_of_the_narrow_dtypes_comes_back(name: str) -> None:
    values = np.arange(16, dtype=np.uint8)
    if name == "float4_e2m1fn":
        array = jnp.array(values.view(jnp.dtype(name)))
    else:
        info = jnp.iinfo(name)
        array = jnp.array(np.arange(int(info.min), int(info.max) + 1).astype(jnp.dtype(name)))
    assert_same_bits(decode_array(read_back(encode_array(array)), "x"), array)


@pytest.mark.parametrize("name", WIDE)
def test_dtypes_of_64_bits_come_back_in_64_bit_mode_and_are_refused_elsewhere(name: str) -> None:
    with jax.enable_x64(True):
        array = jnp.array(np.frombuffer(bytes(range(32)), name))
        payload = read_back(encode_array(array))
        assert_same_bits(decode_array(payload, "x"), array)
    with pytest.raises(ValueError, match=f"x: {name} needs JAX's 64-bit mode"):
        decode_array(payload, "x")


@pytest.mark.parametrize("name", FLOATS)
def test_payloads_of_not_a_number_and_infinities_are_kept(name: str) -> None:
    dtype = jnp.dtype(name)
    every = np.arange(2 ** min(16, 8 * dtype.itemsize), dtype=np.uint32).astype(f"uint{min(16, 8 * dtype.itemsize)}")
    if dtype.itemsize == 4:
        every = (every.astype(np.uint32) << 16) | np.uint32(1)
    array = jnp.array(every.view(dtype))
    assert bits(array) == bits(every)
    assert_same_bits(decode_array(read_back(encode_array(array)), "x"), array)


def test_bytes_are_little_endian() -> None:
    assert encode_array(jnp.array([1], jnp.int32))["data"] == "AQAAAA=="
    assert encode_array(jnp.array(1.0, jnp.bfloat16)) == {"dtype": "bfloat16", "shape": [], "data": "gD8="}


@pytest.mark.parametrize("size", [1, 100, 20_000])
def test_decoded_arrays_own_their_memory_so_that_they_are_donated_in_place(size: int) -> None:
    double = jax.jit(lambda x: x + x, donate_argnums=0)
    payload = encode_array(jnp.arange(size, dtype=jnp.float32))
    # Of so many, some are decoded from bytes that JAX could take over where they are.
    for array in [decode_array(payload, "x") for _ in range(64)]:
        place = array.unsafe_buffer_pointer()
        assert double(array).unsafe_buffer_pointer() == place


def test_encoding_holds_no_more_than_one_array_twice() -> None:
    tree = {name: jnp.ones(2**18) for name in "abcdefgh"}
    specs = Specs.of(tree)
    tracemalloc.start()
    payload = encode_tree(tree, specs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    text = sum(len(array["data"]) for array in payload.values())
    assert peak < text * (1 + 2 / 8)


@pytest.mark.parametrize("data", ["A", "AAA", "AA=A", "=AAA", "AAAAA===", "AAAA\n", " AAAA", "AA-_", "AAé=", None, 1])
def test_only_strict_base64_is_read(data: Any) -> None:
    with pytest.raises(ValueError, match=r"^x: 'data' is not base64"):
        decode_array({"dtype": "uint8", "shape": [3], "data": data}, "x")


@pytest.mark.parametrize("generator", GENERATORS)
def test_keys_draw_the_same_after_a_round_trip(generator: str) -> None:
    key = key_of(generator, 0, ())
    again = decode_array(read_back(encode_array(key)), "key")
    np.testing.assert_array_equal(jax.random.bits(again, (4,)), jax.random.bits(key, (4,)))


NAMES = st.text(min_size=1, max_size=3).filter(lambda name: "/" not in name)
TREES = st.recursive(
    arrays(),
    lambda nodes: st.one_of(
        st.lists(nodes, max_size=2), st.tuples(nodes, nodes), st.dictionaries(NAMES, nodes, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.slow
@quick
@given(TREES)
def test_any_tree_comes_back_in_its_container(tree: Any) -> None:
    specs = Specs.of(tree)
    payload = read_back(encode_tree(tree, specs))
    again = decode_tree(payload, specs, lambda _, array, what: decode_array(array, what), "tree")
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(assert_same_bits, again, tree)
    assert specs_from_json(read_back(specs.to_json()), "specs").by_path == specs.by_path


@pytest.mark.slow
@quick
@given(st.dictionaries(NAMES, arrays(("float32", "bfloat16", "float16")), max_size=3))
def test_any_state_comes_back_bit_by_bit_into_a_new_facade(params: Any) -> None:
    regularizer, other = fo.FedProxRegularizer(), fo.FedProxRegularizer()
    regularizer.setup(params)
    state = regularizer.begin_round(regularizer.state, params)
    saved = read_back(regularizer.save(state, params))
    if not all_finite(params):
        with pytest.raises(ValueError, match="expected finite numbers"):
            other.set_state(saved)
        return
    other.set_state(saved)
    assert other.get_state() == saved
    for name, param in params.items():
        assert_same_bits(other.state.reference[name], param)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=4),
        st.sampled_from(
            [2**40, 10**30, -1, "float64", "f8, )", "a", "key:", "key:rbg", "int4", "AAAA", "=", "float32"]
        ),
    ),
    lambda nodes: st.one_of(st.lists(nodes, max_size=2), st.dictionaries(st.text(max_size=3), nodes, max_size=2)),
    max_leaves=3,
)


def places(payload: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document but the whole."""
    items = payload.items() if isinstance(payload, dict) else enumerate(payload) if isinstance(payload, list) else ()
    return [place for key, value in items for place in ((*at, key), *places(value, (*at, key)))]


@st.composite
def mutilations(draw: Callable[..., Any], payload: Any) -> Any:
    """Delete, add, replace, truncate or change a few of the values anywhere in a JSON document."""
    payload = copy.deepcopy(payload)
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(places(payload)))
        parent = payload
        for key in parents:
            parent = parent[key]
        value = parent[last]
        how = draw(st.sampled_from(["delete", "add", "replace", "change"]))
        if how == "delete":
            del parent[last]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=3))] = draw(JSON)
        elif how == "add":
            parent.append(draw(JSON))
        elif how == "change" and isinstance(value, str):
            parent[last] = value[: draw(st.integers(0, len(value)))]
        elif how == "change" and type(value) is int:
            parent[last] = value + draw(st.integers())
        else:
            parent[last] = draw(JSON)
        if not payload:
            break
    return payload


PARAMS = {"a": jnp.array([1.0, -2.0], jnp.bfloat16), "b": {"c": jnp.ones((1, 2)), "d": jnp.zeros((0, 3))}}


def composite() -> fo.Optimizer:
    noise = fo.GaussianNoiseModule(std=0.0, seed=1)
    return fo.Optimizer(0.1, regularizers=["fedprox"], modules=[noise, "adam", "scaffold-client"])


def server() -> fo.ScaffoldServerModule:
    return fo.ScaffoldServerModule()


@functools.cache
def message() -> Any:
    client = fo.ScaffoldClientModule()
    client.run(PARAMS)
    return client.collect_aux_var()


def saved_of(brick: Any) -> Any:
    ran(brick, PARAMS, PARAMS)
    if isinstance(brick, fo.ScaffoldServerModule):
        brick.process_aux_var({"ann": message(), "bob": message()})
    else:
        brick.collect_aux_var()
    return brick.get_state()


def unborn(brick: Any) -> Any:
    brick.on_round_start()
    return brick.get_state()


@functools.cache
def states() -> list[tuple[Callable[[], Any], Any]]:
    return [(composite, saved_of(composite())), (server, saved_of(server())), (composite, unborn(composite()))]


@pytest.mark.slow
@settings(parent=quick, max_examples=300)
@given(st.data(), st.deferred(lambda: st.sampled_from(states())), st.booleans())
def test_a_mutilated_state_is_a_clear_error_and_changes_nothing_or_is_a_state(
    data: Any, example: tuple[Callable[[], Any], Any], born: bool
) -> None:
    make, good = example
    brick = make()
    if born:
        brick.set_state(states()[0][1] if make is composite else good)
    before, payload = brick.get_state(), data.draw(mutilations(good))
    try:
        brick.set_state(payload)
    except (KeyError, TypeError, ValueError) as refusal:
        error = str(refusal)
        assert type(brick).__name__ in error
        assert brick.get_state() == before
        brick.set_state(good)
        assert brick.get_state() == good
    else:
        again = make()
        again.set_state(read_back(brick.get_state()))
        assert again.get_state() == brick.get_state()


@pytest.mark.slow
@settings(parent=quick, max_examples=200)
@given(st.deferred(lambda: mutilations(message())), st.booleans())
def test_a_mutilated_message_is_a_clear_error_and_changes_nothing_or_is_a_message(payload: Any, born: bool) -> None:
    brick = server()
    if born:
        brick.set_state(states()[1][1])
    before = brick.get_state()
    try:
        brick.process_aux_var({"eve": payload})
    except (KeyError, TypeError, ValueError) as refusal:
        error = str(refusal)
        assert "eve" in error
        assert brick.get_state() == before
        brick.process_aux_var({"ann": message()})
    for variate in jax.tree.leaves(brick.state.total):
        assert np.isfinite(np.asarray(variate)).all()


@pytest.mark.slow
@settings(parent=quick, max_examples=100)
@given(mutilations(composite().get_config()))
def test_a_mutilated_configuration_is_a_clear_error_or_a_configuration(config: Any) -> None:
    try:
        optimizer = fo.Optimizer.from_config(config)
    except (KeyError, TypeError, ValueError) as refusal:
        message = str(refusal)
        assert re.search("Optimizer|Module|FedProx|no module is named|no regularizer is named|no scheduler", message)
    else:
        assert fo.Optimizer.from_config(read_back(optimizer.get_config())) == optimizer
