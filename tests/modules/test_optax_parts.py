"""What optax takes as objects, written as JSON: schedules, masks, labels, axes and transformations within others."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo

PARAMS = {"b": jnp.array([0.3, -0.7]), "w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
ON_W = {"b": False, "w": True}
COSINE = {"init_value": 0.0, "peak_value": 0.5, "warmup_steps": 2, "decay_steps": 5}

GROWTH = {"init_value": 1, "end_value": 3, "transition_steps": 2}


def loss(params):
    return sum(jnp.sum((leaf - 0.1) ** 4) for leaf in jax.tree.leaves(params))


def inner(transform, **config):
    return ["optax", {"transform": transform, "config": config}]


def turned(transform):
    return optax.chain(transform, optax.scale(-1.0))


SGD = inner("sgd", learning_rate=0.1)
CASES = {
    "chain of a clip, and of Adam with a schedule and a mask": (
        "chain",
        {
            "args": [
                inner("clip_by_global_norm", max_norm=0.5),
                inner(
                    "adamw",
                    learning_rate=["optax", {"schedule": "warmup_cosine_decay_schedule", "config": COSINE}],
                    mask="w",
                    weight_decay=0.3,
                ),
            ]
        },
        lambda: optax.chain(
            optax.clip_by_global_norm(0.5),
            optax.adamw(optax.warmup_cosine_decay_schedule(**COSINE), mask=ON_W, weight_decay=0.3),
        ),
        -1,
    ),
    "chain of two that descend": (
        "chain",
        {"args": [SGD, inner("sgd", learning_rate=0.5)]},
        lambda: optax.chain(optax.sgd(0.1), optax.sgd(0.5)),
        1,
    ),
    "named chain of ours and of optax's": (
        "named_chain",
        {"args": [["first", ["momentum", {"beta": 0.5}]], ["last", SGD]]},
        lambda: optax.chain(optax.trace(0.5), optax.sgd(0.1)),
        -1,
    ),
    "masked, where what is not masked passes uphill": (
        "masked",
        {"inner": SGD, "mask": ["w"]},
        lambda: optax.masked(turned(optax.sgd(0.1)), ON_W),
        1,
    ),
    "partition by patterns": (
        "partition",
        {
            "transforms": {"matrices": inner("adam", learning_rate=0.1), "rest": ["momentum", {"beta": 0.9}]},
            "param_labels": [["w", "matrices"], ["**", "rest"]],
        },
        lambda: optax.partition(
            {"matrices": turned(optax.adam(0.1)), "rest": optax.trace(0.9)}, {"b": "rest", "w": "matrices"}
        ),
        1,
    ),
    "partition by key": (
        "multi_transform",
        {"transforms": {"a": SGD, "b": inner("adam")}, "param_labels": {"b": "a", "w": "b"}},
        lambda: optax.partition({"a": optax.sgd(0.1), "b": optax.adam(1.0)}, {"b": "a", "w": "b"}),
        -1,
    ),
    "some frozen by a pattern": (
        "selective_transform",
        {"optimizer": inner("adam", learning_rate=0.1), "freeze_mask": "b"},
        lambda: optax.selective_transform(optax.adam(0.1), freeze_mask={"b": True, "w": False}),
        -1,
    ),
    "steps accumulated, more and more of them": (
        "MultiSteps",
        {
            "opt": inner("adam", learning_rate=0.1),
            "every_k_schedule": ["optax", {"schedule": "linear_schedule", "config": GROWTH}],
        },
        lambda: optax.MultiSteps(
            optax.adam(0.1), lambda step: optax.linear_schedule(**GROWTH)(step).astype(int)
        ).gradient_transformation(),
        -1,
    ),
    "steps accumulated": (
        "MultiSteps",
        {"opt": inner("adam", learning_rate=0.1), "every_k_schedule": 2},
        lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        -1,
    ),
    "schedule-free": (
        "contrib.schedule_free",
        {"base_optimizer": SGD, "learning_rate": 0.1},
        lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
        -1,
    ),
    "a rate of ours": (
        "sgd",
        {"learning_rate": ["warmup", {"base": ["linear-decay", {"base": 0.5, "rate": 0.25}], "warmup": 2}]},
        lambda: optax.sgd(
            optax.join_schedules([lambda step: 0.25 * (step + 1), optax.linear_schedule(0.5, 0.0, 4)], [2])
        ),
        -1,
    ),
    "a schedule that is asked for": (
        "scale_by_schedule",
        {"step_size_fn": ["exponential-decay", {"base": 1.0, "rate": 0.5}]},
        lambda: optax.scale_by_schedule(optax.exponential_decay(1.0, 1, 0.5)),
        1,
    ),
    "Muon of what a pattern says": (
        "contrib.muon",
        {"learning_rate": 0.1, "muon_weight_dimension_numbers": [["w", {"reduction_axis": [1], "output_axis": [0]}]]},
        lambda: optax.contrib.muon(
            0.1,
            muon_weight_dimension_numbers={
                "b": None,
                "w": optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0,)),
            },
        ),
        -1,
    ),
    "wrapped twice": (
        "apply_if_finite",
        {"inner": inner("flatten", inner=inner("adam", learning_rate=0.1)), "max_consecutive_errors": 2},
        lambda: optax.apply_if_finite(optax.flatten(optax.adam(0.1)), 2),
        -1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_optax(case):
    name, config, make, sign = CASES[case]
    module, theirs, params = fo.OptaxModule(name, json.loads(json.dumps(config))), make(), PARAMS
    mine_state, their_state = module.init(params), theirs.init(params)
    mine_step, their_step = jax.jit(module.update), jax.jit(theirs.update)
    for _ in range(5):
        gradients = jax.grad(loss)(params)
        mine, mine_state = mine_step(gradients, mine_state, params)
        expected, their_state = their_step(gradients, their_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, sign * b, rtol=1e-6, atol=1e-8), mine, expected)
        params = optax.apply_updates(params, jax.tree.map(lambda leaf: -0.1 * leaf, mine))


def test_lookahead_walks_as_over_pairs_of_fast_and_slow_parameters():
    module = fo.OptaxModule("lookahead", {"fast_optimizer": SGD, "sync_period": 2, "slow_step_size": 0.5})
    optimizer, theirs = fo.Optimizer(1.0, modules=[module]), optax.lookahead(optax.sgd(0.1), 2, 0.5)
    params, pairs = PARAMS, optax.LookaheadParams.init_synced(PARAMS)
    state = theirs.init(pairs)
    for _ in range(5):
        params = optimizer.apply_gradients(params, jax.grad(loss)(params))
        moves, state = theirs.update(jax.grad(loss)(pairs.fast), state, pairs)
        pairs = optax.apply_updates(pairs, moves)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, pairs.fast)


@pytest.mark.parametrize("case", ["partition by patterns", "steps accumulated", "named chain of ours and of optax's"])
def test_state_of_transformations_within_others_resumes_in_mid_run(case):
    name, config, _, _ = CASES[case]
    module, gradients = fo.OptaxModule(name, config), jax.grad(loss)(PARAMS)
    module.run(gradients, PARAMS)
    saved = json.loads(json.dumps(module.get_state(), allow_nan=False))
    copy = fo.OptaxModule.from_config(json.loads(json.dumps(module.get_config())))
    copy.set_state(saved)
    assert copy.get_state() == saved
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, copy.run(gradients, PARAMS), module.run(gradients, PARAMS))


def test_states_of_chains_of_other_parts_are_told_apart():
    adam, yogi = (fo.OptaxModule("chain", {"args": [inner(f"scale_by_{name}")]}) for name in ("adam", "yogi"))
    adam.run(PARAMS)
    yogi.run(PARAMS)
    with pytest.raises(ValueError, match=r"chain\(scale_by_adam\).*chain\(scale_by_yogi\)"):
        yogi.set_state(adam.get_state())


def test_what_optax_counts_is_found_in_a_state():
    module = fo.OptaxModule("scale_by_adam")
    state = module.init(PARAMS)
    for _ in range(3):
        _, state = module.update(PARAMS, state)
    assert optax.tree.get(state, "count") == 3
    optimizer = fo.Optimizer(("warmup", {"base": 0.1, "warmup": 3}), modules=["momentum", module])
    assert optax.tree.get(optimizer.init(PARAMS), "count") == 0


def test_optax_needs_no_rate_within_a_wrapper_that_descends():
    module = fo.OptaxModule("lookahead", {"fast_optimizer": ["momentum", {}], "sync_period": 5, "slow_step_size": 0.5})
    jax.tree.map(np.testing.assert_allclose, module.run(PARAMS, PARAMS), PARAMS)


def test_patterns_of_labels_that_leave_a_parameter_out_are_named():
    config = {"transforms": {"a": ["adam", {}]}, "param_labels": [["w", "a"]]}
    with pytest.raises(ValueError, match=r"'param_labels': no pattern matches the parameter 'b': end with '\*\*'"):
        fo.OptaxModule("partition", config).run(PARAMS, PARAMS)


def test_a_pattern_that_matches_nothing_is_named_with_near_paths():
    module = fo.OptaxModule("adamw", {"mask": "**/kernel"})
    with pytest.raises(ValueError, match=r"at 'mask': the pattern '\*\*/kernel' matches no path: .*'kernels'"):
        module.run({"kernels": jnp.ones(2)}, {"kernels": jnp.ones(2)})


def nested(levels):
    spec = ["adam", {}]
    for _ in range(levels):
        spec = inner("with_extra_args_support", tx=spec)
    return spec


BAD = [
    (
        "sgd",
        {"learning_rate": ["warmup", {}]},
        r"optax.sgd at 'learning_rate': \['warmup', {}\] makes no scheduler: .*",
    ),
    ("sgd", {"learning_rate": ["adam", {}]}, "no scheduler is named 'adam'"),
    ("sgd", {"learning_rate": {"base": 1}}, "optax.sgd takes a number or a scheduler for 'learning_rate', not {'base'"),
    ("sgd", {"learning_rate": None}, "takes a number or a scheduler for 'learning_rate', not None"),
    ("sgd", {"learning_rate": ["warmup-rounds", {"base": 1, "warmup": 2}]}, "counts rounds, and optax counts steps"),
    ("sgd", {"learning_rate": ["linear-decay", {"base": 1, "rate": 0, "step_level": False}]}, "counts rounds"),
    ("scale_by_schedule", {"step_size_fn": 1.0}, "takes a scheduler for 'step_size_fn', not 1.0"),
    ("sgd", {"nesterov": 1}, "optax.sgd takes a boolean for 'nesterov', not 1"),
    ("sgd", {"momentum": [0.9]}, r"optax.sgd takes a number or null for 'momentum', not \[0.9\]"),
    ("adam", {"b1": True}, "optax.adam takes a number for 'b1', not True"),
    ("adam", {"b1": None}, "optax.adam takes a number for 'b1', not None"),
    ("adamw", {"mu_dtype": "float31"}, "optax.adamw at 'mu_dtype': 'float31' is no dtype"),
    ("adam", {"mu_dtype": 32}, "optax.adam takes the name of a dtype for 'mu_dtype', not 32"),
    ("scale_by_lion", {"mode": "soft"}, "takes one of 'hard', 'smooth', 'refined' for 'mode', not 'soft'"),
    ("polyak_sgd", {"variant": "x"}, "with the arguments {'variant': 'x'} fails: Invalid argument value"),
    ("contrib.prodigy", {"betas": [0.9]}, r"takes a list of 2 values for 'betas', not \[0.9\]"),
    ("contrib.muon", {"ns_coeffs": [[1, 2, 3], [1, 2]]}, "for 'ns_coeffs', not"),
    ("apply_every", {"k": 0}, "takes a whole number of at least 1 for 'k', not 0"),
    ("MultiSteps", {"opt": "adam", "every_k_schedule": 0}, "at least 1 for 'every_k_schedule', not 0"),
    ("scale_by_factored_rms", {"decay_rate_fn": 1.0}, "takes a function or an object, which JSON does not have, for"),
    ("adamw", {"mask": 3}, "takes a pattern over paths, a list of them, or nested mappings by key, for 'mask', not 3"),
    ("adamw", {"mask": "[z-a]"}, r"at 'mask': the pattern '\[z-a\]' cannot be read"),
    ("adamw", {"mask": "*" * 17}, "'mask': the pattern '.*' has more than 16 stars"),
    ("partition", {"transforms": {"a": "adam"}, "param_labels": [["**", "b"]]}, r"one of the labels \['a'\] for .*'b'"),
    (
        "partition",
        {"transforms": {"a": "adam"}, "param_labels": {"w": "b"}},
        r"one of the labels \['a'\] at 'w', not 'b'",
    ),
    ("partition", {"transforms": ["adam"], "param_labels": [["**", "b"]]}, "takes a mapping of labels to modules for"),
    ("chain", {}, "optax.chain refuses the arguments {}"),
    ("chain", {"args": "adam"}, "takes a list of modules for 'args', not 'adam'"),
    ("chain", {"args": []}, r"takes a list of modules for 'args', not \[\]"),
    ("chain", {"args": [3]}, r"optax.chain at 'args': expected a module, such as \['adam', {}\], not 3"),
    ("chain", {"args": ["adan"]}, "'adan' makes no module: no module is named 'adan': did you mean 'adam'"),
    ("chain", {"args": [["adam", {"beta": 1}]]}, "AdamModule has no field 'beta'"),
    ("chain", {"args": [inner("sgd", learning_rate="x")]}, r"optax.sgd at 'learning_rate': 'x' makes no scheduler"),
    ("chain", {"args": [["optax", {"config": {}}]]}, "lacks the key 'transform'"),
    ("chain", {"args": [["optax", {"transform": "sgd", "x": 1}]]}, "has an unknown key 'x'"),
    ("chain", {"args": ["scaffold-client"]}, "'scaffold-client' takes part in rounds, or asks"),
    ("chain", {"args": [["adam", {"round_reset": True}]]}, "takes part in rounds"),
    ("chain", {"args": ["adam"] * 33}, "there are more than 32 transformations within one"),
    ("with_extra_args_support", {"tx": nested(8)}, "nests more than 20 levels deep"),
    ("named_chain", {"args": [["adam", {}]]}, "at 'args': expected a module"),
    ("masked", {"inner": "adam"}, r"optax.masked refuses the arguments .*'mask'"),
    ("contrib.galore", {"weight_dimension_numbers": [["w", {"rows": 0}]]}, "takes no argument 'rows'"),
    ("contrib.galore", {"weight_dimension_numbers": [["w", {"output_axis": "x"}]]}, "takes integers and lists of"),
    ("monitor", {"measures": {}}, "optax.monitor is made by no configuration: what it measures are functions"),
]


@pytest.mark.parametrize(("name", "config", "message"), BAD)
def test_arguments_of_a_wrong_kind_are_refused_by_name_at_once(name, config, message):
    with pytest.raises(ValueError, match=message) as caught:
        fo.OptaxModule(name, config)
    assert len(str(caught.value)) < 2000
