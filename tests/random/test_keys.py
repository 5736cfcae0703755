"""Keys are made by the name of their generator."""

import subprocess
import sys

import jax
import pytest

from functional_optimodules.random.keys import generator_name, make_key

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
    key = make_key(3, None, "test", impl=name)
    assert {"threefry2x32": "fry"}.get(name, name) in str(key.dtype)
    kept = generator_name(key)
    assert jax.random.key_impl(make_key(3, None, "test", impl=kept)) == jax.random.key_impl(key)
