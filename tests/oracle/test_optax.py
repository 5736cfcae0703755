"""The numbers of optax, where its formulas coincide."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo

pytestmark = pytest.mark.slow

STEPS = 21


def normal(*seed):
    rng = np.random.default_rng(seed)
    return {"b": jnp.asarray(rng.normal(size=4), jnp.float32), "w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}


def assert_close(mine, theirs, rtol=1e-5):
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=rtol * float(jnp.abs(theirs[name]).max()))


def trajectory(transform, params):
    """Return the updates of each step, gradients and parameters being the same for all."""

    def step(carry, index):
        seeds = jax.random.fold_in(jax.random.key(0), index)
        gradients = jax.tree.map(lambda leaf: jax.random.normal(seeds, leaf.shape), params)
        weights = jax.tree.map(lambda leaf: leaf * (1 + index), params)
        updates, carry = transform.update(gradients, carry, weights)
        return carry, updates

    return jax.jit(lambda: jax.lax.scan(step, transform.init(params), jnp.arange(STEPS))[1])()


PAIRS = {
    "adam": (fo.AdamModule(), optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-7)),
    "adam, other": (
        fo.AdamModule(beta_1=0.5, beta_2=0.999, eps=1e-3),
        optax.scale_by_adam(b1=0.5, b2=0.999, eps=1e-3),
    ),
    "amsgrad": (fo.AdamModule(amsgrad=True, beta_2=0.7), optax.scale_by_amsgrad(b1=0.9, b2=0.7, eps=1e-7)),
    "yogi": (fo.YogiModule(), optax.scale_by_yogi(b1=0.9, b2=0.99, eps=1e-7, initial_accumulator_value=0.0)),
    "rmsprop": (fo.RMSPropModule(), optax.scale_by_rms(decay=0.9, eps=1e-7, eps_in_sqrt=False)),
    "adagrad": (
        fo.AdaGradModule(eps=1e-12),
        optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-12),
    ),
    "momentum": (fo.MomentumModule(beta=0.8), optax.trace(decay=0.8)),
    "nesterov": (fo.MomentumModule(nesterov=True), optax.trace(decay=0.9, nesterov=True)),
    "ewma": (fo.EWMAModule(beta=0.7), optax.ema(decay=0.7, debias=False)),
    "l2-global-clipping": (fo.L2GlobalClipping(max_norm=2.0), optax.clip_by_global_norm(2.0)),
    "l2-clipping of one leaf": (
        optax.masked(fo.L2Clipping(max_norm=0.5), {"b": True, "w": False}),
        optax.masked(optax.clip_by_global_norm(0.5), {"b": True, "w": False}),
    ),
    "ridge": (fo.RidgeRegularizer(alpha=0.3), optax.add_decayed_weights(0.6)),
    "sgd": (fo.Optimizer(lrate=0.1, modules=[fo.MomentumModule(beta=0.9)]), optax.sgd(0.1, momentum=0.9)),
    "adamw, whose decay is within the rate": (
        fo.Optimizer(lrate=0.1, w_decay=0.1 * 0.02, modules=["adam"]),
        optax.adamw(0.1, b1=0.9, b2=0.99, eps=1e-7, weight_decay=0.02),
    ),
    "an optax schedule": (
        fo.Optimizer(lrate=optax.cosine_decay_schedule(0.3, 15), modules=[fo.EWMAModule()]),
        optax.chain(optax.ema(0.9, debias=False), optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.3, 15))),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_transformations(pair):
    mine, theirs = PAIRS[pair]
    params = normal(5)
    assert_close(trajectory(mine, params), trajectory(theirs, params))


RATES = {
    "exponential-decay": (fo.ExponentialDecay(0.3, 0.8), optax.exponential_decay(0.3, 1, 0.8)),
    "piecewise-decay": (fo.PiecewiseDecay(0.3, 0.8, 4), optax.exponential_decay(0.3, 4, 0.8, staircase=True)),
    "polynomial-decay": (fo.PolynomialDecay(0.3, 2.0, 15), optax.polynomial_schedule(0.3, 0.0, 2.0, 15)),
    "linear-decay": (fo.LinearDecay(0.3, 1 / 16), optax.linear_schedule(0.3, 0.0, 16)),
    "cosine-annealing": (
        fo.CosineAnnealing(base=0.03, max_lr=0.3, duration=15),
        optax.cosine_decay_schedule(0.3, 15, alpha=0.1),
    ),
    "cosine-annealing-warm-restarts": (
        fo.CosineAnnealingWarmRestarts(base=0.0, max_lr=0.3, period=7),
        optax.join_schedules([optax.cosine_decay_schedule(0.3, 7)] * 3, [7, 14]),
    ),
    "sgdr": (
        fo.SGDR(base=0.03, max_lr=0.3, period=3, t_mult=2),
        optax.sgdr_schedule(
            [
                {"init_value": 0.3, "peak_value": 0.3, "decay_steps": steps, "warmup_steps": 0, "end_value": 0.03}
                for steps in (3, 6, 12, 24)
            ]
        ),
    ),
    "warmup": (
        fo.Warmup(fo.CosineAnnealing(base=0.03, max_lr=0.3, duration=10), 5),
        optax.join_schedules(
            [optax.linear_schedule(0.06, 0.36, 5), optax.cosine_decay_schedule(0.3, 10, alpha=0.1)], [5]
        ),
    ),
}


@pytest.mark.parametrize("pair", RATES)
def test_rates(pair):
    scheduler, schedule = RATES[pair]
    mine = jax.lax.scan(
        lambda clock, _: (scheduler.advance(clock), scheduler.value(clock)), scheduler.init(), length=STEPS
    )[1]
    theirs = jax.vmap(schedule)(jnp.arange(STEPS))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * 0.3)
