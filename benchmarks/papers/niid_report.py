"""The table and the plot of `niid_bench.py`, from its CSV file."""

import statistics

from benchmarks.papers.plots import COLOURS, GREY, panels
from benchmarks.report import conditions, table

METHODS = {"fedavg": "FedAvg", "scaffold": "SCAFFOLD", "fedprox": "FedProx", "fednova": "FedNova"}
# Best test accuracy over the rounds, mean and standard deviation, as the README of Flower's baseline prints them.
BASELINE = {
    "Dirichlet (0.5)": ("98.89 ± 0.07", "99.07 ± 0.06", "99.02 ± 0.02", "98.03 ± 0.06"),
    "2 labels": ("96.86 ± 0.30", "96.92 ± 0.52", "96.85 ± 0.15", "96.65 ± 0.39"),
    "1 label": ("19.33 ± 11.82", "9.93 ± 0.12", "51.79 ± 26.75", "52.58 ± 14.08"),
}
STARTS = {
    "": "zero",
    "starts at the weights": "the model's weights, all (Flower's baseline)",
    "starts at one random network": "one random network, all (NIID-Bench's code)",
    "starts at random networks": "a random network each, and c another",
}
CHANGES = {
    "momentum last": "correction before the momentum",
    "no momentum": "no momentum",
    "rate 0.001": "rate 0.001 for 0.01",
}


def write_report(rows, stem, images, epochs, rounds):
    """Write `stem`.md and `stem`.png of the rows of a setting."""
    setting = [str(images), str(epochs), str(rounds)]
    cells = {}
    for row in rows:
        if [row["images"], row["epochs"], row["rounds"]] == setting:
            cells.setdefault((row["partition"], row["method"], row["variant"]), []).append(row)
    seeds = max(map(len, cells.values()), default=0)
    lines = [
        "# MNIST rows of NIID-Bench, as Flower's baseline prints them",
        "",
        f"10 clients, {rounds} rounds, {epochs} local epochs, batches of 64, momentum 0.9, rate 0.01; {images} of the",
        f"60,000 training images; {seeds} seed(s). Best test accuracy over the rounds in %, and *the baseline's*, of",
        "three seeds with all images.",
        "",
        *conditions(),
        "",
        *main_table(cells),
        "",
        *row_of_one_label(cells),
    ]
    plot(cells, stem.with_suffix(".png"))
    text = "\n".join(lines) + "\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


def best(cell):
    """Return the mean, over seeds, of the best accuracy over the rounds in %, or minus infinity for no run."""
    return statistics.mean(100 * float(row["best"]) for row in cell) if cell else float("-inf")


def shown(cell):
    if not cell:
        return "not run"
    values = [100 * float(row["best"]) for row in cell]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main_table(cells):
    rows = []
    for partition, published in BASELINE.items():
        entries = []
        for method, paper in zip(METHODS, published, strict=True):
            runs = {v: cell for (p, m, v), cell in cells.items() if (p, m) == (partition, method)}
            variant = max(runs, key=lambda v: best(runs[v]), default="") if method == "fedprox" else ""
            note = f" ({variant})" if variant else ""
            entries.append(f"**{shown(runs.get(variant))}**{note}, *{paper}*")
        rows.append((partition, *entries))
    return table(("partition", *METHODS.values()), rows)


def row_of_one_label(cells):
    """Say what becomes of SCAFFOLD with one label a client, by where its variates start and by its steps."""

    def entry(name, method, variant):
        cell = cells.get(("1 label", method, variant))
        if not cell:
            return name, "not run", "", "", "", ""
        first = cell[0]
        accuracies, norms = ([float(value) for value in first[key].split()] for key in ("accuracies", "norms"))
        finite = [norm for norm in norms if norm < float("inf")]
        ends = f"{norms[-1]:.3g}" if len(finite) == len(norms) else f"not finite from round {len(finite) + 1} on"
        early = f"{norms[0]:.2f}, {norms[min(2, len(norms) - 1)]:.2f}"
        return name, first["offset"], early, ends, f"{accuracies[-1]:.1%}", f"{max(accuracies):.1%}"

    header = ("", "off by", "norm of the model after rounds 1 and 3", "after the last", "last accuracy", "best")
    return [
        "## One label a client: why SCAFFOLD is at chance",
        "",
        "*Where the variates start.* Off by: the distance of c from the mean of the clients' variates at the start.",
        "",
        *table(header, [entry(name, "scaffold", variant) for variant, name in STARTS.items()]),
        "",
        "*With variates from zero, smaller steps.*",
        "",
        *table(
            header,
            [
                *(entry(name, "scaffold", variant) for variant, name in {"": "as above", **CHANGES}.items()),
                *(entry(f"FedAvg, {name or 'as above'}", "fedavg", name) for name in ("", "no momentum")),
            ],
        ),
        "",
        "![Accuracy and norm by round](niid_bench.png)",
        "",
        *READING,
    ]


READING = (
    "**The start is not the reason.** Where all clients take part in each round, a step holds the variates only",
    "as c_i - c, and a client's new one is the mean of its own moves: what all share at the start is gone after",
    "one round. With zero, the model's weights, or one random network, the first ten rounds have the same",
    "accuracies to four digits; later, rounding tells them apart. Flower's baseline and NIID-Bench's code start",
    "so, and it does them no harm.",
    "",
    "A start that does matter is one where c is not the mean of the c_i. As c moves by the mean of their changes,",
    "it stays off for ever, and the model walks by that offset in each local step: by its norm, times the rate,",
    "times 100 steps a round here, which is what the norms show, until they are not finite. Such a model says 0",
    "for every image: 9.8 %.",
    "",
    "**The length of the local work is.** A client that has one label soon tells it, and has no gradient left;",
    "from then on the correction moves it alone, through all steps of the round. With momentum 0.9 these are ten",
    "times longer than the rate says. The model holds for four rounds; then its norm jumps, and what is left of",
    "it says one label for nearly all images: 8.9 to 11.4 %. It is so on either side of the momentum. Without",
    "it, or at a tenth of the rate, with the same variates from zero, the model stays as it is, and SCAFFOLD",
    "learns: to a third of the images within 25 rounds, though not steadily, and it falls back. The baseline",
    "takes nine times as many steps in a round.",
    "",
    "In accuracy, the best of 50 rounds of a model that says one label is that of the most frequent one that it",
    "happens to say: 11.35 here, where the baseline has 9.93. FedAvg, in which nothing but gradients moves a",
    "client, is above chance in this row: the correction is what costs.",
    "",
    "With two labels a client it is the same, later: SCAFFOLD gets to 75.9 % and then falls to 9.8 %, where the",
    "baseline, with all images, is at 96.92. The other methods, and the row of Dirichlet, are within 2.1 points of",
    "the baseline, with a tenth of its images.",
)


def plot(cells, path):
    figure, ((left, right),) = panels(1, 2)
    shown = {"scaffold": {**STARTS, **CHANGES}, "fedavg": {"": "FedAvg", "no momentum": "FedAvg, no momentum"}}
    curves = [(m, v, name) for m, variants in shown.items() for v, name in variants.items()]
    for index, (method, variant, name) in enumerate(curves):
        cell = cells.get(("1 label", method, variant))
        if cell:
            colour = COLOURS[index] if method == "scaffold" else GREY
            style = "--" if variant in STARTS and variant else ":" if method == "fedavg" and variant else "-"
            accuracies, norms = ([float(value) for value in cell[0][key].split()] for key in ("accuracies", "norms"))
            rounds = range(1, len(accuracies) + 1)
            left.plot(rounds, accuracies, style, color=colour, linewidth=1.5, label=name)
            right.plot(rounds, norms, style, color=colour, linewidth=1.5)
    left.axhline(0.1, color=GREY, linewidth=0.8, linestyle=":")
    left.set_title("one label a client", loc="left", fontweight="bold")
    left.set_ylabel("test accuracy")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    right.set_yscale("log")
    right.set_ylim(5, 1e4)
    right.set_ylabel("norm of the model")
    for axis in (left, right):
        axis.set_xlabel("round")
    figure.savefig(path)
