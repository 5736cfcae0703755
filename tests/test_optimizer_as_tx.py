"""The optimizer as `tx`: in Flax's two optimizers, and inside of optax's combinators."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import functional_optimodules as fo

PARAMS = {"b": jnp.array([0.5, -1.0]), "w": jnp.array([[1.0, 2.0], [-3.0, 0.5]])}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


def test_train_state_of_linen_takes_it_as_tx():
    model = linen.Dense(2)
    inputs = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
    variables = model.init(jax.random.key(0), inputs)["params"]
    optimizer = fo.Optimizer(0.1, w_decay=0.01, modules=["adam"])
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optimizer)

    def loss(params):
        return jnp.mean((model.apply({"params": params}, inputs) - 1.0) ** 2)

    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    params = variables
    for _ in range(3):
        params = optimizer.apply_gradients(params, jax.grad(loss)(params))
        state = step(state)
    assert_close(state.params, params)
    again = TrainState.create(
        apply_fn=model.apply, params=variables, tx=fo.Optimizer(0.1, w_decay=0.01, modules=["adam"])
    )
    # Flax itself costs a second entry: its count of steps starts as a Python number.
    known = step._cache_size()
    step(again)
    assert step._cache_size() == known


def test_optimizer_of_nnx_takes_it_as_tx():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    inputs = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
    tx = nnx.Optimizer(model, fo.Optimizer(0.1, w_decay=0.01, modules=["adam"]), wrt=nnx.Param)

    def loss(model):
        return jnp.mean((model(inputs) - 1.0) ** 2)

    @nnx.jit
    def step(model, tx):
        tx.update(model, nnx.grad(loss)(model))

    by_path = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    facade = fo.Optimizer(0.1, w_decay=0.01, modules=["adam"])
    for _ in range(3):
        slope = nnx.to_pure_dict(nnx.grad(loss)(model))
        by_path = facade.apply_gradients(by_path, slope)
        step(model, tx)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), by_path)


ADAM = {"lrate": 0.1, "w_decay": 0.01, "modules": [("adam", {"eps": 1e-3})]}


def run_transform(transform, steps=4):
    def step(carry, gradient):
        params, state = carry
        updates, state = transform.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(gradients, range(steps)))
    return jax.jit(lambda: jax.lax.scan(step, (PARAMS, transform.init(PARAMS)), stacked)[0][0])()


def reference():
    """Return optax's own Adam with a decay of its own, to put where the optimizer was."""
    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-3),
        optax.scale(0.1),
        optax.add_decayed_weights(0.01),
        optax.scale(-1.0),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.masked(tx, {"b": False, "w": True}),
        lambda tx: optax.partition({"mine": tx, "sgd": optax.sgd(0.3)}, {"b": "sgd", "w": "mine"}),
        lambda tx: optax.apply_if_finite(tx, 2),
        lambda tx: optax.named_chain(("clip", optax.clip(0.5)), ("tx", tx)),
    ],
    ids=["bare", "chain", "masked", "partition", "apply_if_finite", "named_chain"],
)
def test_inside_of_optax_it_gives_what_optax_would(place):
    assert_close(run_transform(place(fo.Optimizer.from_config(ADAM))), run_transform(place(reference())))


def test_multi_steps_gives_it_the_mean_of_gradients():
    mine = optax.MultiSteps(fo.Optimizer.from_config(ADAM), every_k_schedule=2)
    assert_close(run_transform(mine), run_transform(optax.MultiSteps(reference(), every_k_schedule=2)))


def test_hyperparameters_may_be_injected_and_changed_between_steps():
    def build(lrate, modules):
        return fo.Optimizer(lrate=lrate, modules=modules)

    tx = optax.inject_hyperparams(build, static_args="modules")(lrate=0.5, modules=(fo.MomentumModule(beta=0.5),))
    state = tx.init(PARAMS)
    step = jax.jit(tx.update)
    updates, state = step(PARAMS, state, PARAMS)
    assert_close(updates, jax.tree.map(lambda p: -0.5 * p, PARAMS))
    state.hyperparams["lrate"] = jnp.full_like(state.hyperparams["lrate"], 0.25)
    updates, state = step(PARAMS, state, PARAMS)
    assert_close(updates, jax.tree.map(lambda p: -0.25 * 1.5 * p, PARAMS))
    assert step._cache_size() == 1


def test_apply_if_finite_keeps_poison_out_of_the_state():
    tx = optax.apply_if_finite(fo.Optimizer(1.0, modules=["momentum"]), max_consecutive_errors=3)
    state = tx.init(PARAMS)
    poisoned, state = tx.update(jax.tree.map(lambda p: p * jnp.nan, PARAMS), state, PARAMS)
    assert_equal(poisoned, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(tx.update(PARAMS, state, PARAMS)[0], jax.tree.map(jnp.negative, PARAMS))


def test_one_trace_serves_equal_optimizers():
    step = jax.jit(lambda optimizer, state: optimizer.update(PARAMS, state, PARAMS), static_argnums=0)
    for _ in range(3):
        optimizer = fo.Optimizer.from_config(ADAM)
        step(optimizer, optimizer.init(PARAMS))
    assert step._cache_size() == 1
