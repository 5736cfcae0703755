"""What comes from outside is bounded: depth, size, names, magnitudes, and what clients claim of themselves."""

import copy
import json
import tracemalloc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.stateful.compiled import compiled, layout_of, starts_from_values
from functional_optimodules.wire.arrays import encode_array

ONES = {"w": jnp.ones(3)}


class Pace(fo.FromServer):
    rate: fo.Scalar


class Listener(fo.OptiModule, register=False):
    """A module that receives, and sends nothing."""

    name: ClassVar[str] = "listener"
    receives = Pace

    def init(self, params: Any) -> Any:
        return ()

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return updates, state


def deep(levels: int = 100_000, kind: Any = list) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


def forget(value: Any) -> None:
    """Take a deep value apart: its own end would be as deep a recursion."""
    while isinstance(value, list | dict) and value:
        value = value.pop() if isinstance(value, list) else value.popitem()[1]


def report(delta: Any = 1.0, joined: Any = 1, **changes: Any) -> Any:
    client = fo.ScaffoldClientModule()
    client.run(ONES)
    message = json.loads(json.dumps(client.collect_aux_var()))
    message["variables"]["delta"]["w"] = encode_array(jnp.full(3, delta, jnp.float32))
    message["variables"]["joined"] = encode_array(jnp.asarray(joined))
    return message | changes


def variate(server: fo.ScaffoldServerModule) -> Any:
    return server.collect(server.state).variate["w"]


@pytest.mark.parametrize("kind", [list, dict])
def test_a_state_that_nests_too_deep_is_refused(kind: Any) -> None:
    module = fo.MomentumModule()
    module.run(ONES)
    saved = module.get_state()
    for key in ("variables", "params", "rounds_begun", "clients", "round", "name"):
        spoilt = {**saved, key: deep(kind=kind)}
        with pytest.raises(ValueError, match="MomentumModule: the state nests more than 100 levels deep"):
            module.set_state(spoilt)
        forget(spoilt[key])
    assert module.get_state() == saved


def test_a_message_that_nests_too_deep_is_refused() -> None:
    server = fo.ScaffoldServerModule()
    for key in ("variables", "params", "sender"):
        message = report(**{key: deep()})
        with pytest.raises(ValueError, match="what was received nests more than 100 levels deep"):
            server.process_aux_var({"ann": message})
        forget(message[key])
    assert server.state is None


def test_a_configuration_that_nests_too_deep_is_refused() -> None:
    config: Any = 0.1
    for _ in range(5000):
        config = ["warmup", {"base": config, "warmup": 3}]
    with pytest.raises(ValueError, match="nests more than 100 levels deep"):
        fo.Scheduler.from_specs(*config)
    with pytest.raises(TypeError, match="nests more than 100 levels deep"):
        fo.OptaxModule("sgd", {"momentum": deep()})


def test_an_error_quotes_little_of_what_it_refuses() -> None:
    module = fo.MomentumModule()
    module.run(ONES)
    saved = module.get_state()
    for bad in ("x" * 10**7, [0] * 10**6, {str(i): 0 for i in range(10**5)}, 10**20_000):
        for key in ("name", "params", "variables", "rounds_begun", "message_out", "clients", "round"):
            with pytest.raises((KeyError, TypeError, ValueError)) as caught:
                module.set_state({**saved, key: bad})
            assert len(str(caught.value)) < 2000, key
        with pytest.raises((KeyError, TypeError, ValueError)) as caught:
            fo.Optimizer.from_config({"lrate": bad})
        assert len(str(caught.value)) < 2000
    with pytest.raises(KeyError) as caught:
        fo.Optimizer.from_config({"x" * 10**7: 1})
    assert len(str(caught.value)) < 2000


def test_too_much_base64_is_refused_before_it_is_decoded() -> None:
    server, message = fo.ScaffoldServerModule(), report()
    message["variables"]["delta"]["w"]["data"] = "A" * 4_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"'w'.*not base64 of 12 bytes, 16 characters, but 4000000 characters"):
        server.process_aux_var({"ann": message})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_message_may_speak_of_so_many_parameters_and_bytes_to_a_server_that_knows_none(limiting: Any) -> None:
    client = fo.ScaffoldClientModule()
    client.run({f"p{i}": jnp.ones(2) for i in range(5)})
    message = client.collect_aux_var()
    limiting(fo.Limits(leaves=4))
    server = fo.ScaffoldServerModule()
    with pytest.raises(ValueError, match="'ann' speaks of 5 parameters, where at most 4 are taken: see `Limits`"):
        server.process_aux_var({"ann": message})
    limiting(fo.Limits(bytes=39))
    with pytest.raises(ValueError, match="40 bytes: call `setup"):
        server.process_aux_var({"ann": message})
    limiting(fo.Limits(leaves=4, bytes=39))
    server.setup({f"p{i}": jnp.zeros(2) for i in range(5)})
    server.process_aux_var({"ann": message})
    assert server.get_state()["clients"] == ["ann"]


def test_names_have_a_length() -> None:
    server = fo.ScaffoldServerModule()
    with pytest.raises(ValueError, match="the name of a client should be a string of at most 1000 characters"):
        server.process_aux_var({"a" * 1001: report()})
    with pytest.raises(ValueError, match="a path in 'params' should be a string of at most 1000 characters"):
        server.process_aux_var({"ann": report(params={"w" * 1001: {"dtype": "float32", "shape": [3]}})})


@pytest.mark.parametrize("joined", [10**6, -1, 0.5, 1e30, 2])
def test_a_flag_is_0_or_1(joined: Any) -> None:
    server = fo.ScaffoldServerModule()
    message = report(joined=np.float32(joined) if isinstance(joined, float) else np.int32(joined))
    with pytest.raises(ValueError, match=r"client 'eve', variable 'joined' (is .*: expected 0|has a value of 1e\+30)"):
        server.process_aux_var({"eve": message})
    assert server.state is None


def test_a_server_counts_its_clients_itself() -> None:
    server = fo.ScaffoldServerModule()
    server.process_aux_var({"ann": report(joined=1), "eve": report(joined=0)})
    for _ in range(3):
        server.process_aux_var({"eve": report(delta=0.0, joined=1)})
    assert server.state.clients == 2
    np.testing.assert_array_equal(variate(server), np.ones(3))


def test_a_negative_weight_is_refused_by_name() -> None:
    client, server = fo.FedExPClientModule(), fo.FedExPServerModule()
    client.run(ONES, **dict.fromkeys(client.asks().step, 1.0))
    client.on_round_end(**dict.fromkeys(client.asks().end, 1.0))
    message = client.collect_aux_var()
    message["variables"]["weight"] = encode_array(np.float32(-1))
    with pytest.raises(ValueError, match=r"'eve', variable 'weight' is -1.0: expected a number of at least 0"):
        server.process_aux_var({"eve": message})


def test_a_client_too_many_is_refused_by_name_and_the_known_ones_go_on() -> None:
    server = fo.ScaffoldServerModule(num_clients=2)
    server.process_aux_var({"ann": report(), "bob": report()})
    with pytest.raises(ValueError, match=r"num_clients=2 .*'eve' is one more than .*'ann', 'bob'"):
        server.process_aux_var({"ann": report(), "eve": report()})
    server.process_aux_var({"ann": report(delta=0.0), "bob": report(delta=0.0)})
    np.testing.assert_array_equal(variate(server), np.ones(3))


@pytest.mark.parametrize("huge", [1e38, -3e38, 1e19])
def test_numbers_that_would_swamp_those_of_others_are_refused_by_name(huge: float) -> None:
    server = fo.ScaffoldServerModule()
    server.process_aux_var({"ann": report()})
    before = server.get_state()
    with pytest.raises(ValueError, match=r"'eve', variable 'delta' at 'w' has a value of .*: see `Limits`"):
        server.process_aux_var({"ann": report(), "eve": report(delta=huge)})
    assert server.get_state() == before
    server.process_aux_var({"ann": report()})


def test_the_bound_on_magnitudes_is_a_setting(limiting: Any) -> None:
    limiting(fo.Limits(magnitude=100.0))
    server = fo.ScaffoldServerModule()
    with pytest.raises(ValueError, match=r"has a value of 101, where at most 100 is taken"):
        server.process_aux_var({"eve": report(delta=101.0)})
    server.process_aux_var({"ann": report(delta=100.0)})
    with pytest.raises(TypeError, match="set_limits: int should be `Limits`"):
        fo.set_limits(3)  # type: ignore[arg-type]


STATES: dict[str, tuple[Any, str, Any]] = {
    "not a number": (fo.MomentumModule(), "velocity", jnp.array([1, jnp.nan, 1], jnp.float32)),
    "infinity": (fo.MomentumModule(), "velocity", jnp.array([1, jnp.inf, 1], jnp.float32)),
    "a negative count": (fo.AdamModule(), "steps", jnp.int32(-5)),
    "a count that overflows": (fo.AdamModule(), "steps", jnp.int32(2**31 - 1)),
    "a clock far back": (fo.Optimizer(fo.LinearDecay(1.0, 0.1)), "lrate/steps", jnp.int32(-(2**31))),
}


@pytest.mark.parametrize("fault", STATES)
@pytest.mark.parametrize("new", [True, False])
def test_a_state_that_no_run_comes_to_is_refused_and_changes_nothing(fault: str, new: bool) -> None:
    made, name, value = STATES[fault]
    brick, donor = made.bare(), made.bare()
    donor.run(ONES)
    saved = donor.get_state()
    saved["variables"][name] = {"w": encode_array(value)} if value.ndim else encode_array(value)
    if not new:
        brick.run(ONES)
    before = brick.get_state()
    with pytest.raises(ValueError, match=f"{type(brick).__name__}: variable '{name}'.* holds .*: expected"):
        brick.set_state(saved)
    assert brick.get_state() == before
    with pytest.raises(ValueError, match="expected"):
        brick.load(saved, ONES)


@pytest.mark.parametrize("steps", [-1, -(2**31), 2**31 - 1])
def test_the_clock_of_a_scheduler_is_a_count(steps: int) -> None:
    scheduler = fo.LinearDecay(1.0, 0.1)
    saved = scheduler.get_state()
    saved["variables"]["steps"] = encode_array(np.int32(steps))
    with pytest.raises(ValueError, match=f"LinearDecay: variable 'steps' holds {steps}: expected counts below"):
        scheduler.set_state(saved)
    assert scheduler.get_next_rate() == 1.0


def test_a_state_may_hold_the_infinity_that_a_new_one_has() -> None:
    module, other = (fo.OptaxModule("contrib.reduce_on_plateau") for _ in range(2))
    module.setup(ONES)
    assert not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(module.state))
    other.set_state(json.loads(json.dumps(module.get_state())))
    assert other.get_state() == module.get_state()


def test_a_copy_carries_whatever_its_own_state_has_come_to() -> None:
    module = fo.MomentumModule()
    module.run({"w": jnp.full(3, jnp.nan)})
    assert copy.deepcopy(module).get_state() == module.get_state()


def test_rounds_that_wait_are_bounded_when_read_and_when_begun() -> None:
    module = fo.MomentumModule()
    saved = module.get_state()
    with pytest.raises(ValueError, match="'rounds_begun' should be from 0 to 1000, not 1000000"):
        module.set_state({**saved, "rounds_begun": 10**6})
    module.set_state({**saved, "rounds_begun": 1000})
    with pytest.raises(RuntimeError, match=r"1000 rounds were begun that wait .*: call `setup\(params\)`"):
        module.on_round_start()
    module.setup(ONES)
    module.on_round_start()
    module.run(ONES)


def test_what_is_not_finite_is_not_committed_and_counts_as_lost() -> None:
    client, server = fo.ScaffoldClientModule(), fo.ScaffoldServerModule()
    for scale in (1.0, float("nan"), 3.0):
        client.on_round_start()
        if server.state is not None:
            client.process_aux_var(server.collect_aux_var())
        client.run({"w": jnp.full(3, scale)})
        message = client.collect_aux_var()
        if np.isfinite(scale):
            server.process_aux_var({"ann": message})
        else:
            with pytest.raises(ValueError, match="'ann', variable 'delta' at 'w' has values that are not finite"):
                server.process_aux_var({"ann": message})
    client.on_round_start()
    np.testing.assert_array_equal(client.state.local["w"], np.full(3, 3.0))
    np.testing.assert_array_equal(variate(server), client.state.local["w"])


@pytest.mark.parametrize("then", ["on_round_start", "run", "process_aux_var"])
def test_a_message_that_was_committed_cannot_be_retracted(then: str) -> None:
    client, server = fo.ScaffoldClientModule(), fo.ScaffoldServerModule()
    client.run(ONES)
    message = client.collect_aux_var()
    server.process_aux_var({"ann": message})
    given = {"on_round_start": (), "run": (ONES,), "process_aux_var": (server.collect_aux_var(),)}[then]
    getattr(client, then)(*given)
    before = client.get_state()
    with pytest.raises(RuntimeError, match="ScaffoldClientModule: there is no message to retract"):
        client.retract_aux_var()
    assert client.get_state() == before


@pytest.mark.parametrize("module", [fo.AdamModule(), Listener()])
def test_who_sends_nothing_may_retract_it(module: fo.OptiModule) -> None:
    optimizer = fo.Optimizer(0.1, modules=[module])
    optimizer.run(ONES)
    optimizer.collect_aux_var()
    optimizer.retract_aux_var()


@pytest.mark.parametrize("kept", [compiled, layout_of, starts_from_values])
def test_what_is_kept_of_bricks_and_parameters_is_bounded(kept: Any) -> None:
    assert kept.cache_parameters()["maxsize"] <= 512


LIVES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a client in a server's round": (fo.MomentumModule(), {"round": "sent"}, "'round' should be absent, not 'sent'"),
    "a server in a client's round": (
        fo.ScaffoldServerModule(),
        {"round": "open"},
        "'round' should be 'begun' or 'sent' or absent, not 'open'",
    ),
    "a client with clients": (fo.ScaffoldClientModule(), {"clients": ["ann"]}, "'clients' should name at most 0"),
    "clients too many": (fo.ScaffoldServerModule(2), {"clients": ["ann", "bob", "eve"]}, "name at most 2, not .*'eve'"),
}


@pytest.mark.parametrize("fault", LIVES)
def test_a_life_that_the_brick_cannot_have_led_is_refused(fault: str) -> None:
    made, changes, message = LIVES[fault]
    brick = made.bare()
    saved = brick.get_state()
    with pytest.raises(ValueError, match=message):
        brick.set_state(saved | changes)
    assert brick.get_state() == saved
