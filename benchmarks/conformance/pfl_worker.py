"""pfl-research's algorithms, on its PyTorch models."""

import contextlib
from types import SimpleNamespace

import numpy as np
import torch
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.algorithm.fedprox import FedProx, FedProxParams
from pfl.algorithm.scaffold import SCAFFOLD, SCAFFOLDParams
from pfl.context import UserContext
from pfl.data.dataset import Dataset
from pfl.data.user_state import InMemoryUserStateStorage
from pfl.exception import UserNotFoundError
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from benchmarks.conformance.side import Side
from benchmarks.worker import serve


class Steps(Dataset):
    """A user's data, in an epoch of which it takes so many steps, their batches in order."""

    def __init__(self, problem, client, steps):
        super().__init__([problem.centres[client]], user_id=str(client))
        self.curvature, self.centres = np.float32(problem.curvatures[client]), np.float32(problem.centres[client])
        self.steps = steps

    def __len__(self):
        return self.steps

    def iter(self, batch_size):
        if batch_size is None:
            yield [self.curvature, self.centres]
            return
        for step in range(self.steps):
            yield [self.curvature, self.centres[step % len(self.centres)][None]]


class Quadratic(torch.nn.Module):
    def __init__(self, start):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))

    def loss(self, curvature, centres):
        away = self.w - centres
        return torch.einsum("bd,de,be->b", away, curvature, away).mean() / 2

    def metrics(self, curvature, centres):
        return {}


class PFL:
    def make(self, algorithm, problem, hyper):
        if algorithm.startswith("scaffold") and len(set(problem.weights)) > 1:
            raise NotImplementedError("clients count alike")
        module = Quadratic(problem.start)

        def local(parameters, lr):
            return torch.optim.SGD(parameters, lr=lr, momentum=hyper.get("momentum", 0.0))

        model = PyTorchModel(module, local, torch.optim.SGD(module.parameters(), lr=hyper["server_lrate"]))
        kinds = {"fedavg": FederatedAveraging, "fedprox": FedProx}
        return SimpleNamespace(
            name=algorithm,
            problem=problem,
            hyper=hyper,
            model=model,
            algorithm=kinds.get(algorithm, SCAFFOLD)(),
            storage=InMemoryUserStateStorage(),
            iteration=0,
        )

    def settings(self, run, cohort):
        common = {
            "central_num_iterations": 10**9,
            "evaluation_frequency": 10**9,
            "train_cohort_size": cohort,
            "val_cohort_size": None,
        }
        if run.name == "fedavg":
            return NNAlgorithmParams(**common)
        if run.name == "fedprox":
            return FedProxParams(mu=run.hyper["mu"], **common)
        return SCAFFOLDParams(
            population=run.problem.num_clients,
            use_gradient_as_control_variate=run.name == "scaffold-option-1",
            user_state_storage=run.storage,
            **common,
        )

    def round(self, run, plan):
        """Do what `FederatedAlgorithm.run` does in an iteration, with a cohort that is given."""
        train = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=run.hyper["lrate"], local_batch_size=1)
        settings = self.settings(run, len(plan.arrived))
        contexts, run.model, _ = run.algorithm.get_next_central_contexts(run.model, run.iteration, settings, train)
        # Models are evaluated in iteration 0 whatever is asked for.
        context = contexts[0].__class__(**{**vars(contexts[0]), "do_evaluation": False})
        total = None
        for client in plan.arrived:
            data = Steps(run.problem, client, plan.steps[client])
            statistics, _ = run.algorithm.simulate_one_user(run.model, data, context)
            user = UserContext(num_datapoints=int(run.problem.weights[client]), seed=None, user_id=str(client))
            statistics, _ = WeightByDatapoints().postprocess_one_user(stats=statistics, user_context=user)
            # What is returned is in the model's own buffers.
            statistics = statistics.apply_elementwise(torch.clone)
            total = statistics if total is None else total + statistics
        run.model, _ = run.algorithm.process_aggregated_statistics(context, Metrics(), run.model, total)
        run.iteration += 1
        return run

    def params(self, run):
        return run.model.pytorch_model.w.detach().numpy()

    def variates(self, run):
        """Return SCAFFOLD's."""
        each = np.zeros((run.problem.num_clients, run.problem.start.size))
        for client in range(len(each)):
            with contextlib.suppress(UserNotFoundError):
                each[client] = run.storage.load_state(str(client), "local_c")["w"].numpy()
        return {"c": run.algorithm._server_c["w"].numpy(), "c_i": each}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Side(PFL(), "pfl", "torch"))
