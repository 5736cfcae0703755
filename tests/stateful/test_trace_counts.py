"""Nothing is traced or compiled twice, and no compilation cache keeps a state alive."""

import weakref
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo
from functional_optimodules import (
    AdamModule,
    CosineAnnealing,
    ExponentialDecay,
    FromClients,
    MomentumModule,
    Optimizer,
    OptiModule,
    Params,
    Warmup,
    hyperparameter,
)
from functional_optimodules.stateful.compiled import compiled
from functional_optimodules.testing.trees import ran

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(())}
TRACES: list[str] = []


class Report(FromClients):
    total: Params


class CountingState(NamedTuple):
    total: Any


class Counting(OptiModule, register=False):
    """It notes each time that one of its methods is traced."""

    name: ClassVar[str] = "counting"
    sends = Report
    receives = Report
    beta: float = hyperparameter(default=0.5, within="[0, 1]")

    def init(self, params):
        return CountingState(jax.tree.map(jnp.zeros_like, params))

    def update(self, updates, state, params=None, **extra_args):
        TRACES.append("update")
        total = jax.tree.map(lambda t, g: self.beta * t + g, state.total, updates)
        return total, CountingState(total)

    def begin_round(self, state, params=None):
        TRACES.append("begin_round")
        return state

    def collect(self, state):
        TRACES.append("collect")
        return Report(state.total)

    def commit(self, state):
        TRACES.append("commit")
        return CountingState(jax.tree.map(jnp.zeros_like, state.total))

    def process(self, aux, state):
        TRACES.append("process")
        return CountingState(jax.tree.map(jnp.add, state.total, aux.total))


@pytest.fixture(autouse=True)
def _fresh_traces():
    TRACES.clear()
    compiled.cache_clear()


def gradients(step):
    return jax.tree.map(lambda p: p * (step + 1), PARAMS)


def test_update_is_traced_once_from_step_to_step():
    brick = Counting()
    for step in range(4):
        brick.run(gradients(step))
    assert TRACES == ["update"]


def test_update_is_traced_again_for_another_hyper_parameter_or_other_parameters():
    Counting().run(PARAMS)
    Counting(0.25).run(PARAMS)
    Counting().run({"w": jnp.ones(2)})
    assert TRACES == ["update"] * 3


def test_an_equal_brick_built_anew_is_not_traced():
    Counting().run(PARAMS)
    Counting.from_config({"beta": 0.5}).run(gradients(1))
    Counting(jnp.float32(0.5)).run(gradients(2))
    assert TRACES == ["update"]


def test_a_round_that_starts_traces_nothing_again():
    brick = Counting()
    for step in range(3):
        brick.on_round_start()
        brick.run(gradients(step))
        brick.run(gradients(step))
    # The first round is begun with the parameters of the first step, the others at once.
    assert TRACES.count("update") == 1
    assert TRACES.count("begin_round") <= 2
    known = len(TRACES)
    brick.on_round_start()
    brick.run(PARAMS)
    assert len(TRACES) == known


def test_messages_are_traced_once_in_each_direction():
    first, second = Counting(), Counting()
    for step in range(3):
        for brick in (first, second):
            brick.run(gradients(step))
        messages = {"first": first.collect_aux_var(), "second": second.collect_aux_var()}
        first.process_aux_var(messages)
    once = ("update", "begin_round", "collect", "commit", "process")
    assert {name: TRACES.count(name) for name in TRACES} == dict.fromkeys(once, 1)


def test_a_restored_state_is_not_traced():
    brick, restored = Counting(), Counting()
    brick.run(PARAMS)
    restored.set_state(brick.get_state())
    restored.run(gradients(1))
    assert TRACES == ["update"]


@pytest.mark.parametrize(
    "lrate",
    [
        0.1,
        Warmup(CosineAnnealing(0.0, 1.0, 5), 2),
        ExponentialDecay(1.0, 0.5, step_level=False),
        lambda step: 1 / (step + 1),
    ],
    ids=["number", "warmup", "by-round", "function"],
)
def test_a_rate_that_changes_traces_nothing_again(lrate):
    optimizer = Optimizer(lrate, 0.01, modules=[Counting(), "adam"])
    params = PARAMS
    for step in range(5):
        if step % 2:
            optimizer.start_round()
        params = optimizer.apply_gradients(params, gradients(step))
    assert TRACES.count("update") == 1


def test_an_equal_optimizer_built_anew_is_not_traced():
    for _ in range(2):
        optimizer = Optimizer(("cosine-annealing", {"base": 0.0, "max_lr": 1.0, "duration": 5}), modules=[Counting()])
        optimizer.compute_updates_from_gradients(PARAMS, PARAMS)
    assert TRACES == ["update"]


def test_equal_bricks_as_static_arguments_share_a_compilation():
    step = jax.jit(lambda brick, state, g: brick.update(g, state), static_argnums=0)
    for brick in (Counting(), Counting(), Counting().bare()):
        step(brick, brick.init(PARAMS), PARAMS)
    assert TRACES == ["update"]


def test_equal_bricks_give_one_optax_transformation():
    assert Counting().to_optax() is Counting().to_optax()


def state_of(brick):
    return [weakref.ref(leaf) for leaf in jax.tree.leaves(brick._session.memory.state)]


def test_a_facade_keeps_its_own_state_alive(alive):
    brick = AdamModule()
    brick.run(PARAMS)
    references = state_of(brick)
    assert references
    assert alive(references) == references


@pytest.mark.parametrize("make", [AdamModule, lambda: Optimizer(0.1, modules=["momentum", "scaffold-client"])])
def test_no_cache_keeps_the_state_of_a_facade_that_is_gone(make, alive):
    brick = make()
    brick.setup(PARAMS)
    brick.on_round_start()
    ran(brick, PARAMS, PARAMS)
    brick._session.collect()
    brick.get_state()
    references = [*state_of(brick), weakref.ref(brick._session), weakref.ref(brick)]
    del brick
    assert alive(references) == []


def test_no_cache_keeps_the_gradients_of_a_step(alive):
    brick, updates = AdamModule(), gradients(1)
    output = brick.run(updates, PARAMS)
    references = [weakref.ref(leaf) for leaf in jax.tree.leaves((updates, output))]
    del updates, output
    assert alive(references) == []


def test_what_is_made_of_a_facade_that_has_run_does_not_keep_its_state(alive):
    brick = MomentumModule()
    brick.run(PARAMS)
    references = [*state_of(brick), weakref.ref(brick._session)]
    transformation, optimizer = brick.to_optax(), Optimizer(0.1, modules=[brick])
    chained = optax.chain(transformation, optax.scale(-1.0))
    optimizer.run(PARAMS)
    step = jax.jit(chained.update)
    step(PARAMS, chained.init(PARAMS))
    del brick
    assert alive(references) == []


def test_reset_lets_go_of_the_state(alive):
    brick = MomentumModule()
    brick.run(PARAMS)
    references = state_of(brick)
    brick.reset()
    assert alive(references) == []


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), jnp.asarray(0.5, jnp.float32)], ids=["float", "NumPy", "JAX"])
def test_a_number_in_the_place_of_an_array_traces_nothing_again(number):
    module = Counting()
    module.run({**gradients(0), "b": jnp.float32(0.5)}, PARAMS, scale=jnp.float32(2))
    for scale in (number, 2.0, jnp.float32(3)):
        module.run({**gradients(1), "b": number}, {**PARAMS, "b": number}, scale=scale)
    assert TRACES == ["update"]


def test_rates_that_are_numbers_or_arrays_of_one_value_share_a_trace():
    optimizers = [Optimizer(rate, modules=[Counting(beta=0.5)]) for rate in (0.5, np.float32(0.5), jnp.float32(0.5))]
    for optimizer in optimizers:
        optimizer.apply_gradients(PARAMS, gradients(0))
    assert TRACES == ["update"]


def test_packed_and_unpacked_steps_are_traced_once_each():
    params = {f"{index:02d}": jnp.ones(3) for index in range(40)}
    module, packed = Counting(), fo.pack(params)
    for _ in range(3):
        module.on_round_start()
        module.run(params)
        module.run(packed)
    assert sorted(TRACES) == ["begin_round", "update", "update"]
