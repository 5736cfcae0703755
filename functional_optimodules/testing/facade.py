"""Checks of a brick's facade: what it remembers, saves, restores and leaves alone."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax

from functional_optimodules.brick import Brick
from functional_optimodules.testing.check import check
from functional_optimodules.testing.configs import assert_equal, through_json
from functional_optimodules.testing.exchange import deliver, messages_for
from functional_optimodules.testing.trees import (
    assert_same,
    assert_same_structure,
    collected,
    containers,
    known,
    parameters,
    ran,
    randoms,
    stepped,
)
from functional_optimodules.types import PyTree
from functional_optimodules.wire.paths import leaf_paths


def ran_midway(brick: Brick, params: PyTree) -> Brick:
    """Return an equal brick whose facade is in the middle of a round, with messages taken and sent."""
    started = brick.bare()
    started.setup(params)
    started.on_round_start()
    ran(started, randoms(params, 1), params)
    deliver(started, messages_for(brick, params))
    ran(started, randoms(params, 2), params)
    collected(started, params)
    return started


def _continued(brick: Brick, params: PyTree) -> list[PyTree]:
    outputs = [ran(brick, randoms(params, 3), params)]
    brick.on_round_start()
    return [*outputs, ran(brick, randoms(params, 4), params)]


@check(Brick, scope="class")
def check_run_is_update(brick: Brick) -> None:
    """`run` is `update`, whose state it keeps; `state` is a copy that later steps leave alone."""
    params = parameters()
    runs = brick.bare()
    runs.setup(params)
    kept = runs.state
    expected, last = stepped(brick, runs.state, params, (1, 2))
    outputs = [ran(runs, randoms(params, seed), params) for seed in (1, 2)]
    assert_same(outputs, expected, "`run` gives other updates than `update`", close=True)
    assert_same(runs.state, last, "`run` keeps another state than that of `update`", close=True)
    for leaf in jax.tree.leaves(kept):
        assert not leaf.is_deleted(), "a step deletes a copy of the state"


@check(Brick, scope="field")
def check_resume_in_mid_round(brick: Brick) -> None:
    """A state saved as JSON in mid-round continues identically: in a new brick, or in one that has run."""
    params = parameters()
    original = ran_midway(brick, params)
    saved = through_json(original.get_state(), "the state")
    new, used = (type(brick).from_config(through_json(brick.get_config(), "the configuration")) for _ in range(2))
    used.setup(params)
    ran(used, randoms(params, 9), params)
    for each in (new, used):
        each.set_state(saved)
        assert each.get_state() == saved, "a restored state is saved as another"
    expected, last = _continued(original, params), original.get_state()
    for each in (new, used):
        assert_same(_continued(each, params), expected, "a restored brick continues differently: keep all in the state")
        assert each.get_state() == last, "a restored brick arrives at another state: keep all in the state"


@check(Brick, scope="class")
def check_state_before_the_first_run(brick: Brick) -> None:
    """What is saved before the first `run` is restored: rounds that were begun count."""
    early, restored = brick.bare(), brick.bare()
    early.on_round_start()
    early.on_round_start()
    saved = through_json(early.get_state(), "the state")
    restored.set_state(saved)
    assert restored.get_state() == saved, "a state saved before the first `run` is lost"
    assert np.isfinite(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(ran(restored, parameters(), parameters()))))


@check(Brick, scope="class")
def check_containers_are_equal(brick: Brick) -> None:
    """Any container gives the same numbers in the same container, from a state saved over another."""
    vector, scalar = parameters()["layer"]["bias"], parameters()["scale"]
    for name, put in containers().items():
        params = put(vector, scalar)
        grads = randoms(params, 1)
        paths = leaf_paths(params)
        flat_params, flat_grads = (dict(zip(paths, jax.tree.leaves(tree), strict=True)) for tree in (params, grads))
        reference, hung = brick.bare(), brick.bare()
        reference.setup(flat_params)
        hung.set_state(reference.get_state())
        expected, output = ran(reference, flat_grads, flat_params), ran(hung, grads, params)
        assert_same_structure(output, grads, f"a {name} leaves `update` as another container")
        by_path = dict(zip(paths, jax.tree.leaves(output), strict=True))
        assert_same(by_path, expected, f"parameters in a {name} get other updates", close=True)
        assert_same_structure(
            brick.init(params),
            hung.state,
            f"over a {name}, `init` makes other containers than a restored state has: let the parts of the state that "
            "are shaped like the parameters have their very container",
        )


@check(Brick, scope="class")
def check_odd_trees(brick: Brick) -> None:
    """No parameters, a lone scalar, and an array without elements are parameters too, and can be resumed."""
    for params in ({}, jnp.ones(()), {"empty": jnp.zeros((0, 3)), "one": jnp.ones(1)}):
        steps, resumed = brick.bare(), brick.bare()
        steps.setup(params)
        ran(steps, randoms(params, 1), params)
        resumed.set_state(through_json(steps.get_state(), "the state"))
        outputs = [ran(each, randoms(params, 2), params) for each in (steps, resumed)]
        assert_same(outputs[1], outputs[0], f"over parameters {params}, a restored state continues differently")
        for leaf in jax.tree.leaves(outputs):
            assert np.isfinite(leaf).all(), f"parameters {params} give {outputs[0]}"


@check(Brick)
def check_chained_after_running(brick: Brick) -> None:
    """A brick whose facade has run can be chained, and neither use touches the other or the caller's arrays."""
    params = parameters()
    runs = ran_midway(brick, params)
    saved, updates = runs.get_state(), randoms(params, 1)
    asked = known(brick.asks().step, params)
    # Of what is none of its own, `optax.chain` drops extra arguments.
    chained = optax.chain(runs.to_optax() if asked else runs, optax.scale(-1.0))
    state = chained.init(params)
    (expected,), _ = stepped(brick, state[0], params, (1,))
    output, _ = chained.update(updates, state, params, **asked)
    assert_same(output, jax.tree.map(jnp.negative, expected), "in `optax.chain` it gives other updates", close=True)
    assert runs.get_state() == saved, "chaining a brick changes its facade's state: read only arguments in `update`"
    assert_equal(runs, brick, "a brick whose facade has run")
    first = ran(runs, updates, params)
    ran(runs, updates, params)
    runs.on_round_start()
    ran(runs, updates, params)
    for leaf in jax.tree.leaves((updates, params, first)):
        assert not leaf.is_deleted(), "`run` deletes arrays of the caller"


@check(Brick, scope="class")
def check_refused_under_trace(brick: Brick) -> None:
    """`run` under an outer jit is an error, which leaves the facade usable."""
    params = parameters()
    for runs in (ran_midway(brick, params), brick.bare()):
        saved = runs.get_state()
        try:
            jax.jit(lambda tree, runs=runs: ran(runs, tree, tree))(params)
        except RuntimeError as error:
            message = str(error)
        else:
            raise AssertionError("`run` under jit is no error")
        assert "`update" in message, f"the error of `run` under jit does not say what to use instead: {message}"
        assert runs.get_state() == saved, "`run` refused under jit has changed the state"
        ran(runs, params, params)


@check(Brick, scope="class")
def check_copies_are_independent(brick: Brick) -> None:
    """Copies and pickles are equal, carry the state, take the same next step, and go their own way."""
    params = parameters()
    original = ran_midway(brick, params)
    copies = [copy.copy(original), copy.deepcopy(original)]
    if "<locals>" not in type(brick).__qualname__:  # pickle finds classes by their names
        copies.append(pickle.loads(pickle.dumps(original)))
    saved = original.get_state()
    expected = _continued(original, params)
    for each in copies:
        assert_equal(each, brick, "a copy")
        assert each.get_state() == saved, "a copy has another state, or steps of the original reach it"
        assert_same(_continued(each, params), expected, "a copy continues differently")
