"""States of the pure methods as JSON, and back."""

import json
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import functional_optimodules as fo

PARAMS = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(2)}
GRADIENTS = jax.tree.map(lambda leaf: leaf + 0.5, PARAMS)


def optimizer() -> fo.Optimizer:
    return fo.Optimizer(0.1, regularizers=["fedprox"], modules=["l2-global-clipping", ("adam", {"amsgrad": True})])


def written(payload):
    return json.loads(json.dumps(payload, allow_nan=False))


def test_the_state_of_a_train_state_is_saved_and_continued_bit_by_bit():
    start = TrainState.create(apply_fn=None, params=PARAMS, tx=optimizer()).apply_gradients(grads=GRADIENTS)
    saved = written(start.tx.save(start.opt_state, start.params))
    fresh = TrainState.create(apply_fn=None, params=start.params, tx=optimizer())
    fresh = fresh.replace(step=start.step, opt_state=fresh.tx.load(saved, fresh.params))
    chex.assert_trees_all_equal(
        fresh.apply_gradients(grads=GRADIENTS).opt_state, start.apply_gradients(grads=GRADIENTS).opt_state
    )


def test_the_facade_and_the_pure_methods_read_what_the_other_wrote():
    brick, state = optimizer(), optimizer().init(PARAMS)
    _, state = brick.update(GRADIENTS, state, PARAMS)
    brick.set_state(written(brick.save(state, PARAMS)))
    chex.assert_trees_all_equal(brick.load(written(brick.get_state()), PARAMS), state)


def test_a_state_is_loaded_into_another_container():
    class Pair(NamedTuple):
        w: jax.Array
        b: jax.Array

    module = fo.MomentumModule()
    _, state = module.update(GRADIENTS, module.init(PARAMS))
    loaded = module.load(written(module.save(state, PARAMS)), jax.eval_shape(lambda: Pair(**PARAMS)))
    assert isinstance(loaded.velocity, Pair)
    chex.assert_trees_all_equal(loaded.velocity._asdict(), state.velocity)


def test_the_state_of_an_nnx_optimizer_is_saved_without_its_wrappers():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, fo.Optimizer(0.1, modules=["momentum"]), wrt=nnx.Param)
    gradients = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2))(model)
    optimizer.update(model, gradients)
    params = nnx.state(model, nnx.Param)
    saved = written(optimizer.tx.save(optimizer.opt_state, params))
    loaded = optimizer.tx.load(saved, params)
    chex.assert_trees_all_equal(jax.tree.leaves(loaded.modules["momentum"].velocity), jax.tree.leaves(gradients))
    assert optimizer.tx.save(loaded, params) == saved


def test_saving_a_pure_state_leaves_the_facade_alone():
    module = fo.MomentumModule()
    module.run(GRADIENTS)
    before = module.get_state()
    module.load(module.save(module.init(PARAMS), PARAMS), PARAMS)
    assert module.get_state() == before


@pytest.mark.parametrize(
    ("saved", "error", "message"),
    [
        (fo.YogiModule().save(fo.YogiModule().init(PARAMS), PARAMS), ValueError, "that of 'yogi', not of 'adam'"),
        (fo.AdamModule().get_state(), ValueError, "nothing to load"),
        (fo.AdamModule().save(fo.AdamModule().init({"w": PARAMS["w"]}), {"w": PARAMS["w"]}), ValueError, "'b'"),
        ({}, KeyError, "lacks the key 'name'"),
        (optax.EmptyState(), TypeError, "a mapping"),
    ],
)
def test_what_cannot_be_loaded_is_refused(saved, error, message):
    with pytest.raises(error, match=message):
        fo.AdamModule().load(saved, PARAMS)


def nnx_pair(tx):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def nnx_step(model, optimizer):
    gradients = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2))(model)
    optimizer.update(model, gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    "modules", [["momentum"], ["scaffold-client", ("adam", {"amsgrad": True})], ["gaussian-noise"]]
)
def test_a_saved_state_is_restored_into_an_nnx_optimizer_in_place_and_goes_on_bit_by_bit(modules):
    tx = fo.Optimizer(("warmup", {"base": 0.1, "warmup": 3}), regularizers=["fedprox"], modules=modules)
    model, optimizer = nnx_pair(tx)
    nnx_step(model, optimizer)
    saved = written(tx.save(optimizer.opt_state, nnx.state(model, nnx.Param)))
    twin, restored = nnx_pair(tx)
    nnx.update(twin, nnx.state(model))
    before = restored.opt_state
    tx.restore(restored, saved, twin)
    assert restored.opt_state is before
    nnx.jit(nnx_step)(model, optimizer)
    nnx.jit(nnx_step)(twin, restored)
    for a, b in zip(jax.tree.leaves(nnx.state(twin)), jax.tree.leaves(nnx.state(model)), strict=True):
        assert (a == b).all()
    assert tx.save(restored.opt_state, nnx.state(twin, nnx.Param)) == tx.save(
        optimizer.opt_state, nnx.state(model, nnx.Param)
    )


def test_what_cannot_be_restored_leaves_the_nnx_optimizer_as_it_was():
    tx = fo.Optimizer(0.1, modules=["momentum"])
    model, optimizer = nnx_pair(tx)
    nnx_step(model, optimizer)
    before = tx.save(optimizer.opt_state, nnx.state(model, nnx.Param))
    other = fo.Optimizer(0.1, modules=["adam"])
    with pytest.raises(ValueError, match=r"'optimizer adam'.*'optimizer momentum'"):
        tx.restore(optimizer, other.save(other.init(PARAMS), PARAMS), model)
    with pytest.raises(ValueError, match=r"the state has a leaf 'b'"):
        tx.restore(optimizer, tx.save(tx.init(PARAMS), PARAMS), model)
    with pytest.raises(TypeError, match=r"TrainState is no `nnx.Optimizer`: use `load`"):
        tx.restore(TrainState.create(apply_fn=None, params=PARAMS, tx=tx), before, model)
    assert tx.save(optimizer.opt_state, nnx.state(model, nnx.Param)) == before
