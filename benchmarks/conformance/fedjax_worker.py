"""FedJAX's algorithms."""

from types import SimpleNamespace

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import fed_avg, fed_prox, mime, mime_lite

from benchmarks.conformance.side import Side
from benchmarks.worker import serve

MASK = fedjax.EXAMPLE_MASK_KEY
# How batches are made is decided by `Client`.
TRAIN, GRADIENTS = fedjax.ShuffleRepeatBatchHParams(batch_size=1), fedjax.PaddedBatchHParams(batch_size=1)


class Client:
    """A client's data, as the algorithms use a `ClientDataset`: so many steps, their batches in order."""

    def __init__(self, problem, client, steps):
        self.problem, self.client, self.steps = problem, client, steps

    def __len__(self):
        return int(self.problem.weights[self.client])

    def batch(self, index):
        centre = self.problem.centres[self.client, index % self.problem.num_batches]
        curvature = self.problem.curvatures[self.client]
        return {"centre": np.float32(centre)[None], "curvature": np.float32(curvature)[None]}

    def shuffle_repeat_batch(self, hparams):
        return [self.batch(step) for step in range(self.steps)]

    def padded_batch(self, hparams):
        return [{**self.batch(index), MASK: np.array([True])} for index in range(self.problem.num_batches)]


def losses(params, batch, key):
    away = params - batch["centre"]
    return jnp.einsum("bd,bde,be->b", away, batch["curvature"], away) / 2


gradient = fedjax.grad(losses)


class FedJAX:
    def __init__(self):
        self.made = {}

    def make(self, algorithm, problem, hyper):
        # Each one made compiles its steps anew.
        key = algorithm, *hyper.items()
        if key not in self.made:
            self.made[key] = self.algorithm(algorithm, hyper)
        made = self.made[key]
        return SimpleNamespace(
            problem=problem, algorithm=made, state=made.init(jnp.asarray(problem.start, jnp.float32))
        )

    def algorithm(self, algorithm, hyper):
        client = fedjax.optimizers.sgd(hyper["lrate"])
        rate = hyper.get("server_lrate", 1.0)
        # On the server, optax's optimizers, as near to the paper's as their options come.
        servers = {
            "fedavgm": lambda: fedjax.optimizers.sgd(rate, momentum=hyper["server_momentum"]),
            "fedadam": lambda: fedjax.optimizers.adam(rate, hyper["beta_1"], hyper["beta_2"], hyper["tau"]),
            "fedyogi": lambda: fedjax.optimizers.yogi(rate, hyper["beta_1"], hyper["beta_2"], hyper["tau"]),
            "fedadagrad": lambda: fedjax.optimizers.adagrad(rate, hyper["tau"] ** 2, hyper["tau"]),
        }
        server = servers.get(algorithm, lambda: fedjax.optimizers.sgd(rate))()
        if algorithm == "fedprox":
            return fed_prox.fed_prox(losses, client, server, TRAIN, hyper["mu"])
        if algorithm in ("mime", "mimelite"):
            # Momentum of the form that the paper's base algorithm has.
            base = fedjax.optimizers.create_optimizer_from_optax(averaged_momentum(hyper["lrate"], hyper["momentum"]))
            make = mime.mime if algorithm == "mime" else mime_lite.mime_lite
            return make(losses, base, TRAIN, GRADIENTS, rate)
        if hyper.get("momentum"):
            client = fedjax.optimizers.sgd(hyper["lrate"], momentum=hyper["momentum"])
        return fed_avg.federated_averaging(gradient, client, server, TRAIN)

    def round(self, run, plan):
        keys = jax.random.split(jax.random.PRNGKey(0), len(plan.arrived))
        clients = [
            (str(client), Client(run.problem, client, plan.steps[client]), key)
            for client, key in zip(plan.arrived, keys)  # noqa: B905
        ]
        run.state, _ = run.algorithm.apply(run.state, clients)
        return run

    def params(self, run):
        return np.asarray(run.state.params)


def averaged_momentum(lrate, beta):
    """Return m = beta m + (1 - beta) g, and steps of -lrate m, of optax's parts."""
    import optax

    return optax.chain(optax.ema(beta, debias=False), optax.scale(-lrate))


if __name__ == "__main__":
    serve(Side(FedJAX(), "fedjax", "jax", "optax"))
