"""What the optimizer does, in which order and from which configuration."""

import json
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo

CONFIG = {
    "lrate": ["warmup", {"base": ["cosine-annealing", {"base": 0.01, "max_lr": 0.1, "duration": 20}], "warmup": 3}],
    "w_decay": 0.001,
    "regularizers": [["fedprox", {"alpha": 0.1}]],
    "modules": [["l2-global-clipping", {"max_norm": 1.0}], ["adam", {"beta_2": 0.95}]],
}
PARAMS = {"b": jnp.array([0.5, -1.0]), "w": jnp.array([[1.0, 2.0], [-3.0, 0.5]])}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


def trained(optimizer, params, steps):
    for step in steps:
        params = optimizer.apply_gradients(params, gradients(step))
    return params


def test_order_is_regularizers_modules_rate_and_decay():
    optimizer = fo.Optimizer(
        lrate=0.5,
        w_decay=0.25,
        regularizers=[("ridge", {"alpha": 1.0}), ("lasso", {"alpha": 3.0})],
        modules=[("l2-clipping", {"max_norm": 2.0}), ("momentum", {"beta": 0.5})],
    )
    params, gradient = jnp.array([-1.0, 2.0]), jnp.array([5.0, 1.0])
    # g + 2 w + 3 sign(w) = (0, 8), clipped to (0, 2); then the velocity, (0, 2) and (0, 3).
    np.testing.assert_allclose(optimizer.run(gradient, params=params), [0.25, -(0.5 * 2 + 0.25 * 2)])
    np.testing.assert_allclose(optimizer.run(gradient, params=params), [0.25, -(0.5 * 3 + 0.25 * 2)])


def test_order_of_the_modules_is_that_of_the_list():
    clip, velocity = ("l2-clipping", {"max_norm": 1.0}), ("momentum", {"beta": 0.5})
    steps = {}
    for modules in ((clip, velocity), (velocity, clip)):
        optimizer = fo.Optimizer(lrate=1.0, modules=modules)
        steps[modules[0][0]] = [float(optimizer.run(jnp.array([3.0]))[0]) for _ in range(2)]
    assert steps == {"l2-clipping": [-1.0, -1.5], "momentum": [-1.0, -1.0]}


@pytest.mark.parametrize("w_decay", [0.5, ("exponential-decay", {"base": 0.5, "rate": 0.5}), lambda step: 0.5])
def test_weight_decay_is_not_multiplied_by_the_rate(w_decay):
    optimizer = fo.Optimizer(lrate=0.25, w_decay=w_decay)
    updates = optimizer.compute_updates_from_gradients({"w": jnp.array([8.0])}, {"w": jnp.array([1.0])})
    np.testing.assert_allclose(updates["w"], [-(0.25 * 1 + 0.5 * 8)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"w_decay": 0.1}, "w_decay=0.1 needs the parameters"),
        ({"w_decay": ("linear-decay", {"base": 0.1, "rate": 0.1})}, "needs the parameters"),
        ({"regularizers": ["ridge"]}, "RidgeRegularizer needs the parameters"),
    ],
)
def test_parameters_are_asked_for_where_they_are_needed(config, message):
    optimizer = fo.Optimizer.from_config({"lrate": 0.1} | config)
    with pytest.raises(ValueError, match=message):
        optimizer.update(PARAMS, optimizer.init(PARAMS))
    assert jax.tree.structure(optimizer.run(PARAMS, params=PARAMS)) == jax.tree.structure(PARAMS)


def test_parameters_may_be_left_out_where_nothing_needs_them():
    optimizer = fo.Optimizer(lrate=2.0, modules=["momentum"])
    assert_equal(optimizer.update(PARAMS, optimizer.init(PARAMS))[0], jax.tree.map(lambda p: -2 * p, PARAMS))


def test_names_pairs_and_instances_build_equal_optimizers():
    by_name = fo.Optimizer(0.1, modules=["adam", "momentum"], regularizers=["lasso"])
    by_pair = fo.Optimizer(0.1, modules=[("adam", {}), ["momentum", {"beta": 0.9}]], regularizers=[("lasso", {})])
    by_instance = fo.Optimizer(
        0.1, modules=(fo.AdamModule(), fo.MomentumModule()), regularizers=(fo.LassoRegularizer(),)
    )
    assert by_name == by_pair == by_instance
    assert len({by_name, by_pair, by_instance}) == 1


def test_instance_whose_facade_has_run_starts_anew_in_an_optimizer():
    module = fo.MomentumModule()
    module.run(PARAMS)
    optimizer = fo.Optimizer(1.0, modules=[module])
    assert_equal(optimizer.run(PARAMS), jax.tree.map(jnp.negative, PARAMS))


def test_configuration_goes_through_json():
    optimizer = fo.Optimizer.from_config(CONFIG)
    written = json.loads(json.dumps(optimizer.get_config(), allow_nan=False))
    assert fo.Optimizer.from_config(written) == optimizer
    assert written["modules"][1] == ["adam", fo.AdamModule(beta_2=0.95).get_config()]


def test_configuration_is_read_from_toml():
    text = """
    lrate = ["warmup", {base = ["cosine-annealing", {base = 0.01, max_lr = 0.1, duration = 20}], warmup = 3}]
    w_decay = 0.001
    regularizers = [["fedprox", {alpha = 0.1}]]
    modules = [["l2-global-clipping", {max_norm = 1}], ["adam", {beta_2 = 0.95}]]
    """
    assert fo.Optimizer.from_config(tomllib.loads(text)) == fo.Optimizer.from_config(CONFIG)


def test_function_of_the_step_is_a_rate_that_no_configuration_can_hold():
    optimizer = fo.Optimizer(lrate=optax.linear_schedule(1.0, 0.0, 4))
    assert [float(optimizer.run(jnp.ones(()))) for _ in range(3)] == [-1.0, -0.75, -0.5]
    with pytest.raises(TypeError, match=r"Optimizer: lrate=.* cannot be written in a configuration"):
        optimizer.get_config()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, KeyError, "Optimizer needs a value for 'lrate'"),
        ({"lrate": 0.1, "module": []}, KeyError, "no field 'module': did you mean 'modules'"),
        ({"lrate": 0.1, "modules": ["adma"]}, KeyError, "no module is named 'adma': did you mean 'adam'"),
        ({"lrate": 0.1, "modules": ["ridge"]}, KeyError, "no module is named 'ridge'"),
        ({"lrate": 0.1, "modules": [("adam", {"beta": 0.9})]}, KeyError, "AdamModule has no field 'beta'"),
        ({"lrate": 0.1, "modules": [("adam", {"beta_1": 1.5})]}, ValueError, r"AdamModule: beta_1=1.5 .*\[0, 1\)"),
        ({"lrate": 0.1, "modules": "adam"}, TypeError, "Optimizer: modules='adam'"),
        ({"lrate": 0.1, "modules": [fo.RidgeRegularizer()]}, TypeError, "Optimizer: modules="),
        ({"lrate": -0.1}, ValueError, "Optimizer: lrate=-0.1"),
        ({"lrate": float("nan")}, ValueError, "Optimizer: lrate=nan"),
        ({"lrate": "0.1"}, (KeyError, TypeError), "0.1"),
        ({"lrate": 0.1, "w_decay": None}, TypeError, "Optimizer: w_decay=None"),
        ({"lrate": 0.1, "modules": ["scaffold-client"] * 2}, ValueError, "named 'scaffold'"),
    ],
)
def test_bad_configuration_is_refused_by_name(config, error, message):
    with pytest.raises(error, match=message):
        fo.Optimizer.from_config(config)


def test_two_bricks_of_one_name_have_a_state_each():
    optimizer = fo.Optimizer(1.0, modules=[("momentum", {"beta": 0.5}), "adam", ("momentum", {"beta": 0.0})])
    state = optimizer.init(PARAMS)
    assert list(state.modules) == ["momentum", "adam", "momentum-2"]
    optimizer.run(PARAMS)
    variables = optimizer.get_state()["variables"]
    assert {"modules/momentum/velocity", "modules/momentum-2/velocity"} < variables.keys()


def test_state_of_another_optimizer_is_refused_and_nothing_changes():
    adam, yogi = fo.Optimizer(0.1, modules=["adam"]), fo.Optimizer(0.1, modules=["yogi"])
    adam.run(PARAMS)
    yogi.run(PARAMS)
    before = yogi.get_state()
    with pytest.raises(ValueError, match=r"optimizer adam.*optimizer yogi"):
        yogi.set_state(adam.get_state())
    assert yogi.get_state() == before


def test_saved_in_mid_round_it_goes_on_bit_by_bit():
    optimizer = fo.Optimizer.from_config(CONFIG)
    optimizer.start_round()
    params = trained(optimizer, PARAMS, range(4))
    optimizer.start_round()
    params = trained(optimizer, params, range(4, 6))
    config, state = json.loads(json.dumps([optimizer.get_config(), optimizer.get_state()], allow_nan=False))
    copy = fo.Optimizer.from_config(config)
    copy.set_state(state)
    assert copy.get_state() == state
    uninterrupted, resumed = trained(optimizer, params, range(6, 9)), trained(copy, params, range(6, 9))
    assert_equal(resumed, uninterrupted)
    optimizer.start_round()
    copy.start_round()
    assert_equal(trained(copy, resumed, range(9, 11)), trained(optimizer, uninterrupted, range(9, 11)))
    assert copy.get_state() == optimizer.get_state()


def test_rounds_begun_before_the_first_step_are_counted_also_across_a_save():
    config = {"lrate": ("exponential-decay", {"base": 1.0, "rate": 0.5, "step_level": False})}
    optimizer, copy = fo.Optimizer.from_config(config), fo.Optimizer.from_config(config)
    optimizer.start_round()
    optimizer.start_round()
    copy.set_state(json.loads(json.dumps(optimizer.get_state())))
    copy.start_round()
    assert float(optimizer.run(jnp.ones(()))) == -0.5
    assert float(copy.run(jnp.ones(()))) == -0.25


@pytest.mark.parametrize("donate", [False, True])
def test_apply_gradients_adds_the_updates(donate):
    one, other = fo.Optimizer.from_config(CONFIG), fo.Optimizer.from_config(CONFIG)
    given = jax.tree.map(jnp.copy, PARAMS)
    updates = one.compute_updates_from_gradients(PARAMS, gradients(0))
    mine = gradients(0)
    assert_close(other.apply_gradients(given, mine, donate=donate), optax.apply_updates(PARAMS, updates))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(mine))
    assert {leaf.is_deleted() for leaf in jax.tree.leaves(given)} == {donate}


def test_donated_steps_give_the_same_numbers():
    kept, donated = fo.Optimizer.from_config(CONFIG), fo.Optimizer.from_config(CONFIG)
    params = jax.tree.map(jnp.copy, PARAMS)
    for step in range(4):
        params = donated.apply_gradients(params, gradients(step), donate=True)
    assert_equal(params, trained(kept, PARAMS, range(4)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"w": PARAMS["w"]},
        {**PARAMS, "b": jnp.zeros(3)},
        {**PARAMS, "b": jnp.zeros(2, jnp.float16)},
        {**PARAMS, "c": jnp.zeros(2)},
    ],
)
def test_gradients_of_another_shape_are_refused_and_nothing_changes(wrong):
    optimizer = fo.Optimizer.from_config(CONFIG)
    params = trained(optimizer, PARAMS, range(2))
    before = optimizer.get_state()
    with pytest.raises(ValueError, match=r"'[bc]'"):
        optimizer.apply_gradients(params, wrong, donate=True)
    assert optimizer.get_state() == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_facade_under_a_trace_says_what_to_use_and_stays_usable():
    optimizer = fo.Optimizer.from_config(CONFIG)
    with pytest.raises(RuntimeError, match=r"use the pure `update\(updates, state, params\)`"):
        jax.jit(optimizer.apply_gradients)(PARAMS, gradients(0))
    fresh = fo.Optimizer.from_config(CONFIG)
    assert_equal(trained(optimizer, PARAMS, [0]), trained(fresh, PARAMS, [0]))


def test_message_for_nobody_is_a_key_error():
    optimizer = fo.Optimizer(0.1, modules=["scaffold-client"])
    optimizer.run(PARAMS)
    before = optimizer.get_state()
    with pytest.raises(KeyError, match=r"no module .* named 'scafold': did you mean 'scaffold'"):
        optimizer.process_aux_var({"scafold": {}})
    assert optimizer.get_state() == before
    assert fo.Optimizer(0.1, modules=["adam"]).collect_aux_var() == {}


def test_extra_arguments_reach_the_bricks():
    optimizer = fo.Optimizer(1.0, modules=[("optax", {"transform": "contrib.reduce_on_plateau"})])
    assert_close(optimizer.run(PARAMS, params=PARAMS, value=jnp.ones(())), jax.tree.map(jnp.negative, PARAMS))
    chained = optax.chain(optax.identity(), optimizer.to_optax())
    updates, _ = chained.update(PARAMS, chained.init(PARAMS), PARAMS, value=jnp.ones(()))
    assert_close(updates, jax.tree.map(jnp.negative, PARAMS))
