"""Flower's strategies. Its clients' training is their user's: plain steps here, with what its documentation adds."""

import functools
import logging
from types import SimpleNamespace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.conformance.side import Side, local_descent
from benchmarks.worker import serve

ADAPTIVE = "fedadam", "fedyogi", "fedadagrad"


class Flower:
    def make(self, algorithm, problem, hyper):
        # Each participant is asked by name, as if it had been drawn.
        keep = {"fraction_train": 1.0, "min_train_nodes": 1, "min_available_nodes": 1}
        strategies = {
            "fedavg": lambda: strategy.FedAvg(**keep),
            "fedprox": lambda: strategy.FedProx(proximal_mu=hyper["mu"], **keep),
            "fedavgm": lambda: strategy.FedAvgM(
                server_learning_rate=hyper["server_lrate"], server_momentum=hyper["server_momentum"], **keep
            ),
            "fedadam": lambda: strategy.FedAdam(
                eta=hyper["server_lrate"], beta_1=hyper["beta_1"], beta_2=hyper["beta_2"], tau=hyper["tau"], **keep
            ),
            "fedyogi": lambda: strategy.FedYogi(
                eta=hyper["server_lrate"], beta_1=hyper["beta_1"], beta_2=hyper["beta_2"], tau=hyper["tau"], **keep
            ),
            "fedadagrad": lambda: strategy.FedAdagrad(eta=hyper["server_lrate"], tau=hyper["tau"], **keep),
            "median": lambda: strategy.FedMedian(**keep),
            "trimmed-mean": lambda: strategy.FedTrimmedAvg(beta=hyper["beta"], **keep),
            "krum": lambda: strategy.Krum(num_malicious_nodes=int(hyper["byzantine"]), **keep),
            "multi-krum": lambda: strategy.MultiKrum(
                num_malicious_nodes=int(hyper["byzantine"]), num_nodes_to_select=int(hyper["chosen"]), **keep
            ),
        }
        if hyper.get("server_lrate", 1.0) != 1 and algorithm not in (*ADAPTIVE, "fedavgm"):
            raise NotImplementedError("the strategy has no server's rate")
        params = ArrayRecord({"w": Array(np.float32(problem.start))})
        return SimpleNamespace(
            problem=problem, hyper=hyper, algorithm=algorithm, strategy=strategies[algorithm](), arrays=params, round=0
        )

    def round(self, run, plan):
        # Rounds count from 1, as in `Strategy.start`.
        run.round += 1
        grid = SimpleNamespace(get_node_ids=lambda: list(plan.participants))
        messages = run.strategy.configure_train(run.round, run.arrays, ConfigRecord(), grid)
        replies = [self.reply(run, plan, message) for message in messages]
        run.arrays, _ = run.strategy.aggregate_train(run.round, replies)
        return run

    def reply(self, run, plan, message):
        client = message.metadata.dst_node_id
        if client in plan.dropped:
            return Message(Error(code=0, reason="lost"), reply_to=message)
        x = message.content["arrays"]["w"].numpy()
        pull = None
        if run.algorithm == "fedprox":
            pull = functools.partial(as_documented, x, message.content["config"]["proximal-mu"])
        momentum = run.hyper.get("momentum", 0.0)
        y = local_descent(run.problem, client, x, plan.steps[client], run.hyper["lrate"], momentum, pull)
        metrics = MetricRecord({"num-examples": int(run.problem.weights[client])})
        content = RecordDict({"arrays": ArrayRecord({"w": Array(y)}), "metrics": metrics})
        return Message(content, reply_to=message)

    def params(self, run):
        return run.arrays["w"].numpy()


def as_documented(x, mu, y):
    """Return the gradient of the term that the docstring of `FedProx` adds to the loss, mu / 2 times a norm."""
    distance = np.linalg.norm(y - x)
    return np.float32(mu / 2) * (y - x) / distance if distance > 0 else 0


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    # What a server's process would have been told, for its messages' headers.
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    serve(Side(Flower(), "flwr"))
