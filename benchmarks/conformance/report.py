"""Other libraries' federated algorithms, and ours, beside oracles written from the papers.

    python -m benchmarks.conformance.report

Each library is judged in an environment of its own, which is made in the user's cache and
needs a package index and some minutes; one that cannot be made is left out, and it is said so.
"""

import csv

import numpy as np

from benchmarks.conformance.ours import Peers, Simulator
from benchmarks.conformance.readings import READINGS, WHERE
from benchmarks.conformance.side import Side
from benchmarks.environments import FEDJAX, make_environment
from benchmarks.report import parse_arguments, table, write
from benchmarks.step.peers import DECLEARN
from benchmarks.worker import Worker
from functional_optimodules.testing.federated import ORACLES, SCENARIOS, TOLERANCE
from functional_optimodules.testing.federated.check import differences, hyper_of, movement, oracle_trajectory

TORCH = "torch==2.13.0"
FEDOPT = "fedavgm", "fedadam", "fedyogi", "fedadagrad"
PEERS = {
    "flwr": (("flwr==1.41.0",), ("fedavg", "fedprox", *FEDOPT, "median", "trimmed-mean", "krum", "multi-krum")),
    "declearn": (DECLEARN, ("fedavg", "fedprox", "scaffold")),
    "fedjax": (FEDJAX["FedJAX on JAX 0.4"], ("fedavg", "fedprox", *FEDOPT, "mime", "mimelite")),
    "fluke": (
        ("fluke-fl==0.8.1", TORCH, "torchvision==0.28.0"),
        ("fedavg", "fedprox", "fednova", "fedexp", "ditto", *FEDOPT, "scaffold", "feddyn"),
    ),
    "pfl": (("pfl==0.6.0", TORCH), ("fedavg", "fedprox", "scaffold", "scaffold-option-1")),
}
OURS = {"ours, simulator": Simulator, "ours, over JSON": Peers}


def reproduces(variant, paths):
    """Whether a variant of an oracle gives the numbers that an implementation gave, in all scenarios."""
    for name, path in paths.items():
        scenario, oracle = SCENARIOS[name], ORACLES[variant.name]
        federation, reference = variant(scenario.problem(), **hyper_of(oracle, scenario)), []
        for plan in scenario.plans:
            federation.round(plan)
            reference.append(federation.shown())
        scale = movement(oracle_trajectory(oracle, scenario), federation.problem.start)
        if not np.max(differences(list(map(np.array, path)), reference, scale)) <= TOLERANCE:
            return False
    return True


def reason(peer, algorithm, judged):
    """Return why an implementation differs, and where that is to be seen."""
    rows = judged["rows"]
    if all(row[1] in ("passes", "holds", "not run") for row in rows):
        return ""
    variant = READINGS.get((peer, algorithm))
    if variant is None:
        said = next((f"raises {row[2]}" for row in rows if row[1] == "raises"), judged["why"].partition("): ")[2])
        return f"{said} ({WHERE.get((peer, algorithm), 'not looked up')})"
    if not reproduces(variant, judged["paths"]):
        raise ValueError(f"{peer}'s {algorithm} is not what {variant.__name__} says")
    return f"{variant.summary()} ({WHERE[peer, algorithm]})"


def summary(name, algorithm, why, rows):
    """Return a row of the table for an algorithm."""

    def count(right, wrong):
        verdicts = [row[1] for row in rows]
        total = verdicts.count(right) + verdicts.count(wrong)
        return f"{verdicts.count(right)} of {total}" if total else ""

    apart = [row[2] for row in rows if row[1] in ("passes", "differs")]
    worst = f"{max(apart):.0e}" if max(apart) > TOLERANCE else ""
    differs = [row[0] for row in rows if row[1] in ("differs", "does not hold")]
    agrees = any(row[1] in ("passes", "holds") for row in rows)
    where = ", ".join(differs) if agrees else "all"
    # A bar would end the cell.
    why = why.replace("|", "\\|")
    return name, algorithm, count("passes", "differs"), count("holds", "does not hold"), worst, where, why


def judge(peer, side, algorithms):
    """Return what a library says it is, the rows of its summary, and all its rows.

    Args:
      side: a function of a `Side`'s method and its arguments.
    """
    about = side("about")
    name, lines, everything = about.partition(",")[0], [], []
    for algorithm in algorithms:
        judged = side("judge", algorithm)
        if all(row[1] == "not run" for row in judged["rows"]):
            continue
        lines.append(summary(name, algorithm, reason(peer, algorithm, judged), judged["rows"]))
        print(*lines[-1], sep=" | ", flush=True)
        everything += [(name, algorithm, *row) for row in judged["rows"]]
    return about, lines, everything


def judge_ours(peer):
    side = Side(OURS[peer](), "functional-optimodules", "jax")
    about, lines, everything = judge(peer, lambda method, *args: getattr(side, method)(*args), ORACLES)
    return f"{peer}: {about}", [(peer, *row[1:]) for row in lines], [(peer, *row[1:]) for row in everything]


def judge_peer(peer):
    requirements, algorithms = PEERS[peer]
    worker = Worker(make_environment(requirements), f"benchmarks.conformance.{peer}_worker")
    try:
        return judge(peer, worker.ask, algorithms)
    finally:
        worker.close()


def main():
    args = parse_arguments(__doc__, peers=((*OURS, *PEERS), "only these"))
    said, lines, everything = [], [], []
    for peer in args.peers:
        try:
            about, mine, rows = judge_ours(peer) if peer in OURS else judge_peer(peer)
        except RuntimeError as error:
            said.append(f"- {peer} was not run: {str(error).splitlines()[-1]}")
            continue
        said.append(f"- {about}")
        lines += mine
        everything += rows
    intro = [
        "Each algorithm that a library offers, beside an oracle in float64 that is written from the paper, on five",
        "quadratic losses; how many scenarios and invariants agree. A difference is the largest of a parameter over",
        "the largest movement of one, in all rounds; up to 1e-4 passes. A reason was read in the library's source,",
        "and gives its numbers: an oracle changed by it agrees with the library in all scenarios. What is not",
        "offered, or not with some option, is not counted. Each scenario is in report.csv.",
        "",
        "Clients of Flower's strategies are their user's: plain steps here, and what its documentation adds to them.",
        "FedJAX's fedavgm, fedadam, fedyogi and fedadagrad are its averaging with those optimizers on the server.",
        "In FedJAX, fluke and pfl nobody drops out: who would is not asked. declearn's mean is unweighted here.",
        "",
        *said,
    ]
    header = "library", "algorithm", "scenarios", "invariants", "difference", "in", "why"
    write(
        args.results / "conformance" / "report.md",
        "Federated algorithms beside their papers",
        intro,
        table(header, lines),
    )
    with open(args.results / "conformance" / "report.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("library", "algorithm", "scenario", "result", "difference"))
        rows.writerows((*row[:4], f"{row[4]:.1e}" if isinstance(row[4], float) else row[4]) for row in everything)


if __name__ == "__main__":
    main()
