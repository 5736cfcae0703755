"""Rounds on up to 256 TPU chips, compiled and not run: memory, what chips exchange, and the compiler's estimates.

    python -m benchmarks.scale.topology

It needs a package index and Linux on x86, and no TPU: the chips are described to the compiler, which comes with
`libtpu`, in an environment of its own. Two models: a perceptron of 784-64-10, whole on each chip, and one of 101 M
parameters, each client's split over a group of chips by a second axis of the mesh, `model`.
"""

import csv
import math

from benchmarks.environments import LIBTPU, with_libtpu
from benchmarks.report import parse_arguments, section, write
from benchmarks.worker import Worker

WITHIN = " within a group"
METHODS = ("fedavg", "scaffold")
GRIDS = ((2, 2), (4, 4), (8, 8), (16, 16))
SMALL = [
    {"model": "small", "method": method, "chips": chips, "group": 1, "clients": clients, "participants": 2048}
    for method in METHODS
    for chips, clients in (*((chips, 10_240) for chips in GRIDS), (GRIDS[-1], 100_000), (GRIDS[-1], 1_000_000))
]
# Of the bank of SCAFFOLD, whose rows are models, 1,024 clients are as many as is sensible.
LARGE = [
    {"model": "large", "participants": 256, **case}
    for case in (
        *({"method": "fedavg", "chips": chips, "group": 16, "clients": 1024} for chips in GRIDS[1:]),
        {"method": "fedavg", "chips": GRIDS[-1], "group": 4, "clients": 1024},
        {"method": "fedavg", "chips": GRIDS[-1], "group": 16, "clients": 1_000_000, "participants": 2048},
        {"method": "scaffold", "chips": GRIDS[-1], "group": 16, "clients": 1024},
    )
]
TABLES = {
    "784-64-10 perceptron, whole on each chip": SMALL,
    "101 M parameters, a client's split over a group of chips": LARGE,
}
HEADER = [
    "method",
    "chips",
    "clients",
    "a round",
    "kept and data, MB a chip",
    "temporary, MB a chip",
    "exchanged by all",
    "within a group",
    "trace, s",
    "compile, s",
    "FLOP",
    "MB moved",
    "us",
    "not estimated",
]
INTRO = [
    "By `python -m benchmarks.scale.topology`. Nothing was run on a TPU: this is what the compiler for TPU v5e says of",
    "one round, with 20 examples a client in batches of 5. *Kept and data* are the arguments of the round: parameters,",
    "the bank of what clients keep, and their data. *Exchanged by all* counts the collectives over all groups, once a",
    "round; *within a group* those of chips that share a client's model, in its local steps.",
    "",
    "FLOP, bytes moved and the time are the compiler's estimates for a chip, with the body of each loop counted",
    "**once**: one chunk of clients, one local step, one layer; and without what it has no estimate of, whose number",
    "is the last column. They compare rows, and are no forecast of a round's time.",
    "",
    "Temporary memory grows with the chunk of clients run at once, up to 256. What is more than that, the text of a",
    "program shows to be a copy of the data in bfloat16, made once a program and not once a round, ahead of the loops",
    "that multiply by it. SCAFFOLD's bank is not copied: its rows are flat, and read one by one. Of matrices, a TPU",
    "would put the clients last, and copy the bank to read it by client: 1,038 MB in the row of a million clients.",
]


def named(collectives, within):
    """Return the collectives within groups, or the others, with how many there are."""
    chosen = ((name, count) for name, count in collectives.items() if name.endswith(WITHIN) is within)
    return ", ".join(f"{count} {name.removesuffix(WITHIN)}" for name, count in chosen)


def row(case, found):
    """Return a row of the table."""
    chips, group = math.prod(case["chips"]), case["group"]
    counts = {within: named(found["collectives"], within) for within in (False, True)}
    # What has no estimate counts as -1 second.
    unknown = max(0, math.ceil(-found["optimal_s"]))
    return [
        case["method"],
        f"{chips}" if group == 1 else f"{chips // group} x {group}",
        f"{case['clients']:,}",
        f"{case['participants']:,}",
        f"{found['arguments'] / 1e6:,.1f}",
        f"{found['temporary'] / 1e6:,.1f}",
        counts[False] or "nothing",
        counts[True] or "nothing",
        f"{found['trace_s']:.1f}",
        f"{found['compile_s']:.1f}",
        f"{found['flops']:.2g}",
        f"{found['bytes'] / 1e6:,.0f}",
        f"{(found['optimal_s'] + unknown) * 1e6:,.0f}",
        unknown,
    ]


def main():
    options = parse_arguments(__doc__, only=(METHODS, "only these methods"), small=(False, "leave the large model out"))
    worker = Worker(with_libtpu(), "benchmarks.scale.topology_worker")
    written = []

    def measure(case):
        found = worker.ask("compile", case)
        exchanged = {"by_all": named(found["collectives"], False), "within": named(found["collectives"], True)}
        rest = {name: value for name, value in found.items() if name != "collectives"}
        written.append({**case, "chips": math.prod(case["chips"]), **rest, **exchanged})
        return [[row(case, found)]]

    try:
        sections = [
            section(title, measure, [case for case in cases if case["method"] in options.only], HEADER)
            for title, cases in TABLES.items()
            if not (options.small and cases is LARGE)
        ]
    finally:
        worker.close()
    path = options.results / "scale" / "topology.md"
    write(path, "Rounds compiled for described TPUs", [*INTRO, "", f"- compiler: {LIBTPU}"], *sections)
    with path.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, written[0], lineterminator="\n")
        rows.writeheader()
        rows.writerows(written)


if __name__ == "__main__":
    main()
