"""Messages: the same in every form, few bytes, and nothing that is trusted."""

import json
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from functional_optimodules.federated.protocol.coding import Coded
from functional_optimodules.federated.protocol.message import Message, opened
from functional_optimodules.wire.paths import Specs

RNG = np.random.default_rng(0)
DENSE = RNG.normal(size=(40, 50)).astype(np.float32)
ARRAYS = {
    "dense": DENSE,
    "sparse": np.where(RNG.random((40, 50)) < 0.02, DENSE, 0).astype(np.float32),
    "signs": np.where(DENSE > 0, np.float32(0.5), np.float32(-0.5)),
    "levels": np.round(DENSE * 3).clip(-9, 9).astype(np.float32),
    "zeros": np.zeros((40, 50), np.float32),
    "minus zeros": np.full((40, 50), -0.0, np.float32),
    "bfloat16": DENSE.astype(ml_dtypes.bfloat16),
    "float16": np.round(DENSE).astype(np.float16),
    "complex": (DENSE + 1j * DENSE[::-1]).astype(np.complex64),
    "booleans": DENSE > 0,
    "integers": RNG.integers(0, 3, (1000,)).astype(np.int32),
    "bytes": RNG.integers(0, 255, (1001,)).astype(np.uint8),
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 3), np.float32),
    "NaN": np.where(DENSE > 2, np.float32(np.nan), 0).astype(np.float32),
}


def same_bits(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("form", ["itself", "json", "bytes"])
def test_an_array_arrives_bit_by_bit(name, form):
    message = Message.of({"kind": "test"}, {"at": {"path": ARRAYS[name]}})
    carried = {
        "itself": lambda: message,
        "json": lambda: json.loads(json.dumps(message.to_json(), allow_nan=False)),
        "bytes": message.to_bytes,
    }[form]()
    specs = Specs.of({"at": {"path": jax.ShapeDtypeStruct(ARRAYS[name].shape, ARRAYS[name].dtype)}})
    received = opened(carried)
    assert received.about == {"kind": "test"}
    same_bits(received.tree(specs, "the message")["at"]["path"], ARRAYS[name])


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("sparse", 8 * 2000 * 0.03),
        ("signs", 2000 / 8 + 8),
        ("levels", 2000 * 5 / 8 + 80),
        ("zeros", 4),
        ("minus zeros", 4),
    ],
)
def test_what_is_sparse_or_of_few_values_takes_few_bytes(name, most):
    assert Message.of({}, {"a": ARRAYS[name]}).nbytes <= most


@pytest.mark.parametrize("leaves", [{"one": (2000, 100)}, {f"layer-{i}/kernel": (100,) for i in range(1000)}])
def test_the_binary_form_takes_little_more_than_the_arrays(leaves):
    tree = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in leaves.items()}
    total = sum(leaf.nbytes for leaf in tree.values())
    assert len(Message.of({"kind": "report"}, tree).to_bytes()) <= 1.05 * total


def test_a_large_array_is_a_view_of_the_bytes():
    data = Message.of({}, {"a": RNG.normal(size=(1000, 100)).astype(np.float32)}).to_bytes()
    specs = Specs.of({"a": jax.ShapeDtypeStruct((1000, 100), jnp.float32)})
    read = Message.from_bytes(data).tree(specs, "the message")["a"]
    assert np.shares_memory(read, np.frombuffer(data, np.uint8))


def test_the_layout_is_the_documented_one():
    data = Message.of({"kind": "x"}, {"a": np.arange(3, dtype=np.int32)}).to_bytes()
    assert data[:8] == b"FOPMSG\r\n"
    assert data[8:12] == (1).to_bytes(4, "little")
    size = int.from_bytes(data[12:16], "little")
    head = json.loads(zlib.decompress(data[16 : 16 + size]))
    assert head == {"about": {"kind": "x"}, "arrays": {"a": ["int32", [3], {"raw": ["int32", 3, 0]}]}}
    assert np.frombuffer(data[-(-(16 + size) // 64) * 64 :], "<i4").tolist() == [0, 1, 2]


def head(about, arrays, body=b"\0" * 64):
    packed = zlib.compress(json.dumps({"about": about, "arrays": arrays}).encode())
    start = b"FOPMSG\r\n" + (1).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed
    return start + b"\0" * (-len(start) % 64) + body


RAW = {"raw": ["float32", 2, 0]}
HOSTILE = {
    "too short": (b"FOP", "has 3 bytes: expected at least 16"),
    "another format": (b"x" * 100, "begins with b'xxxxxxxx'"),
    "a head beyond the end": (
        b"FOPMSG\r\n" + b"\1\0\0\0" + b"\xff\xff\0\0" + b"x" * 10,
        "its head alone should have 65535",
    ),
    "a head that is no zlib": (b"FOPMSG\r\n" + b"\1\0\0\0" + b"\4\0\0\0abcd", "head cannot be read"),
    "a head of zeros that unpacks for ever": (
        b"FOPMSG\r\n" + b"\1\0\0\0" + (len(bomb := zlib.compress(b" " * 2**25))).to_bytes(4, "little") + bomb,
        "longer than 4194304 bytes",
    ),
    "a part beyond the end": (
        head({}, {"a": ["float32", [99], {"raw": ["float32", 99, 0]}]}),
        "do not lie in 64 bytes",
    ),
    "a part at an odd place": (head({}, {"a": ["float32", [2], {"raw": ["float32", 2, 3]}]}), "do not lie in"),
    "a part of a billion": (head({}, {"a": ["float32", [2], {"raw": ["float32", 2**50, 0]}]}), "do not lie in"),
    "an unknown dtype": (head({}, {"a": ["O", [2], RAW]}), "'O' is no dtype"),
    "a negative size": (head({}, {"a": ["float32", [-2], RAW]}), "non-negative"),
    "no list": (head({}, {"a": {"dtype": "float32"}}), r"should be \[dtype, shape, parts\]"),
    "many parts": (head({}, {"a": ["float32", [2], dict.fromkeys("abcd", RAW["raw"])]}), "expected at most 3"),
    "deep nesting": (head([[]], {}), "should be mappings"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bytes_that_are_no_message_are_refused(name):
    data, words = HOSTILE[name]
    with pytest.raises(ValueError, match=words):
        Message.from_bytes(data)


def test_json_that_nests_too_deep_is_refused():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nests more than"):
        Message.from_json({"about": {"x": deep}, "arrays": {}})


LIKE = jax.ShapeDtypeStruct((100,), jnp.float32)
REST = np.zeros(1, np.float32)
PLACES, CODES = np.array([3, 7], np.uint32), np.zeros(13, np.uint8)
TWO = np.ones(2, np.float32)
CODINGS = {
    "another shape": (Coded(np.dtype("f4"), (99,), {"raw": np.zeros(99, np.float32)}), "expected float32.100."),
    "another dtype": (Coded(np.dtype("i4"), (100,), {"raw": np.zeros(100, np.int32)}), "expected float32.100."),
    "too few values": (Coded(np.dtype("f4"), (100,), {"raw": np.zeros(99, np.float32)}), r"expected float32\[100\]"),
    "no way": (Coded(np.dtype("f4"), (100,), {"raw": TWO, "places": PLACES}), "has the parts"),
    "falling places": (
        Coded(np.dtype("f4"), (100,), {"rest": REST, "places": PLACES[::-1], "values": TWO}),
        "places should rise",
    ),
    "a place twice": (
        Coded(np.dtype("f4"), (100,), {"rest": REST, "places": PLACES[[0, 0]], "values": TWO}),
        "places should rise",
    ),
    "a place beyond": (
        Coded(np.dtype("f4"), (100,), {"rest": REST, "places": PLACES + np.uint32(98), "values": TWO}),
        "less than 100",
    ),
    "places without values": (
        Coded(np.dtype("f4"), (100,), {"rest": REST, "places": PLACES, "values": TWO[:1]}),
        r"float32\[2\]",
    ),
    "no rest": (
        Coded(np.dtype("f4"), (100,), {"rest": TWO, "places": PLACES, "values": TWO}),
        r"expected float32\[1\]",
    ),
    "no palette": (Coded(np.dtype("f4"), (100,), {"codes": CODES, "palette": TWO[:0]}), "a palette of 0 values"),
    "a code beyond": (
        Coded(np.dtype("f4"), (100,), {"codes": np.full(25, 0xFF, np.uint8), "palette": np.zeros(3, np.float32)}),
        "beyond the palette of 3",
    ),
    "too few codes": (Coded(np.dtype("f4"), (100,), {"codes": CODES[:5], "palette": TWO}), r"expected uint8\[13\]"),
}


@pytest.mark.parametrize("name", CODINGS)
def test_parts_that_do_not_make_the_array_are_refused(name):
    coded, words = CODINGS[name]
    with pytest.raises(ValueError, match=words):
        coded.array(LIKE, "the array")


def test_a_boolean_is_0_or_1():
    coded = Coded(np.dtype(bool), (3,), {"raw": np.array([0, 1, 2], np.uint8).view(bool)})
    with pytest.raises(ValueError, match="a byte of 0 or 1"):
        coded.array(jax.ShapeDtypeStruct((3,), jnp.bool_), "the array")


def test_each_array_that_is_missing_or_unknown_is_named():
    message = Message.of({}, {"a": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="the message has an unknown array 'a'"):
        message.tree(Specs.of({"b": LIKE}), "the message")


def test_what_is_no_message_is_refused():
    with pytest.raises(TypeError, match="a message is a Message, its JSON values or its bytes, not int"):
        opened(3)
