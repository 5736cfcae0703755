"""The experiment that every way of running it must agree on: SCAFFOLD, FedProx and Adam on the server."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

NUM_CLIENTS, PARTICIPANTS, ROUNDS, BATCH, EPOCHS = 7, 3, 5, 4, 2
SIZES = (3, 9, 4, 14, 6, 1, 8)


def clients() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"x": rng.normal(size=(n, 3)).astype(np.float32) + i * 0.2, "y": rng.integers(0, 2, n).astype(np.int32)}
        for i, n in enumerate(SIZES)
    ]


def params() -> dict[str, jax.Array]:
    return {"w": jnp.linspace(-0.5, 0.5, 6).reshape(3, 2), "b": jnp.zeros(2)}


def loss(params: Any, batch: Any) -> jax.Array:
    """The cross-entropy of each example."""
    logits = jax.nn.log_softmax(batch["x"] @ params["w"] + params["b"])
    return -jnp.take_along_axis(logits, batch["y"][:, None], axis=1)[:, 0]


def noisy_loss(params: Any, batch: Any, key: jax.Array) -> Any:
    """A loss that draws: its metric tells what was drawn, whatever the batch."""
    draw = jax.random.normal(key, (2,))
    values = loss({**params, "b": params["b"] + draw}, batch)
    return values, {"draw": jnp.full(values.shape, jnp.sum(draw))}


def optimizers(num_clients: int = NUM_CLIENTS) -> tuple[fo.Optimizer, fo.Optimizer]:
    client = fo.Optimizer(0.2, regularizers=[("fedprox", {"alpha": 0.1})], modules=["scaffold-client"])
    server = fo.Optimizer(0.05, modules=[("scaffold-server", {"num_clients": num_clients}), "adam"])
    return client, server


def federation(num_clients: int = NUM_CLIENTS, **options: Any) -> Federation:
    client, server = optimizers(num_clients)
    return Federation(loss, client, server, batch_size=BATCH, epochs=EPOCHS, weighting="examples", **options)


def noisy_federation(**options: Any) -> Federation:
    noise = ("gaussian-noise", {"std": 0.1, "safe_mode": False, "seed": 0})
    return Federation(noisy_loss, fo.Optimizer(0.2, modules=[noise]), batch_size=BATCH, **options)


def run(federation: Federation, data: FederatedData, rounds: int = ROUNDS, size: int | None = PARTICIPANTS) -> Any:
    """Run a federation by one compiled program."""
    state = federation.init(params(), data, seed=3)
    program = jax.jit(lambda state, data: federation.run(state, data, rounds, participants=size), donate_argnums=0)
    return program(state, data)


def as_numpy(tree: Any) -> dict[str, np.ndarray]:
    return {key: np.asarray(value) for key, value in tree.items()}


AGGREGATIONS: dict[str, Any] = {
    "median": "median",
    "trimmed-mean": ("trimmed-mean", {"share": 0.3}),
    "multi-krum": ("multi-krum", {"attackers": 1, "selected": 2}),
    "geometric-median": "geometric-median",
    "gradient-masked": "gradient-masked",
}


def aggregated(name: str, data: FederatedData, mapping: Any = None) -> list[list[float]]:
    """Return the parameters after two rounds of six of the clients, of whom one drops out of each."""
    federation = Federation(
        loss, fo.Optimizer(0.2), batch_size=BATCH, aggregation=AGGREGATIONS[name], mapping=mapping, weighting="examples"
    )
    state, who = federation.init(params(), data, seed=3), jnp.array([6, 3, 0, 5, 1, 2])
    advance = jax.jit(lambda state, data, dropped: federation.round(state, data, who, dropped=dropped)[0])
    for dropped in (1, 4):
        # Devices that the host plays may wait for each other for ever where two rounds are under way.
        state = jax.block_until_ready(advance(state, data, jnp.arange(6) == dropped))
    return [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(state.params)]
