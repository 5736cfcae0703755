"""declearn's modules as pure functions: their own numbers, over rounds, compiled, chained and saved."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo
from functional_optimodules.testing import contract

pytest.importorskip("declearn", reason="the reference has no release for this Python", exc_type=ImportError)

from declearn.model.sklearn import NumpyVector
from declearn.optimizer import list_optim_modules
from declearn.optimizer import modules as reference
from declearn.optimizer.regularizers import FedProxRegularizer

from functional_optimodules.integrations.declearn import functionalize, to_declearn

ROUNDS, STEPS = 3, 3
EXCHANGING = {"scaffold-client", "scaffold-server"}


def normal(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in {"w": (3, 2), "b": (4,)}.items()}


def ours(tree):
    return jax.tree.map(jnp.asarray, tree)


def assert_same_over_rounds(brick, module, rtol=1e-5, dtype=np.float32):
    for round_ in range(ROUNDS):
        brick.on_round_start()
        module.on_round_start()
        for step in range(STEPS):
            gradients = normal((round_, step), dtype)
            output, expected = brick.run(ours(gradients)), module.run(NumpyVector(gradients)).coefs
            largest = max(np.abs(values).max() for values in expected.values())
            for name, values in expected.items():
                assert output[name].dtype == dtype
                np.testing.assert_allclose(output[name], values, rtol=0, atol=rtol * largest)


CONFIGS = [
    {},
    {"round_reset": True},
    {"amsgrad": True},
    {"amsgrad": True, "round_reset": True},
    {"nesterov": True},
]
CASES = [
    (name, config)
    for name, cls in list_optim_modules().items()
    if not name.startswith("fo-") and name not in {"gaussian-noise", *EXCHANGING}
    for config in CONFIGS
    if config.keys() <= set(cls.__init__.__code__.co_varnames)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_module_of_declearn_that_exchanges_and_draws_nothing_has_its_own_numbers(name, config):
    module = list_optim_modules()[name]
    assert_same_over_rounds(functionalize(module(**config)), module(**config))


@pytest.mark.slow
def test_in_64_bit_mode_they_are_equal_to_the_last_digits():
    with jax.enable_x64(True):
        brick = functionalize(reference.AdamModule(beta_2=0.999))
        assert_same_over_rounds(brick, reference.AdamModule(beta_2=0.999), rtol=1e-12, dtype=np.float64)


class Holding(reference.OptiModule, register=False):
    """Gradients less those of the round's first step: it begins with `None`, in each round."""

    name = "holding"

    def __init__(self):
        self.held = None
        self.rounds = 0
        self.total = 0.0

    def on_round_start(self):
        self.held = None
        self.rounds += 1

    def run(self, gradients):
        if self.held is None:
            self.held = gradients
        self.total = self.total + 0.5
        return (gradients - self.held) / (1 + self.rounds) + self.total * gradients


def test_what_is_none_at_first_may_be_so_in_each_round_and_counts_go_on():
    brick = functionalize(Holding())
    assert_same_over_rounds(brick, Holding())
    assert brick.state.values["rounds"] == ROUNDS
    assert brick.state.values["total"] == 0.5 * ROUNDS * STEPS


@pytest.mark.slow
def test_it_is_a_pure_pair_under_scan_and_vmap_with_one_trace_for_all_steps():
    init, update = functionalize(reference.AdamModule(amsgrad=True))
    gradients = [normal(step) for step in range(STEPS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)

    def step(state, g):
        output, state = update(g, state)
        return state, output

    state, outputs = jax.jit(lambda: jax.lax.scan(step, init(ours(gradients[0])), stacked))()
    assert state.values["steps"] == STEPS
    module = reference.AdamModule(amsgrad=True)
    for index, g in enumerate(gradients):
        for name, values in module.run(NumpyVector(g)).coefs.items():
            np.testing.assert_allclose(outputs[name][index], values, rtol=1e-5, atol=1e-5)
    states = jax.vmap(init)(stacked)
    mapped, _ = jax.vmap(update)(stacked, states)
    first, _ = update(ours(gradients[1]), init(ours(gradients[1])))
    np.testing.assert_allclose(mapped["w"][1], first["w"], rtol=1e-6)


def test_it_chains_with_bricks_and_with_optax_over_any_container():
    momentum = reference.MomentumModule(beta=0.5)
    optimizer = fo.Optimizer(0.1, modules=[fo.L2Clipping(1.0), functionalize(momentum), "adam"])
    same = fo.Optimizer(0.1, modules=[fo.L2Clipping(1.0), fo.MomentumModule(beta=0.5), "adam"])
    chain = optax.chain(functionalize(momentum), optax.scale(-0.1))
    params = {"layer": [jnp.ones((2, 2)), jnp.ones(3)]}
    theirs, state = params, chain.init(params)
    mine = params
    for _ in range(3):
        gradients = jax.tree.map(jnp.sin, mine)
        expected = same.compute_updates_from_gradients(mine, gradients)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
            optimizer.compute_updates_from_gradients(mine, gradients),
            expected,
        )
        mine = optax.apply_updates(mine, expected)
        updates, state = chain.update(jax.tree.map(jnp.sin, theirs), state)
        theirs = optax.apply_updates(theirs, updates)
    assert jax.tree.structure(theirs) == jax.tree.structure(params)


@pytest.mark.slow
@pytest.mark.parametrize("module", [reference.AdamModule(amsgrad=True, round_reset=True), Holding()])
def test_it_keeps_the_contract_of_bricks(module):
    # It is given as an instance, and not by a configuration; at a gradient of 0, the derivative is declearn's own.
    excused = {"check_config_round_trip", "check_resume_in_mid_round", "check_gradient_at_zero_is_finite"}
    checks = {name: check for name, check in contract(functionalize(module)) if name not in excused}
    assert "check_copies_are_independent" in checks
    for check in checks.values():
        check()


@pytest.mark.slow
def test_modules_of_equal_attributes_make_equal_bricks():
    assert functionalize(reference.AdamModule()) == functionalize(reference.AdamModule())
    assert hash(functionalize(reference.AdamModule())) == hash(functionalize(reference.AdamModule()))
    assert functionalize(reference.AdamModule()) != functionalize(reference.AdamModule(eps=1e-3))
    assert functionalize(reference.AdamModule()) != functionalize(reference.YogiModule())


def test_what_was_a_brick_is_one_again():
    assert functionalize(to_declearn(fo.AdamModule(beta_1=0.5))) == fo.AdamModule(beta_1=0.5)


def test_a_configuration_cannot_hold_it():
    with pytest.raises(TypeError, match="cannot be written in a configuration"):
        functionalize(reference.AdamModule()).get_config()


class Deciding(Holding, register=False):
    def run(self, gradients):
        self.rounds = self.rounds + gradients.sum().coefs["a"]
        return gradients if self.rounds > 0 else -1 * gradients


class Drawing(Holding, register=False):
    def run(self, gradients):
        return random.SystemRandom().random() * gradients


class OnTheHost(Holding, register=False):
    def run(self, gradients):
        return type(gradients)({name: np.asarray(values) for name, values in gradients.coefs.items()})


class Packing(Holding, register=False):
    def run(self, gradients):
        return NumpyVector(gradients.pack())


class Listing(Holding, register=False):
    def run(self, gradients):
        self.held = [gradients]
        return gradients


class Appending(Holding, register=False):
    def __init__(self):
        super().__init__()
        self.past = []

    def run(self, gradients):
        self.past.append(gradients)
        return sum(self.past)


class Seeded(Holding, register=False):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def run(self, gradients):
        return self.generator.random() * gradients


class Late(Holding, register=False):
    def run(self, gradients):
        self.held = 3.0
        return gradients


class Forgetting(Holding, register=False):
    def run(self, gradients):
        self.total = self.total + gradients
        return super().run(gradients)


class Summing(Holding, register=False):
    def run(self, gradients):
        return gradients.sum()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Deciding(), "does more than arithmetic of Vectors: TracerBoolConversionError"),
        (Drawing(), "is another function each time that it is traced"),
        (OnTheHost(), "TracerArrayConversionError"),
        (Packing(), "it takes a Vector to the host"),
        (Listing(), r"remembers \['held'\], which are neither Vectors nor numbers"),
        (Appending(), r"remembers \['past'\], which are neither"),
        (Seeded(), r"remembers \['generator'\], which are neither"),
        (Late(), r"remembers \['held'\], which are neither"),
        (Forgetting(), r"`on_round_start` forgets \['held'\], and not all of \['held', 'total'\]"),
        (Summing(), "not a Vector like the gradients"),
        (reference.GaussianNoiseModule(safe_mode=True), "draws noise on the host.*use GaussianNoiseModule"),
        (reference.GaussianNoiseModule(safe_mode=False, seed=0), "draws noise on the host"),
        (reference.ScaffoldClientModule(), "exchanges auxiliary variables"),
        (FedProxRegularizer(), "takes an `OptiModule` of declearn, not FedProxRegularizer"),
    ],
)
def test_what_does_more_is_refused_with_the_reason(module, words):
    with pytest.raises(TypeError, match=words):
        functionalize(module)


def test_one_that_has_run_is_refused_and_left_as_it_was():
    module = reference.MomentumModule()
    module.run(NumpyVector(normal(0)))
    velocity = module.velocity
    with pytest.raises(ValueError, match=r"has run, and remembers \['velocity'\]"):
        functionalize(module)
    assert module.velocity is velocity


def test_the_module_itself_is_never_run():
    module = reference.AdamModule()
    functionalize(module).run(ours(normal(0)))
    assert module.get_state() == reference.AdamModule().get_state()
