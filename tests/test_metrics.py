"""What a step tells: the numbers, where they come from, that nothing else is computed, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.testing.trees import randoms

PARAMS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[1.0, 2.0], [2.0, 4.0]])}
GRADS = {"a": jnp.array([6.0, 8.0]), "b": jnp.array([[0.0, 0.1], [0.1, 0.0]])}


def told(tx, params=PARAMS, grads=GRADS, number=1):
    state = tx.init(params)
    for _ in range(number):
        updates, state = jax.jit(tx.update)(grads, state, params)
    return {name: float(value) for name, value in tx.metrics(state).items()}, updates


def norm(tree):
    return float(np.sqrt(sum((np.float64(leaf) ** 2).sum() for leaf in jax.tree.leaves(tree))))


def test_norms_rates_and_shares_are_those_of_the_step():
    tx = fo.Optimizer(
        ("exponential-decay", {"base": 0.5, "rate": 0.5}),
        w_decay=0.01,
        modules=[("l2-clipping", {"max_norm": 1.0}), "momentum", ("l2-global-clipping", {"max_norm": 100.0})],
        watch=["*", "l2-clipping/*", "*/clipped", "momentum/norm_after"],
    )
    found, updates = told(tx, number=2)
    clipped = {"a": GRADS["a"] / 10, "b": GRADS["b"]}
    expected = {
        "gradient_norm": norm(GRADS),
        "update_norm": norm(updates),
        "param_norm": norm(PARAMS),
        "update_ratio": norm(updates) / norm(PARAMS),
        "lrate": 0.25,
        "w_decay": 0.01,
        "count": 2,
        "l2-clipping/norm_before": norm(GRADS),
        "l2-clipping/norm_after": norm(clipped),
        "l2-clipping/clipped": 0.5,
        "l2-global-clipping/clipped": 0.0,
        "momentum/norm_after": 1.9 * norm(clipped),
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pack", [fo.pack, "inside"], ids=["packed", "packed inside"])
def test_they_are_the_same_of_packed_parameters(pack):
    params = {f"{i}": jnp.full(3, 1.0 + i) for i in range(8)}
    config = {
        "lrate": 0.1,
        "modules": [["l2-clipping", {"max_norm": 5.0}], "adam"],
        "groups": [{"match": "[0-3]", "modules": ["momentum"]}],
        "watch": ["**"],
    }
    plain, _ = told(fo.Optimizer.from_config(config), params, params)
    if pack == "inside":
        found, _ = told(fo.Optimizer.from_config({**config, "packed": True}), params, params)
    else:
        found, _ = told(fo.Optimizer.from_config(config), pack(params), pack(params))
    assert found == pytest.approx(plain, rel=1e-5)
    assert 0 < found["l2-clipping/clipped"] < 1


def test_a_brick_of_ones_own_says_what_it_likes_in_one_method():
    class Doubling(fo.OptiModule, register=False):
        name = "doubling"

        def init(self, params):
            return optax.EmptyState()

        def update(self, updates, state, params=None, **extra_args):
            return jax.tree.map(lambda g: 2 * g, updates), state

        def measure(self, before, after, state, params=None):
            return {"largest": jnp.max(after["a"]), "least": jnp.min(before["a"])}

    found, _ = told(fo.Optimizer(0.1, modules=[Doubling(), Doubling()], watch=["doubling-2/largest", "doubling/*"]))
    assert found["doubling-2/largest"] == 32
    assert found["doubling/least"] == 6
    assert "doubling-2/least" not in found


def reductions(watch):
    tx = fo.Optimizer(0.1, modules=["adam"], watch=watch)
    text = jax.jit(tx.update).lower(GRADS, tx.init(PARAMS), PARAMS).as_text()
    return text.count("stablehlo.reduce(")


def test_what_is_not_watched_is_not_computed():
    assert reductions([]) == reductions(["lrate"]) == 0
    assert reductions(["gradient_norm"]) == reductions(["update_norm"]) == len(PARAMS)
    assert reductions(["gradient_norm", "adam/norm_after"]) == 2 * len(PARAMS)


def test_the_count_of_steps_is_found_by_name():
    tx = fo.Optimizer(("warmup", {"base": 0.1, "warmup": 2}), modules=["adam", "momentum"], watch=["count"])
    state = tx.init(PARAMS)
    for count in range(3):
        assert optax.tree.get(state, "count") == count
        _, state = tx.update(GRADS, state, PARAMS)


def test_states_that_watch_are_saved():
    tx = fo.Optimizer(0.1, watch=["update_norm"])
    tx.apply_gradients(PARAMS, GRADS)
    other = fo.Optimizer.from_config(json.loads(json.dumps(tx.get_config())))
    other.set_state(json.loads(json.dumps(tx.get_state())))
    assert other.metrics(other.state) == tx.metrics(tx.state)


def test_a_federation_tells_them_in_its_history():
    client = fo.Optimizer(0.1, modules=["l2-global-clipping"], watch=["gradient_norm", "*/clipped"])
    server = fo.Optimizer(1.0, watch=["update_norm"])
    data = FederatedData.from_clients([randoms(jnp.zeros((4, 2)), seed) for seed in range(3)])
    federation = Federation(lambda params, x: ((x - params["w"]) ** 2).sum(-1), client, server=server, batch_size=4)
    start = {"w": jnp.zeros(2)}
    state, history = federation.fit(federation.init(start, data), data, 1)
    assert history["server/update_norm"] == pytest.approx(norm(state.params), rel=1e-5)
    means = [2 * np.linalg.norm(randoms(jnp.zeros((4, 2)), seed).mean(0)) for seed in range(3)]
    assert sorted(history["client/gradient_norm"][0]) == pytest.approx(sorted(means), rel=1e-5)
    assert history["client/l2-global-clipping/clipped"].sum() == sum(mean > 1 for mean in means)


def test_a_name_that_nobody_says_is_an_error_that_names_near_ones():
    with pytest.raises(
        ValueError, match="watch: the pattern 'gradient_nrom' matches no metric: did you mean 'gradient_norm'"
    ):
        fo.Optimizer(0.1, watch=["gradient_nrom"]).init(PARAMS)


def test_two_plug_ins_that_name_a_metric_alike_are_an_error():
    class Ridge(fo.OptiModule, register=False):
        name = "ridge"

        def init(self, params):
            return optax.EmptyState()

        def update(self, updates, state, params=None, **extra_args):
            return updates, state

    with pytest.raises(ValueError, match="two plug-ins name a metric 'ridge/norm_before'"):
        fo.Optimizer(0.1, regularizers=["ridge"], modules=[Ridge()], watch=["lrate"]).init(PARAMS)


class Said(fo.OptiModule, register=False):
    """Says something of a step, and something of its state."""

    name = "said"

    def init(self, params):
        return optax.EmptyState()

    def update(self, updates, state, params=None, **extra_args):
        return updates, state


@pytest.mark.parametrize("name", ["norm_after", "share"])
def test_a_brick_that_names_two_metrics_alike_is_an_error_before_the_first_step(name):
    class Twice(Said, register=False):
        def measure(self, before, after, state, params=None):
            return {name: jnp.ones(())}

        def metrics(self, state):
            return {"share": jnp.ones(())}

    with pytest.raises(ValueError, match=f"two plug-ins name a metric 'said/{name}'"):
        fo.Optimizer(0.1, modules=[Twice()], watch=["said/*"]).init(PARAMS)


def test_a_metric_that_is_no_scalar_is_an_error_before_the_first_step():
    class Vector(Said, register=False):
        def measure(self, before, after, state, params=None):
            return {"all": after["a"]}

    with pytest.raises(ValueError, match=r"Vector.measure says 'all' is float32\[2\]: expected a scalar"):
        fo.Optimizer(0.1, modules=[Vector()], watch=["said/all"]).init(PARAMS)


def test_what_is_said_of_the_parameters_needs_them():
    tx = fo.Optimizer(0.1, watch=["update_ratio"])
    with pytest.raises(ValueError, match="'update_ratio', which is watched, needs the parameters: pass `params`"):
        tx.update(GRADS, tx.init(PARAMS))
