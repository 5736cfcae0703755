"""Every public factory of optax runs by its name, or is in a list with the reason why not.

What `optax.experimental` has is not gone over: it may change with any version. It is taken where a step keeps shapes.
"""

import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo
from functional_optimodules.modules.optax_parts import REFUSED

PARAMS = {"b": jnp.array([0.3, -0.7]), "w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
SGD = ["optax", {"transform": "sgd", "config": {"learning_rate": 0.1}}]
LABELS = {"transforms": {"a": "adam", "b": SGD}, "param_labels": [["w", "a"], ["**", "b"]]}

# What has no arguments that it cannot do without runs with none.
CONFIGS = {
    "MultiSteps": {"opt": SGD, "every_k_schedule": 1},
    "adaptive_grad_clip": {"clipping": 0.1},
    "add_noise": {"eta": 0.01, "gamma": 0.5, "key": 1},
    "apply_if_finite": {"inner": "adam", "max_consecutive_errors": 3},
    "chain": {"args": ["momentum", SGD]},
    "clip": {"max_delta": 0.5},
    "clip_by_block_rms": {"threshold": 0.5},
    "clip_by_global_norm": {"max_norm": 0.5},
    "contrib.mechanize": {"base_optimizer": SGD},
    "contrib.sam": {"optimizer": SGD, "adv_optimizer": SGD, "sync_period": 1},
    "contrib.scale_by_muon": {"weight_dimension_numbers": [["**", {"reduction_axis": 0, "output_axis": -1}]]},
    "contrib.schedule_free": {"base_optimizer": SGD, "learning_rate": 0.1},
    "contrib.split_real_and_imaginary": {"inner": "adam"},
    "ema": {"decay": 0.5},
    "flatten": {"inner": "adam"},
    "freeze": {"mask": "b"},
    "lookahead": {"fast_optimizer": SGD, "sync_period": 2, "slow_step_size": 0.5},
    "masked": {"inner": SGD, "mask": "w"},
    "multi_transform": LABELS,
    "named_chain": {"args": [["first", "momentum"], ["last", SGD]]},
    "noisy_sgd": {"key": 1},
    "partition": LABELS,
    "scale": {"step_size": 0.5},
    "scale_by_backtracking_linesearch": {"max_backtracking_steps": 3},
    "scale_by_schedule": {"step_size_fn": ["linear-decay", {"base": 1.0, "rate": 0.1}]},
    "scale_by_zoom_linesearch": {"max_linesearch_steps": 3},
    "selective_transform": {"optimizer": SGD, "freeze_mask": "b"},
    "trace": {"decay": 0.5},
    "with_extra_args_support": {"tx": "adam"},
}
# Functions that say nothing of what they return, and make no transformation.
OTHERS = {
    "contrib.schedule_free_eval_params",
    "matrix_inverse_pth_root",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
}
# What needs the loss gets it by the facade, and what needs a function by the pure update.
LOSS = {"contrib.momo", "contrib.momo_adam", "contrib.reduce_on_plateau", "polyak_sgd", "scale_by_polyak"}
FUNCTION = {
    "contrib.hutchinson_estimator_diag_hessian": ("obj_fn",),
    "contrib.sophia": ("obj_fn",),
    "lbfgs": ("value", "grad", "value_fn"),
    "scale_by_backtracking_linesearch": ("value", "grad", "value_fn"),
    "scale_by_zoom_linesearch": ("value", "grad", "value_fn"),
}
MATRICES = {"contrib.scale_by_muon"}
UNMOVED = {"set_to_zero"}
UNSIGNED = {"contrib.hutchinson_estimator_diag_hessian"}


def factories():
    for prefix, module in (("", optax), ("contrib.", optax.contrib), ("", optax.transforms)):
        for name, value in sorted(vars(module).items()):
            function = value.func if isinstance(value, functools.partial) else value
            if name.startswith("_") or not (inspect.isfunction(function) or value is optax.MultiSteps):
                continue
            made = inspect.signature(value).return_annotation
            if made is inspect.Signature.empty or "GradientTransformation" in str(made):
                yield prefix + name


# Optax says so of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
NAMES = sorted(set(factories()) - OTHERS)
TAKEN = [name for name in NAMES if name.removeprefix("contrib.") not in REFUSED]


def loss(params):
    return sum(jnp.sum((leaf - 0.1) ** 2) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_factory_is_made_by_a_configuration_or_says_why_not(name):
    if name in TAKEN:
        assert fo.OptaxModule(name, CONFIGS.get(name, {})).transform == name
        return
    with pytest.raises(ValueError, match=f"made by no configuration: {REFUSED[name.removeprefix('contrib.')]}"):
        fo.OptaxModule(name)


def test_the_lists_name_nothing_that_optax_has_not():
    known = {*factories(), *(name.removeprefix("contrib.") for name in factories())}
    assert not {*CONFIGS, *REFUSED, *OTHERS, *LOSS, *FUNCTION} - known


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TAKEN if name not in FUNCTION])
def test_every_factory_points_uphill_and_resumes_in_mid_run(name):
    module, slope = fo.OptaxModule(name, CONFIGS.get(name, {})), 0.0
    params = {"w": PARAMS["w"]} if name in MATRICES else PARAMS
    for _ in range(3):
        value, gradients = jax.value_and_grad(loss)(params)
        known = {"value": value} if name in LOSS else {}
        output = module.run(gradients, params, **known)
        slope += sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(gradients), strict=True))
        params = jax.tree.map(lambda p, o: p - 1e-3 * o, params, output)
    assert slope > 0 or name in UNMOVED
    saved, config = json.loads(json.dumps([module.get_state(), module.get_config()], allow_nan=False))
    copy = fo.OptaxModule.from_config(config)
    copy.set_state(saved)
    assert copy == module
    assert copy.get_state() == saved
    expected = module.run(gradients, params, **known)
    jax.tree.map(np.testing.assert_array_equal, copy.run(gradients, params, **known), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTION)
def test_what_needs_a_function_gets_it_by_the_pure_update(name):
    module = fo.OptaxModule(name, CONFIGS.get(name, {}))
    value, gradients = jax.value_and_grad(loss)(PARAMS)
    known = {"value": value, "grad": gradients, "value_fn": loss, "obj_fn": loss}
    output, _ = module.update(gradients, module.init(PARAMS), PARAMS, **{key: known[key] for key in FUNCTION[name]})
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(output))
    assert name in UNSIGNED or loss(jax.tree.map(lambda p, o: p - 1e-3 * o, PARAMS, output)) < value
