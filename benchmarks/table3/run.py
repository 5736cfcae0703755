"""Table 3 of the SCAFFOLD paper (Karimireddy et al. 2020), on MNIST.

    python -m benchmarks.table3.run --data mnist_by_writer.npz

First 100 clients, then each writer a client: `--clients` names one of the two.

Communication rounds until logistic regression reaches 0.85 test accuracy. As in the
paper: 100 clients, 20 of them sampled in a round, batches of a fifth of a client's
data, 1, 5, 10 and 20 local epochs, a server that takes the clients' mean (its rate is
1), FedProx with mu = 1, parameters that begin at zero, and a local rate tuned for each
cell. At similarity s, s % of the examples are dealt out at random, and the others
sorted by label. SGD takes one step a round, on the gradient at the server's parameters
over all the examples of the sampled clients.

A whole experiment, with the accuracy measured after each round, is one compiled
program that ends when the target is reached. Each result is appended to a CSV file
at once; a run that was interrupted goes on from there.
"""

import csv
import functools
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import parse_arguments
from benchmarks.table3.report import write_report
from functional_optimodules import Optimizer
from functional_optimodules.federated import FederatedData, Federation

METHODS = ("sgd", "fedavg", "fedprox", "scaffold")
EPOCHS = (1, 5, 10, 20)
SIMILARITIES = (0, 10, 100)
RATES = (0.3, 0.1, 1.0, 0.03, 3.0, 0.01)
TUNING_SEED, SEEDS = 0, (1, 2, 3)
MU = 1.0
NUM_CLIENTS, SAMPLED = 100, 20
TARGET = 0.85
FIELDS = ("phase", "clients", "method", "similarity", "epochs", "rate", "seed", "limit", "rounds", "accuracy")


def logits(params, images):
    return images.reshape(len(images), -1).astype(jnp.float32) / 255 @ params["w"] + params["b"]


def loss_fn(params, batch):
    log_probabilities = jax.nn.log_softmax(logits(params, batch["x"]))
    return -jnp.sum(log_probabilities * jax.nn.one_hot(batch["y"], 10), axis=-1)


def partition(images, labels, similarity, seed):
    """Deal `similarity` % of the examples out at random, and the others sorted by label."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    common, rest = np.split(order, [len(order) * similarity // 100])
    rest = rest[np.argsort(labels[rest], kind="stable")]
    parts = zip(np.array_split(common, NUM_CLIENTS), np.array_split(rest, NUM_CLIENTS), strict=True)
    rows = [np.concatenate(both) for both in parts]
    return FederatedData.from_clients([{"x": images[part], "y": labels[part]} for part in rows])


@functools.partial(jax.jit, static_argnames=("method", "epochs", "batch_size"))
def rounds_to_target(data, test, rate, seed, limit, *, method, epochs, batch_size):
    """Return after how many rounds the target was reached, or the limit, and the best accuracy."""
    client = {
        "sgd": lambda: Optimizer(rate),
        "fedavg": lambda: Optimizer(rate),
        "fedprox": lambda: Optimizer(rate, regularizers=[("fedprox", {"alpha": MU})]),
        "scaffold": lambda: Optimizer(rate, modules=["scaffold-client"]),
    }[method]()
    sends = [("scaffold-server", {"num_clients": data.num_clients})] if method == "scaffold" else []
    federation = Federation(
        loss_fn, client, Optimizer(1.0, modules=sends), batch_size=batch_size, epochs=epochs, mapping="scan"
    )
    params = {"w": jnp.zeros((784, 10)), "b": jnp.zeros(10)}
    state = federation.init(params, data)._replace(key=jax.random.key(seed))

    def body(carry):
        state, best = carry
        draw = jax.random.fold_in(jax.random.key(seed + 1000), state.round)
        chosen = jax.random.permutation(draw, data.num_clients)[:SAMPLED].astype(jnp.int32)
        state, _ = federation.round(state, data, chosen)
        accuracy = jnp.mean(jnp.argmax(logits(state.params, test["x"]), -1) == test["y"])
        return state, jnp.maximum(best, accuracy)

    go_on = lambda carry: (carry[1] < TARGET) & (carry[0].round < limit)  # noqa: E731
    state, best = jax.lax.while_loop(go_on, body, (state, jnp.float32(0)))
    return state.round, best


class Results:
    """The lines of a CSV file, each written as soon as it is known."""

    def __init__(self, path):
        self.path = path
        self.rows = list(csv.DictReader(path.open())) if path.exists() else []
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(",".join(FIELDS) + "\n")

    def find(self, **key):
        return next((row for row in self.rows if all(row[k] == str(v) for k, v in key.items())), None)

    def add(self, **row):
        self.rows.append({name: str(value) for name, value in row.items()})
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(row)


def cells(clients):
    """Yield (method, similarity, epochs), the cheap ones first."""
    similarities = SIMILARITIES if clients == "split" else ("writers",)
    for epochs, similarity, method in itertools.product(EPOCHS, similarities, METHODS):
        if method != "sgd" or epochs == 1:
            yield method, similarity, epochs


def solve(results, load, test, clients, cell, limit):
    """Tune the rate of a cell on one seed, then run the others at the best."""
    method, similarity, epochs = cell
    key = {"clients": clients, "method": method, "similarity": similarity, "epochs": epochs}

    def run(phase, rate, seed, most):
        known = results.find(**key, phase=phase, rate=rate, seed=seed)
        if known is None:
            start = time.perf_counter()
            data, batch_size = load(similarity, seed)
            rounds, best = rounds_to_target(
                data,
                test,
                jnp.float32(rate),
                jnp.int32(seed),
                jnp.int32(most),
                method=method,
                epochs=epochs,
                batch_size=None if method == "sgd" else batch_size,
            )
            reached = bool(best >= TARGET)
            row = {"rounds": int(rounds) if reached else "", "accuracy": f"{float(best):.4f}", "limit": most}
            results.add(**key, phase=phase, rate=rate, seed=seed, **row)
            print(*cell, phase, rate, seed, row, f"{time.perf_counter() - start:.1f} s", flush=True)
            known = results.rows[-1]
        return int(known["rounds"]) if known["rounds"] else None, float(known["accuracy"])

    # A rate is given up as soon as it is known to be slower than the best before it.
    best_rate, best = RATES[0], (limit + 1, 0.0)
    for rate in RATES:
        rounds, accuracy = run("tune", rate, TUNING_SEED, min(limit, best[0]))
        score = (rounds or limit + 1, -accuracy)
        if score < best:
            best_rate, best = rate, score
    for seed in SEEDS:
        run("final", best_rate, seed, limit)


def run(results, archive, clients, limit):
    """Solve all cells that are not solved yet."""
    images, labels, writers = archive["x_train"], archive["y_train"].astype(np.int32), archive["writer_train"]
    test = {"x": jnp.asarray(archive["x_test"]), "y": jnp.asarray(archive["y_test"], jnp.int32)}

    @functools.lru_cache(maxsize=4)
    def load(similarity, seed):
        if clients == "split":
            return partition(images, labels, similarity, seed), len(labels) // NUM_CLIENTS // 5
        median = int(np.median(np.unique(writers, return_counts=True)[1]))
        return FederatedData.from_ids({"x": images, "y": labels}, writers), median // 5

    for cell in cells(clients):
        solve(results, load, test, clients, cell, limit)


def main():
    args = parse_arguments(
        __doc__,
        data=(Path("mnist_by_writer.npz"), "NumPy archive of x_, y_ and writer_ train and test"),
        clients=(("split", "writers"), "100 clients, or the writers"),
        limit=(200, "rounds after which a run is given up"),
        only_report=(False, "write the tables and plots of what there is"),
    )
    for clients in args.clients:
        results = Results(args.results / "table3" / f"{clients}.csv")
        if not args.only_report:
            run(results, np.load(args.data), clients, args.limit)
        write_report(results.rows, results.path.with_suffix(""), args.limit)


if __name__ == "__main__":
    main()
