"""Schedule-free: algorithm 1 of the paper in NumPy float64, with the weights of its code, and optax's."""

import jax
import numpy as np
import optax
import pytest
from optax import contrib

import functional_optimodules as fo

from .steps import PARAMS, assert_close, assert_equal, exact, gradients, walk

STEPS = 25


def paper(grads, params, rates, beta, power, decay=0.0, second=None):
    """Yield y and x after each step, of SGD, or with `second` as its average's weight of AdamW."""
    z = x = y = params
    v, total, largest = np.zeros_like(params), 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        y = (1 - beta) * z + beta * x
        direction = gradient
        if second is not None:
            v = second * v + (1 - second) * gradient**2
            direction = gradient / (np.sqrt(v / (1 - second**step)) + 1e-8)
        z = z - rate * direction - decay * y
        largest = max(largest, rate)
        total += largest**power
        c = largest**power / total
        x = (1 - c) * x + c * z
        yield (1 - beta) * z + beta * x, x


def read(optimizer, each, state):
    return optimizer.eval_params(state, jax.tree.map(lambda leaf: leaf[-1], each))


@pytest.mark.parametrize(("beta", "power"), [(0.9, 2.0), (0.5, 0.0), (0.98, 1.0)])
@pytest.mark.parametrize("warmup", [1, 8])
def test_sgd_is_algorithm_1_with_the_weights_of_the_authors_code(beta, power, warmup):
    grads = gradients(STEPS)
    optimizer = fo.Optimizer(
        ("warmup", {"base": 0.3, "warmup": warmup}),
        wrappers=[("schedule-free", {"beta": beta, "weight_lr_power": power})],
    )
    each, state = walk(optimizer, grads)
    rates = [0.3 * min(step / warmup, 1) for step in range(1, STEPS + 1)]
    for name, first in exact(PARAMS).items():
        expected = list(paper(exact(grads)[name], first, rates, beta, power))
        assert_close(each[name], np.stack([y for y, _ in expected]))
        assert_close(read(optimizer, each, state)[name], expected[-1][1])


def test_adamw_is_algorithm_1():
    grads = gradients(STEPS)
    adam = ("adam", {"beta_1": 0.0, "beta_2": 0.999, "eps": 1e-8})
    optimizer = fo.Optimizer(
        ("warmup", {"base": 0.05, "warmup": 6}), w_decay=0.002, modules=[adam], wrappers=["schedule-free"]
    )
    each, state = walk(optimizer, grads)
    rates = [0.05 * min(step / 6, 1) for step in range(1, STEPS + 1)]
    for name, first in exact(PARAMS).items():
        expected = list(paper(exact(grads)[name], first, rates, 0.9, 2.0, decay=0.002, second=0.999))
        assert_close(each[name], np.stack([y for y, _ in expected]), rtol=1e-4)
        assert_close(read(optimizer, each, state)[name], expected[-1][1], rtol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (fo.Optimizer(0.3, wrappers=["schedule-free"]), contrib.schedule_free_sgd(0.3)),
        (
            fo.Optimizer(0.3, wrappers=[("schedule-free", {"beta": 0.5, "weight_lr_power": 0.0})]),
            contrib.schedule_free_sgd(0.3, b1=0.5, weight_lr_power=0.0),
        ),
        (
            fo.Optimizer(
                0.05,
                w_decay=0.05 * 0.01,
                modules=[("adam", {"beta_1": 0.0, "beta_2": 0.999, "eps": 1e-8})],
                wrappers=["schedule-free"],
            ),
            contrib.schedule_free_adamw(0.05, weight_decay=0.01),
        ),
    ],
    ids=["sgd", "sgd of equal weights", "adamw"],
)
def test_it_is_optaxs_at_a_constant_rate(optimizer, reference):
    # With a warm-up, optax weighs each iterate by the rate of the next step: what it counts from is 1, and not 0.
    grads = gradients(STEPS)
    each, state = walk(optimizer, grads)
    expected, theirs = walk(reference, grads)
    assert_close(each, expected, rtol=1e-4)
    last = jax.tree.map(lambda leaf: leaf[-1], expected)
    assert_close(read(optimizer, each, state), contrib.schedule_free_eval_params(theirs, last), rtol=1e-4)


def test_the_average_solves_a_quadratic_without_a_schedule():
    optimizer = fo.Optimizer(0.5, wrappers=["schedule-free"])
    target = jax.tree.map(lambda p: p * 0 + 1.5, PARAMS)
    params, state = PARAMS, optimizer.init(PARAMS)
    step = jax.jit(optimizer.update)
    for _ in range(150):
        updates, state = step(jax.tree.map(lambda p, t: p - t, params, target), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(optimizer.eval_params(state, params), target, rtol=1e-2)


def test_a_rate_of_zero_moves_nothing_and_gives_no_nan():
    optimizer = fo.Optimizer(0.0, wrappers=["schedule-free"])
    each, state = walk(optimizer, gradients(3))
    assert_equal(jax.tree.map(lambda leaf: leaf[-1], each), PARAMS)
    assert_equal(read(optimizer, each, state), PARAMS)


def test_a_new_round_may_start_a_new_average_from_what_it_is_given():
    optimizer = fo.Optimizer(0.3, wrappers=[("schedule-free", {"round_reset": True})])
    _, state = walk(optimizer, gradients(4))
    given = jax.tree.map(lambda p: p + 1, PARAMS)
    found, _ = optimizer.update(PARAMS, optimizer.begin_round(state, given), given)
    expected, _ = optimizer.update(PARAMS, optimizer.init(given), given)
    assert_equal(found, expected)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_lies_between_averaging_and_none(beta):
    with pytest.raises(ValueError, match=r"ScheduleFreeWrapper: beta=.* should be in \(0, 1\)"):
        fo.ScheduleFreeWrapper(beta=beta)
