"""Small quadratics that the tests of federated bricks share, and three ways of running rounds over them.

Clients have quadratic losses of several batches; any subset of them takes part with any
numbers of steps, and some messages never arrive.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from functional_optimodules.federated import Federation

CLIENTS, BATCHES, SIZE = 4, 3, 4
LRATE = 0.1
_DRAWS = np.random.default_rng(0)
_FACTORS = _DRAWS.normal(size=(CLIENTS, BATCHES, SIZE, SIZE))
HESSIANS = 0.5 * np.eye(SIZE) + 0.2 * _FACTORS @ _FACTORS.swapaxes(-1, -2)
TARGETS = _DRAWS.normal(size=(CLIENTS, BATCHES, SIZE))
START = np.linspace(-1, 1, SIZE)


class Round(NamedTuple):
    """The steps of each participant, and those of which nothing arrives."""

    steps: dict[int, int]
    lost: tuple[int, ...] = ()


SCHEDULE = (
    Round({0: 3, 1: 1}),
    Round({0: 2, 2: 5, 3: 1}, lost=(2,)),
    Round({1: 4}),
    Round({0: 1, 1: 2, 2: 3, 3: 6}),
    Round({2: 2, 3: 1}, lost=(3,)),
    Round({0: 4, 1: 4, 3: 1}),
)
ALIKE = np.ones(CLIENTS)
WEIGHTS = np.array([2.0, 0.5, 1.0, 3.0])


def gradient(client: int, step: int, y: np.ndarray) -> np.ndarray:
    """The gradient of the batch that a client takes in a step."""
    return HESSIANS[client, step % BATCHES] @ y - TARGETS[client, step % BATCHES]


def full_gradient(client: int, y: np.ndarray) -> np.ndarray:
    return HESSIANS[client].mean(0) @ y - TARGETS[client].mean(0)


def mean_gradient(clients: Any, weights: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.average([full_gradient(client, y) for client in clients], axis=0, weights=weights[list(clients)])


def tree(vector: Any) -> Any:
    return {"w": jnp.asarray(vector[:3], jnp.float32), "b": jnp.asarray(vector[3], jnp.float32)}


def vector(params: Any) -> np.ndarray:
    return np.append(params["w"], params["b"]).astype(np.float64)


def known_in_step(client: int, step: int, x: np.ndarray, mean: np.ndarray) -> dict[str, Any]:
    return {"anchor_gradient": tree(gradient(client, step, x)), "mean_gradient": tree(mean)}


def known_at_end(client: int, steps: int, delta: np.ndarray, x: np.ndarray, weight: float) -> dict[str, Any]:
    return {
        "delta": tree(delta),
        "num_steps": jnp.int32(steps),
        "weight": jnp.float32(weight),
        "full_gradient": tree(full_gradient(client, x)),
    }


class After(NamedTuple):
    """What there is after a round."""

    x: np.ndarray
    server: Any
    clients: Mapping[int, Any]


def rounds(
    client: fo.Optimizer,
    server: fo.Optimizer,
    uplink: Any = None,
    schedule: tuple[Round, ...] = SCHEDULE,
    weights: np.ndarray = ALIKE,
    gradient: Any = gradient,
) -> Iterator[After]:
    """Run rounds by the pure methods, and yield what there is after each."""
    step, serve = jax.jit(client.update), jax.jit(server.update)
    x, state = START, server.init(tree(START))
    states = dict.fromkeys(range(CLIENTS), client.init(tree(START)))
    for steps, lost in schedule:
        state = server.begin_round(state, tree(x))
        mean, broadcast = mean_gradient(steps, weights, x), server.collect(state)
        moves, auxes = [], []
        for who, count in steps.items():
            own = client.process(broadcast, client.begin_round(states[who], tree(x)))
            y = tree(x)
            for number in range(count):
                known = known_in_step(who, number, x, mean)
                updates, own = step(tree(gradient(who, number, vector(y))), own, y, **known)
                y = jax.tree.map(jnp.add, y, updates)
            known = known_at_end(who, count, vector(y) - vector(tree(x)), x, weights[who])
            own, sent = client.end_round(own, **known), jax.tree.map(jnp.negative, known["delta"])
            told = client.collect(own)
            if uplink is not None:
                sent, up = uplink.update(sent, uplink.init(tree(x)), tree(x), **known)
                told |= {uplink.aux_name: uplink.collect(up)}
            if who not in lost:
                moves.append(weights[who] * vector(sent))
                auxes.append(told)
                states[who] = client.commit(own)
        for name in auxes[0]:
            merged = auxes[0][name]
            for each in auxes[1:]:
                merged = merged.merge(each[name])
            state = server.process({name: merged}, state)
        heard = [who for who in steps if who not in lost]
        known = {"joined": jnp.float32(len(heard)), "mean_gradient": tree(mean)}
        updates, state = serve(tree(np.sum(moves, axis=0) / weights[heard].sum()), state, tree(x), **known)
        x = x + vector(updates)
        yield After(x, state, dict(states))


def wire(message: Any) -> Any:
    return json.loads(json.dumps(message, allow_nan=False))


def over_json(
    client: fo.Optimizer,
    server: fo.Optimizer,
    uplink: Any = None,
    schedule: tuple[Round, ...] = SCHEDULE,
    weights: np.ndarray = ALIKE,
) -> Iterator[np.ndarray]:
    """Run rounds between peers that exchange JSON, and yield the parameters after each."""
    peers = {who: fo.Optimizer.from_config(wire(client.get_config())) for who in range(CLIENTS)}
    x = tree(START)
    server.setup(x)
    for steps, lost in schedule:
        at = vector(x)
        mean, broadcast = mean_gradient(steps, weights, at), wire(server.collect_aux_var())
        moves, messages = [], {}
        for who, count in steps.items():
            peer, y = peers[who], jax.tree.map(jnp.copy, x)
            peer.start_round()
            if broadcast:
                peer.process_aux_var(broadcast)
            for number in range(count):
                known = known_in_step(who, number, at, mean)
                y = peer.apply_gradients(y, tree(gradient(who, number, vector(y))), **known)
            known = known_at_end(who, count, vector(y) - at, at, weights[who])
            peer.finish_round(**known)
            told, sent = wire(peer.collect_aux_var()), jax.tree.map(jnp.negative, known["delta"])
            if uplink is not None:
                up = uplink.bare()
                sent = up.run(sent, x, num_steps=known["num_steps"], weight=known["weight"])
                told[up.aux_name] = wire(up.collect_aux_var())
            if who in lost:
                peer.retract_aux_var()
                continue
            moves.append(weights[who] * vector(sent))
            messages[str(who)] = told
        server.process_aux_var(messages)
        heard = [who for who in steps if who not in lost]
        g = tree(np.sum(moves, axis=0) / weights[heard].sum())
        x = server.apply_gradients(x, g, joined=jnp.float32(len(heard)), mean_gradient=tree(mean))
        yield vector(x)


def quadratic(params: Any, batch: Any) -> jax.Array:
    """Each example's loss, of which the batches' gradients are `gradient`."""
    y = jnp.append(params["w"], params["b"])
    return 0.5 * (batch["hessian"] @ y) @ y - batch["target"] @ y


def simulated(
    client: fo.Optimizer,
    server: fo.Optimizer,
    uplink: Any = None,
    schedule: tuple[Round, ...] = SCHEDULE,
    weights: np.ndarray = ALIKE,
) -> Iterator[np.ndarray]:
    """Run rounds of a `Federation`, in one program, and yield the parameters after each."""
    most = max(max(steps.values()) for steps, _ in schedule)
    batches = np.arange(most) % BATCHES
    data = {"hessian": HESSIANS[:, batches, None], "target": TARGETS[:, batches, None]}
    data = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), data)

    federation = Federation(quadratic, client, server, uplink=() if uplink is None else [uplink])
    state = federation.init(tree(START), CLIENTS)
    run, everyone = jax.jit(federation.round), jnp.arange(CLIENTS)
    for steps, lost in schedule:
        # Who drops out was not there, for all that anyone knows.
        absent = jnp.array([who not in steps or who in lost for who in range(CLIENTS)])
        counts = jnp.array([steps.get(who, 1) for who in range(CLIENTS)], jnp.int32)
        known = {"num_steps": counts, "weights": jnp.asarray(weights, jnp.float32), "dropped": absent}
        state, _ = run(state, data, everyone, **known)
        yield vector(state.params)


def assert_near(found: np.ndarray, expected: np.ndarray, name: str = "x") -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=name)
