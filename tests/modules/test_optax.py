"""Optax's transformations by name: their signs, arguments, states and errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import functional_optimodules as fo

TARGET = {"b": jnp.array([0.3, -0.7]), "w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}


def loss(params):
    return sum(jnp.sum((p - t) ** 2) for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(TARGET), strict=True))


def equal(left, right):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), left, right)))


FACTORIES = [
    ("adabelief", {}),
    ("adafactor", {}),
    ("adam", {"learning_rate": 0.1}),
    ("adamw", {"b2": 0.99, "mu_dtype": "bfloat16"}),
    ("add_noise", {"eta": 0.01, "gamma": 0.5, "key": 1}),
    ("clip", {"max_delta": 0.5}),
    ("contrib.cocob", {}),
    ("contrib.muon", {}),
    ("contrib.prodigy", {}),
    ("contrib.scale_by_cocob", {}),
    ("contrib.scale_by_madgrad", {}),
    ("contrib.schedule_free_adamw", {}),
    ("ema", {"decay": 0.5}),
    ("identity", {}),
    ("lamb", {}),
    ("lion", {"b1": 0.9}),
    ("rprop", {}),
    ("scale_by_adam", {"eps": 1e-6}),
    ("scale_by_learning_rate", {"learning_rate": 0.5}),
    ("scale_by_learning_rate", {"learning_rate": 0.5, "flip_sign": False}),
    ("scale_by_rprop", {}),
    ("scale_by_sm3", {}),
    ("sgd", {"momentum": 0.5}),
    ("sm3", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), FACTORIES)
def test_every_transformation_points_uphill_and_resumes_in_mid_run(name, config):
    module = fo.OptaxModule(name, config)
    params = jax.tree.map(lambda t: jnp.full_like(t, 0.1), TARGET)
    slope = 0.0
    for _ in range(3):
        gradients = jax.grad(loss)(params)
        output = module.run(gradients, params)
        slope += sum(jnp.vdot(o, g) for o, g in zip(jax.tree.leaves(output), jax.tree.leaves(gradients), strict=True))
        params = jax.tree.map(lambda p, o: p - 1e-3 * o, params, output)
    assert slope > 0
    saved, written = json.loads(json.dumps([module.get_state(), module.get_config()], allow_nan=False))
    copy = fo.OptaxModule.from_config(written)
    copy.set_state(saved)
    assert copy == module
    assert copy.get_state() == saved
    assert equal(copy.run(gradients, params), module.run(gradients, params))


@pytest.mark.parametrize(("name", "config"), [("polyak_sgd", {}), ("scale_by_polyak", {}), ("contrib.momo", {})])
def test_transformations_that_take_the_loss_point_uphill(name, config):
    module = fo.OptaxModule(name, config)
    params = jax.tree.map(jnp.zeros_like, TARGET)
    value, gradients = jax.value_and_grad(loss)(params)
    output = module.run(gradients, params, value=value)
    assert loss(jax.tree.map(lambda p, o: p - 0.1 * o, params, output)) < value


@pytest.mark.slow
def test_line_search_takes_its_function_through_the_pure_update():
    module = fo.OptaxModule("lbfgs")
    params = jax.tree.map(jnp.zeros_like, TARGET)
    value, gradients = jax.value_and_grad(loss)(params)
    output, _ = module.update(gradients, module.init(params), params, value=value, grad=gradients, value_fn=loss)
    assert loss(jax.tree.map(jnp.subtract, params, output)) < value


@pytest.mark.parametrize("rate", [None, 0.25])
def test_learning_rate_is_1_unless_told_otherwise(rate):
    module = fo.OptaxModule("sgd", {} if rate is None else {"learning_rate": rate})
    np.testing.assert_array_equal(module.run(jnp.array([2.0, -4.0])), np.array([2.0, -4.0]) * (rate or 1))


@pytest.mark.parametrize(
    ("name", "config", "transform"),
    [
        ("scale_by_adam", {"b2": 0.9, "nesterov": True}, lambda: optax.scale_by_adam(b2=0.9, nesterov=True)),
        ("lion", {"b1": 0.9}, lambda: optax.chain(optax.lion(1.0, b1=0.9), optax.scale(-1.0))),
        ("trace", {"decay": 0.5}, lambda: optax.trace(0.5)),
    ],
)
def test_numbers_are_those_of_optax(name, config, transform):
    module, theirs = fo.OptaxModule(name, config), transform()
    state = theirs.init(TARGET)
    for scale in (1.0, -0.5, 3.0):
        gradients = jax.tree.map(lambda t, scale=scale: scale * t, TARGET)
        expected, state = theirs.update(gradients, state, TARGET)
        for mine, leaf in zip(jax.tree.leaves(module.run(gradients, TARGET)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, leaf, rtol=1e-6)


def test_equal_arguments_in_another_order_make_an_equal_brick():
    left, right = fo.OptaxModule("lion", {"b1": 0.8, "b2": 0.9}), fo.OptaxModule("lion", {"b2": 0.9, "b1": 0.8})
    assert left == right
    assert hash(left) == hash(right)
    assert left != fo.OptaxModule("lion", {"b1": 0.8})


def test_state_goes_into_another_container_where_several_arrays_stand_for_a_parameter():
    module = fo.OptaxModule("sm3")
    leaves = [TARGET["b"], TARGET["w"]]
    module.run(leaves)
    saved = json.loads(json.dumps(module.get_state()))
    copy = fo.OptaxModule("sm3")
    copy.set_state(saved)
    mine, theirs = module.run(leaves), copy.run(tuple(leaves))
    assert isinstance(theirs, tuple)
    assert equal(list(theirs), mine)


def test_mutilated_arrays_that_stand_for_one_parameter_are_refused_by_name():
    module = fo.OptaxModule("scale_by_sm3")
    module.run(TARGET)
    saved = module.get_state()
    part = next(name for name, value in saved["variables"].items() if isinstance(value.get("w"), dict))
    del saved["variables"][part]["w"][next(iter(saved["variables"][part]["w"]))]
    before = module.get_state()
    with pytest.raises(ValueError, match="should hold the arrays"):
        module.set_state(saved)
    assert module.get_state() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_gradients_come_back_in_their_dtype(dtype):
    gradients = jax.tree.map(lambda t: t.astype(dtype), TARGET)
    module = fo.OptaxModule("adamw")
    output = module.run(gradients, gradients)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(output)} == {dtype}
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(output))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("lyon", {}, "no public 'lyon': did you mean .*'lion'"),
        ("contrib.prodigi", {}, "did you mean .*'prodigy'"),
        ("_src.alias.sgd", {}, "no public '_src.alias.sgd'"),
        ("", {}, "no public ''"),
        ("lion", {"b3": 0.9}, r"optax.lion takes no argument 'b3': did you mean 'b\d'"),
        ("clip", {}, "optax.clip refuses the arguments {}: .*max_delta"),
        ("masked", {}, "optax.masked refuses the arguments {}: .*inner"),
        ("apply_updates", {}, "optax.apply_updates makes no gradient transformation"),
        ("l2_loss", {}, "optax.l2_loss makes no gradient transformation"),
        ("l2_loss", {"predictions": 1.0}, "optax.l2_loss makes no gradient transformation"),
        ("cosine_decay_schedule", {"init_value": 1.0, "decay_steps": 3}, "makes no gradient transformation"),
        ("EmptyState", {}, "optax.EmptyState makes no gradient transformation"),
        ("MultiSteps", {}, "optax.MultiSteps refuses the arguments {}: .*'opt'"),
        ("GradientTransformation", {}, "optax.GradientTransformation makes no gradient transformation"),
        ("Schedule", {}, "optax.Schedule makes no gradient transformation"),
        ("contrib", {}, "optax.contrib makes no gradient transformation"),
    ],
)
def test_what_cannot_be_built_is_a_value_error_that_says_why(name, config, message):
    with pytest.raises(ValueError, match=message):
        fo.OptaxModule(name, config)


def test_arguments_that_are_no_json_values_are_a_type_error():
    with pytest.raises(TypeError, match=r"OptaxModule: config=.* not made of JSON values"):
        fo.OptaxModule("sgd", {"learning_rate": optax.constant_schedule(1.0)})


def test_state_of_another_transformation_is_refused_though_it_has_the_same_variables():
    adam, yogi = fo.OptaxModule("scale_by_adam"), fo.OptaxModule("scale_by_yogi")
    adam.run(TARGET)
    assert adam.get_state()["variables"].keys() == _after_a_run(yogi)["variables"].keys()
    before = yogi.get_state()
    with pytest.raises(ValueError, match=r"scale_by_adam.*scale_by_yogi"):
        yogi.set_state(adam.get_state())
    assert yogi.get_state() == before


def test_optimizer_tells_states_of_different_transformations_apart():
    adam, yogi = (
        fo.Optimizer(0.1, modules=[("optax", {"transform": f"scale_by_{name}"})]) for name in ("adam", "yogi")
    )
    adam.run(TARGET)
    with pytest.raises(ValueError, match=r"scale_by_adam.*scale_by_yogi"):
        yogi.set_state(adam.get_state())


def _after_a_run(module):
    module.run(TARGET)
    return module.get_state()


@pytest.mark.parametrize(
    "name", ["tree_utils.typing.contextlib.os.popen", "experimental.aggregating.jax.jit", "jax.jit"]
)
def test_a_configuration_reaches_nothing_that_optax_only_imports(name, tmp_path):
    with pytest.raises(ValueError, match="optax"):
        fo.OptiModule.from_specs("optax", {"transform": name, "config": {"cmd": f"touch {tmp_path / 'made'}"}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nadam", "nadamw"])
def test_a_factory_that_optax_made_by_partial_application_is_one(name):
    module = fo.OptaxModule(name, {"b1": 0.8})
    transform = getattr(optax, name)(1.0, b1=0.8)
    expected, _ = transform.update(TARGET, transform.init(TARGET), TARGET)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-6), module.run(TARGET, TARGET), expected)


MASK = {"a": True, "b": {"c": False, "d": True}, "e": False, "f": False}
MASKED = {
    "a": jnp.ones(3),
    "b": {"c": jnp.ones(2), "d": jnp.ones(2)},
    "e": jnp.ones(1),
    "f": [jnp.ones(1), jnp.ones(2)],
}
DECAYED = {"a": 0.5, "b": {"c": 0.0, "d": 0.5}, "e": 0.0, "f": 0.0}


def masked_containers():
    decayed = jax.tree.map(jnp.full_like, MASKED, {**DECAYED, "f": [0.0, 0.0]})
    variables = lambda tree: nnx.State(jax.tree.map(nnx.Param, {**tree, "f": dict(enumerate(tree["f"]))}))  # noqa: E731
    return {"dict": (MASKED, decayed), "nnx.State": (variables(MASKED), variables(decayed))}


@pytest.mark.parametrize("container", masked_containers())
def test_a_mask_by_key_holds_in_pure_code_in_the_facade_and_in_saved_states(container):
    params, expected = masked_containers()[container]
    module = fo.OptaxModule("add_decayed_weights", {"weight_decay": 0.5, "mask": MASK})
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer, restored = fo.Optimizer(1.0, modules=[module]), fo.Optimizer(1.0, modules=[module])
    assert equal(module.update(zeros, module.init(params), params)[0], expected)
    assert equal(module.run(zeros, params), expected)
    assert equal(optimizer.compute_updates_from_gradients(params, zeros), jax.tree.map(jnp.negative, expected))
    restored.set_state(json.loads(json.dumps(optimizer.get_state())))
    assert equal(restored.compute_updates_from_gradients(params, zeros), jax.tree.map(jnp.negative, expected))
    assert module.load(module.save(module.init(params), params), params) == module.init(params)


def test_a_state_with_masked_parts_is_saved_and_goes_on():
    module = fo.OptaxModule("adamw", {"mask": MASK, "weight_decay": 0.5})
    for _ in range(2):
        module.run(MASKED, MASKED)
    restored = fo.OptiModule.from_specs("optax", module.get_config())
    restored.set_state(json.loads(json.dumps(module.get_state())))
    assert equal(restored.run(MASKED, MASKED), module.run(MASKED, MASKED))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": True}, "optax.add_decayed_weights at 'mask' says nothing of the parameter 'b/c': it names \\['a'\\]"),
        ({**MASK, "z": True}, "names 'z', and there are the parameters"),
        ({**MASK, "b": 1}, "should be a boolean at 'b', not 1"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask, message):
    with pytest.raises(ValueError, match=message):
        fo.OptaxModule("add_decayed_weights", {"mask": mask}).run(MASKED, MASKED)


def test_parameters_that_optax_misses_are_asked_for_in_our_own_words():
    with pytest.raises(ValueError, match=r"optax.adamw needs the parameters: .*`run\(gradients, params\)`"):
        fo.OptaxModule("adamw").run(TARGET)


def test_a_function_among_the_arguments_of_the_stateful_side_is_refused_by_name():
    module = fo.OptaxModule("polyak_sgd")
    with pytest.raises(TypeError, match=r"the extra argument 'value' is a function.*use the pure `update"):
        module.run(TARGET, TARGET, value=lambda params: 1.0)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "contrib.dpsgd",
            {"learning_rate": 0.1, "l2_norm_clip": "sgd", "noise_multiplier": 2147483648, "seed": 0},
            "optax.contrib.dpsgd is made by no configuration: it takes gradients of each example",
        ),
        ("clip", {"max_delta": "sgd"}, "optax.clip takes a number for 'max_delta', not 'sgd'"),
        ("scale_by_lbfgs", {"memory_size": 10**6}, "optax.scale_by_lbfgs with .* has a state of .* at most 1000 times"),
        ("contrib.mechanize", {"weight_decay": 10**4000}, "'weight_decay', not <an integer of 13288 bits>"),
        ("contrib.muon", {"ns_steps": 10**6}, "takes at most 1000 for 'ns_steps', not 1000000"),
        ("lion", {"b1": "x" * 10**6}, "optax.lion takes a number for 'b1', not 'xxx"),
    ],
)
def test_arguments_that_ask_for_too_much_are_refused_at_once(name, config, message):
    with pytest.raises(ValueError, match=message) as caught:
        fo.OptaxModule(name, config)
    assert len(str(caught.value)) < 2000


def test_a_state_of_some_hundred_copies_is_taken():
    fo.OptaxModule("scale_by_lbfgs", {"memory_size": 400})


def test_arguments_that_fail_at_the_first_step_are_named():
    module = fo.OptaxModule("adaptive_grad_clip", {"clipping": 0.1, "axis": 7})
    with pytest.raises(ValueError, match=r"optax.adaptive_grad_clip with the arguments .*'axis': 7.* fails: .*axis"):
        module.run(TARGET, TARGET)


@pytest.mark.parametrize(("name", "found"), [("adamw", "'adamw'"), ("muon", "'contrib.muon'")])
def test_what_only_optax_has_is_said_to_be_there(name: str, found: str) -> None:
    with pytest.raises(KeyError) as error:
        fo.Optimizer(0.1, modules=[name])
    assert f"of optax: ['optax', {{'transform': {found}}}]" in error.value.args[0]
    with pytest.raises(ValueError, match=r"did you mean 'contrib\.muon'"):
        fo.OptaxModule("muon")
