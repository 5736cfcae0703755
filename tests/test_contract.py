"""The contract suite over every registered plug-in, and over optimizers made of them."""

import pytest

from functional_optimodules import (
    ExponentialDecay,
    Optimizer,
    list_optim_modules,
    list_optim_regularizers,
    list_rate_schedulers,
)
from functional_optimodules.federated.aggregation import list_aggregators
from functional_optimodules.testing import contract, instances

PLUGINS = {**list_optim_modules(), **list_optim_regularizers(), **list_rate_schedulers(), **list_aggregators()}

CLIENT = Optimizer(
    ("warmup", {"base": ("cosine-annealing", {"base": 0.01, "max_lr": 0.5, "duration": 4}), "warmup": 2}),
    ExponentialDecay(0.1, 0.5, step_level=False),
    ["fedprox", "lasso", "ridge"],
    [
        "scaffold-client",
        ("l2-global-clipping", {"max_norm": 0.5}),
        ("gaussian-noise", {"std": 0.1, "safe_mode": False}),
        ("momentum", {"round_reset": True}),
        ("adam", {"amsgrad": True}),
        ("optax", {"transform": "lion"}),
    ],
)
SERVER = Optimizer(1.0, modules=["scaffold-server", "yogi-momentum"])

CHECKS = {
    f"{name}-{label}": check
    for name, plugin in {**PLUGINS, "client-optimizer": CLIENT, "server-optimizer": SERVER}.items()
    for label, check in contract(plugin)
}
# One instance of each class is for the inner loop, with each check.
OTHERS = {f"-{label}" for cls in PLUGINS.values() for label in list(instances(cls))[1:]}


@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith(tuple(OTHERS))) for name in CHECKS]
)
def test_plugin_keeps_the_contract(check):
    CHECKS[check]()
