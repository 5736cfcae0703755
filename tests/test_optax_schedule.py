"""Optax's schedules as schedulers by name: every one of them, nested ones, and what is refused."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo

COSINE = {"init_value": 0.1, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": 5, "end_value": 0.01}
PIECES = {"init_value": 1.0, "boundaries_and_scales": {"2": 0.5, "4": 0.1}}
BY_STEP = {"boundaries_and_scales": {2: 0.5, 4: 0.1}}

# What a configuration writes, and what optax is given where that is another.
SCHEDULES = {
    "constant_schedule": ({"value": 0.5}, {}),
    "cosine_decay_schedule": ({"init_value": 1.0, "decay_steps": 5, "exponent": 2.0}, {}),
    "cosine_onecycle_schedule": ({"transition_steps": 6, "peak_value": 1.0}, {}),
    "exponential_decay": ({"init_value": 1.0, "transition_steps": 2, "decay_rate": 0.5, "staircase": True}, {}),
    "join_schedules": (
        {
            "schedules": [
                ["warmup", {"base": 0.4, "warmup": 4}],
                ["optax", {"schedule": "warmup_cosine_decay_schedule", "config": COSINE}],
                0.25,
            ],
            "boundaries": [2, 5],
        },
        {
            "schedules": [
                lambda step: jnp.minimum(0.1 * (step + 1), 0.4),
                optax.warmup_cosine_decay_schedule(**COSINE),
                optax.constant_schedule(0.25),
            ]
        },
    ),
    "linear_onecycle_schedule": ({"transition_steps": 6, "peak_value": 1.0}, {}),
    "linear_schedule": ({"init_value": 1.0, "end_value": 0.1, "transition_steps": 4, "transition_begin": 1}, {}),
    "piecewise_constant_schedule": (PIECES, BY_STEP),
    "piecewise_interpolate_schedule": ({**PIECES, "interpolate_type": "cosine"}, BY_STEP),
    "polynomial_schedule": ({"init_value": 1.0, "end_value": 0.1, "power": 2, "transition_steps": 4}, {}),
    "sgdr_schedule": ({"cosine_kwargs": [COSINE, COSINE]}, {}),
    "warmup_constant_schedule": ({"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 3}, {}),
    "warmup_cosine_decay_schedule": (COSINE, {}),
    "warmup_exponential_decay_schedule": (
        {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 2, "transition_steps": 2, "decay_rate": 0.5},
        {},
    ),
}


# They make no schedules.
OTHERS = {"inject_hyperparams", "inject_stateful_hyperparams"}


def test_every_public_schedule_of_optax_is_among_these():
    public = {name for name, value in vars(optax.schedules).items() if inspect.isfunction(value) and name[0] != "_"}
    public |= {
        name
        for name, value in vars(optax).items()
        if inspect.isfunction(value) and inspect.signature(value).return_annotation == optax.Schedule
    }
    assert public == SCHEDULES.keys() | OTHERS


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_optax(name):
    config, otherwise = SCHEDULES[name]
    scheduler = fo.Scheduler.from_specs("optax", json.loads(json.dumps({"schedule": name, "config": config})))
    theirs = getattr(optax, name)(**{**config, **otherwise})
    clock, advance = scheduler.init(), jax.jit(lambda clock: (scheduler.value(clock), scheduler.advance(clock)))
    for step in range(8):
        rate, clock = advance(clock)
        np.testing.assert_allclose(rate, theirs(jnp.int32(step)), rtol=1e-6)


def test_rate_by_rounds_counts_rounds():
    scheduler = fo.OptaxSchedule("linear_schedule", {"init_value": 1, "end_value": 0, "transition_steps": 4}, False)
    rates = []
    for _ in range(3):
        scheduler.on_round_start()
        rates += [scheduler.get_next_rate() for _ in range(2)]
    assert rates == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5]


def test_it_drives_an_optimizer_and_a_warm_up():
    decay = (
        "optax",
        {"schedule": "linear_schedule", "config": {"init_value": 1.0, "end_value": 0.0, "transition_steps": 2}},
    )
    optimizer = fo.Optimizer(("warmup", {"base": decay, "warmup": 2}))
    moves = [optimizer.compute_updates_from_gradients(jnp.ones(()), jnp.ones(())) for _ in range(5)]
    assert moves == [-0.5, -1.0, -1.0, -0.5, 0.0]
    assert fo.Optimizer.from_config(json.loads(json.dumps(optimizer.get_config()))) == optimizer


def test_equal_arguments_in_another_order_make_an_equal_scheduler():
    left, right = (
        fo.OptaxSchedule("cosine_decay_schedule", config)
        for config in ({"init_value": 1.0, "decay_steps": 3}, {"decay_steps": 3, "init_value": 1.0})
    )
    assert left == right
    assert hash(left) == hash(right)


def join(*schedules, boundaries=(3,)):
    return "join_schedules", {"schedules": list(schedules), "boundaries": list(boundaries)}


def deep(levels):
    spec = 0.1
    for _ in range(levels):
        schedule, config = join(spec, spec)
        spec = ["optax", {"schedule": schedule, "config": config}]
    return join(spec, spec)


@pytest.mark.parametrize(
    ("schedule", "config", "message"),
    [
        ("cosine_schedule", {}, "optax has no public 'cosine_schedule': did you mean"),
        ("_src.schedule.constant_schedule", {"value": 1}, "optax has no public"),
        ("x", {}, "optax has no public 'x': nothing there is named nearly so"),
        ("adam", {}, "optax.adam makes no schedule: it returns"),
        ("Schedule", {}, "optax.Schedule makes no schedule"),
        ("inject_hyperparams", {}, "optax.inject_hyperparams makes no schedule"),
        ("constant_schedule", {}, "optax.constant_schedule refuses the arguments {}: .*'value'"),
        ("constant_schedule", {"value": "1"}, "optax.constant_schedule takes a number for 'value', not '1'"),
        ("constant_schedule", {"valu": 1}, "takes no argument 'valu': did you mean 'value'"),
        ("cosine_decay_schedule", {"init_value": 1, "decay_steps": 0}, "requires positive decay_steps"),
        ("cosine_decay_schedule", {"init_value": 1, "decay_steps": 2.5}, "takes an integer for 'decay_steps', not 2.5"),
        (
            "cosine_decay_schedule",
            {"init_value": 1, "decay_steps": 2**40},
            "takes at most 4294967296 for 'decay_steps'",
        ),
        ("piecewise_constant_schedule", {**PIECES, "boundaries_and_scales": {"a": 1}}, "a mapping of steps to numbers"),
        ("piecewise_constant_schedule", {**PIECES, "boundaries_and_scales": {"1": "x"}}, "takes a number for 'bound"),
        ("piecewise_interpolate_schedule", {**PIECES, "interpolate_type": "x"}, "must be either 'cosine' or 'linear'"),
        ("sgdr_schedule", {"cosine_kwargs": [{"peak": 1}]}, "at 'cosine_kwargs' takes no argument 'peak'"),
        ("sgdr_schedule", {"cosine_kwargs": COSINE}, "takes a list of mappings for 'cosine_kwargs'"),
        ("sgdr_schedule", {"cosine_kwargs": []}, "optax.sgdr_schedule refuses the arguments"),
        (*join(0.1, 0.2, boundaries=()), "it takes one boundary between each two schedules"),
        ("join_schedules", {"schedules": [0.1]}, "refuses the arguments .*'boundaries'"),
        ("join_schedules", {"schedules": 0.1, "boundaries": []}, "takes a list of schedulers and numbers for"),
        (*join(0.1, True), "expected a number or a scheduler, such as .*, not True"),
        (*join(0.1, ["warmup", {}]), "at 'schedules': .* makes no scheduler: Warmup needs a value"),
        (*join(0.1, ["warmup-rounds", {"base": 1, "warmup": 2}]), "counts rounds, and optax counts steps alone"),
        (*deep(8), "nests more than 20 levels deep"),
    ],
)
def test_what_is_no_schedule_is_refused_by_name(schedule, config, message):
    with pytest.raises(ValueError, match=message) as caught:
        fo.OptaxSchedule(schedule, config)
    assert len(str(caught.value)) < 2000


def test_a_scheduler_with_a_clock_of_its_own_is_no_function_of_the_step():
    class Own(fo.Scheduler, register=False):
        name = "own-clock"

        def value(self, clock):
            return clock.steps * 1.0

    fo.Scheduler._registry["own-clock"] = Own
    try:
        with pytest.raises(ValueError, match="Own keeps a clock of its own: it is no function of the step"):
            fo.OptaxSchedule(*join(0.1, ["own-clock", {}]))
    finally:
        del fo.Scheduler._registry["own-clock"]
