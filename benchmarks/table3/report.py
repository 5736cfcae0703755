"""The tables and the plot of `run.py`, from its CSV file."""

import statistics

from benchmarks.report import table

NAMES = {"sgd": "SGD", "fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD"}
COLUMNS = ("0", "10", "100")
# Rounds to 0.5 test accuracy on EMNIST at similarity 0 %, 10 % and 100 %.
PAPER = {
    ("sgd", 1): (317, 365, 416),
    ("scaffold", 1): (77, 62, 60),
    ("scaffold", 5): (152, 20, 10),
    ("scaffold", 10): (286, 16, 7),
    ("fedavg", 1): (258, 74, 83),
    ("fedavg", 5): (428, 34, 10),
    ("fedavg", 10): (711, 25, 6),
}


def write_report(rows, stem, limit):
    """Write `stem`.md and `stem`.png of the rows that there are."""
    cells = {}
    for row in rows:
        if row["phase"] == "final":
            cell = cells.setdefault((row["method"], int(row["epochs"]), row["similarity"]), [])
            cell.append((int(row["rounds"]) if row["rounds"] else None, float(row["rate"])))
    columns = [c for c in (*COLUMNS, "writers") if any(key[2] == c for key in cells)]
    plot(cells, columns, stem.with_suffix(".png"), limit)
    lines = [
        *heading(columns),
        "",
        *by_method(cells, columns, limit),
        *spread(rows),
        *comparison(cells),
        *reading(cells, limit),
    ]
    text = "\n".join(lines) + "\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


def heading(columns):
    writers = columns == ["writers"]
    clients = (
        "539 clients, the writers of the digits, of 19 to 131 examples, which count alike in the mean;\n"
        "20 sampled in a round, batches of 23, a fifth of the median"
        if writers
        else "100 clients of 600 examples, 20 sampled in a round, batches of 120"
    )
    return [
        "# Rounds to 0.85 test accuracy" + (", natural writers as clients" if writers else ""),
        "",
        f"Logistic regression on MNIST; {clients}.",
        "Median of 3 seeds (smallest to largest; the local rate). The rate is the best of 0.01, 0.03, 0.1, 0.3, 1 and",
        "3 on a seed of its own, of equals the first in the order 0.3, 0.1, 1, 0.03, 3, 0.01; the server's is 1.",
        "FedProx has mu = 1. Accuracy is measured after each round, on all 10,000 test images, and the first round",
        "that reaches the target counts, whatever follows.",
        *([] if writers else ["In italics, the paper's rounds to 0.5 accuracy on EMNIST, where they are at hand."]),
    ]


def median(cell, limit):
    return statistics.median(limit + 1 if rounds is None else rounds for rounds, _ in cell)


def shown(cell, limit):
    if not cell:
        return "not run"
    show = lambda rounds: f">{limit}" if rounds is None or rounds > limit else f"{rounds:g}"  # noqa: E731
    values = sorted(limit + 1 if rounds is None else rounds for rounds, _ in cell)
    return f"**{show(median(cell, limit))}** ({show(values[0])} to {show(values[-1])}; {cell[0][1]:g})"


def by_method(cells, columns, limit):
    rows = []
    for method, epochs in sorted({key[:2] for key in cells}, key=lambda key: (list(NAMES).index(key[0]), key[1])):
        entries = []
        for column in columns:
            paper = PAPER.get((method, epochs)) if column in COLUMNS else None
            entry = shown(cells.get((method, epochs, column)), limit)
            entries.append(entry + (f", *{paper[COLUMNS.index(column)]}*" if paper else ""))
        rows.append((NAMES[method], epochs if method != "sgd" else "one step", *entries))
    titles = [f"similarity {c} %" if c != "writers" else "writers" for c in columns]
    return table(("method", "epochs", *titles), rows)


def spread(rows):
    """Say where the rate is on the edge of the grid."""
    rates = sorted({float(row["rate"]) for row in rows})
    final = {(r["method"], r["epochs"], r["similarity"], float(r["rate"])) for r in rows if r["phase"] == "final"}
    edge = sum(rate in (rates[0], rates[-1]) for *_, rate in final)
    return ["", f"In {edge} of {len(final)} cells the best rate is the largest or the smallest of the grid."]


def comparison(cells):
    """Put the ratios of methods beside the paper's."""
    rows = []
    for epochs in (1, 5, 10, 20):
        entries = []
        for index, column in enumerate(COLUMNS):
            pair = [cells.get((method, epochs, column)) for method in ("fedavg", "scaffold")]
            if not all(pair) or any(rounds is None for cell in pair for rounds, _ in cell):
                continue
            here = median(pair[0], 0) / median(pair[1], 0)
            there = [PAPER.get((method, epochs)) for method in ("fedavg", "scaffold")]
            paper = f"*{there[0][index] / there[1][index]:.1f}*" if all(there) else "-"
            entries.append(f"{here:.1f}, {paper}")
        if len(entries) == len(COLUMNS):
            rows.append((epochs, *entries))
    if not rows:
        return []
    head = ("epochs", "0 %", "10 %", "100 %")
    return ["", "FedAvg's rounds over SCAFFOLD's, here and *in the paper*:", "", *table(head, rows)]


def reading(cells, limit):
    """Say which of the orders in the paper's table hold here too."""
    if not all((method, e, c) in cells for method in ("fedavg", "scaffold") for e in (1, 5, 10, 20) for c in COLUMNS):
        return []
    r = {key: median(cell, limit) for key, cell in cells.items()}
    epochs = (1, 5, 10, 20)
    claims = {
        "at 0 %, SCAFFOLD needs fewer rounds than FedAvg at any number of epochs": all(
            r["scaffold", e, "0"] < r["fedavg", e, "0"] for e in epochs
        ),
        "at 10 %, SCAFFOLD needs fewer rounds than FedAvg at any number of epochs": all(
            r["scaffold", e, "10"] < r["fedavg", e, "10"] for e in epochs
        ),
        "at 100 % the two are within a factor of 1.5": all(
            2 / 3 <= r["scaffold", e, "100"] / r["fedavg", e, "100"] <= 1.5 for e in epochs
        ),
        "SCAFFOLD needs fewer rounds than SGD at any number of epochs and any similarity": all(
            r["scaffold", e, c] < r["sgd", 1, c] for e in epochs for c in COLUMNS
        ),
        "at 0 %, FedAvg with 5 or more epochs needs more rounds than SGD": all(
            r["fedavg", e, "0"] > r["sgd", 1, "0"] for e in epochs[1:]
        ),
        "at 0 %, 10 epochs cost both more rounds than 1": all(
            r[method, 10, "0"] > r[method, 1, "0"] for method in ("fedavg", "scaffold")
        ),
        "at 10 % and 100 %, 10 epochs cost both fewer rounds than 1": all(
            r[method, 10, c] < r[method, 1, c] for method in ("fedavg", "scaffold") for c in COLUMNS[1:]
        ),
    }
    says = lambda whether: [f"- {claim};" for claim, holds in claims.items() if holds == whether]  # noqa: E731
    return [
        "",
        "Of what the paper's table shows, this holds here:",
        "",
        *says(True),
        "",
        "and this does not:",
        "",
        *says(False),
    ]


def plot(cells, columns, path, limit):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not columns:
        return
    figure, axes = plt.subplots(1, len(columns), figsize=(3.6 * len(columns) + 1, 3.4), sharey=True, squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        for color, method in zip(("0.4", "C0", "C1", "C3"), NAMES, strict=True):
            points = sorted((key[1], cell) for key, cell in cells.items() if key[0] == method and key[2] == column)
            if not points:
                continue
            values = [sorted(limit if rounds is None else rounds for rounds, _ in cell) for _, cell in points]
            middle = [statistics.median(v) for v in values]
            if method == "sgd":
                axis.axhline(middle[0], color=color, linestyle=":", label=NAMES[method])
                continue
            epochs = [e for e, _ in points]
            axis.plot(epochs, middle, "o-", color=color, label=NAMES[method], markersize=4)
            axis.fill_between(epochs, [v[0] for v in values], [v[-1] for v in values], color=color, alpha=0.15, lw=0)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks([1, 5, 10, 20], ["1", "5", "10", "20"])
        axis.minorticks_off()
        axis.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        axis.set_xlabel("local epochs")
        axis.set_title(f"similarity {column} %" if column != "writers" else "539 writers")
    axes[0, 0].set_ylabel("rounds to 0.85 test accuracy")
    axes[0, -1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
