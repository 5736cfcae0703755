"""Checks of bricks under JAX's transformations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from functional_optimodules.brick import Brick
from functional_optimodules.packing.adapter import adapted
from functional_optimodules.testing.check import check
from functional_optimodules.testing.exchange import received
from functional_optimodules.testing.trees import assert_same, compiled_step, parameters, ran, randoms, stepped, update
from functional_optimodules.types import PyTree


@check(Brick, scope="field")
def check_jit_equals_eager(brick: Brick) -> None:
    """A compiled step gives what the same step gives without compilation."""
    broken = "under jit: let nothing but its arguments enter it"
    params, compiled = parameters(), brick.bare()
    compiled.setup(params)
    state = compiled.state
    for seed in (1, 2):
        gradients = randoms(params, seed)
        eager, state = update(brick, gradients, state, params)
        assert_same(ran(compiled, gradients, params), eager, f"`update` differs {broken}", close=True)
    # What is left of a difference has the rounding of the numbers that it is of.
    assert_same(compiled.state, state, f"the state differs {broken}", close=True, size=1.0)


@check(Brick)
def check_vmap_over_clients(brick: Brick) -> None:
    """Clients whose states are stacked get what each gets alone."""
    params = parameters()
    states = [brick.fold_in(brick.init(params), client) for client in range(3)]
    gradients = [randoms(params, client) for client in range(3)]
    mapped = jax.vmap(functools.partial(update, brick.bare()), in_axes=(0, 0, None))
    together = jax.jit(mapped)(_stack(gradients), _stack(states), params)
    alone = [compiled_step(brick.bare(), g, s, params) for g, s in zip(gradients, states, strict=True)]
    assert_same(together, _stack(alone), "under vmap, clients differ from what each gets alone", close=True)


def _stack(trees: PyTree) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@check(Brick, scope="class")
def check_scan_equals_loop(brick: Brick) -> None:
    """Steps in a `lax.scan` are those of a Python loop."""
    params = parameters()
    state = brick.init(params)
    gradients = [randoms(params, seed) for seed in range(3)]

    def body(carry: PyTree, updates: PyTree) -> PyTree:
        output, carry = update(brick, updates, carry, params)
        return carry, output

    last, scanned = jax.jit(lambda state, xs: jax.lax.scan(body, state, xs))(state, _stack(gradients))
    outputs, expected = stepped(brick, state, params, range(3))
    assert_same(scanned, _stack(outputs), "steps in a scan differ from those of a loop", close=True)
    assert_same(last, expected, "the state after a scan differs from that after a loop", close=True)


@check(Brick)
def check_traced_once(brick: Brick) -> None:
    """Neither a step, nor a round, nor a message, nor an equal brick built anew traces `update` again."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(brick: Brick, updates: PyTree, state: PyTree, params: PyTree) -> PyTree:
        traces.append(brick)
        return update(brick, updates, state, params)

    params = parameters()
    auxes = received(brick, params)
    state = brick.init(params)
    for each in (brick.bare(), dataclasses.replace(brick)):
        for seed in range(2):
            step.trace(each, randoms(params, seed), state, params)
            _, state = compiled_step(each, randoms(params, seed), state, params)
        state = each.begin_round(state, params)
        state = adapted(each).process(auxes, state) if auxes else state
        state = each.begin_round(each.commit(state))
    assert len(traces) == 1, (
        f"`update` was traced {len(traces)} times: keep shapes, dtypes and weak types of the state, and hash by fields"
    )


@check(Brick)
def check_strict_promotion(brick: Brick) -> None:
    """No line relies on implicit dtype promotion, which users may have made an error."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = parameters(dtype)
        auxes = received(brick, params)
        with jax.numpy_dtype_promotion("strict"):
            state = brick.init(params)
            jax.eval_shape(functools.partial(update, brick), params, state, params)
            jax.eval_shape(brick.begin_round, state, params)
            jax.eval_shape(lambda state: (adapted(brick).collect(state), adapted(brick).commit(state)), state)
            if auxes:
                jax.eval_shape(adapted(brick).process, auxes, state)
