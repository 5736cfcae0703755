"""declearn's optimizers and aggregator, put together as its server and its clients do, without a network."""

from types import SimpleNamespace

import numpy as np
from declearn.aggregator import AveragingAggregator
from declearn.model.sklearn import NumpyVector
from declearn.optimizer import Optimizer

from benchmarks.conformance.side import Side
from benchmarks.worker import serve


class Model:
    """All that an optimizer asks of a model."""

    def __init__(self, weights):
        self.weights = NumpyVector({"w": np.float32(weights)})

    def get_weights(self, trainable=True):
        return self.weights

    def apply_updates(self, updates):
        self.weights = self.weights + updates


class Declearn:
    def make(self, algorithm, problem, hyper):
        if len(set(problem.weights)) > 1:
            raise NotImplementedError("the mean is by steps, or all count alike")
        modules, server, regularizers = [], [], []
        if hyper.get("momentum"):
            modules = [("momentum", {"beta": hyper["momentum"], "round_reset": True})]
        if algorithm == "fedprox":
            regularizers = [("fedprox", {"alpha": hyper["mu"]})]
        if algorithm == "scaffold":
            modules, server = ["scaffold-client"], ["scaffold-server"]
        clients = range(problem.num_clients)
        return SimpleNamespace(
            problem=problem,
            model=Model(problem.start),
            # By default the mean is weighted by steps; the papers' is not.
            aggregator=AveragingAggregator(steps_weighted=False),
            server=Optimizer(hyper["server_lrate"], modules=server),
            clients=[Optimizer(hyper["lrate"], regularizers=regularizers, modules=modules) for _ in clients],
        )

    def round(self, run, plan):
        broadcast, results = run.server.collect_aux_var(), []
        for client in plan.participants:
            reply = self.train(run, client, plan.steps[client], broadcast)
            if client not in plan.dropped:
                results.append(reply)
        aux = {}
        for _, sent in results:
            for name, variables in sent.items():
                aux[name] = aux.get(name, 0) + variables
        run.server.process_aux_var(aux)
        run.server.apply_gradients(run.model, run.aggregator.finalize_updates(sum(updates for updates, _ in results)))
        return run

    def train(self, run, client, steps, broadcast):
        optimizer, model = run.clients[client], Model(run.model.weights.coefs["w"])
        optimizer.process_aux_var(broadcast)
        optimizer.start_round()
        for step in range(steps):
            gradient = run.problem.gradient(client, model.weights.coefs["w"], step)
            optimizer.apply_gradients(model, NumpyVector({"w": np.float32(gradient)}))
        updates = run.aggregator.prepare_for_sharing(run.model.weights - model.weights, steps)
        return updates, optimizer.collect_aux_var()

    def params(self, run):
        return run.model.weights.coefs["w"]

    def variates(self, run):
        """Return SCAFFOLD's: what the server would send, and what the clients keep."""

        def array(value):
            return value.coefs["w"] if isinstance(value, NumpyVector) else np.zeros_like(self.params(run))

        sent = run.server.collect_aux_var()["scaffold"].state
        return {"c": array(sent), "c_i": np.array([array(each.modules[0].state) for each in run.clients])}


if __name__ == "__main__":
    serve(Side(Declearn(), "declearn"))
