"""States in `flax.serialization`: as they are where they are plain arrays, and by `to_arrays` where they are not."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.random.keys import words

PARAMS = {"layers": [{"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.ones(2, jnp.bfloat16)} for _ in range(2)]}
PLAIN = fo.Optimizer(("warmup", {"warmup": 3, "base": 0.1}), modules=["gaussian-noise", "adam"])
KEYED = fo.Optimizer(0.1, modules=[("gaussian-noise", {"safe_mode": False}), "qsgd", "adam"])


def assert_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_array_equal(*(words(jnp.asarray(leaf)) for leaf in (a, b)))


def stepped(tx: fo.Optimizer, params: Any, state: Any = None) -> Any:
    return jax.jit(tx.update)(params, tx.init(params) if state is None else state, params)[1]


def test_a_state_of_plain_arrays_is_serialized_as_it_is() -> None:
    state = stepped(PLAIN, PARAMS)
    like = PLAIN.init(PARAMS)
    for found in (
        serialization.from_bytes(like, serialization.to_bytes(state)),
        serialization.from_state_dict(like, serialization.to_state_dict(state)),
    ):
        assert_bits(found, state)
        assert_bits(stepped(PLAIN, PARAMS, found), stepped(PLAIN, PARAMS, state))


@pytest.mark.slow
@pytest.mark.parametrize("tx", [PLAIN, KEYED], ids=["secret", "keyed"])
def test_packed_trees_and_keys_are_serialized_as_plain_arrays(tx: fo.Optimizer) -> None:
    packed = fo.pack(PARAMS)
    state, like = stepped(tx, packed), tx.init(packed)
    with pytest.raises(TypeError):  # rather than something that could not be read
        serialization.to_bytes(state)
    saved = serialization.to_bytes(fo.to_arrays(state))
    shapes = jax.eval_shape(lambda state: state, like)
    for arrays in (serialization.from_bytes(fo.to_arrays(like), saved), serialization.msgpack_restore(saved)):
        for target in (like, shapes):
            found = fo.from_arrays(arrays, target)
            assert_bits(found, state)
            assert_bits(stepped(tx, packed, found), stepped(tx, packed, state))


@pytest.mark.slow
def test_a_train_state_is_serialized() -> None:
    module = nn.Dense(2)
    made = [module.init(jax.random.key(seed), jnp.ones((1, 3)))["params"] for seed in range(2)]
    state, like = (TrainState.create(apply_fn=module.apply, params=fo.pack(params), tx=KEYED) for params in made)
    state = state.apply_gradients(grads=state.params)
    saved = serialization.to_bytes(fo.to_arrays(state))
    found = fo.from_arrays(serialization.from_bytes(fo.to_arrays(like), saved), like)
    assert_bits(found, state)
    assert_bits(found.apply_gradients(grads=state.params), state.apply_gradients(grads=state.params))


def test_an_nnx_optimizer_is_serialized() -> None:
    pairs = []
    for seed in range(2):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        pairs.append((model, nnx.Optimizer(model, KEYED, wrt=nnx.Param)))
    first, second = pairs
    first[1].update(first[0], nnx.state(first[0], nnx.Param))
    saved = serialization.to_bytes(fo.to_arrays(nnx.to_pure_dict(nnx.state(first))))
    state = nnx.state(second)
    nnx.replace_by_pure_dict(
        state, fo.from_arrays(serialization.msgpack_restore(saved), nnx.to_pure_dict(nnx.state(second)))
    )
    nnx.update(second, state)
    assert_bits(nnx.state(second), nnx.state(first))


@pytest.mark.slow
def test_a_federation_is_serialized() -> None:
    federation = Federation(
        lambda params, batch: ((params["w"] - batch) ** 2).sum(axis=-1),
        fo.Optimizer(0.1, modules=["scaffold-client", "gaussian-noise"]),
        fo.Optimizer(1.0, modules=[("scaffold-server", {"num_clients": 2})]),
    )
    data = FederatedData.from_clients([jnp.ones((4, 2)), jnp.zeros((3, 2))])
    state, _ = federation.fit(federation.init({"w": jnp.zeros(2)}, data), data, 2)
    saved = serialization.to_bytes(federation.to_arrays(state))
    found = federation.from_arrays(serialization.msgpack_restore(saved), federation.init({"w": jnp.zeros(2)}, data))
    assert_bits(found, state)
    assert_bits(federation.fit(found, data, 2)[0], federation.fit(state, data, 2)[0])


def test_arrays_of_another_shape_or_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has uint32\[2\] at 'key': expected uint32\[4\]"):
        fo.from_arrays({"key": np.zeros(2, np.uint32)}, {"key": jax.random.key(0, impl="rbg")})
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS)
    with pytest.raises(ValueError, match=r"has bfloat16\[2\] at 'layers/0/b': expected float16\[2\]; has float32"):
        fo.from_arrays(PARAMS, halves)
    with pytest.raises(TypeError, match="trees of arrays: at 'w' there is 'text'"):
        fo.from_arrays({"w": "text"}, {"w": jnp.ones(2)})
