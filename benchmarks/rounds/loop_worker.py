"""A worker of the benchmark of rounds: a Python loop over one jitted step, fed from NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.rounds.problem import BATCH, EXAMPLES, RATE, Rounds, losses, make_clients, make_params
from benchmarks.worker import serve

OPTIMIZER = optax.sgd(RATE)


@functools.partial(jax.jit, donate_argnums=1)
def step(params, state, batch):
    gradients = jax.grad(lambda p: jnp.mean(losses(p, batch)))(params)
    updates, state = OPTIMIZER.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, donate_argnums=0)
def add(total, new, old):
    return jax.tree.map(lambda t, n, o: t + (n - o), total, new, old)


@jax.jit
def average(params, total, count):
    return jax.tree.map(lambda p, t: p + t / count, params, total)


def make(model, method, participants, bank, dtype):
    clients = make_clients(bank, dtype)
    params = jax.tree.map(jnp.asarray, make_params(model))
    rng = np.random.default_rng(2)

    def run():
        nonlocal params
        total = jax.tree.map(jnp.zeros_like, params)
        for client in rng.choice(bank, participants, replace=False):
            local, state = params, OPTIMIZER.init(params)
            order = rng.permutation(EXAMPLES)
            for start in range(0, EXAMPLES, BATCH):
                rows = order[start : start + BATCH]
                local, state = step(local, state, {name: leaf[rows] for name, leaf in clients[client].items()})
            total = add(total, local, params)
        params = jax.block_until_ready(average(params, total, float(participants)))

    return run


if __name__ == "__main__":
    serve(Rounds(make, "optax"))
