"""fluke's algorithms."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import torch

if torch.__version__.endswith("+cpu"):
    # The index has torchvision for CUDA alone: without, it lacks operators that it says more of. None is used.
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

from fluke.algorithms import PersonalizedFL
from fluke.algorithms.ditto import Ditto
from fluke.algorithms.fedavg import FedAVG
from fluke.algorithms.fedavgm import FedAVGM
from fluke.algorithms.feddyn import FedDyn
from fluke.algorithms.fedexp import FedExP
from fluke.algorithms.fednova import FedNova
from fluke.algorithms.fedopt import FedOpt
from fluke.algorithms.fedprox import FedProx
from fluke.algorithms.scaffold import SCAFFOLD
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader

from benchmarks.conformance.side import Side
from benchmarks.worker import serve

SIZE = 3
ALGORITHMS = {
    "fedavg": FedAVG,
    "fedprox": FedProx,
    "fednova": FedNova,
    "fedexp": FedExP,
    "ditto": Ditto,
    "fedavgm": FedAVGM,
    "fedadam": FedOpt,
    "fedyogi": FedOpt,
    "fedadagrad": FedOpt,
    "scaffold": SCAFFOLD,
    "feddyn": FedDyn,
}
ADAPTIVE = {"fedadam": "adam", "fedyogi": "yogi", "fedadagrad": "adagrad"}


class Steps(FastDataLoader):
    """A client's data, in an epoch of which it takes so many steps, their batches in order."""

    def __init__(self, problem, client):
        # As many rows as its weight says.
        rows = torch.zeros(int(problem.weights[client]), 1)
        super().__init__(rows, rows, num_labels=1, batch_size=1)
        curvature = problem.curvatures[client].ravel()
        batches = [np.concatenate([curvature, centre]) for centre in problem.centres[client]]
        self.batches = torch.tensor(np.array(batches), dtype=torch.float32)

    def __iter__(self):
        for step in range(self.n_batches):
            row = self.batches[step % len(self.batches)]
            yield row, row


class Quadratic(torch.nn.Module):
    """A model whose output is its loss."""

    def __init__(self, start):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))

    def forward(self, row):
        away = self.w - row[-SIZE:]
        return away @ row[:-SIZE].reshape(SIZE, SIZE) @ away / 2


def output(value, _):
    return value


class Fluke:
    # What is no option of it, and is another number in the oracle's default.
    fixed = {"fedexp": {"eps": 1e-4}}  # noqa: RUF012

    def make(self, algorithm, problem, hyper):
        rate, client, server = hyper.get("server_lrate", 1.0), {}, {"weighted": True}
        if algorithm in ADAPTIVE:
            # For FedAdagrad, what it does not read stays as it is.
            betas = {"beta1": hyper["beta_1"], "beta2": hyper.get("beta_2", 0.999)}
            server |= {"mode": ADAPTIVE[algorithm], "lr": rate, "tau": hyper["tau"], **betas}
        elif algorithm == "fedavgm":
            if rate != 1:
                raise NotImplementedError("the server has no rate")
            server |= {"momentum": hyper["server_momentum"]}
        elif algorithm == "scaffold":
            server |= {"global_step": rate}
        elif algorithm == "feddyn":
            client, server = {"alpha": hyper["alpha"], "clipping": 0}, {**server, "alpha": hyper["alpha"]}
        elif rate != 1:
            server |= {"lr": rate}
        if hyper.get("mu"):
            if algorithm == "fednova":
                raise NotImplementedError("there is no proximal term")
            client |= {"mu": hyper["mu"]}
        if algorithm == "ditto":
            client |= {"lam": hyper["lam"], "tau": 1}
        sgd = {"lr": hyper["lrate"], "momentum": hyper.get("momentum", 0.0)}
        return self.build(ALGORITHMS[algorithm], problem, sgd, client, server)

    def build(self, kind, problem, sgd, client, server):
        model = Quadratic(problem.start)
        if issubclass(kind, PersonalizedFL):
            client, sgd = {**client, "model": model}, {"lr": sgd["lr"]}
        clients = [
            kind.get_client_class(None)(
                index=index,
                train_set=Steps(problem, index),
                test_set=None,
                optimizer_cfg=OptimizerConfigurator({"name": "SGD", **sgd}),
                loss_fn=output,
                local_epochs=1,
                **deepcopy(client),
            )
            for index in range(problem.num_clients)
        ]
        server = kind.get_server_class(None)(model=model, test_set=None, clients=clients, **server)
        algorithm = kind(len(clients), None, None, clients=clients, server=server)
        algorithm._round_zero()
        return SimpleNamespace(algorithm=algorithm, round=0)

    def round(self, run, plan):
        """Do what `CentralizedFL.run` does in a round, with participants that are given."""
        run.round += 1
        server = run.algorithm.server
        clients = [run.algorithm.clients[index] for index in plan.arrived]
        server.broadcast_model(clients)
        for client in clients:
            client.train_set.n_batches = plan.steps[client.index]
            client.local_update(run.round)
        server.aggregate(clients, server.receive_client_models(clients, state_dict=False))
        return run

    def params(self, run):
        server = run.algorithm.server
        # FedDyn has two models: this is what clients start from.
        return getattr(server, "cld_mdl", server.model).w.detach().numpy()

    def variates(self, run):
        """Return what is comparable of what it keeps."""
        clients, server = run.algorithm.clients, run.algorithm.server
        if hasattr(clients[0], "personalized_model"):
            return {"personal": np.array([client.personalized_model.w.detach().numpy() for client in clients])}
        if not hasattr(server, "control"):
            raise NotImplementedError("it keeps no such variates")
        zero = {"w": torch.zeros(SIZE)}
        return {
            "c": server.control["w"].numpy(),
            "c_i": np.array([(client.control or zero)["w"].numpy() for client in clients]),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Side(Fluke(), "fluke-fl", "torch"))
