"""Checks of `begin_round`, `commit`, `process`, `forget` and `fold_in`."""

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.brick import Brick, OptiModule
from functional_optimodules.numerics import wide
from functional_optimodules.packing.adapter import adapted
from functional_optimodules.random.keys import CipherKey, is_any_key
from functional_optimodules.testing.check import check
from functional_optimodules.testing.exchange import received
from functional_optimodules.testing.trees import (
    assert_same,
    assert_same_specs,
    end_round,
    known,
    leaves_without_keys,
    parameters,
    randoms,
    stepped,
    to_numpy,
)


@check(Brick)
def check_rounds_keep_structure(brick: Brick) -> None:
    """Nothing that happens between steps changes the state's structure, shapes or dtypes."""
    params = parameters()
    _, state = stepped(brick, brick.init(params), params, (1,))
    auxes = received(brick, params)
    made = {
        "begin_round(state, params)": brick.begin_round(state, params),
        "begin_round(state)": brick.begin_round(state),
        "end_round(state)": end_round(brick, state, params),
        "commit(state)": brick.commit(state),
        "fold_in(state, 1)": brick.fold_in(state, 1),
    }
    if auxes:
        made["process(aux, state)"] = adapted(brick).process(auxes, state)
    for call, new in made.items():
        assert_same_specs(new, state, f"`{call}` changes the state")


@check(Brick, scope="field")
def check_round_reset_is_as_new(brick: Brick) -> None:
    """With `round_reset`, a round starts from the state that `init` makes."""
    if not getattr(brick, "round_reset", False):
        return
    params = parameters()
    fresh = brick.init(params)
    _, state = stepped(brick, fresh, params, (1, 2))
    for begun in (brick.begin_round(state, params), brick.begin_round(state)):
        assert_same(
            leaves_without_keys(begun),
            leaves_without_keys(fresh),
            "with `round_reset`, a round does not start as `init`",
        )


@check(Brick)
def check_forget_takes_back_what_was_given(brick: Brick) -> None:
    """What `forget` is told that a client gave, it takes out of the state that came of it."""
    if not brick.recalls() or not isinstance(brick, OptiModule):
        return
    params, adapter, before = parameters(), adapted(brick.bare()), brick.init(parameters())
    auxes, gradients = received(brick, params), randoms(params, 3)
    delta = jax.tree.map(lambda g: -wide(g), gradients)
    alone = {
        name: jnp.float32(1) if name == "joined" else value for name, value in known(brick.asks().step, params).items()
    }
    _, after = adapter.update(gradients, adapter.process(auxes, before), params, **alone)
    forgotten = adapter.forget(after, delta, auxes)
    assert_same(forgotten, before, "`forget` leaves something of what a client gave, or takes out more", close=True)


@check(Brick, scope="class")
def check_fold_in_separates_clients(brick: Brick) -> None:
    """An identity changes every PRNG key of a state, and nothing else."""
    state = brick.init(parameters())
    first, second = brick.fold_in(state, 1), brick.fold_in(state, 2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_any_key):
        at = jax.tree_util.keystr(path)
        a, b = (dict(jax.tree_util.tree_leaves_with_path(each, is_leaf=is_any_key))[path] for each in (first, second))
        same = np.array_equal(to_numpy(a), to_numpy(b))
        if is_any_key(leaf):
            assert not same, f"clients 1 and 2 have the same key at {at}: leave `fold_in` as it is"
        else:
            assert np.array_equal(to_numpy(a), to_numpy(leaf)), f"`fold_in` changes {at}, which is no key"
        assert is_any_key(leaf) or leaf.dtype != np.uint32, (
            f"the state holds uint32 at {at}: a PRNG key is made by `jax.random.key`, for `fold_in` to find it"
        )


@check(Brick, scope="class")
def check_keys_can_be_restored(brick: Brick) -> None:
    """PRNG keys of a state are of generators that JAX has, which is how checkpointers restore them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(brick.init(parameters()), is_leaf=is_any_key):
        known = not is_any_key(leaf) or isinstance(leaf, CipherKey) or isinstance(jax.random.key_impl(leaf), str)
        assert known, (
            f"the key at {jax.tree_util.keystr(path)} is of a generator that JAX has no name for, which Orbax saves "
            "and cannot restore: make it of one of JAX's, or by `make_key`"
        )
