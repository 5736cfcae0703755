"""Parameters that are shared by turns, as streaming DiLoCo shares them."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import Federation

SIZES = {"a": (3,), "b": (2,), "c": (2,)}
TARGETS = {name: np.random.default_rng(7).normal(size=(4, *shape)) for name, shape in SIZES.items()}
CLIENTS, STEPS, RATE, OUTER, BETA = 4, 3, 0.2, 0.7, 0.9


def loss(params: Any, batch: Any) -> jax.Array:
    """Half the squared distance from a client's own targets, with a pull between the fragments."""
    who = batch["who"][0]
    apart = sum(jnp.sum((params[name] - jnp.asarray(TARGETS[name], jnp.float32)[who]) ** 2) for name in SIZES)
    return 0.5 * apart + 0.3 * jnp.sum(params["a"]) * jnp.sum(params["b"])


def gradient(params: dict[str, np.ndarray], who: int) -> dict[str, np.ndarray]:
    found = {name: params[name] - TARGETS[name][who] for name in SIZES}
    found["a"] = found["a"] + 0.3 * params["b"].sum()
    found["b"] = found["b"] + 0.3 * params["a"].sum()
    return found


def oracle(rounds: list[list[int]], mixing: float) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Fragments {a} and {b} by turns, c in every round; the outer step is Nesterov's, of what is due alone."""
    shared = {name: np.zeros(shape) for name, shape in SIZES.items()}
    velocity = {name: np.zeros(shape) for name, shape in SIZES.items()}
    own = [{name: np.zeros(shape) for name, shape in SIZES.items()} for _ in range(CLIENTS)]
    unseen: list[set[str]] = [set() for _ in range(CLIENTS)]
    for number, participants in enumerate(rounds):
        due = ("a", "b")[number % 2]
        deltas = []
        for who in participants:
            y = {"c": shared["c"].copy()}
            for name in ("a", "b"):
                back = mixing * own[who][name] + (1 - mixing) * shared[name]
                y[name] = back if name in unseen[who] else own[who][name].copy()
            start = {name: shared[name].copy() for name in y}
            for _ in range(STEPS):
                g = gradient(y, who)
                y = {name: y[name] - RATE * g[name] for name in y}
            own[who], unseen[who] = y, set()
            deltas.append({name: y[name] - start[name] for name in y})
        for name in (due, "c"):
            g = -np.mean([delta[name] for delta in deltas], axis=0)
            velocity[name] = BETA * velocity[name] + g
            shared[name] = shared[name] - OUTER * (BETA * velocity[name] + g)
        for each in unseen:
            each.add(due)
    return shared, own


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["scan", "vmap"])
@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_fragments_are_shared_by_turns(mixing: float, mapping: Any) -> None:
    rounds = [[0, 1, 2, 3], [0, 2, 3], [1, 3], [0, 1, 2, 3], [2, 0], [3, 1]]
    server = fo.Optimizer(OUTER, modules=[("momentum", {"beta": BETA, "nesterov": True})])
    federation = Federation(loss, fo.Optimizer(RATE), server, fragments=[["a"], ["b"]], mixing=mixing, mapping=mapping)
    state = federation.init({name: jnp.zeros(shape) for name, shape in SIZES.items()}, CLIENTS)
    for participants in rounds:
        batches = {"who": np.broadcast_to(np.array(participants)[:, None, None], (len(participants), STEPS, 1))}
        state, _ = federation.round(state, batches, participants)
    shared, own = oracle(rounds, mixing)
    for name in SIZES:
        np.testing.assert_allclose(state.params[name], shared[name], rtol=1e-5, atol=1e-6)
        for who in range(CLIENTS) if name != "c" else ():
            np.testing.assert_allclose(federation.model(state, who)[name], own[who][name], rtol=1e-5, atol=1e-6)


def test_a_saved_federation_goes_on() -> None:
    federation = Federation(loss, fo.Optimizer(RATE), fragments=[["a"], ["b"]], mixing=0.25)
    start = federation.init({name: jnp.zeros(shape) for name, shape in SIZES.items()}, CLIENTS)
    batches = {"who": np.broadcast_to(np.arange(CLIENTS)[:, None, None], (CLIENTS, STEPS, 1))}
    state, _ = federation.round(start, batches, range(CLIENTS))
    again = federation.decode(federation.encode(state), start)
    (on, _), (once_more, _) = (federation.round(each, batches, range(CLIENTS)) for each in (state, again))
    chex.assert_trees_all_equal(on._replace(key=None), once_more._replace(key=None))


def test_fragments_are_apart() -> None:
    params = {name: jnp.zeros(shape) for name, shape in SIZES.items()}
    with pytest.raises(ValueError, match="'a' is in more than one of the fragments"):
        Federation(loss, fo.Optimizer(RATE), fragments=[["a"], ["*"]]).init(params, CLIENTS)
    with pytest.raises(ValueError, match="fragments: the pattern 'd' matches no path"):
        Federation(loss, fo.Optimizer(RATE), fragments=[["a"], ["d"]]).init(params, CLIENTS)
