"""Every wrapper wherever an optimizer goes: Flax, packed states, federations, sweeps, configurations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

from .steps import PARAMS, assert_close, assert_equal, gradients, walk

NAMES = sorted(fo.list_wrappers())
# In an order that makes sense.
ALL = ["skip-non-finite", ("accumulation", {"steps": 2}), "master-weights", "ema", "lookahead", "state-dtype"]
every_wrapper = pytest.mark.parametrize("wrappers", [*([name] for name in NAMES), ALL], ids=[*NAMES, "several"])


def optimizer(wrappers, **fields):
    return fo.Optimizer(0.1, 0.01, ["ridge"], ["adam"], wrappers=wrappers, **fields)


@every_wrapper
def test_a_configuration_and_a_state_survive_json(wrappers):
    tx = optimizer(wrappers)
    twin = fo.Optimizer.from_config(json.loads(json.dumps(tx.get_config())))
    assert (twin, hash(twin)) == (tx, hash(tx))
    params, others = PARAMS, PARAMS
    for step in range(7):
        if step == 4:
            twin.set_state(json.loads(json.dumps(tx.get_state())))
            others = params
        gradient = jax.tree.map(lambda g, at=step: g[at], gradients(7))
        params = tx.apply_gradients(params, gradient)
        if step >= 4:
            others = twin.apply_gradients(others, gradient)
    assert_equal(others, params)
    assert twin.get_state() == tx.get_state()


@pytest.mark.slow
@every_wrapper
def test_eager_compiled_packed_and_kept_packed_are_one(wrappers):
    grads = gradients(5)
    expected, state = walk(optimizer(wrappers), grads)
    eager, kept = PARAMS, optimizer(wrappers).init(PARAMS)
    for step in range(5):
        updates, kept = optimizer(wrappers).update(jax.tree.map(lambda g, at=step: g[at], grads), kept, eager)
        eager = optax.apply_updates(eager, updates)
    assert_close(eager, jax.tree.map(lambda leaf: leaf[-1], expected))
    by_state, _ = walk(optimizer(wrappers, packed=True), grads)
    assert_close(by_state, expected)
    packed, each = fo.pack(PARAMS), []
    packed_state = optimizer(wrappers).init(packed)
    for step in range(5):
        gradient = fo.pack(jax.tree.map(lambda g, at=step: g[at], grads), like=packed)
        updates, packed_state = optimizer(wrappers).update(gradient, packed_state, packed)
        packed = optax.apply_updates(packed, updates)
        each.append(fo.unpack(packed))
    assert_close(each[-1], jax.tree.map(lambda leaf: leaf[-1], expected))
    read = fo.unpack(optimizer(wrappers).eval_params(packed_state, packed))
    assert_close(read, optimizer(wrappers).eval_params(state, jax.tree.map(lambda leaf: leaf[-1], expected)))


@pytest.mark.slow
@every_wrapper
def test_train_state_of_linen_takes_it_as_tx(wrappers):
    model, tx = linen.Dense(2), optimizer(wrappers)
    inputs = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
    params = model.init(jax.random.key(0), inputs)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def slope(params):
        return jax.grad(lambda p: jnp.mean((model.apply({"params": p}, inputs) - 1.0) ** 2))(params)

    step = jax.jit(lambda state: state.apply_gradients(grads=slope(state.params)))
    for _ in range(4):
        params = tx.apply_gradients(params, slope(params))
        state = step(state)
    assert_close(state.params, params)
    assert_close(tx.eval_params(state.opt_state, state.params), tx.eval_params(tx.state, params))


@pytest.mark.slow
@every_wrapper
def test_optimizer_of_nnx_takes_it_as_tx(wrappers):
    model, tx = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optimizer(wrappers)
    inputs = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
    held = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model):
        return jnp.mean((model(inputs) - 1.0) ** 2)

    @nnx.jit
    def step(model, held):
        held.update(model, nnx.grad(loss)(model))

    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for _ in range(4):
        params = tx.apply_gradients(params, nnx.to_pure_dict(nnx.grad(loss)(model)))
        step(model, held)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)
    read = tx.eval_params(held.opt_state, nnx.state(model, nnx.Param))
    assert_close(nnx.to_pure_dict(read), tx.eval_params(tx.state, params))


def clients():
    rng = np.random.default_rng(0)
    sizes = (3, 9, 4, 14, 6)
    return FederatedData.from_clients([{"x": rng.normal(size=(size, 2)).astype(np.float32)} for size in sizes])


def distance(params, batch):
    return jnp.sum((batch["x"] @ params["w"] - params["b"][:2]) ** 2, axis=-1)


def federation(client, server):
    whole = Federation(distance, client, server, batch_size=4, epochs=2, weighting="examples")
    state, history = whole.fit(whole.init(PARAMS, clients(), seed=3), clients(), 4, participants=3)
    return whole, state, history


@pytest.mark.slow
@every_wrapper
def test_a_server_of_a_federation_may_have_it(wrappers):
    server = fo.Optimizer(0.5, modules=["momentum"], wrappers=wrappers)
    _, state, history = federation(fo.Optimizer(0.1), server)
    _, plain, _ = federation(fo.Optimizer(0.1), fo.Optimizer(0.5, modules=["momentum"]))
    assert np.isfinite(history["loss"]).all()
    assert (state.params["w"] != PARAMS["w"]).all()
    if wrappers in (["ema"], ["polyak"], ["master-weights"], ["skip-non-finite"], ["stochastic-rounding"]):
        assert_close(state.params, plain.params)
    assert jnp.isfinite(server.eval_params(state.server, state.params)["w"]).all()


@pytest.mark.slow
@every_wrapper
def test_clients_in_a_federation_keep_theirs_and_their_state_survives_saving(wrappers):
    client = optimizer(wrappers)
    whole, state, history = federation(client, fo.Optimizer(1.0))
    assert np.isfinite(history["loss"]).all()
    saved = json.loads(json.dumps(whole.encode(state)))
    restored = whole.decode(saved, like=whole.init(PARAMS, clients(), seed=5))
    results = [whole.fit(each, clients(), 2, participants=3)[0].params for each in (restored, state)]
    assert_equal(*results)


@pytest.mark.slow
@every_wrapper
def test_seeds_in_one_vmapped_program_get_what_each_gets_alone(wrappers):
    tx = optimizer(wrappers)
    seeds = jnp.arange(3)

    def train(shift):
        params = jax.tree.map(lambda p: p + shift.astype(p.dtype), PARAMS)
        return walk(tx, gradients(5), params)[0]

    together = jax.vmap(train)(seeds)
    alone = [train(seed) for seed in seeds]
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))


@every_wrapper
def test_lowered_for_any_platform(wrappers):
    tx = optimizer(wrappers)
    state = tx.init(PARAMS)
    words = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        assert jax.jit(tx.update).trace(PARAMS, words, PARAMS).lower(lowering_platforms=(platform,)).as_text()
