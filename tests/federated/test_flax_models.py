"""Flax models in a federation: a few lines, and the numbers of NumPy for what is trained and what is averaged."""

import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

CLIENTS, SIZE, LRATE = 3, 8, 0.1


@functools.cache
def clients() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(SIZE, 2)).astype(np.float32) * (1 + i) + i for i in range(CLIENTS)]


@functools.cache
def data() -> FederatedData:
    return FederatedData.from_clients(clients())


class Net(nnx.Module):
    """Normalization of its input, so that its statistics are those of the data, and a head with dropout."""

    def __init__(self, rngs: nnx.Rngs, rate: float = 0.5) -> None:
        self.norm = nnx.BatchNorm(2, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.drop(self.norm(x)))[:, 0]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(momentum=0.9, use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(1, name="head")(x)[:, 0]


def nnx_loss(model: Any, batch: Any) -> Any:
    error = (model(batch) - batch[:, 0]) ** 2
    return error.mean(), {"error": error.mean()}


def linen_loss(apply: Any, batch: Any, train: bool) -> Any:
    error = (apply(batch, train) - batch[:, 0]) ** 2
    return error.mean(), {"error": error.mean()}


@functools.cache
def net() -> Net:
    return Net(nnx.Rngs(0))


@functools.cache
def variables() -> Any:
    return LinenNet().init(jax.random.key(0), jnp.ones((1, 2)), False)


@functools.cache
def made(kind: str, local: tuple[str, ...] = (), **options: Any) -> tuple[Federation, Any]:
    """A federation of one full batch a step, and its model."""
    options = {"steps": 3, "local": list(local), **options}
    if kind == "nnx":
        return Federation.from_nnx(net(), nnx_loss, fo.Optimizer(LRATE), **options), net()
    return Federation.from_linen(LinenNet(), linen_loss, fo.Optimizer(LRATE), **options), variables()


def statistics(model: Any) -> np.ndarray:
    if isinstance(model, Net):
        found = model.norm.mean[...], model.norm.var[...]
    else:
        found = model["batch_stats"]["norm"]["mean"], model["batch_stats"]["norm"]["var"]
    return np.asarray(found, float)


def head(model: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(model, Net):
        return np.asarray(model.head.kernel[...], float), np.asarray(model.head.bias[...], float)
    return tuple(np.asarray(model["params"]["head"][name], float) for name in ("kernel", "bias"))  # type: ignore


def scale(model: Any) -> Any:
    return np.asarray(model.norm.scale[...] if isinstance(model, Net) else model["params"]["norm"]["scale"])


def moved(before: np.ndarray, client: int) -> np.ndarray:
    """Three steps of running statistics over the whole of a client's data."""
    each = clients()[client].astype(float)
    now = np.stack([each.mean(axis=0), each.var(axis=0)])
    for _ in range(3):
        before = 0.9 * before + 0.1 * now
    return before


pytestmark = pytest.mark.slow
KINDS = pytest.mark.parametrize("kind", ["nnx", "linen"])


@KINDS
def test_statistics_are_the_mean_of_those_of_the_participants_that_joined(kind: str) -> None:
    federation, model = made(kind)
    state, program = federation.init(model, data()), jax.jit(federation.round, donate_argnums=0)
    expected = np.array([[0.0, 0.0], [1.0, 1.0]])
    rounds = (
        ((0, 2), (1.0, 3.0), (False, False)),
        ((1, 0), (1.0, 1.0), (False, True)),
        ((2, 1), (1.0, 1.0), (True,) * 2),
    )
    for chosen, weights, lost in rounds:
        state, _ = program(
            state, data(), np.array(chosen), weights=np.array(weights, np.float32), dropped=np.array(lost)
        )
        heavy = np.array(weights) * ~np.array(lost)
        if heavy.any():
            expected = np.average([moved(expected, c) for c in chosen], axis=0, weights=heavy)
        np.testing.assert_allclose(statistics(federation.model(state)), expected, rtol=1e-5, atol=1e-5)
        assert type(federation.model(state)) is type(model)


@KINDS
def test_evaluation_is_without_dropout_and_by_the_running_statistics(kind: str) -> None:
    federation, model = made(kind)
    state, _ = federation.run(federation.init(model, data()), data(), 2)
    end = federation.model(state)
    (mean, var), (kernel, bias) = statistics(end), head(end)
    w = scale(end).astype(float)
    offset = np.asarray(end.norm.bias[...] if kind == "nnx" else end["params"]["norm"]["bias"], float)
    expected = []
    for each in clients():
        x = (each.astype(float) - mean) / np.sqrt(var + 1e-5) * w + offset
        expected.append(np.mean(((x @ kernel + bias)[:, 0] - each[:, 0]) ** 2))
    for given in (state, end):
        found = federation.evaluate(given, data(), batch_size=None if given is state else 3)
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)
        np.testing.assert_array_equal(found["error"], found["loss"])
    keys = [federation.evaluate(state, data(), key=jax.random.key(seed))["loss"] for seed in (0, 1)]
    np.testing.assert_array_equal(*keys)


@KINDS
@pytest.mark.parametrize("local", [("**/norm/*",), ("**/head/*",)])
def test_fedbn_and_fedper_are_patterns(kind: str, local: Any) -> None:
    federation, model = made(kind, local)
    before = head(model), scale(model)
    state = federation.init(model, data())
    state, _ = federation.fit(state, data(), 2)
    saved = json.loads(json.dumps(federation.encode(state), allow_nan=False))
    restored = federation.decode(saved, federation.init(model, data(), seed=3))
    state, _ = federation.fit(state, data(), 1)
    for each in (state, federation.fit(restored, data(), 1)[0]):
        models = [federation.model(each, client) for client in (0, 1, None)]
        heads, scales = ([part(one) for one in models] for part in (lambda m: head(m)[0], scale))
        apart, alike = (scales, heads) if "norm" in local[0] else (heads, scales)
        assert not np.array_equal(apart[0], apart[1])
        np.testing.assert_array_equal(alike[0], alike[1])
        np.testing.assert_array_equal(alike[0], alike[2])
        np.testing.assert_array_equal(apart[2], before[1] if "norm" in local[0] else before[0][0])
        # Statistics of their own are those of their own data: three rounds of three steps.
        if "norm" in local[0]:
            for client in (0, 1):
                expected = np.array([[0.0, 0.0], [1.0, 1.0]])
                for _ in range(3):
                    expected = moved(expected, client)
                np.testing.assert_allclose(statistics(models[client]), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(statistics(federation.model(state, 1)), statistics(models[1]))


@KINDS
def test_dropout_draws_apart_by_client_and_step_and_the_same_however_clients_are_run(kind: str) -> None:
    ends = []
    for mapping in ("scan", 2):
        federation, model = made(kind, mapping=mapping, weighting="examples")
        state, history = federation.run(federation.init(model, data(), seed=7), data(), 2)
        ends.append((head(federation.model(state)), history["loss"]))
    np.testing.assert_allclose(ends[0][0][0], ends[1][0][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-4)
    other, _ = federation.run(federation.init(model, data(), seed=8), data(), 2)
    assert not np.allclose(head(federation.model(other))[0], ends[1][0][0], rtol=1e-4)


@KINDS
def test_the_users_model_is_left_as_it_was(kind: str) -> None:
    federation, model = made(kind)
    before = jax.tree.map(np.array, (statistics(model), head(model)))
    federation.fit(federation.init(model, data()), data(), 1)
    jax.tree.map(np.testing.assert_array_equal, (statistics(model), head(model)), before)
    if kind == "nnx":
        assert not model.drop.deterministic
        assert not model.norm.use_running_average


@KINDS
def test_a_model_outlives_the_rounds_that_donate_the_state_it_came_from(kind: str) -> None:
    federation, model = made(kind)
    state = federation.init(model, data())
    early = federation.model(state)
    federation.fit(state, data(), 1)
    np.testing.assert_array_equal(statistics(early), [[0, 0], [1, 1]])


@KINDS
def test_a_model_may_be_evaluated_after_each_round(kind: str) -> None:
    """What `run` calls after each round gets enough to evaluate a model with statistics."""
    federation, model = made(kind)
    state = federation.init(model, data())
    _, history = federation.run(
        state, data(), 2, evaluate=lambda given: {"test": federation.evaluate(given, data())["loss"].mean()}
    )
    assert history["test"].shape == (2,)


@KINDS
def test_partial_batches_of_models_with_statistics_are_refused(kind: str) -> None:
    federation, model = made(kind, batch_size=3)
    with pytest.raises(ValueError, match="use remainder='drop' or 'wrap'"):
        federation.run(federation.init(model, data()), data(), 1)
    each = lambda loss: lambda *args: loss(*args)[0] + 0 * args[1][:, 0]  # noqa: E731
    if kind == "nnx":
        federation = Federation.from_nnx(net(), each(nnx_loss), fo.Optimizer(LRATE), batch_size=3)
    else:
        by_example = lambda apply, batch, train: linen_loss(apply, batch, train)[0] + 0 * batch[:, 0]  # noqa: E731
        federation = Federation.from_linen(LinenNet(), by_example, fo.Optimizer(LRATE), batch_size=3)
    with pytest.raises(ValueError, match="would count in the model's state: use remainder='drop' or 'wrap'"):
        federation.run(federation.init(model, data()), data(), 1)


def test_only_what_is_chosen_is_trained() -> None:
    federation = Federation.from_nnx(
        net(), nnx_loss, fo.Optimizer(LRATE), wrt=nnx.All(nnx.Param, nnx.PathContains("head")), steps=2
    )
    state, _ = federation.run(federation.init(net(), data()), data(), 2)
    end = federation.model(state)
    np.testing.assert_array_equal(scale(end), scale(net()))
    assert not np.array_equal(head(end)[0], head(net())[0])


def test_a_linen_loss_without_an_argument_for_training_is_called_without() -> None:
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(1)(x)[:, 0]

    federation = Federation.from_linen(
        Plain(), lambda apply, batch: (apply(batch) - batch[:, 0]) ** 2, fo.Optimizer(0.001), batch_size=3
    )
    given = Plain().init(jax.random.key(0), jnp.ones((1, 2)))
    state, history = federation.run(federation.init(given, data()), data(), 5)
    assert history["loss"][-1].mean() < history["loss"][0].mean()
    assert federation.model(state).keys() == {"params"}
    assert federation.evaluate(state, data())["loss"].shape == (CLIENTS,)


def test_a_linen_loss_may_name_training_by_keyword_alone() -> None:
    def loss(apply: Any, batch: Any, *, train: bool) -> Any:
        return linen_loss(apply, batch, train)

    federation = Federation.from_linen(LinenNet(), loss, fo.Optimizer(LRATE))
    state, _ = federation.run(federation.init(variables(), data()), data(), 1)
    assert np.isfinite(statistics(federation.model(state))).all()


def test_frozen_variables_are_variables_too() -> None:
    from flax.core import freeze

    federation, _ = made("linen")
    state, _ = federation.run(federation.init(freeze(variables()), data()), data(), 1)
    assert np.isfinite(statistics(federation.model(state))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Federation.from_nnx({"w": 1}, nnx_loss, fo.Optimizer(LRATE)), "expected an `nnx.Module`, not dict"),
        (lambda: Federation.from_nnx(LinenNet(), nnx_loss, fo.Optimizer(LRATE)), "an `nnx.Module`, not LinenNet"),
        (lambda: made("nnx")[0].init({"w": jnp.ones(2)}, 3), "expected an `nnx.Module`, not dict"),
        (lambda: made("linen")[0].init(LinenNet(), 3), "expected the variables of a linen module"),
        (lambda: made("linen")[0].init({"w": jnp.ones(2)}, 3), "expected the variables of a linen module"),
        (lambda: Federation.from_linen(net(), linen_loss, fo.Optimizer(LRATE)), "linen"),
    ],
)
def test_what_is_no_model_of_that_kind(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_a_model_other_than_the_federations_is_refused() -> None:
    federation, _ = made("nnx")
    with pytest.raises((TypeError, ValueError), match="Federation"):
        federation.init(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), data())
