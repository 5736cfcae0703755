"""One round of federated averaging: this library beside its peers, in turn.

    python benchmarks/federated_rounds.py

100 clients of 100 examples, batches of 20, one local epoch, reshuffled at each round;
logistic regression on 784 inputs, and a 784-64-10 perceptron. Each side lives in a
process of its own and runs one round at a time, in turn with the others, so that what
else the machine does falls on all alike. Ours checks every client's update for values
that are not finite; the peers do not.

Then: a bank of 10,000 clients against one of 100, with 100 sampled.
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from machine import processor
from peer_environment import FEDJAX, make_environment

HERE = Path(__file__).parent
MODELS = {"logistic": "logistic regression", "perceptron": "784-64-10 perceptron"}
# For each of ours and each peer, how many times faster ours should be.
TARGETS = {
    ("one device", "FedJAX"): {"logistic": 3.0, "perceptron": 2.2},
    ("device per core", "FedJAX"): {"logistic": 6.0, "perceptron": 5.0},
    ("one device", "Python loop"): {"logistic": 1.4, "perceptron": 1.4},
    ("device per core", "Python loop"): {"logistic": 2.5, "perceptron": 2.5},
}
SCAFFOLD_TARGETS = {"logistic": 1.45, "perceptron": 1.65}
BANK_TARGET = 1.2


class Worker:
    """A process that runs rounds when asked."""

    def __init__(self, python, script, devices):
        flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
        environment = {**os.environ, "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([str(python), str(HERE / script)], env=environment, **pipes)

    def ask(self, *case):
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(case), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended before it answered {case}")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Timed(NamedTuple):
    """What one side took: per round in wall-clock and CPU seconds, and what else it said."""

    wall: list
    cpu: list
    extra: Any


def interleave(sides, repeats):
    """Time `{name: (worker, case)}` in turn, and return `{name: Timed}`."""
    timed = {name: Timed([], [], worker.ask(*case)[2]) for name, (worker, case) in sides.items()}
    for _ in range(repeats):
        for name, (worker, case) in sides.items():
            wall, cpu, _ = worker.ask(*case)
            timed[name].wall.append(wall)
            timed[name].cpu.append(cpu)
    return timed


def quartiles(times):
    return tuple(1e3 * value for value in statistics.quantiles(times, n=4))


def verdict(value, target, at_least=True):
    return "reached" if (value >= target if at_least else value <= target) else "missed"


def rounds(workers, repeats, participants, rows):
    """Time the rounds of each model; return the report's lines."""
    lines = ["| model | side | median, ms | quartiles, ms | fastest, ms | CPU, ms |", "|---|---|---|---|---|---|"]
    ratios = ["| model | ratio | of medians | of the fastest | target | |", "|---|---|---|---|---|---|"]
    for model, title in MODELS.items():
        size = (participants, participants, "float32")
        sides = {name: (worker, (model, "fedavg", *size)) for name, worker in workers.items()}
        for name in ("one device", "device per core"):
            if name in workers:
                sides[f"SCAFFOLD, {name}"] = (workers[name], (model, "scaffold", *size))
        medians, fastest = {}, {}
        for name, timed in interleave(sides, repeats).items():
            low, medians[name], high = quartiles(timed.wall)
            fastest[name] = 1e3 * min(timed.wall)
            ours = f"ours, {name}" if name in ("one device", "device per core") else name
            spread = f"{low:.1f} to {high:.1f} | {fastest[name]:.1f} | {quartiles(timed.cpu)[1]:.1f}"
            lines.append(f"| {title} | {ours} | {medians[name]:.1f} | {spread} |")
            rows += [(model, name, *seconds) for seconds in zip(timed.wall, timed.cpu, strict=True)]
        for (side, family), targets in TARGETS.items():
            for peer in medians:
                if side not in medians or not peer.startswith(family) or "pmap" in peer:
                    continue
                ratio, best = medians[peer] / medians[side], fastest[peer] / fastest[side]
                judged = f">= {targets[model]} | {verdict(ratio, targets[model])}"
                ratios.append(f"| {title} | {peer} / ours, {side} | {ratio:.2f} | {best:.2f} | {judged} |")
        for side in ("one device", "device per core"):
            if side in medians:
                ratio, best = (times[f"SCAFFOLD, {side}"] / times[side] for times in (medians, fastest))
                target = SCAFFOLD_TARGETS[model]
                judged = f"<= {target} | {verdict(ratio, target, at_least=False)}"
                ratios.append(f"| {title} | SCAFFOLD / FedAvg, {side} | {ratio:.2f} | {best:.2f} | {judged} |")
    return [*lines, "", *ratios]


def banks(worker, repeats, rows):
    """Time rounds of 100 clients out of 100 and out of 10,000; return the report's lines."""
    lines = [
        "| clients in the bank | method | median, ms | quartiles, ms | temporary memory, KiB |",
        "|---|---|---|---|---|",
    ]
    ratios = [
        "",
        "| method | time, 10,000 / 100 | target | | temporary memory, 10,000 / 100 |",
        "|---|---|---|---|---|",
    ]
    for method in ("fedavg", "scaffold"):
        sides = {bank: (worker, ("logistic", method, 100, bank, "uint8")) for bank in (100, 10_000)}
        medians, memory = {}, {}
        for bank, timed in interleave(sides, repeats).items():
            memory[bank] = timed.extra
            low, medians[bank], high = quartiles(timed.wall)
            quartile = f"{low:.1f} to {high:.1f}"
            lines.append(f"| {bank:,} | {method} | {medians[bank]:.1f} | {quartile} | {memory[bank] / 1024:,.0f} |")
            rows += [(f"bank of {bank}", method, *seconds) for seconds in zip(timed.wall, timed.cpu, strict=True)]
        ratio, grown = medians[10_000] / medians[100], memory[10_000] / memory[100]
        judged = verdict(ratio, BANK_TARGET, at_least=False)
        ratios.append(f"| {method} | {ratio:.2f} | <= {BANK_TARGET} | {judged} | {grown:.2f} |")
    return [*lines, *ratios]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40, help="timed rounds of each side")
    parser.add_argument("--participants", type=int, default=100, help="clients in a round")
    parser.add_argument("--devices", type=int, default=len(os.sched_getaffinity(0)), help="host devices of the mesh")
    parser.add_argument("--no-fedjax", action="store_true", help="leave FedJAX out, which needs a package index")
    parser.add_argument("--no-banks", action="store_true", help="leave the bank of 10,000 clients out (5 GB)")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    ours = [(sys.executable, "rounds_ours.py")]
    plan = {"one device": (*ours[0], 1), "device per core": (*ours[0], args.devices)}
    plan["Python loop"] = (sys.executable, "rounds_loop.py", 1)
    if not args.no_fedjax:
        pythons = {name: make_environment(requirements) for name, requirements in FEDJAX.items()}
        plan |= {name: (python, "rounds_fedjax.py", 1) for name, python in pythons.items()}
        name, python = list(pythons.items())[-1]
        plan[f"{name}, pmap, device per core"] = (python, "rounds_fedjax.py", args.devices)
    if args.devices == 1:
        plan = {name: side for name, side in plan.items() if "device per core" not in name}
    workers = {name: Worker(*side) for name, side in plan.items()}
    rows = []
    try:
        about = {name: worker.ask("about") for name, worker in workers.items()}
        measured = rounds(workers, args.repeats, args.participants, rows)
        for name in list(workers)[1:]:
            workers.pop(name).close()
        bank_lines = [] if args.no_banks else banks(workers["one device"], args.repeats, rows)
    finally:
        for worker in workers.values():
            worker.close()
    report = [
        "# One round of federated averaging",
        "",
        f"{args.participants} clients of 100 examples, batches of 20, one epoch; {args.repeats} timed rounds of each",
        "side, one at a time and in turn. Times are this machine's and this hour's; the ratios are what counts.",
        "Where the quartiles are far apart the machine was busy with other things, and the fastest rounds say more",
        "than the medians; CPU is the median CPU time of all threads of a side, which waiting for a core leaves alone.",
        "",
        f"- machine: {processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        *(f"- {name}: {text}" for name, text in about.items()),
        f"- optax {version('optax')}; FedJAX 0.0.17",
        "",
        *measured,
        "",
        *(["## A bank of 10,000 clients, 100 of them sampled", "", *bank_lines] if bank_lines else []),
    ]
    text = "\n".join(report).rstrip() + "\n"
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "federated_rounds.md").write_text(text)
    with (args.results / "federated_rounds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case", "side", "wall seconds", "CPU seconds"), *rows])
    print(text)


if __name__ == "__main__":
    main()
