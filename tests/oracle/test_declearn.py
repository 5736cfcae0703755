"""The numbers of declearn 2.9.1, which computes in float64 on NumPy arrays here; ours are float32.

Where declearn is known to be wrong, `tests/test_known_faults.py` says what is right.
"""

import base64
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo

pytest.importorskip("declearn", reason="the reference has no release for this Python", exc_type=ImportError)

from declearn import optimizer as reference
from declearn.model.sklearn import NumpyVector
from declearn.optimizer import modules as reference_modules
from declearn.optimizer import regularizers as reference_regularizers
from declearn.optimizer import schedulers as reference_schedulers

pytestmark = pytest.mark.slow

ROUNDS, STEPS = 3, 7


def normal(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"b": (4,), "s": (), "w": (3, 4)}
    return {
        name: scale * rng.normal(size=shape).astype(np.float32).astype(np.float64) for name, shape in shapes.items()
    }


def ours(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def assert_close(mine, theirs, rtol=1e-5):
    """Compare relatively to the largest number of the tree: a single one may be a difference of two that are near."""
    theirs = theirs.coefs if isinstance(theirs, NumpyVector) else theirs
    assert mine.keys() == theirs.keys()
    largest = max(np.max(np.abs(leaf)) for leaf in theirs.values())
    for name, leaf in theirs.items():
        np.testing.assert_allclose(mine[name], leaf, rtol=0, atol=rtol * largest, err_msg=name)


MODULES = [
    ("adagrad", {}),
    ("adagrad", {"eps": 1e-2, "round_reset": True}),
    ("adam", {}),
    ("adam", {"beta_1": 0.5, "beta_2": 0.999, "eps": 1e-3}),
    ("adam", {"amsgrad": True, "beta_2": 0.7}),
    ("adam", {"round_reset": True}),
    ("ewma", {}),
    ("ewma", {"beta": 0.3, "round_reset": True}),
    ("gaussian-noise", {"std": 0.0, "safe_mode": False, "seed": 0}),
    ("l2-clipping", {}),
    ("l2-clipping", {"max_norm": 2.5}),
    ("l2-global-clipping", {}),
    ("l2-global-clipping", {"max_norm": 4.0}),
    ("momentum", {}),
    ("momentum", {"beta": 0.5, "nesterov": True, "round_reset": True}),
    ("rmsprop", {}),
    ("rmsprop", {"beta": 0.5, "eps": 1e-2, "round_reset": True}),
    ("scaffold-client", {}),
    ("scaffold-server", {}),
    ("yogi", {}),
    ("yogi", {"beta_1": 0.5, "beta_2": 0.9, "eps": 1e-3, "round_reset": True}),
    ("yogi", {"amsgrad": True, "beta_2": 0.7}),
    ("yogi-momentum", {}),
    ("yogi-momentum", {"beta": 0.3, "round_reset": True}),
]
REGULARIZERS = [(name, config) for name in ("fedprox", "lasso", "ridge") for config in ({}, {"alpha": 0.7})]


def of_the_reference(plugins):
    """Leave out our bricks, which `functional_optimodules.integrations.declearn` registers with the reference."""
    return {name: plugin for name, plugin in plugins.items() if not name.startswith("fo-")}


def test_every_plugin_of_the_reference_is_compared():
    assert {name for name, _ in MODULES} == of_the_reference(reference.list_optim_modules()).keys()
    assert {name for name, _ in REGULARIZERS} == of_the_reference(reference.list_optim_regularizers()).keys()
    assert {name for name, _ in SCHEDULERS} == set(reference.list_rate_schedulers()) - {"constant"}


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (fo.list_optim_modules, reference.list_optim_modules),
        (fo.list_optim_regularizers, reference.list_optim_regularizers),
        (fo.list_rate_schedulers, reference.list_rate_schedulers),
    ],
)
def test_names_class_names_fields_and_defaults_are_those_of_the_reference(mine, theirs):
    for name, plugin in of_the_reference(theirs()).items():
        if name == "constant":
            continue
        own = mine()[name]
        assert own.__name__ == plugin.__name__
        parameters = inspect.signature(own).parameters
        for field, parameter in inspect.signature(plugin).parameters.items():
            assert parameters[field].default == parameter.default, (name, field)


@pytest.mark.parametrize(("name", "config"), MODULES)
def test_modules_over_rounds(name, config):
    module = fo.OptiModule.from_specs(name, config)
    other = reference_modules.OptiModule.from_specs(name, config)
    for round_ in range(ROUNDS):
        module.on_round_start()
        other.on_round_start()
        for step in range(STEPS):
            gradients = normal((round_, step))
            assert_close(module.run(ours(gradients)), other.run(NumpyVector(gradients)))


@pytest.mark.parametrize(("name", "config"), REGULARIZERS)
def test_regularizers_over_rounds(name, config):
    regularizer = fo.Regularizer.from_specs(name, config)
    other = reference_regularizers.Regularizer.from_specs(name, config)
    for round_ in range(ROUNDS):
        regularizer.on_round_start()
        other.on_round_start()
        for step in range(STEPS):
            gradients, weights = normal((round_, step)), normal((round_, step, 1))
            mine = regularizer.run(ours(gradients), ours(weights))
            assert_close(mine, other.run(NumpyVector(gradients), NumpyVector(weights)))


DECAY = {"base": 0.3, "rate": 0.4}
CYCLE = {"base": 0.01, "max_lr": 0.3, "stepsize": 4}
COSINE = {"base": 0.01, "max_lr": 0.3}
SCHEDULERS = [
    *[
        (name, config | {"step_level": level})
        for level in (True, False)
        for name, config in [
            ("exponential-decay", DECAY),
            ("inverse-scaling", DECAY),
            ("linear-decay", DECAY | {"rate": 0.07}),
            ("piecewise-decay", DECAY | {"step_size": 2}),
            ("polynomial-decay", {"base": 0.3, "power": 3, "limit": 15}),
            ("polynomial-decay", {"base": 0.3, "power": 1, "limit": 2}),
            ("cosine-annealing", COSINE | {"duration": 2}),
            ("cosine-annealing", COSINE | {"duration": 17}),
        ]
    ],
    ("exponential-decay", DECAY),
    ("cosine-annealing-warm-restarts", COSINE | {"period": 5}),
    ("cosine-annealing-warm-restarts", COSINE | {"period": 8, "t_mult": 0.6}),
    ("cyclic-exp-range", CYCLE | {"decay": 0.9}),
    ("cyclic-triangular", CYCLE),
    ("cyclic-triangular", CYCLE | {"decay": True, "stepsize": 3}),
    ("warmup", {"base": 0.3, "warmup": 9}),
    ("warmup", {"base": ("exponential-decay", DECAY | {"step_level": True}), "warmup": 9}),
    ("warmup", {"base": ("exponential-decay", DECAY | {"step_level": False}), "warmup": 9}),
    ("warmup-rounds", {"base": 0.3, "warmup": 2}),
    ("warmup-rounds", {"base": ("inverse-scaling", DECAY | {"step_level": True}), "warmup": 2}),
    ("warmup-rounds", {"base": ("inverse-scaling", DECAY | {"step_level": False}), "warmup": 1}),
]


@pytest.mark.parametrize(("name", "config"), SCHEDULERS)
def test_schedulers_over_rounds(name, config):
    scheduler = fo.Scheduler.from_specs(name, config)
    other = reference_schedulers.Scheduler.from_specs(name, config)
    mine, theirs = [], []
    for _ in range(ROUNDS):
        scheduler.on_round_start()
        other.on_round_start()
        mine += [scheduler.get_next_rate() for _ in range(STEPS)]
        theirs += [other.get_next_rate() for _ in range(STEPS)]
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * max(theirs) if min(theirs) == 0 else 0)


class Model:
    """As much of a model as the reference's optimizer asks for."""

    def __init__(self, weights):
        self.weights = NumpyVector(weights)

    def get_weights(self, trainable):
        return self.weights

    def apply_updates(self, updates):
        self.weights = self.weights + updates


OPTIMIZERS = [
    {"lrate": 0.1},
    {"lrate": 0.1, "w_decay": 0.01},
    {
        "lrate": 0.02,
        "w_decay": 0.003,
        "regularizers": ["fedprox", ("ridge", {"alpha": 0.05}), "lasso"],
        "modules": [("l2-global-clipping", {"max_norm": 2.0}), ("adam", {"amsgrad": True})],
    },
    {
        "lrate": ("cosine-annealing", {"base": 0.001, "max_lr": 0.1, "duration": 18}),
        "w_decay": ("exponential-decay", {"base": 0.01, "rate": 0.9}),
        "regularizers": [("fedprox", {"alpha": 0.5})],
        "modules": [("momentum", {"nesterov": True, "round_reset": True}), "rmsprop"],
    },
    {"lrate": ("warmup", {"base": 0.05, "warmup": 5}), "modules": ["scaffold-client", "yogi", "l2-clipping"]},
]


def pull(weights, seed):
    """Make gradients that depend on where the weights are, so that the trajectories could part."""
    return {
        name: 0.3 * leaf + noise for (name, leaf), noise in zip(weights.items(), normal(seed).values(), strict=True)
    }


@pytest.mark.parametrize("config", OPTIMIZERS)
def test_optimizer_over_rounds(config):
    optimizer = fo.Optimizer.from_config(config)
    other = reference.Optimizer.from_config(config)
    params, model = ours(normal(99)), Model(normal(99))
    for round_ in range(ROUNDS):
        optimizer.start_round()
        other.start_round()
        for step in range(STEPS):
            before = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
            params = optimizer.apply_gradients(params, ours(pull(before, (round_, step))))
            other.apply_gradients(model, NumpyVector(pull(model.weights.coefs, (round_, step))))
            assert_close(params, model.weights)


@pytest.mark.parametrize(
    "specs",
    [
        ("exponential-decay", DECAY | {"step_level": False}),
        ("linear-decay", DECAY | {"step_level": False}),
        ("cosine-annealing", COSINE | {"duration": 2, "step_level": False}),
    ],
)
def test_optimizer_whose_rates_follow_rounds(specs):
    """The reference computes a rate one step early: it is handed the round's own here."""
    config = {"lrate": specs, "w_decay": 0.01, "modules": ["adam"]}
    optimizer, other = fo.Optimizer.from_config(config), reference.Optimizer.from_config(config)
    weights, model = normal(99), Model(normal(99))
    for round_ in range(ROUNDS):
        optimizer.start_round()
        other.start_round()
        for step in range(STEPS):
            gradients = normal((round_, step))
            other._lrate = other._lrate_scheduler.compute_value(step, round_)
            theirs = other.compute_updates_from_gradients(model, NumpyVector(gradients))
            assert_close(optimizer.compute_updates_from_gradients(ours(weights), ours(gradients)), theirs)


def read(array):
    return np.frombuffer(base64.b64decode(array["data"]), array["dtype"]).reshape(array["shape"])


def test_scaffold_exchange_with_unequal_numbers_of_steps():
    """Every client takes part in every round, and each collects once: there the reference is right."""
    names = ["ada", "bea", "cyd"]
    clients = {name: fo.ScaffoldClientModule() for name in names}
    server = fo.ScaffoldServerModule()
    others = {name: reference_modules.ScaffoldClientModule() for name in names}
    other_server = reference_modules.ScaffoldServerModule()
    for round_ in range(ROUNDS):
        for index, name in enumerate(names):
            for step in range(STEPS - index):
                gradients = normal((round_, step, index))
                assert_close(clients[name].run(ours(gradients)), others[name].run(NumpyVector(gradients)))
        messages = {name: client.collect_aux_var() for name, client in clients.items()}
        auxes = {name: other.collect_aux_var() for name, other in others.items()}
        for name, aux in auxes.items():
            delta = messages[name]["variables"]["delta"]
            assert_close({path: read(array) for path, array in delta.items()}, aux.delta)
        server.process_aux_var(messages)
        other_server.process_aux_var(auxes["ada"] + auxes["bea"] + auxes["cyd"])
        variate, other_variate = server.collect_aux_var(), other_server.collect_aux_var()
        sent = variate["variables"]["variate"]
        assert_close({path: read(array) for path, array in sent.items()}, other_variate.state)
        for name in names:
            clients[name].process_aux_var(variate)
            others[name].process_aux_var(other_variate)
