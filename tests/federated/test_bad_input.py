"""What is refused, each with an error that says what is wrong."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation, clients_mesh

from .test_rounds import ClaimModule, ClaimsModule

ONES = [np.ones((n, 2), np.float32) for n in (3, 5, 4)]


class MadeState(NamedTuple):
    number: jax.Array


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
    with pytest.raises(TypeError, match="callback=3 should be a function of the state and the history"):
        federation().fit(state, data(), 1, callback=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`evaluate` returns a metric 'loss'"):
        federation().run(state, data(), 1, evaluate=lambda w: {"loss": w})
    with pytest.raises(ValueError, match=r"weights of shape \[2\] for 3 clients"):
        federation().run(state, data(), 1, weights=jnp.ones(2))


@pytest.mark.parametrize("entry", ["round", "run", "fit"])
class TestWeights:
    @staticmethod
    def call(entry: str, weights: Any) -> Any:
        state = federation().init(jnp.zeros(2), data())
        if entry == "round":
            return federation().round(state, data(), [0, 1, 2], weights=weights)
        return getattr(federation(), entry)(state, data(), 1, weights=weights)

    @pytest.mark.slow
    @pytest.mark.parametrize("wrong", [[1.0, -1.0, 1.0], [np.nan, 1.0, 1.0], [1.0, np.inf, 0.0], [0.0] * 3, ["a"] * 3])
    def test_that_mean_nothing(self, entry: str, wrong: Any) -> None:
        for weights in (wrong, np.array(wrong)):
            with pytest.raises(ValueError, match=r"weights \[.*\] should be finite and >= 0, and not all 0"):
                self.call(entry, weights)

    def test_of_another_length(self, entry: str) -> None:
        with pytest.raises(ValueError, match=r"weights of shape \[2\] for 3 (participants|clients)"):
            self.call(entry, [1.0, 2.0])

    @pytest.mark.slow
    def test_in_a_list_are_taken(self, entry: str) -> None:
        listed, array = self.call(entry, [1, 0, 3]), self.call(entry, jnp.array([1.0, 0.0, 3.0]))
        np.testing.assert_array_equal(listed[0].params, array[0].params)


def server_for(number: int) -> Federation:
    server = fo.Optimizer(1.0, modules=[("scaffold-server", {"num_clients": number})])
    return Federation(squares, fo.Optimizer(0.1, modules=["scaffold-client"]), server, batch_size=2)


def per_client_for(number: int) -> Federation:
    client, server = fo.Optimizer(0.1, modules=[ClaimModule()]), fo.Optimizer(1.0, modules=[ClaimsModule(number)])
    return Federation(squares, client, server, batch_size=2)


def silent_server_for(number: int) -> Federation:
    server = fo.Optimizer(1.0, modules=[("feddyn-server", {"num_clients": number})])
    return Federation(squares, fo.Optimizer(0.1, modules=["feddyn-client"]), server, batch_size=2)


@pytest.mark.parametrize("make", [server_for, per_client_for, silent_server_for])
def test_a_servers_module_that_was_told_of_fewer_clients(make: Any) -> None:
    message = r"there are 3 clients, and the server's .*Module\(num_clients=2\) is for 2: give it num_clients=3"
    for clients in (3, data()):
        with pytest.raises(ValueError, match=message):
            make(2).init(jnp.zeros(2), clients)
    state = server_for(3).init(jnp.zeros(2), 3)
    for batches in (data(), np.ones((1, 1, 2, 2), np.float32)):
        with pytest.raises(ValueError, match=r"there are 3 clients, and the server's .* is for 2"):
            server_for(2).round(state, batches, [0])
    make(3).init(jnp.zeros(2), data())


def sides(client: Any = (), server: Any = (), **options: Any) -> Federation:
    return Federation(squares, fo.Optimizer(0.1, modules=client), fo.Optimizer(1.0, modules=server), **options)


DECAY = ("exponential-decay", {"base": 0.1, "rate": 0.9, "step_level": True})


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        (sides(["momentum"]), sides(["ewma"]), "client was 'optimizer momentum', and is 'optimizer ewma' here"),
        (sides(["momentum"]), sides(), "client was 'optimizer momentum', and is 'optimizer' here"),
        (sides(), sides(server=["adam"]), "server was 'optimizer', and is 'optimizer adam' here"),
        (sides(server=["adagrad"]), sides(server=["adam"]), "server was 'optimizer adagrad'"),
        (sides(["scaffold-client"], ["scaffold-server"]), sides(), "client was 'optimizer scaffold-client'"),
        (sides([("momentum", {"round_reset": True})]), sides(["momentum"]), "what a client keeps lacks the leaf"),
        (sides(["momentum"]), sides([("momentum", {"round_reset": True})]), "what a client keeps has a leaf"),
        (sides(server=["adam"]), sides(server=[("adam", {"amsgrad": True})]), "server's state .* 'modules/adam/"),
        (sides(), Federation(squares, fo.Optimizer(DECAY)), "what a client keeps lacks the leaf"),
    ],
)
def test_the_state_of_another_federation(made: Federation, given: Federation, message: str) -> None:
    state = made.init(jnp.zeros(2), data())
    calls = [
        lambda: given.round(state, data(), [0]),
        lambda: jax.jit(lambda state: given.round(state, data(), [0]))(state),
        lambda: given.run(state, data(), 2),
        lambda: given.fit(state, data(), 2),
        lambda: given.encode(state),
        lambda: given.decode(given.encode(given.init(jnp.zeros(2), data())), state),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"the state is of another federation: .*{message}.*: make one with `init`"
        ):
            call()


def test_the_state_of_a_federation_with_other_parameters() -> None:
    state = federation().init(jnp.zeros(2), data())._replace(params=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"what a client keeps has float32\[2\] at '0': expected float32\[3\]"):
        federation().round(state, data(), [0])


def test_a_metric_that_is_a_dict() -> None:
    nested = lambda w, b: (squares(w, b), {"accuracy": {"top": squares(w, b)}})  # noqa: E731
    message = (
        "the metric 'accuracy' is a dict: expected a scalar, or one value per example. Give each .* 'accuracy/top'"
    )
    with pytest.raises(TypeError, match=message):
        one_round(federation(nested))
    with pytest.raises(TypeError, match=message):
        federation(nested).evaluate(jnp.zeros(2), data())


class Network(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layer = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (Network().norm, "'mean' is of nnx.BatchStat"),
        (Network().dropout, "'rngs/count' is of nnx.RngCount"),
        (nnx.state(Network()), "'dropout/rngs/count' is of nnx.RngCount"),
        (nnx.as_pure(nnx.state(Network().dropout)), "'rngs/count' is of uint32"),
        ({"w": jnp.zeros(2), "key": jax.random.key(0)}, "'key' is of key<fry>"),
        ({"w": jnp.zeros(2), "step": np.int32(0)}, "'step' is of int32"),
        ({"w": jnp.zeros(2), "step": 0}, "'step' is of <class 'int'>"),
        ({"w": jnp.zeros(2), "name": "linear"}, "'name' is of <class 'str'>"),
    ],
)
def test_parameters_that_no_gradient_trains(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"among the parameters, {message}, .* `nnx.state\\(model, nnx.Param\\)`"):
        federation().init(params, data())


def test_the_parameters_of_a_module_alone_are_taken() -> None:
    params = nnx.state(Network(), nnx.Param)
    assert jax.tree.structure(federation().init(params, data()).params) == jax.tree.structure(params)


class ForgetsState(fo.OptiModule, register=False):
    name: ClassVar[str] = "forgets-state"

    def init(self, params: Any) -> MadeState:
        return MadeState(jnp.zeros(()))

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return updates


class ChangesShapes(fo.OptiModule, register=False):
    name: ClassVar[str] = "changes-shapes"

    def init(self, params: Any) -> MadeState:
        return MadeState(jnp.zeros(()))

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return jax.tree.map(jnp.sum, updates), state


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [2, 12])
@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize(
    ("brick", "message"),
    [
        (
            ForgetsState(),
            r"ForgetsState.update returned one .*: expected two values[\s\S]*right:  return updates, state",
        ),
        (ChangesShapes(), r"ChangesShapes.update changed the updates at .* from float32\[2\] to float32\[\]"),
    ],
)
def test_a_brick_that_returns_something_else(leaves: int, side: str, brick: Any, message: str) -> None:
    params = {f"{index:02d}": jnp.zeros(2) for index in range(leaves)}
    wrong = sides(**{side: [brick]}, batch_size=2)
    object.__setattr__(wrong, "loss_fn", lambda w, b: sum(squares(leaf, b) for leaf in w.values()))
    with pytest.raises(TypeError, match=message):
        wrong.round(wrong.init(params, data()), data(), [0])
