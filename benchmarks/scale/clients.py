"""Rounds of up to a million clients, of which only the participants are on the device.

    python -m benchmarks.scale.clients
    python -m benchmarks.scale.clients --most 20000 --rounds 10

SCAFFOLD on clients of 20 examples of bytes, one epoch of one batch; logistic regression with 10 classes. Data are
files, and what clients keep is in a folder, from which a run that is killed goes on. A case has a process of its
own; its memory is what rises from before the first round, compilation included, to the end.

Then the same rounds with all clients on the device, in turn with staged ones, where both fit. What is measured is kept
in a file of the folder, until the report is written: a script that was broken off goes on with what is missing.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.papers.plots import COLOURS, panels
from benchmarks.peak import alone, peak_of
from benchmarks.report import parse_arguments, section, write
from benchmarks.timing import RATIOS, TIMES, at_least, interleave, ratio_row, time_rows
from functional_optimodules import Optimizer
from functional_optimodules.federated import FederatedData, Federation, StagedData, StagedFederation, clients_mesh

EXAMPLES, CLASSES, EVERY, TARGET = 20, 10, 10, 0.8
CLIENTS = (100, 1_000, 10_000, 100_000, 1_000_000)
PARTICIPANTS = (10, 100, 1_000, 3_000)
FEATURES = (10, 100, 784, 3_072)
DEVICES = (1, 2, 4)
HEADER = (
    "devices",
    "clients",
    "participants",
    "parameters",
    "ms a round",
    "memory, MB",
    "data, MB",
    "bank on disk, MB",
)


def loss(params, batch):
    logits = jax.nn.log_softmax(batch["x"].astype(jnp.float32) / 255 @ params["w"] + params["b"])
    return -jnp.take_along_axis(logits, batch["y"][:, None].astype(jnp.int32), axis=1)[:, 0]


def make_params(features):
    return {"w": jnp.zeros((features, CLASSES)), "b": jnp.zeros(CLASSES)}


def federation_of(clients, mapping=None):
    server = Optimizer(1.0, modules=[("scaffold-server", {"num_clients": clients})])
    return Federation(loss, Optimizer(0.1, modules=["scaffold-client"]), server, batch_size=EXAMPLES, mapping=mapping)


@contextlib.contextmanager
def playing(devices):
    """Let processes that are started play several devices; without a number, the one that there is."""
    before = os.environ.get("XLA_FLAGS", "")
    if devices:
        os.environ["XLA_FLAGS"] = f"{before} --xla_force_host_platform_device_count={devices}"
    try:
        yield
    finally:
        os.environ["XLA_FLAGS"] = before


class Kept:
    """What was measured, in a file: each thing is measured once, however often the script is started."""

    def __init__(self, path):
        self.path = path
        self.values = json.loads(path.read_text()) if path.exists() else {}

    def get(self, measure, *args):
        """Return what a function returns for some arguments, as JSON has it."""
        key = f"{measure.__name__}{args}"
        if key not in self.values:
            self.values[key] = measure(*args)
            draft = self.path.with_suffix(".partial")
            draft.write_text(json.dumps(self.values))
            os.replace(draft, self.path)
        return self.values[key]


def make_files(folder, clients, features):
    """Write the clients' examples, a part at a time, and return the paths."""
    rng, paths = np.random.default_rng(0), {}
    for name, high, shape in (("x", 256, (features,)), ("y", CLASSES, ())):
        paths[name] = folder / f"{name}-{clients}-{features}.npy"
        if paths[name].exists():
            continue
        rows = clients * EXAMPLES
        with paths[name].open("wb") as file:
            about = {"descr": "|u1", "fortran_order": False, "shape": (rows, *shape)}
            np.lib.format.write_array_header_1_0(file, about)
            for begin in range(0, rows, 2**17):
                count = min(2**17, rows - begin)
                file.write(rng.integers(0, high, (count, *shape), dtype=np.uint8).data)
    return paths


def staged_run(folder, clients, features, mapping=None):
    """Return a function that runs staged rounds, and the folder that they are kept in."""
    data = StagedData(make_files(folder, clients, features), np.full(clients, EXAMPLES))
    kept = Path(tempfile.mkdtemp(dir=folder))
    staged = StagedFederation(federation_of(clients, mapping), kept)
    state = staged.init(make_params(features), data)

    def run(rounds, participants):
        nonlocal state
        state, history = staged.fit(state, data, rounds, participants=participants, every=EVERY)
        return history["loss"]

    return run, kept


def measure(folder, clients, participants, features, devices, rounds):
    """Return seconds a round, by how much memory rose, and how much room the bank takes."""
    run, kept = staged_run(folder, clients, features, clients_mesh() if devices else None)

    def timed():
        run(EVERY, participants)
        begin = time.perf_counter()
        run(rounds, participants)
        return (time.perf_counter() - begin) / rounds

    seconds, memory = peak_of(timed)
    room = 512 * (kept / "rows").stat().st_blocks
    shutil.rmtree(kept)
    return seconds, memory, room


def measure_alone(case, folder, rounds):
    clients, participants, features, devices = case
    make_files(folder, clients, features)
    with playing(devices):
        return alone(measure, folder, clients, participants, features, devices, rounds)


def row_of(case, seconds, memory, room):
    clients, participants, features, devices = case
    data = clients * EXAMPLES * (features + 1)
    sizes = (f"{size / 1e6:,.0f}" for size in (memory, data, room))
    about = devices or 1, f"{clients:,}", f"{participants:,}", f"{CLASSES * (features + 1):,}"
    return *about, f"{1e3 * seconds:.3g}", *sizes


def compare(folder, clients, participants, features, seconds):
    """Return the times of rounds with everything on the device, and of staged ones."""
    paths = make_files(folder, clients, features)
    split = {name: np.load(path).reshape(clients, EXAMPLES, -1) for name, path in paths.items()}
    data = FederatedData.from_clients([{"x": x, "y": y[:, 0]} for x, y in zip(split["x"], split["y"], strict=True)])
    federation = federation_of(clients)
    state = federation.init(make_params(features), data)
    staged, kept = staged_run(folder, clients, features)

    def on_device():
        nonlocal state
        begin = time.perf_counter()
        state, _ = federation.fit(state, data, 5 * EVERY, participants=participants, every=EVERY)
        return (time.perf_counter() - begin) / (5 * EVERY)

    def from_disk():
        begin = time.perf_counter()
        staged(5 * EVERY, participants)
        return (time.perf_counter() - begin) / (5 * EVERY)

    times = interleave({"on the device": on_device, "staged": from_disk}, seconds, least=5)
    shutil.rmtree(kept)
    return times


def compare_alone(case, folder, seconds):
    clients, participants, features = case
    make_files(folder, clients, features)
    times = alone(compare, folder, clients, participants, features, seconds)
    return {side: np.asarray(each).tolist() for side, each in times.items()}


def compare_rows(case, times):
    clients, participants, features = case
    what = f"{clients:,} clients, {participants:,} a round, {CLASSES * (features + 1):,} parameters"
    times = {side: np.array(each) for side, each in times.items()}
    return time_rows(what, times), [ratio_row(what, times, "on the device", "staged", **at_least(TARGET))]


def plot(found, tables, path):
    figure, (axes, memories) = panels(2, len(tables))
    for column, (title, cases, place) in enumerate(tables):
        values = [CLASSES * (case[2] + 1) if title == "parameters" else case[place] for case in cases]
        for each, index, scale in ((axes[column], 0, 1e3), (memories[column], 1, 1e-6)):
            each.plot(values, [scale * found[case][index] for case in cases], "o-", color=COLOURS[column], markersize=4)
            each.set_xscale("log")
            if title == "devices":
                each.set_xticks(values, labels=values)
                each.minorticks_off()
            each.set_xlabel(title)
        axes[column].set_yscale("log")
        axes[column].set_ylim(1, 1_000)
        memories[column].set_ylim(0, 1.1e-6 * max(found[case][1] for case in found))
    axes[0].set_ylabel("ms a round")
    memories[0].set_ylabel("memory, MB")
    figure.savefig(path)


def main():
    args = parse_arguments(
        __doc__,
        most=(1_000_000, "the most clients"),
        rounds=(30, "timed rounds of a case"),
        seconds=(20.0, "about how long to time both sides of the last table"),
        folder=(Path(tempfile.gettempdir()), "where data and banks are made, and removed again: some 3 GB"),
    )
    by_clients = [(clients, min(clients, 100), 100, 0) for clients in CLIENTS if clients <= args.most]
    most = by_clients[-1][0]
    both, many = min(most, 20_000), min(most, 1_000)
    tables = [
        ("clients", by_clients, 0),
        ("participants", [(most, size, 100, 0) for size in PARTICIPANTS if size <= most], 1),
        ("parameters", [(min(most, 10_000), many, features, 0) for features in FEATURES], 2),
        ("devices", [(both, many, 100, devices) for devices in DEVICES], 3),
    ]
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    kept = Kept(Path(args.folder) / "clients-measured.json")
    folder, found = Path(tempfile.mkdtemp(dir=args.folder)), {}

    def grown(case):
        key = *case, args.rounds
        found[case] = kept.get(measured, *key)
        return ([row_of(case, *found[case])],)

    def measured(*key):
        return measure_alone(key[:-1], folder, key[-1])

    def compared(*key):
        return compare_alone(key[:-1], folder, key[-1])

    try:
        sections = [section(f"As {title} grow", grown, cases, HEADER) for title, cases, _ in tables]
        sections.append(
            section(
                "Beside everything on the device",
                lambda case: compare_rows(case, kept.get(compared, *case, args.seconds)),
                [(both, many, features) for features in (100, 784)],
                ("rounds", *TIMES[1:]),
                ("rounds", *RATIOS[1:]),
            )
        )
    finally:
        shutil.rmtree(folder)
    results = args.results / "scale"
    results.mkdir(parents=True, exist_ok=True)
    plot(found, tables, results / "clients.png")
    intro = [
        f"SCAFFOLD, clients of {EXAMPLES} examples of bytes in files, one epoch of one batch, pieces of {EVERY}",
        f"rounds; {args.rounds} timed rounds a case. Memory is what rises from before the first round to the end,",
        "compilation included. Several devices are those that the cores of the machine play, over a mesh: it does not",
        "get faster, and each has its part of the rows. In the last table, 50 rounds of each side at a time, in turn:",
        "staging wants a core of its own, which a busy machine does not have.",
        "",
        "![cost as clients, participants, parameters and devices grow](clients.png)",
    ]
    write(results / "clients.md", "Clients past memory", intro, *sections)
    kept.path.unlink()


if __name__ == "__main__":
    main()
