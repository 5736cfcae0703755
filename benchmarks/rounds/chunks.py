"""How many clients at once are quickest: rounds client by client, beside rounds in chunks, on the device at hand.

    python -m benchmarks.rounds.chunks

Clients of 100 examples each, or of as many on average, log-normal; federated averaging and SCAFFOLD, over perceptrons
from 610 to 669,706 parameters, a convolutional network and a recurrent one. Each row is a federation whose rounds are
run in turn, in one process, with each way to map its clients; `None` is what the library chooses itself.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from benchmarks.report import SECONDS, parse_arguments, section, write
from benchmarks.timing import interleave
from functional_optimodules.federated import FederatedData, Federation

PERCEPTRONS = {
    "60-10": (60, 10),
    "784-10": (784, 10),
    "784-64-10": (784, 64, 10),
    "784-256-10": (784, 256, 10),
    "784-512-512-10": (784, 512, 512, 10),
}
CASES = [
    *((model, 20, "equal", "fedavg") for model in PERCEPTRONS),
    *((model, batch, "equal", "fedavg") for model in ("784-10", "784-64-10") for batch in (5, 100)),
    *((model, 20, "equal", "scaffold") for model in ("784-10", "784-64-10", "784-256-10")),
    *((model, 20, "log-normal", "fedavg") for model in ("60-10", "784-10", "784-64-10")),
    ("convolutions", 20, "equal", "fedavg"),
    ("recurrent", 20, "equal", "fedavg"),
]
EXAMPLES, CLASSES, TOKENS = 100, 10, 40


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def perceptron(params, batch):
    hidden = batch["x"]
    for weights, bias in params[:-1]:
        hidden = jax.nn.relu(hidden @ weights + bias)
    return cross_entropy(hidden @ params[-1][0] + params[-1][1], batch["y"])


def convolutions(params, batch):
    hidden = batch["x"].reshape(-1, 28, 28, 1)
    for kernel in params[:-1]:
        axes = ("NHWC", "HWIO", "NHWC")
        hidden = jax.nn.relu(jax.lax.conv_general_dilated(hidden, kernel, (2, 2), "VALID", dimension_numbers=axes))
    return cross_entropy(hidden.reshape(hidden.shape[0], -1) @ params[-1], batch["y"])


def recurrent(params, batch):
    def cell(hidden, x):
        return jnp.tanh(x @ params[0] + hidden @ params[1]), None

    words = batch["x"].reshape(-1, TOKENS, 784 // TOKENS).swapaxes(0, 1)
    hidden, _ = jax.lax.scan(cell, jnp.zeros((words.shape[1], 64)), words)
    return cross_entropy(hidden @ params[2], batch["y"])


def make_model(name):
    """Return the inputs of a model, its loss of each example, and its parameters."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return (rng.normal(size=shape) * np.prod(shape[:-1]) ** -0.5).astype(np.float32)

    if name == "convolutions":
        return 784, convolutions, [draw(3, 3, 1, 8), draw(3, 3, 8, 16), draw(6 * 6 * 16, CLASSES)]
    if name == "recurrent":
        return 760, recurrent, [draw(784 // TOKENS, 64), draw(64, 64), draw(64, CLASSES)]
    sizes = PERCEPTRONS[name]
    layers = [(draw(a, b), np.zeros(b, np.float32)) for a, b in itertools.pairwise(sizes)]
    return sizes[0], perceptron, layers


def make_round(loss, params, data, batch, method, mapping):
    """Return a function that runs a round of all clients from where the last one ended."""
    pair = [[], []]
    if method == "scaffold":
        pair = [["scaffold-client"], [("scaffold-server", {"num_clients": data.num_clients})]]
    client, server = (fo.Optimizer(rate, modules=modules) for rate, modules in zip((0.1, 1.0), pair, strict=True))
    federation = Federation(loss, client, server, batch_size=batch, mapping=mapping)
    step = jax.jit(lambda state, data, who: federation.round(state, data, who)[0], donate_argnums=0)
    state, everyone = federation.init(params, data), jnp.arange(data.num_clients)

    def call():
        nonlocal state
        state = step(state, data, everyone)
        return state.params

    return call


def measure(case, clients, chunks, seconds):
    """Return a row: the milliseconds of a round client by client, and what other ways take of that."""
    model, batch, sizes, method = case
    inputs, loss, params = make_model(model)
    rng = np.random.default_rng(0)
    counts = np.full(clients, EXAMPLES)
    if sizes == "log-normal":
        counts = np.maximum(5, EXAMPLES * rng.lognormal(-0.5, 1, clients)).astype(int)
    made = [
        {"x": rng.normal(size=(n, inputs)).astype(np.float32), "y": rng.integers(0, CLASSES, n).astype(np.int32)}
        for n in counts
    ]
    make = functools.partial(make_round, loss, params, FederatedData.from_clients(made), batch, method)
    times = interleave({mapping: make(mapping) for mapping in ("scan", *chunks, None)}, seconds, least=4)
    first = times["scan"].min()
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    shares = (f"{times[mapping].min() / first:.2f}" for mapping in (*chunks, None))
    return [[(f"{model}, {weights:,}", sizes, batch, method, f"{1e3 * first:.3g}", *shares)]]


def main():
    args = parse_arguments(
        __doc__,
        clients=(100, "clients, all of which take part"),
        chunks=((2, 5, 10, 20, 50), "how many at once"),
        cases=(len(CASES), "how many of the cases, from the first"),
        seconds=(SECONDS[0] / 2, SECONDS[1]),
    )
    header = ("model, parameters", "sizes", "batch", "method", "scan, ms", *map(str, args.chunks), "None")
    run = functools.partial(measure, clients=args.clients, chunks=args.chunks, seconds=args.seconds)
    intro = [
        f"{args.clients} clients in a round. Columns say how many clients are run at once, and what a round takes of",
        "that of `scan`, by the fastest of each; `None` is the library's own choice.",
    ]
    path = args.results / "rounds" / "chunks.md"
    write(path, "How many clients at once", intro, section("A round", run, CASES[: args.cases], header))


if __name__ == "__main__":
    main()
