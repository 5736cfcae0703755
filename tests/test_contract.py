"""The contract suite over every registered plug-in, and over optimizers made of them."""

import pytest

from functional_optimodules import (
    ExponentialDecay,
    Optimizer,
    list_optim_modules,
    list_optim_regularizers,
    list_rate_schedulers,
    list_wrappers,
)
from functional_optimodules.federated.aggregation import list_aggregators
from functional_optimodules.testing import contract, instances

PLUGINS = {
    **list_optim_modules(),
    **list_optim_regularizers(),
    **list_rate_schedulers(),
    **list_aggregators(),
    **list_wrappers(),
}

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
# One instance of each class is for the inner loop; with the checks that take long, a few classes are.
OTHERS = tuple(f"-{label}" for cls in PLUGINS.values() for label in list(instances(cls))[1:])
FEW = ("adam-", "momentum-", "scaffold-", "fedprox-", "gaussian-noise-", "trimmed-mean-", "ema-")
AROUND = tuple(f"{name}-" for name in list_wrappers())
LONG = (
    "check_containers_are_equal",
    "check_packed_is_as_unpacked",
    "check_who_dropped_out_does_not_count",
    "check_aggregate_is_like_the_deltas",
    "check_aggregate_of_packed_deltas",
    "check_odd_trees",
    "check_half_precision_accumulates_wide",
    "check_gradient_at_zero_is_finite",
    "check_scan_equals_loop",
    "check_vmap_over_clients",
    "check_state_can_be_donated",
    "check_resume_in_mid_round",
    "check_strict_promotion",
    "check_update_is_pure",
    "check_dtypes_are_kept",
    "check_lowered_for_every_platform",
    "check_aggregate_is_lowered_for_every_platform",
)


def is_slow(name: str) -> bool:
    long = any(f"-{check}" in name for check in LONG) or name.startswith(AROUND)
    return name.endswith(OTHERS) or (long and not name.startswith(FEW))


@pytest.mark.parametrize("check", [pytest.param(name, marks=[pytest.mark.slow] * is_slow(name)) for name in CHECKS])
def test_plugin_keeps_the_contract(check):
    CHECKS[check]()
