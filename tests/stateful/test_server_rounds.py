"""A server that sends its broadcast begins the round: the exchange is the simulation without a further call."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

MODEL = {"w": jnp.zeros(2)}
TARGETS = {"ann": jnp.array([1.0, 0.0]), "bob": jnp.array([0.0, 3.0])}


def make_server():
    rate = ("exponential-decay", {"base": 1.0, "rate": 0.8, "step_level": False})
    return fo.Optimizer(rate, modules=[("scaffold-server", {"num_clients": 2}), ("momentum", {"round_reset": True})])


def exchange(rounds, call=lambda server, moment: None, restart=False):
    """Return the model after rounds of messages; `call` may do more to the server at a moment of a round."""
    server, clients = make_server(), {name: fo.Optimizer(0.1, modules=["scaffold-client"]) for name in TARGETS}
    model = MODEL
    server.setup(model)
    for _ in range(rounds):
        call(server, "before the broadcast")
        sent, received, ends = json.dumps(server.collect_aux_var()), {}, []
        call(server, "after the broadcast")
        if restart:
            saved, server = json.dumps(server.get_state()), make_server()
            server.set_state(json.loads(saved))
        for name, client in clients.items():
            client.start_round()
            client.process_aux_var(json.loads(sent))
            params = model
            for _ in range(3):
                params = client.apply_gradients(params, {"w": params["w"] - TARGETS[name]})
            received[name] = json.loads(json.dumps(client.collect_aux_var()))
            ends.append(params["w"])
        server.process_aux_var(received)
        call(server, "before the step")
        model = server.apply_gradients(model, {"w": model["w"] - sum(ends) / len(ends)})
    return model["w"]


def simulate(rounds):
    data = FederatedData.from_clients([jnp.tile(target, (3, 1)) for target in TARGETS.values()])
    loss = lambda params, batch: ((params["w"] - batch) ** 2).sum(axis=-1) / 2  # noqa: E731
    client = fo.Optimizer(0.1, modules=["scaffold-client"])
    federation = Federation(loss, client=client, server=make_server(), batch_size=1)
    return federation.fit(federation.init(MODEL, data), data, rounds)[0].params["w"]


def collect_again(server, moment):
    if moment == "after the broadcast":
        server.collect_aux_var()


def start(moment):
    return lambda server, now: server.start_round() if now == moment else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        lambda server, moment: None,
        collect_again,
        start("before the broadcast"),
        start("after the broadcast"),
        start("before the step"),
    ],
    ids=["nobody begins it", "asked again", "begun before", "begun after", "begun late"],
)
def test_the_exchange_is_the_simulation_whoever_begins_the_round(call):
    np.testing.assert_allclose(exchange(8, call), simulate(8), rtol=1e-5, atol=1e-6)


def test_a_server_restarted_between_broadcast_and_step_does_not_begin_the_round_again():
    np.testing.assert_array_equal(exchange(5, restart=True), exchange(5))


def test_a_server_that_hears_before_it_speaks_begins_the_round_as_well():
    server = make_server()
    server.setup(MODEL)
    rates = []
    for _ in range(3):
        client = fo.Optimizer(0.1, modules=["scaffold-client"])
        client.apply_gradients(MODEL, {"w": jnp.ones(2)})
        server.process_aux_var({"ann": client.collect_aux_var()})
        rates.append(float(-server.apply_gradients(MODEL, {"w": jnp.ones(2)})["w"][0]))
    np.testing.assert_allclose(rates, [1.0, 0.8, 0.64], rtol=1e-6)


def test_a_client_does_not_begin_rounds_by_sending():
    client = fo.Optimizer(
        ("exponential-decay", {"base": 1.0, "rate": 0.5, "step_level": False}), modules=["scaffold-client"]
    )
    for _ in range(3):
        client.apply_gradients(MODEL, MODEL)
        client.collect_aux_var()
    assert client.state.lrate.rounds == 0


def report(seed):
    client = fo.Optimizer(0.1, modules=["scaffold-client"])
    client.apply_gradients(MODEL, {"w": jnp.full(2, float(seed))})
    return client.collect_aux_var()


def test_messages_may_come_by_client_or_sorted():
    by_client = {"ann": report(1), "bob": report(2)}
    sorted_ = {"scaffold": {name: message["scaffold"] for name, message in by_client.items()}}
    one, other = make_server(), make_server()
    one.process_aux_var(by_client)
    other.process_aux_var(sorted_)
    assert one.get_state() == other.get_state()
    assert one.get_state()["clients"] == ["ann", "bob"]


def test_a_client_of_the_name_of_a_channel_is_understood_in_both_forms():
    one, other = make_server(), make_server()
    one.process_aux_var({"scaffold": report(1)})
    other.process_aux_var({"scaffold": {"scaffold": report(1)["scaffold"]}})
    assert one.get_state() == other.get_state()


@pytest.mark.parametrize(
    ("messages", "error", "text"),
    [
        ({"scafold": {}}, KeyError, "did you mean 'scaffold'"),
        ({"ann": {"scafold": 1}}, KeyError, "no module takes auxiliary variables named 'ann'"),
        ({"scaffold": {}}, ValueError, "no client's message"),
    ],
)
def test_messages_in_neither_form_are_refused(messages, error, text):
    server = make_server()
    before = server.get_state()
    with pytest.raises(error, match=text):
        server.process_aux_var(messages)
    assert server.get_state() == before


def test_a_client_with_nothing_to_say_is_passed_over():
    server = make_server()
    server.process_aux_var({"ann": report(1), "bob": {}})
    assert server.get_state()["clients"] == ["ann"]


@pytest.mark.parametrize("fault", [3, "closed", True])
def test_a_saved_state_with_a_bad_round_is_refused(fault):
    server = make_server()
    server.setup(MODEL)
    server.collect_aux_var()
    saved = server.get_state()
    assert saved["round"] == "sent"
    with pytest.raises(ValueError, match="'round' should be"):
        make_server().set_state({**saved, "round": fault})


def test_a_server_that_hears_nothing_takes_clients_that_say_nothing():
    server = fo.Optimizer(1.0, modules=["momentum"])
    server.process_aux_var({"ann": {}, "bob": {}})
    with pytest.raises(KeyError, match="no module takes auxiliary variables named 'ann'"):
        server.process_aux_var({"ann": report(1)})


def test_who_begins_rounds_himself_may_take_several_steps_in_one():
    server = make_server()
    server.setup(MODEL)
    rates = []
    for _ in range(3):
        server.start_round()
        for _ in range(2):
            server.process_aux_var({"ann": report(1)})
            rates.append(float(-server.apply_gradients(MODEL, {"w": jnp.ones(2)})["w"][0]))
    np.testing.assert_allclose(rates, np.outer([1.0, 0.8, 0.64], [1.0, 1.9]).ravel(), rtol=1e-6)
