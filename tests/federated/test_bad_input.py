"""What is refused, each with an error that says what is wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation, clients_mesh

ONES = [np.ones((n, 2), np.float32) for n in (3, 5, 4)]


def squares(w: Any, batch: Any) -> Any:
    return jnp.sum((w - batch) ** 2, axis=-1)


def federation(loss: Any = squares, **options: Any) -> Federation:
    return Federation(loss, fo.Optimizer(0.1, modules=["momentum"]), **{"batch_size": 2, **options})


def data() -> FederatedData:
    return FederatedData.from_clients(ONES)


def one_round(federation: Federation, who: Any = (0,), **options: Any) -> Any:
    return federation.round(federation.init(jnp.zeros(2), data()), data(), np.asarray(who), **options)


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ([3, 0], r"participants \[3\] are out of range: there are 3 clients"),
        ([-1], r"participants \[-1\] are out of range"),
        ([0, 2, 2], r"participants \[2\] are repeated"),
        ([], "expected integers along one axis"),
        ([0.5], "expected integers"),
        ([[0]], "along one axis"),
    ],
)
def test_participants(who: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_round(federation(), who)


def test_participants_out_of_range_of_the_given_batches_clients() -> None:
    stateless = Federation(squares, fo.Optimizer(0.1))
    with pytest.raises(ValueError, match=r"\[5\] are out of range: there are 4 clients"):
        stateless.round(stateless.init(jnp.zeros(2), 4), np.ones((1, 1, 2, 2), np.float32), [5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, 2.0]}, r"weights of shape \[2\] for 1 participants"),
        ({"weights": [-1.0]}, "should be finite and >= 0"),
        ({"weights": [np.nan]}, "should be finite and >= 0"),
        ({"dropped": [True, False]}, r"dropped of shape \[2\]"),
        ({"num_steps": [1]}, "are for given batches"),
    ],
)
def test_options_of_a_round(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_round(federation(), **{name: np.array(value) for name, value in options.items()})


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (np.ones((2, 1, 2, 2)), {}, "batches of 2 clients for 1 participants"),
        (np.ones((1, 2)), {}, "participants x steps x examples"),
        ({"a": np.ones((1, 2, 3)), "b": np.ones((1, 2, 4))}, {}, "alike in these"),
        (np.ones((1, 3, 2, 2)), {"num_steps": [4]}, r"num_steps=\[4\] should be from 0 to the 3"),
        (np.ones((1, 3, 2, 2)), {"mask": np.ones((1, 3, 1), bool)}, "a mask of shape"),
    ],
)
def test_given_batches(batches: Any, options: Any, message: str) -> None:
    state = federation().init(jnp.zeros(2), 3)
    with pytest.raises(ValueError, match=message):
        federation().round(state, batches, [0], **options)


def test_batches_larger_than_a_clients_data_of_which_nothing_would_remain() -> None:
    with pytest.raises(ValueError, match="batches of 4 with remainder='drop', and a client of 3 examples"):
        federation(batch_size=4, remainder="drop").init(jnp.zeros(2), data())


@pytest.mark.parametrize(
    ("client", "server"),
    [(["scaffold-client"], []), ([], ["scaffold-server"]), (["scaffold-server"], ["scaffold-client"])],
)
def test_a_module_without_its_counterpart(client: Any, server: Any) -> None:
    with pytest.raises(
        ValueError, match=r"'scaffold' have .* on the clients' side .* expected a module and its counterpart"
    ):
        Federation(squares, fo.Optimizer(0.1, modules=client), fo.Optimizer(1.0, modules=server))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda w, b: (w - b) ** 2, ValueError, r"the loss has shape \[2, 2\] for a batch of 2"),
        (lambda w, b: jnp.sum((w - b) ** 2), ValueError, "the loss is a scalar, .* use remainder='drop' or 'wrap'"),
        (lambda w, b: (squares(w, b), {"m": b}), ValueError, r"the metric 'm' has shape \[2, 2\]"),
        (lambda w, b: (squares(w, b), {"round": squares(w, b)}), ValueError, "metric named 'round'"),
        (lambda w, b: (squares(w, b), squares(w, b)), TypeError, "alone or with a dict of metrics"),
    ],
)
def test_losses(loss: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        one_round(federation(loss))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("remainder", "pad"),
        ("weighting", "none"),
        ("sampling", "random"),
        ("on_nonfinite", "ignore"),
        ("epochs", 0),
        ("batch_size", 1.5),
        ("mapping", 0),
        ("mapping", "pmap"),
    ],
)
def test_options_of_a_federation(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}={value!r} should be"):
        federation(**{option: value})


def test_a_mesh_without_an_axis_of_clients() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    for call in (lambda: federation(mapping=mesh), lambda: FederatedData.from_clients(ONES, mesh)):
        with pytest.raises(ValueError, match=r"axes \('data',\), and none named 'clients'"):
            call()


def test_data_and_state_laid_out_otherwise() -> None:
    state = federation().init(jnp.zeros(2), 4)
    with pytest.raises(ValueError, match="data of 3 clients in 3 slots, and a state made for 4 in 4"):
        federation().round(state, data(), [0])


def test_data_in_blocks_for_another_mesh() -> None:
    mesh = clients_mesh(jax.devices()[:1])
    apart = jax.tree.map(lambda leaf: leaf, data())
    object.__setattr__(apart, "num_shards", 3)
    with pytest.raises(ValueError, match="data in 3 blocks, for a mesh of 1"):
        Federation(squares, fo.Optimizer(0.1), mapping=mesh).round(
            Federation(squares, fo.Optimizer(0.1), mapping=mesh).init(jnp.zeros(2), 3), apart, [0]
        )


def test_data_in_blocks_for_no_mesh() -> None:
    apart = data()
    object.__setattr__(apart, "num_shards", 3)
    with pytest.raises(ValueError, match="data in 3 blocks, for mapping='scan'"):
        federation(mapping="scan").evaluate(jnp.zeros(2), apart)


@pytest.mark.parametrize("clients", [0, -1, 2.5, None])
def test_a_number_of_clients(clients: Any) -> None:
    with pytest.raises(ValueError, match="number of at least 1"):
        federation().init(jnp.zeros(2), clients)


@pytest.mark.parametrize("size", [0, 4, 1.5])
def test_a_sample_of_clients(size: Any) -> None:
    with pytest.raises(ValueError, match="should be from 1 to the 3 clients"):
        federation().run(federation().init(jnp.zeros(2), data()), data(), 1, participants=size)


def test_what_run_and_fit_take() -> None:
    state = federation().init(jnp.zeros(2), data())
    with pytest.raises(TypeError, match="take FederatedData, not list"):
        federation().run(state, ONES, 1)
    with pytest.raises(ValueError, match="every=0 should be an integer of at least 1"):
        federation().fit(state, data(), 1, every=0)
    with pytest.raises(ValueError, match="`evaluate` returns a metric 'loss'"):
        federation().run(state, data(), 1, evaluate=lambda w: {"loss": w})
    with pytest.raises(ValueError, match=r"weights of shape \[2\] for 3 clients"):
        federation().run(state, data(), 1, weights=jnp.ones(2))
