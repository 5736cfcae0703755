"""An optimizer that declearn ran and saved goes on here with the numbers that it would have had."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo

pytest.importorskip("declearn", reason="the reference has no release for this Python", exc_type=ImportError)

from declearn import optimizer as reference
from declearn.model.sklearn import NumpyVector
from declearn.utils.serialize import json_deserialize, json_serialize

from functional_optimodules.integrations.declearn import from_declearn_config, from_declearn_state

from .model import Model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def double():
    """declearn computes in float64 on NumPy's arrays."""
    with jax.enable_x64(True):
        yield


def normal(seed):
    rng = np.random.default_rng(seed)
    return NumpyVector({"w": rng.normal(size=(3, 2)), "b": rng.normal(size=(4,))})


def train(optimizer, model, seed, steps):
    for step in range(steps):
        optimizer.apply_gradients(model, normal((seed, step)) + 0.3 * model.weights)


def saved(optimizer):
    """Return what is on a disk of it: a configuration and a state, as JSON text."""
    return json.dumps(optimizer.get_config()), json_serialize(optimizer.get_state())


def taken_over(optimizer, weights):
    """Return an optimizer of ours that goes on, and the weights."""
    config, state = saved(optimizer)
    mine = from_declearn_config(json.loads(config))
    mine.set_state(from_declearn_state(state, mine, weights))
    return mine, {name: jnp.asarray(values) for name, values in weights.coefs.items()}


def go_on(mine, weights, seed, steps):
    for step in range(steps):
        gradients = normal((seed, step)).coefs
        weights = mine.apply_gradients(
            weights, {name: jnp.asarray(gradients[name] + 0.3 * np.asarray(w)) for name, w in weights.items()}
        )
    return weights


def assert_equal(weights, vector):
    assert weights.keys() == vector.coefs.keys()
    for name, values in vector.coefs.items():
        np.testing.assert_allclose(weights[name], values, rtol=1e-9, atol=1e-12)


OPTIMIZERS = {
    "adagrad": {"modules": ["adagrad"]},
    "adam": {"modules": ["adam"]},
    "adam-amsgrad": {"modules": [("adam", {"amsgrad": True, "beta_2": 0.7})]},
    "ewma": {"modules": [("ewma", {"beta": 0.7})]},
    "momentum": {"modules": [("momentum", {"nesterov": True})]},
    "rmsprop": {"modules": ["rmsprop"], "regularizers": ["lasso", ("ridge", {"alpha": 0.2})]},
    "yogi-amsgrad": {"modules": [("yogi", {"amsgrad": True, "beta_2": 0.7})]},
    "yogi-momentum": {"modules": ["yogi-momentum"]},
    "chain": {"w_decay": 0.01, "modules": [("l2-clipping", {"max_norm": 2.0}), "momentum", "ewma", "adam"]},
    "noise": {"modules": [("gaussian-noise", {"std": 0.0, "safe_mode": False}), "l2-global-clipping", "momentum"]},
    "exponential": {"lrate": ("exponential-decay", {"base": 0.3, "rate": 0.8}), "modules": ["momentum"]},
    "decaying-decay": {"w_decay": ("linear-decay", {"base": 0.3, "rate": 0.05})},
    "cosine": {"lrate": ("cosine-annealing", {"base": 0.01, "max_lr": 0.3, "duration": 9})},
    "restarts": {"lrate": ("cosine-annealing-warm-restarts", {"base": 0.01, "max_lr": 0.3, "period": 4})},
    "cyclic": {"lrate": ("cyclic-triangular", {"base": 0.01, "max_lr": 0.3, "stepsize": 3})},
    "warm-up": {"lrate": ("warmup", {"base": 0.3, "warmup": 8})},
    "short-warm-up": {"lrate": ("warmup", {"base": ("exponential-decay", {"base": 0.3, "rate": 0.8}), "warmup": 3})},
}


@pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_goes_on_over_the_next_rounds(config):
    optimizer, model = reference.Optimizer(**{"lrate": 0.1, **config}), Model(normal(99))
    for round_ in range(2):
        optimizer.start_round()
        train(optimizer, model, round_, 3)
    mine, weights = taken_over(optimizer, model.weights)
    for round_ in range(2, 4):
        optimizer.start_round()
        mine.start_round()
        train(optimizer, model, round_, 3)
        weights = go_on(mine, weights, round_, 3)
        assert_equal(weights, model.weights)


ROUND_RATES = {
    "exponential": ("exponential-decay", {"base": 0.3, "rate": 0.5, "step_level": False}),
    "warm-up": (
        "warmup",
        {"base": ("exponential-decay", {"base": 0.3, "rate": 0.5, "step_level": False}), "warmup": 4},
    ),
    "warm-up-rounds": ("warmup-rounds", {"base": 0.3, "warmup": 4}),
    "short-warm-up-rounds": ("warmup-rounds", {"base": ("inverse-scaling", {"base": 0.3, "rate": 0.5}), "warmup": 1}),
}


@pytest.mark.parametrize("specs", ROUND_RATES.values(), ids=ROUND_RATES)
def test_a_rate_that_follows_rounds_goes_on_in_mid_round(specs):
    """At the first step of a round declearn has the rate of the last one."""
    optimizer, model = reference.Optimizer(lrate=specs), Model(normal(99))
    for round_ in range(3):
        optimizer.start_round()
        train(optimizer, model, round_, 3)
    mine, weights = taken_over(optimizer, model.weights)
    train(optimizer, model, 9, 2)
    assert_equal(go_on(mine, weights, 9, 2), model.weights)


def test_scaffold_goes_on_on_both_sides_with_the_clients_that_the_server_knew():
    others = [reference.Optimizer(0.1, modules=["scaffold-client"]) for _ in range(2)]
    server = reference.Optimizer(1.0, modules=["scaffold-server"])
    models = [Model(normal(99)) for _ in others]
    for round_ in range(2):
        for index, (other, model) in enumerate(zip(others, models, strict=True)):
            other.process_aux_var(server.collect_aux_var())
            other.start_round()
            train(other, model, round_ + 10 * index, 2 + index)
        server.process_aux_var({"scaffold": sum(other.collect_aux_var()["scaffold"] for other in others)})
    taken = [taken_over(other, model.weights) for other, model in zip(others, models, strict=True)]
    my_server, _ = taken_over(server, models[0].weights)
    names = [other.modules[0].uuid for other in others]
    for round_ in range(2, 4):
        broadcast, messages, sent = my_server.collect_aux_var(), {}, server.collect_aux_var()
        for index, (name, other, model) in enumerate(zip(names, others, models, strict=True)):
            mine, weights = taken[index]
            mine.process_aux_var(broadcast)
            mine.start_round()
            other.process_aux_var(sent)
            other.start_round()
            train(other, model, round_ + 10 * index, 2 + index)
            weights = go_on(mine, weights, round_ + 10 * index, 2 + index)
            assert_equal(weights, model.weights)
            taken[index] = mine, weights
            messages[name] = mine.collect_aux_var()
        my_server.process_aux_var(messages)
        server.process_aux_var({"scaffold": sum(other.collect_aux_var()["scaffold"] for other in others)})
    total = my_server.state.modules["scaffold-server"]
    assert total.clients == 2
    assert_equal(total.total, server.modules[0].s_state)


def test_a_state_is_for_the_pure_methods_too():
    optimizer, model = reference.Optimizer(0.1, modules=["adam"]), Model(normal(99))
    train(optimizer, model, 0, 3)
    config, state = saved(optimizer)
    mine = from_declearn_config(json.loads(config))
    params = {name: jnp.asarray(values) for name, values in model.weights.coefs.items()}
    loaded = mine.load(from_declearn_state(json_deserialize(state), mine, params), params)
    gradients = normal(5)
    updates, _ = mine.update({name: jnp.asarray(values) for name, values in gradients.coefs.items()}, loaded, params)
    assert_equal(updates, optimizer.compute_updates_from_gradients(model, gradients))


def test_before_the_first_step_there_is_a_new_state():
    optimizer, weights = reference.Optimizer(0.1, modules=["scaffold-client", ("adam", {"amsgrad": True})]), normal(99)
    mine, params = taken_over(optimizer, weights)
    new = fo.Optimizer(0.1, modules=["scaffold-client", ("adam", {"amsgrad": True})])
    new.setup(params)
    assert mine.get_state() == new.get_state()


def test_bricks_that_ran_in_declearn_go_on_without_it():
    optimizer, model = reference.Optimizer(0.1, modules=["fo-fedadam", "fo-scaffold-server"]), Model(normal(99))
    train(optimizer, model, 0, 3)
    mine, weights = taken_over(optimizer, model.weights)
    assert [module.name for module in mine.modules] == ["fedadam", "scaffold-server"]
    train(optimizer, model, 1, 3)
    assert_equal(go_on(mine, weights, 1, 3), model.weights)


def test_a_state_of_something_else_is_refused():
    optimizer, model = reference.Optimizer(0.1, modules=["momentum"]), Model(normal(99))
    train(optimizer, model, 0, 1)
    state = optimizer.get_state()
    with pytest.raises(ValueError, match=r"of the modules \['momentum'\]: expected \['adam'\]"):
        from_declearn_state(state, fo.Optimizer(0.1, modules=["adam"]), model.weights)
    mine = fo.Optimizer(0.1, modules=["momentum"])
    with pytest.raises(ValueError, match=r"of the parameters \['b', 'w'\]: expected \['v'\]"):
        from_declearn_state(state, mine, {"v": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"the shape \(4,\) at 'b': expected \(5,\)"):
        from_declearn_state(state, mine, {"w": jnp.zeros((3, 2)), "b": jnp.zeros(5)})
    nested = ("warmup", {"base": ("warmup", {"base": 0.1, "warmup": 2}), "warmup": 2})
    with pytest.raises(TypeError, match="a warm-up of a warm-up"):
        from_declearn_state(reference.Optimizer(nested).get_state(), fo.Optimizer(nested), model.weights)
    with pytest.raises(KeyError, match="no module is named 'adan'"):
        from_declearn_config({"lrate": 0.1, "modules": [["adan", {}]]})
