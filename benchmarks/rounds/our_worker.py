"""A worker of the benchmark of rounds: this library, on one device or on a mesh of all."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rounds.problem import BATCH, RATE, Rounds, losses, make_clients, make_params
from benchmarks.worker import serve
from functional_optimodules import Optimizer
from functional_optimodules.federated import FederatedData, Federation


def make(model, method, participants, bank, dtype):
    """Return a function that runs a round of a fresh sample of the bank, and gives the program's temporary bytes."""
    mesh = None
    if jax.device_count() > 1:
        mesh = jax.make_mesh((jax.device_count(),), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    scaffold = method == "scaffold"
    federation = Federation(
        losses,
        Optimizer(RATE, modules=["scaffold-client"] if scaffold else []),
        Optimizer(1.0, modules=[("scaffold-server", {"num_clients": bank})] if scaffold else []),
        batch_size=BATCH,
        mapping=mesh,
    )
    data = FederatedData.from_clients(make_clients(bank, dtype), mesh)
    state = federation.init(make_params(model), data)
    rng = np.random.default_rng(2)
    step = jax.jit(lambda state, data, chosen: federation.round(state, data, chosen), donate_argnums=0)

    def sample():
        return jnp.asarray(rng.choice(bank, participants, replace=False), jnp.int32)

    temporary = step.lower(state, data, sample()).compile().memory_analysis().temp_size_in_bytes

    def run():
        nonlocal state
        state, metrics = step(state, data, sample())
        if not np.all(metrics["finite"]):
            raise FloatingPointError("a client sent a value that is not finite")
        jax.block_until_ready(state)
        return temporary

    return run


if __name__ == "__main__":
    serve(Rounds(make, "functional_optimodules"))
