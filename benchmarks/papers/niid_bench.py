"""MNIST rows of NIID-Bench (Li et al. 2022) as Flower's baseline prints them, and why SCAFFOLD is at chance in one.

    python -m benchmarks.papers.niid_bench --data mnist_by_writer.npz

The baseline's protocol: 10 clients, all of them in each of 50 rounds, 10 local epochs, batches of 64, SGD with
momentum 0.9 that starts anew each round, rate 0.01, weight decay 1e-5, clients counted by their examples, the small
CNN of `lenet.py`, and the best test accuracy over the rounds. Partitions: Dirichlet with 0.5 by label, where a
client that has its even share gets no more; 2 and 1 labels a client. As there, SCAFFOLD's correction comes after the
momentum, so that its variates are means of velocities: here that is the order of two modules. FedProx is the best of
several mu. Other than there, the server's variate is the plain mean of the clients', as in the paper.

What is reduced so that it takes half an hour on two cores: `--images` of the 60,000 training images, the same share
of each writer's, so that a client takes a tenth of the local steps (about 100 a round, where the baseline takes
940); one seed for three; two values of mu for four. `--full` is the protocol itself, and takes ten hours. The images
are MNIST's, those of all writers pooled, and the test set is MNIST's own 10,000.

The row of one label is run with variates that start at zero, at the model's weights (as the baseline's do), at one
random network (as NIID-Bench's do), and each at a random network of its own; and without momentum, or at a tenth of
the rate.

Each result is a line of a CSV file as soon as it is known; a run that was interrupted goes on from there.
"""

import csv
import functools
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.papers import lenet
from benchmarks.papers.niid_report import write_report
from benchmarks.report import parse_arguments
from functional_optimodules import Optimizer
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.wire.arrays import encode_array

CLIENTS, BATCH, RATE, MOMENTUM, DECAY = 10, 64, 0.01, 0.9, 1e-5
MUS, ALL_MUS = (0.01, 1.0), (0.001, 0.01, 0.1, 1.0)
SETTING = ("partition", "method", "variant", "images", "epochs", "rounds", "seed")
FIELDS = (*SETTING, "best", "last", "offset", "seconds", "accuracies", "norms")


def dirichlet(labels, alpha, rng):
    """Deal each label out by a Dirichlet draw; a client that has its even share of all examples gets no more."""
    while True:
        parts = [np.zeros(0, int)] * CLIENTS
        for label in range(10):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(CLIENTS, alpha)) * [len(part) < len(labels) / CLIENTS for part in parts]
            cuts = (np.cumsum(shares / shares.sum())[:-1] * len(rows)).astype(int)
            parts = [np.concatenate(pair) for pair in zip(parts, np.split(rows, cuts), strict=True)]
        if min(map(len, parts)) >= 10:
            return parts


def by_labels(labels, per_client, rng):
    """Give each client its number as a label, and others at random; who share a label share its examples alike."""
    owners = [[] for _ in range(10)]
    for client in range(CLIENTS):
        others = rng.permutation(np.delete(np.arange(10), client))[: per_client - 1]
        for label in (client, *others):
            owners[label].append(client)
    parts = [[] for _ in range(CLIENTS)]
    for label, clients in enumerate(owners):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for client, share in zip(clients, np.array_split(rows, len(clients)), strict=True):
            parts[client].append(share)
    return [np.concatenate(shares) for shares in parts]


PARTITIONS = {
    "1 label": lambda labels, rng: by_labels(labels, 1, rng),
    "2 labels": lambda labels, rng: by_labels(labels, 2, rng),
    "Dirichlet (0.5)": lambda labels, rng: dirichlet(labels, 0.5, rng),
}
VARIANTS = (
    "starts at the weights",
    "starts at one random network",
    "starts at random networks",
    "momentum last",
    "no momentum",
    "rate 0.001",
)


def sample_by_writer(writers, count, rng):
    """Draw that many images, the same share of each writer's."""
    place = np.empty(len(writers))
    for writer in np.unique(writers):
        own = np.flatnonzero(writers == writer)
        place[own] = (rng.permutation(len(own)) + rng.uniform()) / len(own)
    return np.argsort(place, kind="stable")[:count]


def optimizers(method, variant):
    """Return the client's and the server's optimizer, and what acts on the uplink."""
    rate = RATE / 10 if variant == "rate 0.001" else RATE
    velocity = [] if variant == "no momentum" else [("momentum", {"beta": MOMENTUM, "round_reset": True})]
    decay = ("ridge", {"alpha": DECAY / 2})
    if method == "fedavg":
        return Optimizer(rate, regularizers=[decay], modules=velocity), Optimizer(1.0), []
    if method == "fedprox":
        proximal = ("fedprox", {"alpha": float(variant.removeprefix("mu "))})
        return Optimizer(rate, regularizers=[decay, proximal], modules=velocity), Optimizer(1.0), []
    if method == "scaffold":
        modules = ["scaffold-client", *velocity] if variant == "momentum last" else [*velocity, "scaffold-client"]
        server = Optimizer(1.0, modules=[("scaffold-server", {"num_clients": CLIENTS})])
        return Optimizer(rate, regularizers=[decay], modules=modules), server, []
    uplink = [("fednova-client", {"momentum": MOMENTUM})]
    return Optimizer(rate, regularizers=[decay], modules=velocity), Optimizer(1.0, modules=["fednova-server"]), uplink


def start_variates(federation, state, variant, rng):
    """Return the state with control variates where a variant starts them, and how far c is off the mean of the c_i."""
    draw = functools.partial(lenet.make_params, rng)
    if variant == "starts at the weights":
        mean = jax.tree.map(np.asarray, state.params)
        own = [mean] * CLIENTS
    elif variant == "starts at one random network":
        mean = draw()
        own = [mean] * CLIENTS
    elif variant == "starts at random networks":
        mean, own = draw(), [draw() for _ in range(CLIENTS)]
    else:
        return state, 0.0
    saved = federation.encode(state)
    stacked = {name: np.stack([variate[name] for variate in own]) for name in mean}
    for name, rows in stacked.items():
        saved["bank"][f"modules/scaffold-client/local/{name}"] = encode_array(rows)
        saved["server"]["modules/scaffold-server/total"][name] = encode_array(np.float32(CLIENTS) * mean[name])
    offset = sum(np.sum((mean[name] - np.mean(rows, axis=0)) ** 2) for name, rows in stacked.items())
    return federation.decode(saved, state), float(offset) ** 0.5


class Results:
    """The lines of a CSV file, each written as soon as it is known."""

    def __init__(self, path):
        self.path = path
        self.rows = list(csv.DictReader(path.open())) if path.exists() else []
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(",".join(FIELDS) + "\n")

    def has(self, setting):
        return any(all(row[name] == str(value) for name, value in setting.items()) for row in self.rows)

    def add(self, row):
        self.rows.append({name: str(value) for name, value in row.items()})
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(row)


def cells(mus):
    """Yield (partition, method, variant), the row to understand first."""
    yield "1 label", "scaffold", ""
    for variant in VARIANTS:
        yield "1 label", "scaffold", variant
    yield "1 label", "fedavg", ""
    yield "1 label", "fedavg", "no momentum"
    for partition in PARTITIONS:
        yield partition, "fednova", ""
        for mu in mus:
            yield partition, "fedprox", f"mu {mu:g}"
        if partition != "1 label":
            yield partition, "fedavg", ""
            yield partition, "scaffold", ""


def run(archive, partition, method, variant, images, epochs, rounds, seed):
    """Run one cell, and return what is found."""
    rng = np.random.default_rng(seed)
    chosen = sample_by_writer(archive["writer_train"], images, rng)
    x, y = archive["x_train"][chosen], archive["y_train"][chosen].astype(np.int32)
    test = [jnp.asarray(archive[name]).reshape(20, 500, *archive[name].shape[1:]) for name in ("x_test", "y_test")]
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,)) if devices > 1 else None
    data = FederatedData.from_indices({"x": x, "y": y}, PARTITIONS[partition](y, rng), mesh)
    client, server, uplink = optimizers(method, variant)
    federation = Federation(
        lenet.losses,
        client,
        server,
        **({"uplink": uplink} if uplink else {}),
        batch_size=BATCH,
        epochs=epochs,
        weighting="examples",
        mapping=mesh,
    )
    state = federation.init(lenet.make_params(rng), data, seed=seed)
    state, offset = start_variates(federation, state, variant, rng)

    def evaluate(params):
        norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params)))
        return {"accuracy": lenet.accuracy(params, *test), "norm": norm}

    begin = time.perf_counter()
    # Not `fit`: what is not finite is to go on, as it does in the baseline.
    _, history = jax.jit(lambda state: federation.run(state, data, rounds, evaluate=evaluate))(state)
    accuracies, norms = np.asarray(history["accuracy"]), np.asarray(history["norm"])
    return {
        "best": f"{accuracies.max():.4f}",
        "last": f"{accuracies[-1]:.4f}",
        "offset": f"{offset:.3g}",
        "seconds": f"{time.perf_counter() - begin:.0f}",
        "accuracies": " ".join(f"{value:.4f}" for value in accuracies),
        "norms": " ".join(f"{value:.4g}" for value in norms),
    }


def main():
    args = parse_arguments(
        __doc__,
        data=(Path("mnist_by_writer.npz"), "NumPy archive of x_, y_ and writer_ train and test"),
        images=(6000, "training images"),
        epochs=(10, "local epochs"),
        rounds=(50, "rounds"),
        seeds=(1, "how many seeds"),
        methods=(("fedavg", "scaffold", "fedprox", "fednova"), "the methods to run"),
        full=(False, "all images, three seeds, four values of mu"),
        cores=(2, "XLA devices on a CPU, each with clients of its own"),
        only_report=(False, "write the table and plot of what there is"),
    )
    jax.config.update("jax_num_cpu_devices", args.cores)
    if args.full:
        args.images, args.seeds = 60_000, 3
    results = Results(args.results / "papers" / "niid_bench.csv")
    archive = {} if args.only_report else dict(np.load(args.data))
    wanted = itertools.product(range(args.seeds), cells(ALL_MUS if args.full else MUS))
    for seed, (partition, method, variant) in [] if args.only_report else wanted:
        values = (partition, method, variant, args.images, args.epochs, args.rounds, seed)
        if method in args.methods and not results.has(setting := dict(zip(SETTING, values, strict=True))):
            found = run(archive, *values)
            results.add(setting | found)
            print(*values, found["best"], found["last"], found["seconds"], flush=True)
    write_report(results.rows, results.path.with_suffix(""), args.images, args.epochs, args.rounds)


if __name__ == "__main__":
    main()
