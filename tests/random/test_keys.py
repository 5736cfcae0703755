"""Keys are made by the name of their generator, from a seed, from the system, or from words that a program is given."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.random.keys import CipherKey, fold_in_keys, generator_name, make_key, typed, words

CODE = """
import sys
import functional_optimodules as fo, functional_optimodules.federated
for name in ("functional_optimodules.random.chacha", "jax.extend"):
    assert name not in sys.modules, name
fo.GaussianNoiseModule(seed=0).init({"w": 1.0})
assert "functional_optimodules.random.chacha" in sys.modules
"""


@pytest.mark.slow
def test_the_cipher_is_imported_by_who_draws_from_it() -> None:
    # It brings a part of JAX with it that takes as long to import as all else here.
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("name", ["chacha20", "threefry2x32", "rbg"])
def test_a_key_is_made_and_saved_by_the_name_of_its_generator(name: str) -> None:
    key = typed(make_key(3, None, "test", impl=name))
    assert {"threefry2x32": "fry"}.get(name, name) in str(key.dtype)
    kept = generator_name(key)
    assert jax.random.key_impl(typed(make_key(3, None, "test", impl=kept))) == jax.random.key_impl(key)


def test_keys_of_the_cipher_are_kept_as_words_and_folded_as_keys() -> None:
    keys = jax.vmap(lambda number: fold_in_keys(make_key(3, None, "test", impl="chacha20"), number))(jnp.arange(3))
    assert isinstance(keys, CipherKey)
    assert (keys.words.shape, keys.words.dtype) == ((3, 10), jnp.uint32)
    one = jax.random.fold_in(typed(make_key(3, None, "test", impl="chacha20")), 2)
    np.testing.assert_array_equal(keys.words[2], words(one))
    both = fold_in_keys({"cipher": keys, "other": jax.random.key(0), "count": jnp.arange(3)}, 5)
    assert (both["cipher"].words != keys.words).any(axis=1).all()
    assert both["other"] != jax.random.key(0)
    np.testing.assert_array_equal(both["count"], jnp.arange(3))


TX = fo.Optimizer(0.1, modules=["gaussian-noise", "tree-aggregation-noise", "qsgd", "random-k"])
PARAMS = {"w": jnp.ones(3)}


def init(params: Any, entropy: Any) -> Any:
    with fo.entropy(entropy):
        return TX.init(params)


def keys_of(state: Any) -> list[tuple[int, ...]]:
    return [tuple(np.asarray(words(each.key)).tolist()) for _, each in sorted(state.modules.items())]


def test_each_call_of_one_program_that_is_given_entropy_has_keys_of_its_own() -> None:
    program = jax.jit(init)
    states = [program(PARAMS, fo.draw_entropy()) for _ in range(2)]
    assert program._cache_size() == 1
    keys = [key[:2] for state in states for key in keys_of(state)]
    assert len(set(keys)) == len(keys) == 8
    entropy = fo.draw_entropy()
    assert keys_of(program(PARAMS, entropy)) == keys_of(program(PARAMS, entropy)) == keys_of(init(PARAMS, entropy))


def test_each_word_of_entropy_counts() -> None:
    flipped = [np.zeros(10, np.uint32), *np.eye(10, dtype=np.uint32)]
    keys = jax.vmap(init, (None, 0))(PARAMS, jnp.array(flipped)).modules["gaussian-noise"].key.words
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 11


def test_shapes_of_a_state_with_keys_from_entropy() -> None:
    shapes = jax.eval_shape(init, PARAMS, fo.draw_entropy())
    made = TX.init(PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(made)
    assert [leaf.dtype for leaf in jax.tree.leaves(shapes)] == [leaf.dtype for leaf in jax.tree.leaves(made)]


def test_a_seed_goes_before_entropy() -> None:
    with fo.entropy(fo.draw_entropy()):
        found = make_key(3, None, "test", impl="chacha20")
    np.testing.assert_array_equal(found.words, make_key(3, None, "test", impl="chacha20").words)


def closed_over() -> Any:
    entropy = fo.draw_entropy()
    return jax.jit(lambda params: init(params, entropy))(PARAMS)


def entered_outside() -> Any:
    with fo.entropy(fo.draw_entropy()):
        return jax.jit(TX.init)(PARAMS)


def shared_by_a_vmap() -> Any:
    @jax.jit
    def made(entropy: Any) -> Any:
        with fo.entropy(entropy):
            return jax.vmap(TX.init)({"w": jnp.ones((2, 3))})

    return made(fo.draw_entropy())


@pytest.mark.parametrize("made", [closed_over, entered_outside, shared_by_a_vmap])
def test_entropy_that_would_be_repeated_is_refused(made: Any) -> None:
    with pytest.raises(RuntimeError, match=r"GaussianNoiseModule: seed=None, within `entropy` .* no argument"):
        made()


def test_without_entropy_a_traced_init_says_how_it_is_given_some() -> None:
    for trace in (jax.jit(TX.init), lambda params: jax.eval_shape(TX.init, params)):
        with pytest.raises(RuntimeError, match=r"GaussianNoiseModule: seed=None(.|\n)* with fo\.entropy\(words\)"):
            trace(PARAMS)
    with pytest.raises(ZeroDivisionError), fo.entropy(fo.draw_entropy()):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="from the operating system"):
        jax.jit(TX.init)(PARAMS)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (np.zeros(8, np.uint32), r"uint32\[8\]"),
        (np.zeros(10, np.int32), r"int32\[10\]"),
        (jax.random.key(0), r"key<fry>\[\]"),
        (3, "3"),
        (None, "None"),
    ],
)
def test_what_is_no_entropy_is_refused(wrong: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"entropy: {found}: expected uint32\[10\], as `draw_entropy`"):
        init(PARAMS, wrong)
