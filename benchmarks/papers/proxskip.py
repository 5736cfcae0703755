"""ProxSkip, as Scaffnew (Mishchenko et al. 2022): communication by the square root of the condition number.

    python -m benchmarks.papers.proxskip

Logistic regression with an l2 penalty of mu on 20 clients with data of their own, strongly convex: kappa is L / mu,
L the largest smoothness of a client. Clients take full gradients, with a rate of 1 / L, begin at zero, and all take
part; the optimum is found by Newton's method in NumPy. Everything runs in float64.

- Gradient descent: one step a round.
- FedAvg: sqrt(kappa) local steps a round.
- SCAFFOLD: the same. Its own theory allows it a rate of 1 / (81 K L), with which a round would be worth 1/81 of a
  step of gradient descent.
- Scaffnew: after each step a coin of p = 1 / sqrt(kappa), the same for all, says whether they communicate, which is
  after sqrt(kappa) steps on average.

By theory, a round shrinks the squared distance to the optimum by (1 - 1 / kappa)^2 with gradient descent, and a step
of Scaffnew a Lyapunov function that holds it by 1 - 1 / kappa or more, so that a round of it is worth 1 /
sqrt(kappa). The features' scales fall as 1 / j^2: the flattest direction has hardly more curvature than the
penalty's, and the slope that is seen is that of the condition number.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.papers.plots import COLOURS, GREY, panels
from benchmarks.report import parse_arguments, table, write
from functional_optimodules import Optimizer
from functional_optimodules.federated import FederatedData, Federation

CLIENTS, EXAMPLES, INPUTS = 20, 50, 20
KAPPAS = (64, 256, 1024, 4096)
METHODS = ("gradient descent", "FedAvg", "SCAFFOLD", "Scaffnew")
SHOWN = 1024


class Problem:
    """Logistic regression with an l2 penalty, of clients that differ, and its optimum.

    Args:
      kappa: the condition number L / mu.
      seed: the draw of the data.
    """

    def __init__(self, kappa, seed):
        rng = np.random.default_rng(seed)
        scales = np.arange(1, INPUTS + 1) ** -2.0
        self.inputs = (rng.normal(size=(CLIENTS, 1, INPUTS)) + rng.normal(size=(CLIENTS, EXAMPLES, INPUTS))) * scales
        planes = rng.normal(size=(CLIENTS, INPUTS)) / scales**0.5
        margins = np.einsum("cni,ci->cn", self.inputs, planes) + rng.logistic(size=(CLIENTS, EXAMPLES))
        self.labels = np.where(margins > 0, 1.0, -1.0)
        curvature = max(np.linalg.eigvalsh(x.T @ x / (4 * EXAMPLES))[-1] for x in self.inputs)
        self.mu = curvature / (kappa - 1)
        self.smoothness = curvature + self.mu
        self.optimum = self.newton()

    def newton(self):
        """Find the optimum of the clients' mean loss, and check that its gradient is zero."""
        x, y = self.inputs.reshape(-1, INPUTS), self.labels.reshape(-1)
        point = np.zeros(INPUTS)
        for _ in range(30):
            against = 1 / (1 + np.exp(y * (x @ point)))
            gradient = -(x.T @ (y * against)) / len(y) + self.mu * point
            hessian = x.T @ (x * (against * (1 - against))[:, None]) / len(y) + self.mu * np.eye(INPUTS)
            point = point - np.linalg.solve(hessian, gradient)
        if not np.linalg.norm(gradient) < 1e-13:
            raise ArithmeticError(f"Newton's method left a gradient of {np.linalg.norm(gradient)}")
        return point

    def loss(self, params, batch):
        margins = batch["y"] * (batch["x"] @ params)
        return jnp.mean(jax.nn.softplus(-margins)) + self.mu / 2 * jnp.vdot(params, params)

    def run(self, method, steps, rounds):
        """Return the squared distance to the optimum, over that of the start, before the first round and after each."""
        modules = {"SCAFFOLD": ["scaffold-client"], "Scaffnew": [("scaffnew", {"probability": 1 / steps})]}
        server = [("scaffold-server", {"num_clients": CLIENTS})] if method == "SCAFFOLD" else []
        federation = Federation(
            self.loss,
            Optimizer(1 / self.smoothness, modules=modules.get(method, [])),
            Optimizer(1.0, modules=server),
            mapping="vmap",
            **({"coin": 1 / steps} if method == "Scaffnew" else {"steps": steps}),
        )
        clients = [{"x": x, "y": y} for x, y in zip(self.inputs, self.labels, strict=True)]
        data = FederatedData.from_clients(clients)
        whole = np.sum(self.optimum**2)

        def evaluate(params):
            return {"distance": jnp.sum((params - self.optimum) ** 2) / whole}

        run = jax.jit(lambda state: federation.run(state, data, rounds, evaluate=evaluate)[1]["distance"])
        return np.concatenate([[1.0], run(federation.init(jnp.zeros(INPUTS), data))])


def slope(distances):
    """Return by how much the logarithm of the squared distance falls in a round, or `None` where it falls no more.

    Of the rounds until the distance is as small as rounding lets it be, the second half counts.
    """
    small = np.flatnonzero(distances < 1e-24)
    end = small[0] if len(small) else len(distances) - 1
    logs = np.log(distances[end // 2 : end + 1])
    found = float(-np.polyfit(np.arange(len(logs)), logs, 1)[0])
    return found if found * len(logs) > 0.1 else None


def measure(kappas, seed):
    """Return by condition number and method the distances of each round."""
    curves = {}
    for kappa in kappas:
        problem, steps = Problem(kappa, seed), round(kappa**0.5)
        # Until gradient descent is at about 1e-6, and those that are faster at what rounding leaves.
        for method in METHODS:
            rounds = 6 * kappa if method == "gradient descent" else 35 * steps
            curves[kappa, method] = problem.run(method, 1 if method == "gradient descent" else steps, rounds)
            print(kappa, method, rounds, curves[kappa, method][-1], slope(curves[kappa, method]), flush=True)
    return curves


def report(curves, kappas, path):
    slopes = {key: slope(distances) for key, distances in curves.items()}
    rows = []
    for kappa in kappas:
        root = kappa**0.5
        descent, scaffold, scaffnew = (slopes[kappa, method] for method in METHODS if method != "FedAvg")
        rows.append(
            (
                kappa,
                f"{descent:.3g}, {descent * kappa:.2f} / kappa",
                f"none: {curves[kappa, 'FedAvg'][-1]:.2g} remains",
                f"{scaffold:.3g}, {scaffold * root:.2f} / sqrt(kappa)",
                f"{scaffnew:.3g}, {scaffnew * root:.2f} / sqrt(kappa)",
                f"{scaffnew / descent:.1f}",
            )
        )
    logs = np.log(kappas)
    powers = {
        method: np.polyfit(logs, [np.log(slopes[kappa, method]) for kappa in kappas], 1)[0]
        for method in METHODS
        if method != "FedAvg"
    }
    write(
        path.with_suffix(".md"),
        "Rounds by the condition number: ProxSkip",
        [
            f"Logistic regression with an l2 penalty, {CLIENTS} clients of {EXAMPLES} examples, full gradients,",
            "rate 1 / L, sqrt(kappa) local steps a round; p = 1 / sqrt(kappa). By how much the logarithm of the",
            "squared distance to the optimum falls in a round, and what Mishchenko et al. 2022 prove: 2 / kappa for",
            "gradient descent, at least 1 / sqrt(kappa) for Scaffnew.",
        ],
        [
            "## Slopes",
            "",
            *table(("kappa", *METHODS, "Scaffnew / gradient descent"), rows),
            "",
            "The slope goes with kappa to the power of "
            + ", ".join(f"{power:.2f} with {method}" for method, power in powers.items())
            + "; in theory -1 with gradient descent, and -0.5 with Scaffnew.",
            "",
            f"![Distances and slopes]({path.name}.png)",
        ],
        ["## Where this agrees with the paper", "", *READING],
    )
    plot(curves, kappas, slopes, path.with_suffix(".png"))


READING = (
    "- Scaffnew goes to the optimum, linearly, and its slope by rounds follows sqrt(kappa): communication is",
    "  accelerated, though each step is one of plain gradient descent. Its slope is about twice what the theorem",
    "  promises, which bounds a Lyapunov function.",
    "- FedAvg with as many local steps stops far off the optimum, whatever the rounds.",
    "- SCAFFOLD with the same rate and number of steps is as fast here, of which the paper has no proof: SCAFFOLD's",
    "  own theory allows 1 / (81 K L), at which it is 81 times slower than gradient descent.",
)


def plot(curves, kappas, slopes, path):
    figure, ((left, right),) = panels(1, 2)
    shown = SHOWN if SHOWN in kappas else kappas[-1]
    for method, colour in zip(METHODS, COLOURS, strict=False):
        left.plot(curves[shown, method], color=colour, label=method, linewidth=1.8)
        points = [(kappa, slopes[kappa, method]) for kappa in kappas if slopes[kappa, method]]
        if points:
            right.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4)
    left.set_xlim(0, 35 * shown**0.5)
    left.set_yscale("log")
    left.set_ylim(1e-26, 10)
    left.set_title(f"kappa = {shown}", loc="left", fontweight="bold")
    left.set_xlabel("communication round")
    left.set_ylabel("squared distance to the optimum")
    left.legend(frameon=False, fontsize=8)
    ends = np.array([kappas[0], kappas[-1]], float)
    for theory, style, text in ((1 / ends**0.5, "--", "1 / sqrt(kappa)"), (2 / ends, ":", "2 / kappa")):
        right.plot(ends, theory, style, color=GREY, label=text)
    right.legend(loc="lower left")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xticks(kappas, kappas)
    right.minorticks_off()
    right.set_title("slope, and theory", loc="left", fontweight="bold")
    right.set_xlabel("kappa")
    right.set_ylabel("fall of its logarithm in a round")
    figure.savefig(path)


def main():
    args = parse_arguments(__doc__, kappas=(KAPPAS, "condition numbers"), seed=(0, "draw of the data"))
    jax.config.update("jax_enable_x64", True)
    kappas = sorted(args.kappas)
    curves = measure(kappas, args.seed)
    report(curves, kappas, args.results / "papers" / "proxskip")


if __name__ == "__main__":
    main()
