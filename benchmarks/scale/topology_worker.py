"""Rounds compiled for TPUs that are described and not there: shapes go in, and what the compiler tells comes out.

It needs `libtpu`, on Linux and x86, and no TPU.
"""

from benchmarks.chips import described_chips  # before JAX is imported

# isort: split
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import functional_optimodules as fo
from benchmarks.rounds.problem import CLASSES, HIDDEN, INPUTS, losses
from benchmarks.scale.exchanges import count
from benchmarks.worker import serve
from functional_optimodules.federated import FederatedData, Federation, clients_mesh

VOCABULARY, WIDTH, LAYERS, TOKENS = 8192, 1024, 11, 128
SMALL = {"w1": (INPUTS, HIDDEN), "b1": (HIDDEN,), "w": (HIDDEN, CLASSES), "b": (CLASSES,)}
# Each matrix, with how it is split over the chips that share a client's model.
LARGE = {
    "embedding": ((VOCABULARY, WIDTH), PartitionSpec("model")),
    "up": ((LAYERS, WIDTH, 4 * WIDTH), PartitionSpec(None, None, "model")),
    "down": ((LAYERS, 4 * WIDTH, WIDTH), PartitionSpec(None, "model")),
}


def token_losses(params, batch):
    """The cross-entropy of each sequence's next tokens, by a residual stack over single tokens."""

    def layer(hidden, weights):
        up, down = weights
        normal = hidden * jax.lax.rsqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + 1e-6)
        return hidden + jax.nn.gelu(normal @ up) @ down, None

    hidden, _ = jax.lax.scan(jax.checkpoint(layer), params["embedding"][batch[:, :-1]], (params["up"], params["down"]))
    logits = hidden @ params["embedding"].T
    chosen = jnp.take_along_axis(logits, batch[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen, axis=-1)


@dataclasses.dataclass
class Case:
    """What to compile a round of.

    Attributes:
      chips: the sides of the grid of chips.
      group: how many chips share a client's model; 1 for a mesh of clients alone.
      method: `fedavg` or `scaffold`.
      model: `small`, a perceptron of 784-64-10, or `large`, 101 M parameters.
      clients: how many there are.
      participants: how many of them take part.
      examples: how many each has.
      batch: how many of them are in a batch.
      rounds: 0 for one round of given participants; otherwise how many, of sampled ones.
    """

    chips: tuple[int, int]
    method: str
    model: str = "small"
    group: int = 1
    clients: int = 10_240
    participants: int = 2048
    examples: int = 20
    batch: int = 5
    rounds: int = 0


def make_mesh(chips, group):
    """Return a mesh of described chips: of clients alone, or of clients and the chips that share one's model."""
    devices = described_chips(*chips)
    if group == 1:
        return clients_mesh(devices)
    return Mesh(np.array(devices).reshape(-1, group), ("clients", "model"), axis_types=(AxisType.Auto,) * 2)


def described(mesh, leaf, spec):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def describe_data(mesh, case, example):
    """Return the shapes of the data of all clients, and where each lies."""
    blocks = mesh.shape["clients"]
    per_block = -(-case.clients // blocks)
    rows = (blocks * per_block * case.examples, *example.shape)
    table = jax.ShapeDtypeStruct((blocks * per_block,), jnp.int32)
    x = jax.ShapeDtypeStruct(rows, example.dtype)
    labels = {"x": x, "y": jax.ShapeDtypeStruct(rows[:1], jnp.int32)}
    data = FederatedData(
        examples=labels if case.model == "small" else x,
        offsets=table,
        sizes=table,
        ids=table,
        slots=jax.ShapeDtypeStruct((case.clients,), jnp.int32),
        num_shards=blocks,
        smallest=case.examples,
        largest=case.examples,
    )
    return jax.tree.map(functools.partial(described, mesh), data, data.partition_specs())


def describe_state(mesh, federation, params, specs, data):
    """Return the shapes of a federation's state; what is shaped like a parameter lies as that does."""
    by_shape = {leaf.shape: specs[name] for name, leaf in params.items()}
    state = jax.eval_shape(federation.init, params, data)
    bank = [described(mesh, leaf, PartitionSpec("clients", *by_shape.get(leaf.shape[1:], ()))) for leaf in state.bank]
    rest = state._replace(bank=[])
    place = lambda leaf: described(mesh, leaf, by_shape.get(leaf.shape, PartitionSpec()))  # noqa: E731
    return jax.tree.map(place, rest)._replace(bank=bank)


def lower(case):
    """Return a lowered round, and its mesh."""
    mesh = make_mesh(case.chips, case.group)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if case.model == "small":
        params, specs, loss = {k: shape(s) for k, s in SMALL.items()}, dict.fromkeys(SMALL, PartitionSpec()), losses
        example = shape((INPUTS,))
    else:
        params, specs, loss = (
            {k: shape(s) for k, (s, _) in LARGE.items()},
            {k: p for k, (_, p) in LARGE.items()},
            token_losses,
        )
        example = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    pair = (
        [["scaffold-client"], [("scaffold-server", {"num_clients": case.clients})]]
        if case.method == "scaffold"
        else [[], []]
    )
    client, server = (fo.Optimizer(rate, modules=modules) for rate, modules in zip((0.1, 1.0), pair, strict=True))
    federation = Federation(loss, client, server, batch_size=case.batch, mapping=mesh)
    data = describe_data(mesh, case, example)
    state = describe_state(mesh, federation, params, specs, data)
    if case.rounds:
        run = lambda state, data: federation.run(state, data, case.rounds, participants=case.participants)  # noqa: E731
        return jax.jit(run, donate_argnums=0).lower(state, data), mesh
    chosen = described(mesh, jax.ShapeDtypeStruct((case.participants,), jnp.int32), PartitionSpec())
    return jax.jit(federation.round, donate_argnums=0).lower(state, data, chosen), mesh


class Compiler:
    """What answers `topology`: see `Case`."""

    def compile(self, case):
        case = Case(**case)
        start = time.perf_counter()
        lowered, mesh = lower(case)
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        return {
            "trace_s": traced - start,
            "compile_s": done - traced,
            "collectives": count(compiled.as_text(), mesh.shape.get("model", 1)),
            "arguments": memory.argument_size_in_bytes,
            "kept": memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
            "optimal_s": cost["optimal_seconds"],
        }


if __name__ == "__main__":
    serve(Compiler())
