"""The numbers of the papers' formulas, written out in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo

STEPS = 60
RTOL = 1e-5


def gradients(steps=STEPS, shape=(3, 5)):
    return np.random.default_rng(7).normal(size=(steps, *shape)).astype(np.float32).astype(np.float64)


def outputs(brick, grads, params=None):
    """Return what a brick makes of each gradient, in one compiled loop."""

    def step(state, inputs):
        gradient, weights = inputs
        output, state = brick.update(gradient, state, weights)
        return state, output

    like = jnp.zeros(grads.shape[1:], jnp.float32)
    weights = None if params is None else jnp.asarray(params, jnp.float32)
    grads = jnp.asarray(grads, jnp.float32)
    return jax.jit(lambda: jax.lax.scan(step, brick.init(like), (grads, weights))[1])()


def adagrad(grads, eps):
    total = 0.0
    for g in grads:
        total = total + g**2
        yield g / (np.sqrt(total) + eps)


def rmsprop(grads, beta, eps):
    second = 0.0
    for g in grads:
        second = beta * second + (1 - beta) * g**2
        yield g / (np.sqrt(second) + eps)


def adam(grads, beta_1, beta_2, eps, amsgrad=False, yogi=False):
    first, second, largest = 0.0, 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        first = beta_1 * first + (1 - beta_1) * g
        moved = -np.sign(second - g**2) * g**2 if yogi else g**2 - second
        second = second + (1 - beta_2) * moved
        first_hat, second_hat = first / (1 - beta_1**t), second / (1 - beta_2**t)
        if amsgrad:
            second_hat = largest = np.maximum(largest, second_hat)
        yield first_hat / (np.sqrt(second_hat) + eps)


def momentum(grads, beta, nesterov):
    velocity = 0.0
    for g in grads:
        velocity = beta * velocity + g
        yield beta * velocity + g if nesterov else velocity


def ewma(grads, beta):
    for t in range(len(grads)):
        weights = (1 - beta) * beta ** np.arange(t, -1, -1)
        yield np.tensordot(weights, grads[: t + 1], 1)


def yogi_momentum(grads, beta):
    average = 0.0
    for g in grads:
        average = average - (1 - beta) * np.sign(average - g) * g
        yield average


def clipped(grads, bound):
    for g in grads:
        yield g * min(1, bound / math.sqrt((g**2).sum()))


MODULES = {
    "adagrad": (fo.AdaGradModule(eps=1e-3), lambda g: adagrad(g, 1e-3)),
    "rmsprop": (fo.RMSPropModule(beta=0.7, eps=1e-3), lambda g: rmsprop(g, 0.7, 1e-3)),
    "adam": (fo.AdamModule(), lambda g: adam(g, 0.9, 0.99, 1e-7)),
    "amsgrad": (fo.AdamModule(0.8, 0.6, amsgrad=True, eps=1e-3), lambda g: adam(g, 0.8, 0.6, 1e-3, amsgrad=True)),
    "yogi": (fo.YogiModule(), lambda g: adam(g, 0.9, 0.99, 1e-7, yogi=True)),
    "yogi, amsgrad": (
        fo.YogiModule(0.8, 0.6, amsgrad=True, eps=1e-3),
        lambda g: adam(g, 0.8, 0.6, 1e-3, amsgrad=True, yogi=True),
    ),
    "momentum": (fo.MomentumModule(), lambda g: momentum(g, 0.9, False)),
    "nesterov": (fo.MomentumModule(beta=0.6, nesterov=True), lambda g: momentum(g, 0.6, True)),
    "ewma": (fo.EWMAModule(beta=0.7), lambda g: ewma(g, 0.7)),
    "yogi-momentum": (fo.YogiMomentumModule(beta=0.7), lambda g: yogi_momentum(g, 0.7)),
    "l2-clipping": (fo.L2Clipping(max_norm=4.0), lambda g: clipped(g, 4.0)),
    "l2-global-clipping": (fo.L2GlobalClipping(max_norm=4.0), lambda g: clipped(g, 4.0)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    module, formula = MODULES[name]
    grads = gradients()
    expected = np.stack(list(formula(grads)))
    np.testing.assert_allclose(outputs(module, grads), expected, rtol=0, atol=RTOL * np.abs(expected).max())


def test_bias_correction_stays_exact_over_thousands_of_steps():
    grads = gradients(3000, (2,))
    expected = np.stack(list(adam(grads, 0.9, 0.9999, 1e-8)))
    got = outputs(fo.AdamModule(beta_2=0.9999, eps=1e-8), grads)
    np.testing.assert_allclose(got, expected, rtol=0, atol=RTOL * np.abs(expected).max())


def test_per_parameter_and_global_clipping_differ_by_whose_norm_they_take():
    tree = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[0.0, 12.0]])}
    own = fo.L2Clipping(max_norm=6.0).update(tree, fo.L2Clipping().init(tree))[0]
    together = fo.L2GlobalClipping(max_norm=6.0).update(tree, fo.L2GlobalClipping().init(tree))[0]
    np.testing.assert_allclose(own["a"], [3, 4])
    np.testing.assert_allclose(own["b"], [[0, 6]])
    np.testing.assert_allclose(together["a"], np.array([3, 4]) * 6 / 13, rtol=1e-6)
    np.testing.assert_allclose(together["b"], np.array([[0, 12]]) * 6 / 13, rtol=1e-6)


REGULARIZERS = {
    "fedprox": (fo.FedProxRegularizer(alpha=0.3), lambda w: 0.3 * (w - w[0])),
    "lasso": (fo.LassoRegularizer(alpha=0.3), lambda w: 0.3 * np.sign(w)),
    "ridge": (fo.RidgeRegularizer(alpha=0.3), lambda w: 0.6 * w),
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizers(name):
    regularizer, penalty = REGULARIZERS[name]
    grads = gradients()
    weights = grads[::-1]
    expected = grads + penalty(weights)
    np.testing.assert_allclose(
        outputs(regularizer, grads, weights), expected, rtol=0, atol=RTOL * np.abs(expected).max()
    )


PENALTIES = {
    "fedprox": lambda w, reference: 0.3 / 2 * jnp.sum((w - reference) ** 2),
    "lasso": lambda w, reference: 0.3 * jnp.sum(jnp.abs(w)),
    "ridge": lambda w, reference: 0.3 * jnp.sum(w**2),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_regularizers_add_the_gradient_of_the_penalty_that_they_name(name):
    regularizer = REGULARIZERS[name][0]
    reference, weights = (jnp.asarray(array, jnp.float32) for array in gradients(2))
    state = regularizer.begin_round(regularizer.init(weights), reference)
    added = regularizer.update(jnp.zeros_like(weights), state, weights)[0]
    np.testing.assert_allclose(added, jax.grad(PENALTIES[name])(weights, reference), rtol=1e-6)


def triangle(step, size):
    position = step % (2 * size)
    return position / size if position < size else 2 - position / size


def sgdr(step, period, factor):
    while step >= period:
        step, period = step - period, period * factor
    return 0.4 + 0.3 * math.cos(math.pi * step / period)


SCHEDULERS = {
    "exponential-decay": (fo.ExponentialDecay(0.3, 0.9999), lambda u: 0.3 * 0.9999**u),
    "inverse-scaling": (fo.InverseScaling(0.3, 0.5), lambda u: 0.3 / math.sqrt(u + 1)),
    "linear-decay": (fo.LinearDecay(0.3, 1e-4), lambda u: 0.3 * max(0, 1 - 1e-4 * u)),
    "piecewise-decay": (fo.PiecewiseDecay(0.3, 0.97, 50), lambda u: 0.3 * 0.97 ** (u // 50)),
    "polynomial-decay": (fo.PolynomialDecay(0.3, 2.5, 900), lambda u: 0.3 * (1 - min(1, u / 900)) ** 2.5),
    "cosine-annealing": (
        fo.CosineAnnealing(0.1, 0.7, 900),
        lambda u: 0.1 + 0.3 * (1 + math.cos(math.pi * min(u, 900) / 900)),
    ),
    "cosine-annealing-warm-restarts": (
        fo.CosineAnnealingWarmRestarts(0.1, 0.7, 90, 0.9),
        lambda u: 0.1 + (0.7 * 0.9 ** (u // 90) - 0.1) / 2 * (1 + math.cos(math.pi * (u % 90) / 90)),
    ),
    "sgdr": (fo.SGDR(0.1, 0.7, 90), lambda u: sgdr(u, 90, 1)),
    "sgdr, doubled": (fo.SGDR(0.1, 0.7, 40, 2), lambda u: sgdr(u, 40, 2)),
    "sgdr, by far": (fo.SGDR(0.1, 0.7, 80, 10**9), lambda u: sgdr(u, 80, 10**9)),
    "cyclic-triangular": (fo.CyclicTriangular(0.1, 0.7, 40), lambda u: 0.1 + 0.6 * triangle(u, 40)),
    "cyclic-triangular, halved": (
        fo.CyclicTriangular(0.1, 0.7, 40, decay=True),
        lambda u: 0.1 + 0.6 * triangle(u, 40) / 2 ** (u // 80),
    ),
    "cyclic-exp-range": (
        fo.CyclicExpRange(0.1, 0.7, 40, 0.999),
        lambda u: (0.1 + 0.6 * triangle(u, 40)) * 0.999**u,
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_also_after_many_steps(name):
    scheduler, formula = SCHEDULERS[name]
    steps = np.array([0, 1, 2, 39, 40, 41, 79, 80, 81, 89, 90, 449, 899, 900, 901, 12_345])
    got = jax.vmap(lambda step: scheduler.compute_value(step, 0))(jnp.asarray(steps, jnp.int32))
    expected = np.array([formula(int(step)) for step in steps])
    np.testing.assert_allclose(got, expected, rtol=RTOL, atol=1e-7 * expected[0])


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("cyclic")])
def test_schedulers_by_rounds_have_the_same_formula_of_the_round(name):
    by_steps, formula = SCHEDULERS[name]
    by_rounds = type(by_steps)(**by_steps.get_config() | {"step_level": False})
    rounds = np.array([0, 1, 49, 50, 89, 90, 450, 900])
    got = jax.vmap(lambda round_: by_rounds.compute_value(10 * round_ + 3, round_))(jnp.asarray(rounds, jnp.int32))
    expected = np.array([formula(int(round_)) for round_ in rounds])
    np.testing.assert_allclose(got, expected, rtol=RTOL, atol=1e-7 * expected[0])


def test_optimizer_is_descent_with_decoupled_weight_decay():
    """Loshchilov and Hutter's algorithm 2, in which the decay has a rate of its own."""
    grads = gradients(20)
    weights = start = grads[0] * 2
    expected = []
    for t, direction in enumerate(adam(grads, 0.9, 0.99, 1e-7)):
        weights = weights - (0.1 * 0.8**t * direction + 0.02 * weights)
        expected.append(weights)
    optimizer = fo.Optimizer(lrate=("exponential-decay", {"base": 0.1, "rate": 0.8}), w_decay=0.02, modules=["adam"])

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (params + updates, state), params + updates

    params = jnp.asarray(start, jnp.float32)
    got = jax.lax.scan(step, (params, optimizer.init(params)), jnp.asarray(grads, jnp.float32))[1]
    np.testing.assert_allclose(got, np.stack(expected), rtol=0, atol=RTOL * np.abs(expected).max())
