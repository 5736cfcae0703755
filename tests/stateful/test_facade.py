"""The facade: one suite of behaviours that every brick gets for free."""

import copy
import json
import pickle
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import functional_optimodules as fo
from functional_optimodules.stateful.session import Fit
from functional_optimodules.testing.trees import ran

GRADS = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array(3.0)}}
PARAMS = {"a": jnp.array([0.5, 0.25]), "b": {"c": jnp.array(-1.0)}}


class Pair(NamedTuple):
    x: Any
    y: Any


class Remember(fo.OptiModule, register=False):
    """Keeps the very arrays that it is given."""

    name: ClassVar[str] = "remember"

    def init(self, params: Any) -> Any:
        return {"gradients": params, "params": params}

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return updates, {"gradients": updates, "params": params}


class Counting(fo.OptiModule, register=False):
    """Counts how often it is traced."""

    name: ClassVar[str] = "counting"
    traces: ClassVar[list[str]] = []
    beta: float = 0.5

    def init(self, params: Any) -> Any:
        return {"seen": jax.tree.map(jnp.zeros_like, params)}

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        self.traces.append("update")
        return updates, {"seen": updates}


class StartsThere(fo.OptiModule, register=False):
    """Pulls towards where the parameters were at first."""

    name: ClassVar[str] = "starts-there"

    def init(self, params: Any) -> Any:
        return {"anchor": jax.tree.map(lambda p: 1.0 * p, params)}

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return jax.tree.map(jnp.add, updates, state["anchor"]), state


class Weighted(fo.OptiModule, register=False):
    """Takes an extra argument."""

    name: ClassVar[str] = "weighted"

    def init(self, params: Any) -> Any:
        return optax.EmptyState()

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda g: g * extra_args["weight"], updates), state


def assert_trees_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def by_rounds() -> fo.Optimizer:
    return fo.Optimizer(("piecewise-decay", {"base": 1.0, "rate": 0.5, "step_size": 1, "step_level": False}))


def test_run_makes_the_state_and_steps_as_the_pure_update() -> None:
    module = fo.AdamModule()
    state = module.init(PARAMS)
    for _ in range(3):
        expected, state = jax.jit(module.update)(GRADS, state)
        assert_trees_equal(module.run(GRADS), expected)
    assert_trees_equal(module.state, state)


def test_setup_makes_the_state_without_a_step() -> None:
    module = fo.MomentumModule()
    assert module.state is None
    module.setup(PARAMS)
    assert_trees_equal(module.state, module.init(PARAMS))
    module.run(GRADS)
    module.setup(PARAMS)
    assert_trees_equal(module.state.velocity, GRADS)


def test_a_second_identity_is_refused() -> None:
    module = fo.GaussianNoiseModule(seed=1)
    module.setup(PARAMS, identity=3)
    before = module.get_state()
    with pytest.raises(RuntimeError, match="GaussianNoiseModule has a state already"):
        module.setup(PARAMS, identity=4)
    assert module.get_state() == before


def test_extra_arguments_reach_the_update() -> None:
    assert_trees_equal(Weighted().run(GRADS, weight=2.0), jax.tree.map(lambda g: 2 * g, GRADS))
    updates = fo.Optimizer(1.0, modules=[Weighted()]).compute_updates_from_gradients(PARAMS, GRADS, weight=2.0)
    assert_trees_equal(updates, jax.tree.map(lambda g: -2 * g, GRADS))


def test_two_rounds_begun_before_the_first_run_count_as_two() -> None:
    optimizer = by_rounds()
    optimizer.start_round()
    optimizer.start_round()
    np.testing.assert_allclose(optimizer.run(GRADS, params=PARAMS)["a"], -0.5 * GRADS["a"])


def test_rounds_begun_before_the_first_run_are_saved() -> None:
    optimizer, other = by_rounds(), by_rounds()
    for _ in range(3):
        optimizer.start_round()
    other.set_state(json.loads(json.dumps(optimizer.get_state())))
    np.testing.assert_allclose(other.run(GRADS, params=PARAMS)["a"], -0.25 * GRADS["a"])


def test_rounds_begun_before_a_received_message_makes_the_state_count() -> None:
    client = fo.ScaffoldClientModule()
    client.run(GRADS)
    server = fo.Optimizer(by_rounds().lrate, modules=["scaffold-server"])
    server.start_round()
    server.start_round()
    server.process_aux_var({"scaffold": {"ann": client.collect_aux_var()}})
    server.start_round()
    np.testing.assert_allclose(server.run(GRADS, params=PARAMS)["a"], -0.25 * GRADS["a"])


def test_a_round_begins_with_the_parameters_of_the_next_run() -> None:
    module = fo.FedProxRegularizer(alpha=1.0)
    module.on_round_start()
    assert_trees_equal(module.run(GRADS, PARAMS), GRADS)
    moved = jax.tree.map(lambda p: p + 1, PARAMS)
    assert_trees_equal(module.run(GRADS, moved), jax.tree.map(lambda g: g + 1, GRADS))
    module.on_round_start()
    assert_trees_equal(module.run(GRADS, moved), GRADS)


def test_a_state_restored_before_the_first_run_continues_in_any_container() -> None:
    module = fo.AdamModule()
    first = Pair(x=jnp.array([1.0, 2.0]), y=[jnp.array(3.0)])
    module.run(first)
    saved = json.loads(json.dumps(module.get_state()))
    expected = module.run(first)
    for container in (
        {"x": first.x, "y": {"0": first.y[0]}},
        {"x": first.x, "y": (first.y[0],)},
        nnx.State({"x": nnx.Param(first.x), "y": {"0": nnx.Param(first.y[0])}}),
    ):
        fresh = fo.AdamModule()
        fresh.set_state(saved)
        fresh.on_round_start()
        output = fresh.run(container)
        assert jax.tree.structure(output) == jax.tree.structure(container)
        for found, wanted in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert fresh.get_state() == module.get_state()


def test_a_state_without_variables_can_be_saved_and_restored() -> None:
    module, other = fo.AdamModule(), fo.AdamModule()
    other.run(GRADS)
    other.set_state(json.loads(json.dumps(module.get_state())))
    assert other.state is None
    assert_trees_equal(other.run(GRADS), module.run(GRADS))


def test_the_wrapper_of_nnx_leaves_is_no_part_of_a_path() -> None:
    module = fo.MomentumModule()
    module.run(nnx.State({"layer": {"kernel": nnx.Param(jnp.ones(2)), "stat": nnx.BatchStat(jnp.ones(1))}}))
    assert set(module.get_state()["params"]) == {"layer/kernel", "layer/stat"}


@pytest.mark.parametrize("method", ["run", "setup"])
def test_two_paths_that_would_be_written_alike_are_refused(method: str) -> None:
    module = fo.MomentumModule()
    with pytest.raises(ValueError, match=r"two parameters have the path 'a/b'"):
        getattr(module, method)({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    assert module.state is None


def test_the_same_paths_in_another_container_are_refused_in_mid_run() -> None:
    module = fo.MomentumModule()
    module.run({"a/b": jnp.ones(1)})
    with pytest.raises(ValueError, match="another container"):
        module.run({"a": {"b": jnp.ones(1)}})
    np.testing.assert_allclose(module.run({"a/b": jnp.ones(1)})["a/b"], 1.9)


def test_the_state_property_is_safe_from_later_donation() -> None:
    module = fo.AdamModule()
    module.run(GRADS)
    snapshot = module.state
    expected = jax.tree.map(np.array, snapshot)
    module.run(GRADS)
    assert_trees_equal(snapshot, expected)


def test_a_step_donates_the_facades_own_state() -> None:
    module = fo.MomentumModule()
    module.run(GRADS)
    inside = jax.tree.leaves(module._session.memory.state)
    module.run(GRADS)
    assert all(leaf.is_deleted() for leaf in inside)


@pytest.mark.parametrize("make", [Remember, fo.MomentumModule, lambda: fo.Optimizer(1.0, modules=[Remember()])])
def test_arrays_of_the_caller_are_never_donated(make: Callable[[], Any]) -> None:
    module = make()
    gradients, params = jax.tree.map(jnp.copy, (GRADS, PARAMS))
    module.setup(params)
    outputs = [ran(module, gradients, params) for _ in range(3)]
    snapshots = [module.state]
    outputs.append(ran(module, gradients, params))
    module.on_round_start()
    ran(module, gradients, params)
    assert_trees_equal((gradients, params), (GRADS, PARAMS))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((outputs, snapshots)))
    if isinstance(module, Remember):
        assert_trees_equal(module.state, {"gradients": GRADS, "params": PARAMS})


def test_apply_gradients_donates_the_parameters_only_on_request() -> None:
    optimizer = fo.Optimizer(1.0)
    params = jax.tree.map(jnp.copy, PARAMS)
    kept = optimizer.apply_gradients(params, GRADS)
    assert_trees_equal(params, PARAMS)
    moved = optimizer.apply_gradients(params, GRADS, donate=True)
    assert_trees_equal(moved, kept)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_reset_makes_it_as_new() -> None:
    module = fo.MomentumModule()
    first = module.run(GRADS)
    module.on_round_start()
    module.reset()
    assert module.state is None
    assert module.get_state() == fo.MomentumModule().get_state()
    assert_trees_equal(module.run(GRADS), first)
    module.reset()
    module.run({"other": jnp.ones(1)})


TRACES: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "jit": lambda f: jax.jit(f)(jnp.ones(2)),
    "grad": lambda f: jax.grad(lambda x: f(x)["w"].sum())(jnp.ones(2)),
    "vmap": lambda f: jax.vmap(f)(jnp.ones((3, 2))),
    "scan": lambda f: jax.lax.scan(lambda carry, x: (carry, f(x)), 0, jnp.ones((3, 2))),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("ran", [False, True])
def test_run_under_a_trace_names_update_and_leaves_the_facade_usable(trace: str, ran: bool) -> None:
    module, twin = fo.MomentumModule(), fo.MomentumModule()
    gradients = {"first": jnp.ones(1), "w": jnp.ones(2)}
    if ran:
        assert_trees_equal(module.run(gradients), twin.run(gradients))
    before = module.get_state()
    with pytest.raises(RuntimeError, match=r"MomentumModule.*use the pure `update"):
        TRACES[trace](lambda x: module.run({"first": jnp.ones(1), "w": x}))
    assert module.get_state() == before
    assert_trees_equal(module.run(gradients), twin.run(gradients))


def test_run_under_jit_on_closed_over_arrays_is_refused_too() -> None:
    module = fo.MomentumModule()
    module.run(GRADS)
    with pytest.raises(RuntimeError, match="use the pure `update"):
        jax.jit(lambda: module.run(GRADS))()
    np.testing.assert_allclose(module.run(GRADS)["a"], 1.9 * GRADS["a"], rtol=1e-6)


def test_every_other_call_that_would_keep_a_traced_state_is_refused_and_changes_nothing() -> None:
    client, server = fo.ScaffoldClientModule(), fo.ScaffoldServerModule()
    client.run(GRADS)
    delta = client.collect_aux_var()
    server.process_aux_var({"ann": delta})
    variate, saved = server.collect_aux_var(), client.get_state()
    optimizer = by_rounds()
    optimizer.run(GRADS, params=PARAMS)
    calls = [
        (client, lambda: client.process_aux_var(variate)),
        (client, lambda: client.set_state(saved)),
        (client, client.collect_aux_var),
        (optimizer, optimizer.start_round),
        (server, lambda: server.process_aux_var({"bob": delta})),
    ]
    new = fo.ScaffoldServerModule()
    calls.append((new, lambda: new.process_aux_var({"ann": delta})))
    for module, call in calls:
        before = module.get_state()
        with pytest.raises(RuntimeError, match="cannot be called under jit"):
            jax.jit(lambda x, call=call: (call(), x)[1])(1.0)
        assert module.get_state() == before


def test_a_module_whose_facade_ran_is_equal_and_can_be_chained() -> None:
    module, new = fo.MomentumModule(0.5), fo.MomentumModule(0.5)
    module.run(GRADS)
    assert module == new
    assert hash(module) == hash(new)
    chain = optax.chain(module, optax.scale(2.0))
    updates, _ = chain.update(GRADS, chain.init(PARAMS))
    assert_trees_equal(updates, jax.tree.map(lambda g: 2 * g, GRADS))
    optimizer = fo.Optimizer(1.0, modules=[module])
    assert_trees_equal(optimizer.run(GRADS, params=PARAMS), jax.tree.map(jnp.negative, GRADS))


def test_the_compilation_cache_keeps_no_state_alive(alive: Any) -> None:
    module = fo.MomentumModule(0.125)
    module.run(GRADS)
    references = [weakref.ref(module), weakref.ref(module._session.memory.state.velocity["a"])]
    del module
    assert alive(references) == []


def test_equal_modules_are_traced_once_over_many_calls() -> None:
    Counting.traces.clear()
    for module in (Counting(0.75), Counting(0.75)):
        for _ in range(3):
            module.run(GRADS)
    assert Counting.traces == ["update"]


def test_a_call_refused_for_its_structure_donates_nothing() -> None:
    module = fo.MomentumModule()
    module.run(GRADS)
    inside = jax.tree.leaves(module._session.memory.state)
    with pytest.raises(ValueError, match="'b/c'"):
        module.run({"a": GRADS["a"]})
    assert not any(leaf.is_deleted() for leaf in inside)


def test_a_state_that_starts_from_the_parameters_is_never_made_from_gradients() -> None:
    module = StartsThere()
    with pytest.raises(ValueError, match="StartsThere: the state starts from the parameters' values: pass `params`"):
        module.run(GRADS)
    assert module.state is None
    assert_trees_equal(module.run(GRADS, PARAMS), jax.tree.map(jnp.add, GRADS, PARAMS))


def test_a_device_failure_in_mid_step_says_what_is_lost_and_reset_recovers() -> None:
    class Failing(fo.OptiModule, register=False):
        name: ClassVar[str] = "failing"

        def init(self, params: Any) -> Any:
            return {"steps": jnp.zeros((), jnp.int32)}

        def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
            return updates, {"steps": state["steps"] + 1}

    module = Failing()
    module.run(GRADS)
    session = module._session
    specs, compiled = session.memory.fit
    broken = copy.copy(compiled)
    session.memory = session.memory._replace(fit=Fit(specs, broken))

    def fail(specs: Any, state: Any, *args: Any) -> Any:
        compiled.step(specs, state, *args)
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    broken.step = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"Failing: the device failed .* is lost: .*`reset\(\)`"):
        module.run(GRADS)
    module.reset()
    module.run(GRADS)
    assert module.state["steps"] == 1


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda brick: pickle.loads(pickle.dumps(brick))])
def test_copies_and_pickles_carry_the_state_and_share_no_buffer(duplicate: Callable[[Any], Any]) -> None:
    module = fo.MomentumModule()
    module.run(GRADS)
    twin = duplicate(module)
    assert twin == module
    expected = module.run(GRADS)
    assert_trees_equal(twin.run(GRADS), expected)


def test_no_two_leaves_of_a_state_share_a_buffer_even_where_init_returns_its_argument() -> None:
    module = Remember()
    module.setup(PARAMS)
    state = module._session.memory.state
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, PARAMS))]
    assert len(set(pointers)) == len(pointers)
