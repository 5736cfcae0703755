"""Cases between the parts: entropy under vmap, rounds that wait for parameters, placement, declarations."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.config.fields import FrozenConfig

PARAMS = {"w": jnp.arange(3.0)}
ONES = {"w": jnp.ones(3)}


class AnchorState(NamedTuple):
    total: Any
    anchor: Any


class AnchorModule(fo.OptiModule, register=False):
    """Subtracts the parameters that the round began with."""

    name: ClassVar[str] = "anchor"
    round_reset: bool = True

    def init(self, params):
        return AnchorState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.copy, params))

    def update(self, updates, state, params=None, **extra_args):
        total = jax.tree.map(jnp.add, state.total, updates)
        return jax.tree.map(jnp.subtract, updates, state.anchor), AnchorState(total, state.anchor)


@pytest.mark.parametrize("brick", [fo.GaussianNoiseModule(), fo.Optimizer(0.1, modules=["gaussian-noise"])])
def test_entropy_under_vmap_is_refused_rather_than_shared(brick):
    with pytest.raises(RuntimeError, match="outside of jit, vmap and scan"):
        jax.vmap(brick.init)(jnp.zeros((4, 3)))


def test_a_reset_that_starts_from_the_parameters_waits_for_those_of_the_next_step():
    module = AnchorModule()
    module.setup(PARAMS)
    module.run(ONES, PARAMS)
    module.on_round_start()
    restored = AnchorModule()
    restored.set_state(json.loads(json.dumps(module.get_state())))
    later = {"w": jnp.full(3, 7.0)}
    for each in (module, restored):
        chex.assert_trees_all_equal(each.run(ONES, later), {"w": jnp.full(3, -6.0)})
        chex.assert_trees_all_equal(each.state, AnchorState(ONES, later))
        assert each.get_state()["rounds_begun"] == 0


def test_a_reset_that_starts_from_the_parameters_asks_for_them_in_pure_code():
    with pytest.raises(ValueError, match="AnchorModule: round_reset restarts from the parameters"):
        AnchorModule().begin_round(AnchorModule().init(PARAMS))


def test_loading_a_facades_state_takes_a_message_that_is_out_as_arrived():
    client = fo.ScaffoldClientModule()
    client.run(ONES)
    client.collect_aux_var()
    state = client.load(client.get_state(), PARAMS)
    assert state.joined == 1
    chex.assert_trees_all_equal(state.local, ONES)


@pytest.mark.slow
def test_states_and_restored_states_lie_where_the_parameters_lie():
    script = """
        import jax, jax.numpy as jnp
        import functional_optimodules as fo

        mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        params = {"w": jax.device_put(jnp.arange(8.0), split)}
        optimizer = fo.Optimizer(0.1, modules=["scaffold-client", "adam", "momentum"])
        for each in (optimizer, fo.Optimizer(0.1, modules=["scaffold-client", "adam", "momentum"])):
            for _ in range(3):
                each.apply_gradients(params, params)
            found = [leaf.sharding for leaf in jax.tree.leaves(each.state) if leaf.shape == (8,)]
            assert len(found) == 6 and all(sharding == split for sharding in found), found
            saved = each.get_state()
            restored = fo.Optimizer.from_config(each.get_config())
            restored.set_state(saved)
            restored.apply_gradients(params, params)
            each.set_state(saved)
            for one in (each, restored):
                assert all(x.sharding == split for x in jax.tree.leaves(one.state) if x.shape == (8,))
            assert each._session.memory.fit.compiled is optimizer._session.memory.fit.compiled
        assert optimizer._session.memory.fit.compiled.apply._cache_size() == 1
    """
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment, timeout=300)


def test_half_precision_does_not_make_an_optax_state_start_from_the_parameters():
    half = {"w": jnp.ones(3, jnp.bfloat16)}
    chex.assert_trees_all_equal(fo.OptaxModule("sgd").run(half), half)


def test_bricks_of_clashing_names_keep_a_state_each():
    class Second(fo.OptiModule, register=False):
        name: ClassVar[str] = "ewma-2"

        def init(self, params):
            return AnchorState(jnp.zeros(()), jnp.zeros(()))

        def update(self, updates, state, params=None, **extra_args):
            return updates, state

    optimizer = fo.Optimizer(0.1, modules=[fo.EWMAModule(0.5), Second(), fo.EWMAModule(0.25)])
    assert len(optimizer.init(PARAMS).modules) == 3
    chex.assert_trees_all_close(optimizer.apply_gradients(PARAMS, ONES)["w"], PARAMS["w"] - 0.1 * 0.5 * 0.75)


def test_traced_and_unhashable_hyper_parameters_work_in_pure_code_and_are_refused_by_the_facade():
    def step(beta):
        transform = fo.MomentumModule(beta=beta).to_optax()
        return transform.update(ONES, transform.init(PARAMS))[0]["w"][0]

    np.testing.assert_allclose(jax.vmap(step)(jnp.array([0.1, 0.9])), 1)

    @dataclasses.dataclass
    class Ramp:
        slope: float

        def __call__(self, step):
            return self.slope * step

    optimizer = fo.Optimizer(Ramp(0.1))
    optimizer.update(ONES, optimizer.init(PARAMS))
    with pytest.raises(TypeError, match="use the pure"):
        optimizer.apply_gradients(PARAMS, ONES)


def test_a_scheduler_is_not_touched_under_a_trace():
    scheduler = fo.ExponentialDecay(1.0, 0.5)
    for call in (scheduler.on_round_start, scheduler.get_next_rate):
        with pytest.raises(RuntimeError, match=r"under jit.*`value\(clock\)` and `advance\(clock\)`"):
            jax.jit(lambda x, call=call: (call(), x)[1])(1.0)
    assert scheduler.get_next_rate() == 1.0


def test_derivatives_in_hyper_parameters_are_finite_at_zero():
    def adam(beta):
        module = fo.AdamModule(beta_1=beta)
        _, state = module.update(ONES, module.init(PARAMS))
        return module.update(ONES, state)[0]["w"][0]

    def decay(rate):
        scheduler = fo.ExponentialDecay(1.0, rate)
        return scheduler.value(scheduler.advance(scheduler.init()))

    assert jnp.isfinite(jax.grad(adam)(0.0))
    assert jnp.isfinite(jax.grad(decay)(0.0))


@pytest.mark.parametrize("identity", ["client-1", -1, 2**32, 1.5, True])
def test_an_identity_is_a_number_that_can_be_folded_in(identity):
    module = fo.GaussianNoiseModule(seed=0)
    with pytest.raises(ValueError, match="should be an integer in"):
        module.setup(PARAMS, identity=identity)
    assert module.state is None


def test_a_server_hears_of_no_more_clients_than_there_are():
    server = fo.ScaffoldServerModule(num_clients=1)
    client = fo.ScaffoldClientModule()
    client.run(ONES)
    message = client.collect_aux_var()
    with pytest.raises(ValueError, match=r"num_clients=1 is less than the 2 clients .*'bob' is one more than .*'ann'"):
        server.process_aux_var({"ann": message, "bob": message})
    assert server.state is None


def test_no_memory_is_taken_on_the_word_of_a_message_without_parameters():
    class Pace(fo.FromServer):
        rate: fo.Scalar

    class PaceModule(fo.OptiModule, register=False):
        name: ClassVar[str] = "pace"
        receives = Pace

        def init(self, params):
            return AnchorState(jax.tree.map(jnp.zeros_like, params), jnp.ones(()))

        def update(self, updates, state, params=None, **extra_args):
            return jax.tree.map(lambda g: state.anchor * g, updates), state

        def process(self, aux, state):
            return state._replace(anchor=aux.rate)

    message = {
        "aux_name": "pace",
        "sender": "server",
        "params": {"w": {"dtype": "float32", "shape": [2**34]}},
        "variables": {"rate": {"dtype": "float32", "shape": [], "data": "AAAAQA=="}},
    }
    module = PaceModule()
    with pytest.raises(ValueError, match=r"would take .* bytes: call `setup"):
        module.process_aux_var(message)
    module.process_aux_var(message | {"params": {"w": {"dtype": "float32", "shape": [3]}}})
    chex.assert_trees_all_equal(module.run(ONES), {"w": jnp.full(3, 2.0)})


def test_a_default_factory_is_a_default_and_a_pair_has_two_values():
    class Pair(fo.Scheduler, register=False):
        name: ClassVar[str] = "pair"
        bounds: tuple[float, float] = dataclasses.field(default_factory=lambda: (0.0, 1.0))

        def compute_value(self, step, round_):
            return jnp.asarray(self.bounds[1])

    assert Pair.from_config({}) == Pair()
    assert Pair((1, 2)).get_config() == {"bounds": [1.0, 2.0]}
    with pytest.raises(TypeError, match="should be of type list of 2 values"):
        Pair((1, 2, 3))


def test_a_name_that_was_meant_for_the_class_is_no_field():
    with pytest.raises(TypeError, match="'name' is an attribute of the class"):

        class Wrong(fo.Scheduler, register=False):
            name: str = "wrong"


def test_a_frozen_configuration_is_equal_to_its_values_and_tells_one_from_true():
    assert FrozenConfig({"b1": 0.5}) == {"b1": 0.5}
    assert FrozenConfig({"b1": 1}) != FrozenConfig({"b1": True})


def test_a_class_is_no_function_of_the_step():
    with pytest.raises(TypeError, match="lrate"):
        fo.Optimizer(fo.CosineAnnealing)


def test_a_server_refuses_what_makes_its_state_overflow_and_keeps_it(limiting):
    limiting(fo.Limits(magnitude=float("inf")))
    server, client = fo.ScaffoldServerModule(), fo.ScaffoldClientModule()
    client.run({"w": jnp.full(3, 3e38)})
    message = client.collect_aux_var()
    server.process_aux_var({"ann": message})
    before = server.get_state()
    with pytest.raises(ValueError, match="bob sent makes the state infinite"):
        server.process_aux_var({"bob": message})
    assert server.get_state() == before
