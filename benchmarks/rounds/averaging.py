"""One round of federated averaging: this library beside its peers, in turn.

    python -m benchmarks.rounds.averaging

100 clients of 100 examples, batches of 20, one local epoch, reshuffled at each round;
logistic regression on 784 inputs, and a 784-64-10 perceptron. Each side lives in a
process of its own and runs one round at a time, in turn with the others, so that what
else the machine does falls on all alike. Ours checks every client's update for values
that are not finite; the peers do not.

Then: a bank of 10,000 clients against one of 100, with 100 sampled.
"""

import csv
import functools
import os
import sys

import numpy as np

from benchmarks.environments import FEDJAX, make_environment
from benchmarks.report import parse_arguments, section, write
from benchmarks.timing import RATIOS, TIMES, at_least, at_most, interleave, ratio_row, time_rows
from benchmarks.worker import Worker

MODELS = {"logistic": "logistic regression", "perceptron": "784-64-10 perceptron"}
# For each of ours and each peer, how many times faster ours should be.
TARGETS = {
    ("ours, one device", "FedJAX"): {"logistic": 3.0, "perceptron": 2.2},
    ("ours, device per core", "FedJAX"): {"logistic": 6.0, "perceptron": 5.0},
    ("ours, one device", "Python loop"): {"logistic": 1.4, "perceptron": 1.4},
    ("ours, device per core", "Python loop"): {"logistic": 2.5, "perceptron": 2.5},
}
SCAFFOLD_TARGETS = {"logistic": 1.45, "perceptron": 1.65}
BANK_TARGET = 1.2
CORES = len(os.sched_getaffinity(0))


class Side:
    """A side in another process. A call runs a round there, and returns its seconds."""

    def __init__(self, worker, *case):
        self.worker, self.case, self.cpu, self.extra = worker, case, [], None

    def __call__(self):
        wall, cpu, self.extra = self.worker.ask("round", *self.case)
        self.cpu.append(cpu)
        return wall


def take(what, sides, repeats, raw):
    """Time a round of each side in turn, and return the times and their rows. The seconds are added to `raw`."""
    times = interleave(sides, least=repeats, most=repeats)
    rows = []
    for row, (name, side) in zip(time_rows(what, times), sides.items(), strict=True):
        cpu = side.cpu[-repeats:]
        rows.append((*row[:-1], f"{1e3 * np.median(cpu):.3g}"))
        raw += [(what, name, *seconds) for seconds in zip(times[name], cpu, strict=True)]
    return times, rows


def measure(model, workers, repeats, participants, raw):
    """Return the rows of both tables of one model."""
    size, title = (participants, participants, "float32"), MODELS[model]
    sides = {name: Side(worker, model, "fedavg", *size) for name, worker in workers.items()}
    ours = [name for name in workers if name.startswith("ours")]
    sides |= {name.replace("ours", "SCAFFOLD"): Side(workers[name], model, "scaffold", *size) for name in ours}
    times, rows = take(title, sides, repeats, raw)
    ratios = []
    for (name, family), targets in TARGETS.items():
        peers = [peer for peer in workers if peer.startswith(family) and "pmap" not in peer and name in workers]
        ratios += [ratio_row(title, times, peer, name, **at_least(targets[model])) for peer in peers]
    most = at_most(SCAFFOLD_TARGETS[model])
    return rows, [*ratios, *(ratio_row(title, times, name.replace("ours", "SCAFFOLD"), name, **most) for name in ours)]


def measure_banks(method, worker, repeats, raw):
    """Return the rows of both tables of rounds of 100 clients, out of 100 and out of 10,000."""
    sides = {f"{bank:,}": Side(worker, "logistic", method, 100, bank, "uint8") for bank in (100, 10_000)}
    times, rows = take(method, sides, repeats, raw)
    memory = [side.extra / 1024 for side in sides.values()]
    ratio = ratio_row(method, times, "10,000", "100", **at_most(BANK_TARGET))
    rows = [(*row, f"{kib:,.0f}") for row, kib in zip(rows, memory, strict=True)]
    return rows, [(*ratio, f"{memory[1] / memory[0]:.2f}")]


def main():
    args = parse_arguments(
        __doc__,
        repeats=(40, "timed rounds of each side"),
        participants=(100, "clients in a round"),
        devices=(CORES, "host devices of the mesh"),
        no_fedjax=(False, "leave FedJAX out, which needs a package index"),
        no_banks=(False, "leave the bank of 10,000 clients out (5 GB)"),
    )
    ours = (sys.executable, "benchmarks.rounds.our_worker")
    plan = {"ours, one device": (*ours, 1), "ours, device per core": (*ours, args.devices)}
    plan["Python loop"] = (sys.executable, "benchmarks.rounds.loop_worker", 1)
    if not args.no_fedjax:
        pythons = {name: make_environment(requirements) for name, requirements in FEDJAX.items()}
        plan |= {name: (python, "benchmarks.rounds.fedjax_worker", 1) for name, python in pythons.items()}
        name, python = list(pythons.items())[-1]
        plan[f"{name}, pmap, device per core"] = (python, "benchmarks.rounds.fedjax_worker", args.devices)
    if args.devices == 1:
        plan = {name: side for name, side in plan.items() if "device per core" not in name}
    workers = {name: Worker(*side) for name, side in plan.items()}
    times, raw = ("model", *TIMES[1:-1], "CPU, ms"), []
    try:
        about = {name: worker.ask("about") for name, worker in workers.items()}
        rounds = functools.partial(
            measure, workers=workers, repeats=args.repeats, participants=args.participants, raw=raw
        )
        sections = [section("A round", rounds, MODELS, times, ("model", *RATIOS[1:]))]
        for name in list(workers)[1:]:
            workers.pop(name).close()
        if not args.no_banks:
            banks = functools.partial(measure_banks, worker=workers["ours, one device"], repeats=args.repeats, raw=raw)
            headers = (
                ("method", "clients in the bank", *times[2:], "temporary memory, KiB"),
                ("method", *RATIOS[1:], "of memory"),
            )
            title = "A bank of 10,000 clients, 100 of them sampled"
            sections.append(section(title, banks, ("fedavg", "scaffold"), *headers))
    finally:
        for worker in workers.values():
            worker.close()
    intro = [
        f"{args.participants} clients of 100 examples, batches of 20, one epoch; {args.repeats} timed rounds of each",
        "side, one at a time and in turn. Times are this machine's and this hour's; the ratios are what counts.",
        "Where the quartiles are far apart the machine was busy with other things, and the fastest rounds say more",
        "than the medians; CPU is the median CPU time of all threads of a side, which waiting for a core leaves alone.",
        "",
        *(f"- {name}: {text}" for name, text in about.items()),
    ]
    write(args.results / "rounds" / "averaging.md", "One round of federated averaging", intro, *sections)
    with (args.results / "rounds" / "averaging.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case", "side", "wall seconds", "CPU seconds"), *raw])


if __name__ == "__main__":
    main()
