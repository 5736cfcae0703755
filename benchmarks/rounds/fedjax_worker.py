"""A worker of the benchmark of rounds: FedJAX's `federated_averaging`, in its own environment.

With several devices it runs by FedJAX's own backend for these, `pmap`.
"""

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg

from benchmarks.rounds.problem import BATCH, RATE, Rounds, losses, make_clients, make_params
from benchmarks.worker import serve


def make(model, method, participants, bank, dtype):
    fedjax.set_for_each_client_backend("pmap" if jax.device_count() > 1 else "jit")
    algorithm = fed_avg.federated_averaging(
        lambda params, batch, key: jax.grad(lambda p: jnp.mean(losses(p, batch)))(params),
        fedjax.optimizers.sgd(RATE),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=1),
    )
    datasets = [fedjax.ClientDataset(client) for client in make_clients(bank, dtype)]
    state = algorithm.init(jax.tree_util.tree_map(jnp.asarray, make_params(model)))
    rng = np.random.default_rng(2)
    key = jax.random.PRNGKey(0)

    def run():
        nonlocal state, key
        key, use = jax.random.split(key)
        chosen = rng.choice(bank, participants, replace=False)
        keys = jax.random.split(use, participants)
        sampled = [(str(client), datasets[client], k) for client, k in zip(chosen, keys)]  # noqa: B905
        state, _ = algorithm.apply(state, sampled)
        jax.block_until_ready(state.params)

    return run


if __name__ == "__main__":
    serve(Rounds(make, "fedjax"))
