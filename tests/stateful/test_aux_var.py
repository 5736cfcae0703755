"""Auxiliary variables: what a pair declares, how it reduces, and when a message is committed."""

import itertools
import json
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules import FromClients, FromServer, Max, Min, Params, PerClient, Scalar, hyperparameter

GRADS = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array(3.0)}}


class Report(FromClients):
    drift: Params
    count: Scalar
    largest: Max[Params]
    latest: Max[Scalar]
    smallest: Min[Params]
    earliest: Min[Scalar]
    weight: PerClient[Scalar]
    own: PerClient[Params]


class Directive(FromServer):
    mean: Params
    rate: PerClient[Scalar]
    anchor: PerClient[Params]


class ReporterState(NamedTuple):
    seen: Any
    steps: jax.Array
    rate: jax.Array
    anchor: Any


class Reporter(fo.OptiModule, register=False):
    """Sends the last gradients; is sent a rate and an anchor of its own."""

    name: ClassVar[str] = "reporter"
    aux_name: ClassVar[str] = "report"
    sends = Report
    receives = Directive

    def init(self, params: Any) -> ReporterState:
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
        return ReporterState(zeros[0], jnp.zeros((), jnp.int32), jnp.ones(()), zeros[1])

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return updates, state._replace(seen=updates, steps=state.steps + 1)

    def collect(self, state: Any) -> Report:
        seen, steps = state.seen, state.steps
        return Report(seen, steps, seen, steps, seen, steps, 10.0 * steps, seen)

    def process(self, aux: Directive, state: Any) -> Any:
        return state._replace(rate=aux.rate, anchor=aux.anchor)


class GatherState(NamedTuple):
    last: Any
    rates: jax.Array
    own: Any


class Gather(fo.OptiModule, register=False):
    """Keeps what the clients' reports reduce to; sends each client its own part back."""

    name: ClassVar[str] = "gather"
    aux_name: ClassVar[str] = "report"
    sends = Directive
    receives = Report
    num_clients: int = hyperparameter(default=3, within="[1, inf)")

    def init(self, params: Any) -> GatherState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        scalars = [jnp.zeros((), jnp.int32) for _ in range(3)]
        own = lambda: jax.tree.map(lambda p: jnp.zeros((self.num_clients, *p.shape), p.dtype), params)  # noqa: E731
        last = Report(zeros(), scalars[0], zeros(), scalars[1], zeros(), scalars[2], jnp.zeros(self.num_clients), own())
        return GatherState(last, jnp.zeros(self.num_clients), own())

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return updates, state

    def collect(self, state: Any) -> Directive:
        return Directive(state.last.drift, state.rates, state.own)

    def process(self, aux: Report, state: Any) -> Any:
        return GatherState(aux, aux.weight + 1, aux.own)


def wire(message: Any) -> Any:
    return json.loads(json.dumps(message, allow_nan=False))


def report_of(scale: float, steps: int) -> Any:
    client = Reporter()
    for _ in range(steps):
        client.run(jax.tree.map(lambda g: scale * g, GRADS))
    return wire(client.collect_aux_var())


def test_fields_reduce_over_clients_as_their_annotations_say() -> None:
    server = Gather()
    server.process_aux_var({"ann": report_of(1.0, 2), "bob": report_of(-3.0, 1), "cat": report_of(0.5, 4)})
    last = server.state.last
    np.testing.assert_allclose(last.drift["a"], -1.5 * GRADS["a"])
    np.testing.assert_allclose(last.largest["a"], [1, 6])
    np.testing.assert_allclose(last.smallest["a"], [-3, -2])
    np.testing.assert_allclose(last.largest["b/c"], 3)
    assert (int(last.count), int(last.latest), int(last.earliest)) == (7, 4, 1)
    np.testing.assert_allclose(last.weight, [20, 10, 40])
    np.testing.assert_allclose(last.own["a"], [[1, -2], [-3, 6], [0.5, -1]])


def test_each_client_is_handed_its_own_message_by_name() -> None:
    server, clients = Gather(), {name: Reporter() for name in ("ann", "bob")}
    for steps, client in enumerate(clients.values(), start=1):
        for _ in range(steps):
            client.run(jax.tree.map(lambda g, s=steps: s * g, GRADS))
    server.process_aux_var({name: wire(client.collect_aux_var()) for name, client in clients.items()})
    sent = wire(server.collect_aux_var())
    assert set(sent) == {"per_client"}
    assert set(sent["per_client"]) == {"ann", "bob"}
    for steps, (name, client) in enumerate(clients.items(), start=1):
        client.process_aux_var(sent["per_client"][name])
        assert float(client.state.rate) == 10 * steps + 1
        np.testing.assert_allclose(client.state.anchor["a"], steps * GRADS["a"])


def test_a_client_keeps_its_place_whoever_reports_and_in_whichever_order() -> None:
    server = Gather()
    server.process_aux_var({"ann": report_of(1.0, 1)})
    server.process_aux_var({"bob": report_of(2.0, 2), "ann": report_of(3.0, 3)})
    np.testing.assert_allclose(server.state.last.weight, [30, 20, 0])
    other = Gather()
    other.set_state(wire(server.get_state()))
    for each in (server, other):
        each.process_aux_var({"bob": report_of(1.0, 1)})
        np.testing.assert_allclose(each.state.last.weight, [0, 10, 0])
    assert set(other.collect_aux_var()["per_client"]) == {"ann", "bob"}


def test_the_whole_bundle_given_to_one_client_is_refused_with_the_right_code() -> None:
    server, client = Gather(), Reporter()
    client.run(GRADS)
    server.process_aux_var({"ann": client.collect_aux_var()})
    before = client.get_state()
    with pytest.raises(TypeError, match=r"message\['per_client'\]\[client\]"):
        client.process_aux_var(server.collect_aux_var())
    assert client.get_state() == before


def test_more_clients_than_places_are_refused() -> None:
    server = Gather(num_clients=2)
    server.process_aux_var({"ann": report_of(1.0, 1), "bob": report_of(1.0, 1)})
    before = server.get_state()
    with pytest.raises(ValueError, match="num_clients=2 is less than the 3 clients"):
        server.process_aux_var({"cat": report_of(1.0, 1)})
    assert server.get_state() == before


def test_through_optimizers_messages_are_keyed_by_aux_name() -> None:
    client, server = fo.Optimizer(0.1, modules=[Reporter()]), fo.Optimizer(1.0, modules=[Gather()])
    client.run(GRADS)
    sent = wire(client.collect_aux_var())
    assert set(sent) == {"report"}
    server.process_aux_var({"report": {"ann": sent["report"]}})
    back = wire(server.collect_aux_var())
    client.process_aux_var({"report": back["report"]["per_client"]["ann"]})
    assert float(client.state.modules["reporter"].rate) == 11


def pure_report(seed: int) -> Report:
    rng = np.random.default_rng(seed)
    number = lambda: jnp.float32(rng.integers(-5, 5))  # noqa: E731
    tree = lambda: {"w": jnp.asarray(rng.integers(-5, 5, 3), jnp.float32)}  # noqa: E731
    report = Report(tree(), number(), tree(), number(), tree(), number(), number(), tree())
    return report.widen(seed, 3)


def test_the_reduction_is_associative_and_commutative() -> None:
    reports = [pure_report(seed) for seed in range(3)]
    merged = [(a.merge(b)).merge(c) for a, b, c in itertools.permutations(reports)]
    merged += [a.merge(b.merge(c)) for a, b, c in itertools.permutations(reports)]
    for other in merged[1:]:
        jax.tree.map(np.testing.assert_array_equal, merged[0], other)


def test_types_are_pytrees_that_pass_through_transformations() -> None:
    report = pure_report(0)
    again = jax.jit(lambda r: r.merge(r))(report)
    assert isinstance(again, Report)
    np.testing.assert_array_equal(again.drift["w"], 2 * report.drift["w"])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), report, report)
    jax.tree.map(np.testing.assert_array_equal, jax.vmap(lambda r: r.merge(r))(stacked).drift["w"][1], again.drift["w"])


def test_narrow_takes_one_clients_part_and_leaves_the_rest() -> None:
    directive = Directive({"w": jnp.ones(2)}, jnp.arange(3.0), {"w": jnp.arange(6.0).reshape(3, 2)})
    mine = directive.narrow(1)
    assert float(mine.rate) == 1
    np.testing.assert_array_equal(mine.anchor["w"], [2, 3])
    np.testing.assert_array_equal(mine.mean["w"], [1, 1])


def scaffold_client(steps: int = 2) -> fo.ScaffoldClientModule:
    client = fo.ScaffoldClientModule()
    for _ in range(steps):
        client.run(GRADS)
    return client


def test_collecting_reads_and_gives_the_same_again() -> None:
    client = scaffold_client()
    before = client.get_state()
    message = client.collect_aux_var()
    assert client.collect_aux_var() == message
    after = client.get_state()
    assert {**after, "message_out": False} == before
    assert after["message_out"] is True


COMMITTERS = {
    "run": lambda client: client.run(GRADS),
    "on_round_start": lambda client: client.on_round_start(),
    "process_aux_var": lambda client: client.process_aux_var(server_message()),
}


def server_message() -> Any:
    server = fo.ScaffoldServerModule()
    server.process_aux_var({"zoe": scaffold_client(1).collect_aux_var()})
    return wire(server.collect_aux_var())


@pytest.mark.parametrize("what", COMMITTERS)
@pytest.mark.parametrize("restored", [False, True])
def test_a_collected_message_is_committed_by_the_next_call_also_after_a_restart(what: str, restored: bool) -> None:
    client = scaffold_client()
    client.collect_aux_var()
    if restored:
        saved, client = wire(client.get_state()), fo.ScaffoldClientModule()
        client.set_state(saved)
    COMMITTERS[what](client)
    state = client.state
    np.testing.assert_array_equal(jax.tree.leaves(state.local)[0], GRADS["a"])
    assert int(state.joined) == 1
    assert client.get_state()["message_out"] is False


@pytest.mark.parametrize("what", COMMITTERS)
@pytest.mark.parametrize("restored", [False, True])
def test_a_retracted_message_is_not_committed(what: str, restored: bool) -> None:
    client = scaffold_client()
    client.collect_aux_var()
    if restored:
        saved, client = wire(client.get_state()), fo.ScaffoldClientModule()
        client.set_state(saved)
    client.retract_aux_var()
    COMMITTERS[what](client)
    state = client.state
    np.testing.assert_array_equal(jax.tree.leaves(state.local)[0], [0, 0])
    assert int(state.joined) == 0


def test_without_a_message_out_nothing_is_committed() -> None:
    client = scaffold_client()
    client.on_round_start()
    assert int(client.state.joined) == 0


def test_a_failed_call_leaves_the_message_out() -> None:
    client = scaffold_client()
    client.collect_aux_var()
    before = client.get_state()
    with pytest.raises(ValueError, match="'b/c'"):
        client.run({"a": GRADS["a"]})
    with pytest.raises(TypeError, match="should be a message"):
        client.process_aux_var(3)  # type: ignore[arg-type]
    assert client.get_state() == before
    assert before["message_out"] is True


def test_before_the_first_run_there_is_nothing_to_collect_and_a_message_makes_the_state() -> None:
    client, optimizer = fo.ScaffoldClientModule(), fo.Optimizer(0.1, modules=["scaffold-client"])
    assert client.collect_aux_var() is None
    assert optimizer.collect_aux_var() == {}
    optimizer.process_aux_var({})
    client.process_aux_var(server_message())
    np.testing.assert_array_equal(client.state.correction["a"], -GRADS["a"])
    np.testing.assert_array_equal(client.run(GRADS)["a"], 2 * GRADS["a"])
    assert int(client.state.steps) == 1


def test_a_state_that_starts_from_the_parameters_asks_for_setup_when_a_message_comes_first() -> None:
    class Anchored(Reporter, register=False):
        def init(self, params: Any) -> ReporterState:
            return super().init(params)._replace(anchor=jax.tree.map(lambda p: 2 * p, params))

    server, client = Gather(), Anchored()
    server.process_aux_var({"ann": report_of(1.0, 1)})
    message = server.collect_aux_var()["per_client"]["ann"]
    with pytest.raises(ValueError, match=r"call `setup\(params\)` first"):
        client.process_aux_var(message)
    assert client.state is None
    client.setup(GRADS)
    client.process_aux_var(message)
    assert float(client.state.rate) == 11


def test_a_module_that_collects_another_type_than_it_declares_is_told_so() -> None:
    class Confused(Reporter, register=False):
        def collect(self, state: Any) -> Any:
            return Directive(state.seen, state.rate, state.anchor)

    module = Confused()
    module.run(GRADS)
    with pytest.raises(TypeError, match=r"Confused.collect returned Directive, and `sends` declares Report"):
        module.collect_aux_var()
    assert module.get_state()["message_out"] is False
