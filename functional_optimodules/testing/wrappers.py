"""Checks of wrappers, beside those of bricks, which the optimizer that a wrapper is put around has to pass."""

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.groups import Group
from functional_optimodules.numerics import is_finite
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.packing.adapter import packed_like
from functional_optimodules.packing.policy import pack
from functional_optimodules.packing.tree import unpack
from functional_optimodules.testing.check import check
from functional_optimodules.testing.trees import (
    assert_same,
    assert_same_specs,
    assert_same_structure,
    compiled_step,
    parameters,
    randoms,
    stepped,
    update,
)
from functional_optimodules.types import PyTree
from functional_optimodules.wrappers.wrapper import Wrapper


def carrier(*wrappers: Wrapper, groups: tuple[Group, ...] = ()) -> Optimizer:
    """Return an optimizer with wrappers, of which the first is outermost."""
    return Optimizer(0.1, modules=["adam"], groups=groups, wrappers=wrappers)


@check(Wrapper)
def check_eval_params_are_like_the_parameters(wrapper: Wrapper) -> None:
    """`eval_params` returns finite parameters of the same container, shapes and dtypes, packed as they are or not."""
    optimizer = carrier(wrapper)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = parameters(dtype)
        for given in (params, pack(params)):
            fresh = optimizer.init(given)
            _, state = stepped(optimizer, fresh, given, (1, 2))
            for each in (fresh, state):
                found = optimizer.eval_params(each, given)
                assert_same_specs(found, given, "`eval_params` returns other parameters than those it is given")
                assert is_finite(found), f"`eval_params` returns {found}: let it return `params` before the first step"


@check(Wrapper, scope="field")
def check_eval_params_of_packed(wrapper: Wrapper) -> None:
    """`eval_params` means the same on packed parameters."""
    optimizer, params = carrier(wrapper), parameters()
    found = []
    for given in (params, pack(params)):
        state = optimizer.init(given)
        for seed in (1, 2, 3):
            gradients = packed_like(randoms(params, seed), given)
            _, state = compiled_step(optimizer, gradients, state, given)
        found.append(unpack(optimizer.eval_params(state, given)))
    assert_same(found[1], found[0], "`eval_params` differs on packed parameters: treat elements alike", close=True)


@check(Wrapper)
def check_inside_and_keep_change_dtypes_alone(wrapper: Wrapper) -> None:
    """`inside` and `keep` return trees of the same structure and shapes."""
    params = parameters(jnp.bfloat16)
    inner = carrier().init(parameters())
    for name, made, given in (("inside", wrapper.inside(params), params), ("keep", wrapper.keep(inner), inner)):
        assert_same_structure(made, given, f"`{name}` changes the structure of what it is given")
        shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (made, given)]
        assert shapes[0] == shapes[1], f"`{name}` changes shapes: found {shapes[0]}, expected {shapes[1]}"


@check(Wrapper)
def check_parameters_may_be_lacking(wrapper: Wrapper) -> None:
    """Trees that lack frozen parameters are taken, and the others get what they would get alone."""
    params = parameters()
    alone, frozen = carrier(wrapper), carrier(wrapper, groups=(Group("scale", frozen=True),))
    rest = {"layer": params["layer"]}
    states = alone.init(rest), frozen.init(params)
    expected, _ = update(alone, randoms(rest, 1), states[0], rest)
    found, _ = update(frozen, {**randoms(rest, 1), "scale": jnp.ones(())}, states[1], params)
    moved = {**optax.apply_updates(rest, expected), "scale": params["scale"]}
    broken = "where a parameter is frozen, others get other updates: go through `jax.tree.map`"
    assert_same(optax.apply_updates(params, found), moved, broken, close=True)


@check(Wrapper)
def check_two_of_a_kind(wrapper: Wrapper) -> None:
    """It may be put around itself, unless it refuses that by a `ValueError` where the state is made."""
    params, optimizer = parameters(), carrier(wrapper, wrapper)
    try:
        state = optimizer.init(params)
    except ValueError:
        return
    _, new = update(optimizer, randoms(params, 1), state, params)
    assert_same_specs(new, state, "around itself, it changes the structure of the state")


@check(Wrapper)
def check_metrics_are_scalars(wrapper: Wrapper) -> None:
    """`metrics` returns scalars, under names of its own, and `check` is content with steps that go well."""
    params, optimizer = parameters(), carrier(wrapper)
    _, state = stepped(optimizer, optimizer.init(params), params, (1, 2))
    optimizer.check(state)
    own: PyTree = state.wrappers[wrapper.name]
    for name, value in wrapper.metrics(own).items():
        assert jnp.shape(value) == (), f"the metric {name!r} is of shape {jnp.shape(value)}: let it be a scalar"
