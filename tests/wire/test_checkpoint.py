"""A checkpoint is the old one or the new one, says what differs, and is never taken for what it is not."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functional_optimodules.random.chacha import CHACHA20
from functional_optimodules.random.keys import CipherKey
from functional_optimodules.wire.checkpoint import Checkpoint, write_checkpoint


def tree(scale=1.0):
    return {
        "params": {"w": scale * jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)},
        "steps": jnp.int32(7),
        "keys": jax.random.split(jax.random.key(3), 2),
        "cipher": jax.random.key(5, impl=CHACHA20),
    }


def same(left, right):
    def raw(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return all((raw(a) == raw(b)).all() for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def read(folder, **options):
    return Checkpoint.open(folder).tree(tree(0.0), **options)


def test_what_was_written_is_read(tmp_path):
    write_checkpoint(tmp_path / "new", "test", {"round": 3}, tree())
    found = Checkpoint.open(tmp_path / "new")
    assert (found.kind, found.about) == ("test", {"round": 3})
    assert same(read(tmp_path / "new"), tree())


def test_words_are_read_of_what_was_saved_as_keys_of_the_cipher(tmp_path):
    write_checkpoint(tmp_path, "test", {}, tree())
    zeros = CipherKey(jnp.zeros(10, jnp.uint32))
    found = Checkpoint.open(tmp_path).tree({**tree(0.0), "cipher": zeros})
    assert same(found["cipher"], CipherKey(jax.random.key_data(tree()["cipher"])))
    assert same(read(tmp_path), tree())
    only = Checkpoint.open(tmp_path).tree({"cipher": zeros}, only=("cipher/**",))
    assert same(only, {"cipher": found["cipher"]})
    with pytest.raises(ValueError, match=r"'cipher/words' is uint32\[10\], and uint32\[2,10\] here"):
        Checkpoint.open(tmp_path).tree({**tree(), "cipher": CipherKey(jnp.zeros((2, 10), jnp.uint32))})


def test_it_can_be_read_with_json_and_numpy_alone(tmp_path):
    write_checkpoint(tmp_path, "test", {}, tree())
    told = json.loads((tmp_path / "checkpoint.json").read_text())["checkpoint"]
    array = told["arrays"]["params/w"]
    raw = (tmp_path / told["data"]).read_bytes()
    found = np.frombuffer(raw, array["dtype"], 6, array["offset"]).reshape(array["shape"])
    assert (found == np.arange(6.0).reshape(2, 3)).all()


class Killed(BaseException):
    """The process has died."""


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
@pytest.mark.parametrize("number", range(3))
def test_whenever_the_process_dies_the_old_or_the_new_is_there(tmp_path, monkeypatch, call, number):
    write_checkpoint(tmp_path, "test", {"round": 1}, tree())
    calls = 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > number:
            raise Killed
        return real(*args, **kwargs)

    real = getattr(os, call)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, dying)
        with contextlib.suppress(Killed):
            write_checkpoint(tmp_path, "test", {"round": 2}, tree(2.0))
    number = Checkpoint.open(tmp_path).about["round"]
    assert same(read(tmp_path), tree(float(number)))
    write_checkpoint(tmp_path, "test", {"round": 3}, tree(3.0))
    assert same(read(tmp_path), tree(3.0))
    assert len(list(tmp_path.iterdir())) == 2  # nothing of what was cut off is left


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, call):
    write_checkpoint(tmp_path, "test", {"round": 1}, tree())

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match=r"No space left on device: .* has what it had before") as caught:
            write_checkpoint(tmp_path, "test", {"round": 2}, tree(2.0))
    assert caught.value.errno == errno.ENOSPC
    assert same(read(tmp_path), tree())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_byte_that_was_changed_anywhere_is_found(tmp_path):
    write_checkpoint(tmp_path, "test", {"round": 1}, tree())
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        for index in range(0, len(whole) - 1, 3):
            path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
            with pytest.raises(ValueError, match=r"damaged|format|dtype|cut short|shape"):
                read(tmp_path)
        path.write_bytes(whole)
    assert same(read(tmp_path), tree())


def test_a_file_that_was_cut_anywhere_is_found(tmp_path):
    write_checkpoint(tmp_path, "test", {"round": 1}, tree())
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        for size in range(0, len(whole) - 1, 5):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"damaged|cut short"):
                read(tmp_path)
        path.write_bytes(whole)


def test_each_difference_is_named(tmp_path):
    other = tree() | {"steps": jnp.float32(7), "more": jnp.zeros(2)}
    del other["cipher"], other["params"]["b"]
    write_checkpoint(tmp_path, "test", {}, other)
    with pytest.raises(ValueError, match="of another kind") as caught:
        read(tmp_path)
    for words in (
        "it lacks 'cipher'",
        "it lacks 'params/b'",
        r"it has 'more' (float32[2])",
        "'steps' is float32[], and",
    ):
        assert words in str(caught.value)


def test_keys_of_another_generator_are_refused(tmp_path):
    write_checkpoint(tmp_path, "test", {}, tree() | {"cipher": jax.random.key(5)})
    with pytest.raises(ValueError, match="'cipher' is threefry2x32 keys"):
        read(tmp_path)


def test_a_part_is_read_by_patterns(tmp_path):
    write_checkpoint(tmp_path, "test", {}, tree() | {"unknown": jnp.zeros(2)})
    found = read(tmp_path, only=("params/**",))
    assert same(found["params"], tree()["params"])
    assert found["keys"] is not None
    assert same(found["steps"], tree(0.0)["steps"])
    with pytest.raises(ValueError, match="the pattern 'parms/\\*' matches no path"):
        read(tmp_path, only=("parms/*",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ("[" * 10**5, "is no JSON"),
        ("[]", r"it holds \[\]"),
        ('{"crc32": 0, "checkpoint": {"format": 2}}', "has format 2: expected 1"),
        ('{"crc32": 0, "checkpoint": {"format": 1}}', "its checksum is another than 0"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, text, words):
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        Checkpoint.open(tmp_path)


def test_a_folder_without_one_says_so(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"has no checkpoint: expected a checkpoint\.json in it"):
            Checkpoint.open(folder)


def test_several_writers_and_readers_of_one_folder_leave_a_whole_checkpoint(tmp_path):
    write_checkpoint(tmp_path, "test", {"round": 0}, tree(0.0))

    def work(number):
        write_checkpoint(tmp_path, "test", {"round": number}, tree(float(number)))
        found = Checkpoint.open(tmp_path)
        assert same(found.tree(tree(0.0)), tree(float(found.about["round"])))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert len(list(tmp_path.iterdir())) == 2


MEMORY = """
import resource, sys
import jax, numpy as np
from functional_optimodules.wire.checkpoint import Checkpoint, write_checkpoint

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

tree = {"a": jax.device_put(np.ones(2**25, np.float32)), "b": jax.device_put(np.ones(2**25, np.float32))}
jax.block_until_ready(tree)
size, before = 2**28, peak()
write_checkpoint(sys.argv[1], "test", {}, tree)
assert peak() - before < 0.3 * size, (peak() - before) / size
read = Checkpoint.open(sys.argv[1]).tree(tree)
assert read["a"][0] == 1
assert peak() - before < 1.3 * size, (peak() - before) / size
"""


@pytest.mark.slow
def test_of_a_large_state_there_is_no_second_copy(tmp_path):
    subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], check=True)
