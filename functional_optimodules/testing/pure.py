"""Checks of `init` and `update` as pure functions of arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.brick import Brick
from functional_optimodules.random.keys import is_any_key, is_key
from functional_optimodules.testing.check import check
from functional_optimodules.testing.trees import (
    assert_same,
    assert_same_specs,
    assert_untouched,
    compiled_step,
    donating_step,
    parameters,
    randoms,
    stepped,
    to_numpy,
    update,
)
from functional_optimodules.types import PyTree
from functional_optimodules.wrappers.wrapper import Wrapper

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


@check(Brick, scope="class")
def check_state_is_a_named_tuple_of_arrays(brick: Brick) -> None:
    """The state is a `NamedTuple`, and its leaves are arrays from the start: no numbers that stand for "not yet"."""
    state = brick.init(parameters())
    is_named = isinstance(state, tuple) and hasattr(state, "_fields")
    assert is_named, f"`init` returns a {type(state).__name__}: let it return a `NamedTuple`"
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert isinstance(leaf, jax.Array), (
            f"`init` returns {leaf!r} at {jax.tree_util.keystr(path)}: let it return arrays, such as zeros"
        )


@check(Brick, scope="field")
def check_update_keeps_structure(brick: Brick) -> None:
    """Neither what `update` returns for updates nor its state changes in structure, shapes or dtypes."""
    params = parameters()
    state = brick.init(params)
    output, new = jax.eval_shape(functools.partial(update, brick), params, state, params)
    assert_same_specs(output, params, "`update` returns other updates than it got")
    assert_same_specs(new, state, "`update` changes the state's structure: let `init` make it whole")


@check(Brick)
def check_update_is_pure(brick: Brick) -> None:
    """The same arguments give the same results, and neither they nor the brick are changed."""
    params = parameters()
    updates, state, memory = randoms(params, 1), brick.init(params), dict(vars(brick))
    before = [jax.tree.flatten(tree) for tree in (updates, state, params)]
    first = update(brick, updates, state, params)
    second = update(brick, updates, state, params)
    assert_same(second, first, "`update` is not a pure function: called twice on the same arguments it differs")
    for flat, tree in zip(before, (updates, state, params), strict=True):
        assert_untouched(tree, flat, "`update` changes its arguments in place: return new containers")
    kept = [key for key, value in vars(brick).items() if memory.get(key) is not value]
    assert not kept, f"`update` keeps {kept} on the brick itself: let the state hold it"


@check(Brick)
def check_state_owns_its_buffers(brick: Brick) -> None:
    """No two leaves of a new state share a buffer, and none is one of the parameters'."""
    params = parameters()
    state = brick.init(params)
    for made, by in ((state, "init"), (brick.begin_round(state, params), "begin_round")):
        taken = {_buffer(leaf): f"params{jax.tree_util.keystr(path)}" for path, leaf in _paths(params)}
        for path, leaf in _paths(made):
            at = jax.tree_util.keystr(path)
            other = taken.setdefault(_buffer(leaf), at)
            assert other == at, (
                f"`{by}` returns one buffer at {other} and at {at}: copy it (`jnp.copy`), for a donated state to be no "
                "other's"
            )


def _paths(tree: PyTree) -> PyTree:
    return jax.tree_util.tree_leaves_with_path(tree)


def _buffer(leaf: Any) -> int:
    return id(leaf) if is_key(leaf) or not leaf.size else leaf.unsafe_buffer_pointer()


@check(Brick)
def check_state_can_be_donated(brick: Brick) -> None:
    """A compiled step may donate the state, from the very first on, and the caller's arrays stay alive."""
    params = parameters()
    state, updates = brick.init(params), randoms(params, 1)
    expected, _ = stepped(brick, state, params, (1, 1))
    for output in expected:
        found, state = donating_step(brick.bare(), updates, state, params)
        assert_same(found, output, "a donated state gives other updates", close=True)
    for leaf in jax.tree.leaves((updates, params)):
        assert not leaf.is_deleted(), "donating the state deletes arrays of the caller: copy what `init` keeps"


@check(Brick)
def check_dtypes_are_kept(brick: Brick) -> None:
    """Updates leave with the dtype that they came with, and the state's dtypes stay."""
    for dtype in _DTYPES:
        with jax.enable_x64(dtype == jnp.float64):
            params = parameters(dtype)
            state = brick.init(params)
            output, new = jax.eval_shape(functools.partial(update, brick), params, state, params)
            assert_same_specs(output, params, f"updates in {dtype.__name__} change: cast them to the dtype they had")
            assert_same_specs(new, state, f"with {dtype.__name__} updates, `update` changes the state")


@check(Brick)
def check_half_precision_accumulates_wide(brick: Brick) -> None:
    """Norms and moments are computed in at least float32, whatever the dtype of the updates."""
    params = [{"w": randoms(jnp.zeros(300, jnp.float16), seed)} for seed in range(2)]
    updates = {"w": jnp.full(300, 256, jnp.float16)}  # the sum of squares is beyond float16
    first = state = brick.init(params[0])
    exact = jax.tree.map(
        lambda old, new: old if is_any_key(old) else new, state, brick.init(_exact(params[0])), is_leaf=is_any_key
    )
    # Noise brings a few of the values so near to a jump, such as a sign's, that rounding takes them across.
    across = 0.03 if any(map(is_any_key, jax.tree.leaves(state, is_leaf=is_any_key))) else 0
    for param in params:
        output, state = compiled_step(brick.bare(), updates, state, param)
        wanted, exact = compiled_step(brick.bare(), _exact(updates), exact, _exact(param))
        found, expected = to_numpy(output["w"]).astype(float), to_numpy(wanted["w"].astype(jnp.float16)).astype(float)
        close = np.isclose(found, expected, rtol=0.02, atol=0.002 * np.abs(expected).max(), equal_nan=True)
        assert (~close).mean() <= across, (
            f"float16 updates give {found[~close][:3]} where float32 gives {expected[~close][:3]}: compute in "
            "`numerics.wide`"
        )
    if any(type(wrapper).keep is not Wrapper.keep for wrapper in getattr(brick, "wrappers", ())):
        return  # It keeps the state in other dtypes between steps, and that is what it is for.
    given = [to_numpy(leaf) for leaf in jax.tree.leaves((first, params, updates))]
    for path, leaf in _paths(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4:
            assert any(np.array_equal(to_numpy(leaf), each) for each in given), (
                f"the state accumulates in {leaf.dtype} at {jax.tree_util.keystr(path)}: make it with "
                "`numerics.zeros_wide`"
            )


def _exact(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


@check(Brick)
def check_gradient_at_zero_is_finite(brick: Brick) -> None:
    """Updates of zero give finite numbers, and so do the derivatives of two steps there."""
    params = parameters()
    state = brick.init(params)

    def total(updates: PyTree) -> PyTree:
        first, then = update(brick, updates, state, params)
        second, _ = update(brick, updates, then, params)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((first, second)))

    found = jax.jit(jax.value_and_grad(total))(jax.tree.map(jnp.zeros_like, params))
    for leaf in jax.tree.leaves(found):
        assert np.isfinite(leaf).all(), (
            f"updates of zero give {found}: take roots by `numerics.safe_sqrt`, and do not divide by 0"
        )
