"""The end of a client's round, and what a server shares, through the stateful facade: as in a federation, over JSON."""

import copy
import json
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.aux_var import FromClients, FromServer, Scalar
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.numerics import cast_like, wide, zeros_wide
from functional_optimodules.types import Params

LRATE, STEPS, ROUNDS = 0.2, 3, 3
TARGETS = (np.array([0.0, 1.0]), np.array([4.0, -1.0]))


class Drift(FromClients):
    total: Params
    steps: Scalar


class Pull(FromServer):
    pull: Params


class DriftState(NamedTuple):
    pull: Any
    drift: Any
    steps: Any
    sent: Any


class DriftClientModule(fo.OptiModule[DriftState], register=False):
    """Adds what the server says to gradients; tells how far each step of its round went."""

    name = "drift-client-of-tests"
    aux_name = "drift-of-tests"
    sends = Drift
    receives = Pull

    def init(self, params: Any) -> DriftState:
        return DriftState(zeros_wide(params), zeros_wide(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(self, updates: Any, state: DriftState, params: Any = None, **extra: Any) -> Any:
        return cast_like(jax.tree.map(lambda g, p: wide(g) + p, updates, state.pull), updates), state

    def end_round(self, state: DriftState, *, delta: Any, num_steps: Any, **known: Any) -> DriftState:
        steps = jnp.asarray(num_steps).astype(jnp.int32)
        drift = jax.tree.map(lambda old, d: old + wide(d), state.drift, delta)
        return state._replace(drift=drift, steps=steps)

    def collect(self, state: DriftState) -> Drift:
        return Drift(state.drift, state.steps)

    def commit(self, state: DriftState) -> DriftState:
        return state._replace(sent=state.sent + 1)

    def process(self, aux: Pull, state: DriftState) -> DriftState:
        return state._replace(pull=aux.pull, drift=zeros_wide(state.drift))


class SumState(NamedTuple):
    pull: Any


class DriftServerModule(fo.OptiModule[SumState], register=False):
    """Says the sum of what it is told, by step."""

    name = "drift-server-of-tests"
    aux_name = "drift-of-tests"
    sends = Pull
    receives = Drift

    def init(self, params: Any) -> SumState:
        return SumState(zeros_wide(params))

    def update(self, updates: Any, state: SumState, params: Any = None, **extra: Any) -> Any:
        return updates, state

    def collect(self, state: SumState) -> Pull:
        return Pull(state.pull)

    def process(self, aux: Drift, state: SumState) -> SumState:
        return SumState(jax.tree.map(lambda t: t / aux.steps.astype(t.dtype), aux.total))


def start() -> Any:
    return {"w": jnp.array([1.0, -2.0])}


def client(*more: Any) -> fo.Optimizer:
    return fo.Optimizer(LRATE, modules=[DriftClientModule(), *more])


def server(*more: Any) -> fo.Optimizer:
    return fo.Optimizer(1.0, modules=[DriftServerModule(), *more])


def wired(message: Any) -> Any:
    return json.loads(json.dumps(message, allow_nan=False))


def steps(optimizer: fo.Optimizer, params: Any, target: np.ndarray, count: int = STEPS) -> Any:
    for _ in range(count):
        params = optimizer.apply_gradients(params, {"w": params["w"] - target.astype(np.float32)})
    return params


def minus(new: Any, old: Any) -> Any:
    return jax.tree.map(jnp.subtract, new, old)


def exchange(server: fo.Optimizer, again: Any = lambda optimizer: optimizer) -> Any:
    """Rounds over JSON, of clients that may be copied, or written and read, in the midst of theirs."""
    clients, model = [client(), client()], start()
    server.setup(model)
    for _ in range(ROUNDS):
        shared = server.share_params(model)
        broadcast, sent, ends = wired(server.collect_aux_var()), {}, []
        for number, target in enumerate(TARGETS):
            one = clients[number]
            one.start_round()
            one.process_aux_var(broadcast)
            end = steps(one, shared, target)
            one = again(one)
            one.finish_round(delta=minus(end, shared), num_steps=STEPS)
            one = clients[number] = again(one)
            sent[str(number)] = wired(one.collect_aux_var())
            ends.append(minus(shared, end)["w"])
        server.process_aux_var(sent)
        model = server.apply_gradients(model, {"w": sum(ends) / 2})
    return model["w"]


def simulated(server: fo.Optimizer) -> Any:
    loss = lambda params, batch: ((params["w"] - batch) ** 2).sum(axis=-1) / 2  # noqa: E731
    data = FederatedData.from_clients([np.tile(target, (2, 1)).astype(np.float32) for target in TARGETS])
    federation = Federation(loss, client(), server, steps=STEPS)
    return federation.fit(federation.init(start(), data), data, ROUNDS)[0].params["w"]


def in_numpy(momentum: float) -> np.ndarray:
    w, pull, ahead = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for _ in range(ROUNDS):
        sent, deltas = w - momentum * ahead, []
        for target in TARGETS:
            y = sent
            for _ in range(STEPS):
                y = y - LRATE * (y - target + pull)
            deltas.append(y - sent)
        pull = np.sum(deltas, axis=0) / (2 * STEPS)
        ahead = momentum * ahead - np.mean(deltas, axis=0)
        w = w - ahead
    return w


def reread(optimizer: fo.Optimizer) -> fo.Optimizer:
    new = client()
    new.set_state(wired(optimizer.get_state()))
    return new


@pytest.mark.parametrize("ahead", [0.0, 0.5])
def test_rounds_over_json_are_those_of_the_federation_and_of_numpy(ahead: float) -> None:
    modules = [("fedacg", {"momentum": ahead})] if ahead else []
    expected = in_numpy(ahead)
    np.testing.assert_allclose(exchange(server(*modules)), expected, atol=1e-5)
    np.testing.assert_allclose(simulated(server(*modules)), expected, atol=1e-5)


@pytest.mark.parametrize("again", [copy.deepcopy, reread, lambda one: pickle.loads(pickle.dumps(one))])
def test_clients_that_are_saved_in_the_midst_of_a_round_go_on(again: Any) -> None:
    np.testing.assert_array_equal(exchange(server(), again), exchange(server()))


def test_what_is_shared_is_the_parameters_where_no_module_looks_ahead() -> None:
    params = start()
    for optimizer in (server(), fo.Optimizer(1.0)):
        np.testing.assert_array_equal(optimizer.share_params(params)["w"], params["w"])
    ahead = fo.Optimizer(1.0, modules=[("fedacg", {"momentum": 0.5})])
    np.testing.assert_array_equal(ahead.share_params(params)["w"], params["w"])
    params = ahead.apply_gradients(params, {"w": jnp.array([2.0, 4.0])})
    np.testing.assert_allclose(ahead.share_params(params)["w"], params["w"] - 0.5 * jnp.array([2.0, 4.0]))
    np.testing.assert_allclose(params["w"], [-1, -6])


def test_a_message_before_the_end_of_the_round_is_refused() -> None:
    one = client()
    end = steps(one, start(), TARGETS[0])
    with pytest.raises(
        RuntimeError, match=r"round has not ended: call `on_round_end\(delta=\.\.\., num_steps=\.\.\.\)`"
    ):
        one.collect_aux_var()
    one.finish_round(delta=minus(end, start()), num_steps=STEPS)
    assert one.collect_aux_var().keys() == {"drift-of-tests"}
    restored = client()
    steps(restored, start(), TARGETS[0])
    other = client()
    other.set_state(wired(restored.get_state()))
    with pytest.raises(RuntimeError, match="round has not ended"):
        other.collect_aux_var()


def ended(**known: Any) -> Any:
    one = client()
    end = steps(one, start(), TARGETS[0])
    before = wired(one.get_state())
    known = {"delta": minus(end, start()), "num_steps": STEPS} | known
    return one, before, {name: value for name, value in known.items() if value is not None}


@pytest.mark.parametrize(
    ("known", "error", "message"),
    [
        ({"num_steps": None}, TypeError, "at the end of a round it asks for 'num_steps'"),
        ({"num_steps": None, "delta": None}, TypeError, "it asks for 'delta', 'num_steps'"),
        ({"delta": {"w": jnp.zeros(3)}}, ValueError, r"delta has float32\[3\] at 'w': expected float32\[2\]"),
        ({"delta": {"v": jnp.zeros(2)}}, ValueError, "delta"),
        ({"delta": jnp.zeros(2)}, ValueError, "delta"),
    ],
)
def test_what_is_wrong_at_the_end_of_a_round_changes_nothing(known: Any, error: Any, message: str) -> None:
    one, before, given = ended(**known)
    with pytest.raises(error, match=message):
        one.finish_round(**given)
    assert wired(one.get_state()) == before


def test_a_round_without_a_step_has_no_end() -> None:
    with pytest.raises(RuntimeError, match="there was no step yet"):
        client().finish_round(delta=start(), num_steps=0)


def test_a_round_ends_once() -> None:
    one, _, given = ended()
    one.finish_round(**given)
    before = wired(one.get_state())
    with pytest.raises(RuntimeError):
        one.finish_round(**given)
    assert wired(one.get_state()) == before


def test_a_round_is_not_ended_under_a_trace() -> None:
    one, before, given = ended()
    with pytest.raises(RuntimeError, match="cannot be called under jit"):
        jax.jit(lambda delta: one.finish_round(delta=delta, num_steps=STEPS))(given["delta"])
    assert wired(one.get_state()) == before


def test_what_nobody_asks_for_may_be_told_too() -> None:
    one, _, given = ended()
    one.finish_round(**given, weight=2.0, coin=0.5)
    plain = fo.Optimizer(LRATE, modules=["momentum"])
    steps(plain, start(), TARGETS[0])
    before = wired(plain.get_state())
    plain.finish_round(**given)
    assert wired(plain.get_state()) == before


def test_numbers_of_numpy_and_of_python_and_arrays_of_either_are_told_alike() -> None:
    states = []
    for number in (int, np.int64, np.int32, jnp.int32):
        for array in (np.asarray, jnp.asarray):
            one, _, given = ended()
            one.finish_round(delta={"w": array(given["delta"]["w"])}, num_steps=number(STEPS))
            states.append(wired(one.get_state()))
    assert all(state == states[0] for state in states)


def test_a_message_that_was_lost_is_not_committed_and_the_next_round_tells_it_again() -> None:
    one, _, given = ended()
    one.finish_round(**given)
    first = wired(one.collect_aux_var())
    assert wired(one.collect_aux_var()) == first
    one.retract_aux_var()
    one.start_round()
    end = steps(one, start(), TARGETS[0])
    one.finish_round(delta=minus(end, start()), num_steps=STEPS)
    assert int(one.state.modules["drift-client-of-tests"].sent) == 0
    one.collect_aux_var()
    one.start_round()
    assert int(one.state.modules["drift-client-of-tests"].sent) == 1


def test_the_rate_of_the_step_is_told_by_the_optimizer() -> None:
    class RateState(NamedTuple):
        rates: Any

    class RateModule(fo.OptiModule[RateState], register=False):
        name = "rate-of-tests"

        def init(self, params: Any) -> RateState:
            return RateState(jnp.zeros(()))

        def update(self, updates: Any, state: RateState, params: Any = None, *, lrate: Any, **extra: Any) -> Any:
            return updates, RateState(state.rates + lrate)

    for _ in range(2):  # the second time what was compiled is used again
        rate = ("inverse-scaling", {"base": 0.5, "rate": 1.0})
        one = fo.Optimizer(rate, modules=[RateModule()])
        steps(one, start(), TARGETS[0])
        np.testing.assert_allclose(one.state.modules["rate-of-tests"].rates, 0.5 * (1 + 1 / 2 + 1 / 3), rtol=1e-6)


def test_many_small_parameters_end_a_round_as_their_tree_does() -> None:
    params = {f"{i:02d}": jnp.arange(3.0) + i for i in range(20)}
    found = []
    for small in (None, 0):
        fo.set_small_leaf(small)
        try:
            one = client("momentum")
            end = one.apply_gradients(params, params)
            one.finish_round(delta=minus(end, params), num_steps=1)
            found.append(wired(one.collect_aux_var()))
        finally:
            fo.set_small_leaf(None)
    assert found[0] == found[1]
