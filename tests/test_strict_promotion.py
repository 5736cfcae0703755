"""Where JAX promotes nothing by itself, and has 64 bits, every brick and aggregation takes every dtype.

Both are settings of the process: this file is also the program that the test runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.federated.aggregation import Aggregator
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.testing.instances import instances
from functional_optimodules.testing.trees import known

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


def trees():
    yield from ((dtype, {"a": jnp.ones((2, 3), dtype), "b": jnp.ones(3, dtype)}) for dtype in DTYPES)
    yield "one of each", {dtype: jnp.ones((2, 3), dtype) for dtype in DTYPES}


def whole_round(brick, params):
    """Take a brick through all of its pure methods but `process`, and return its updates."""
    state = brick.begin_round(brick.init(params), params)
    updates, state = brick.update(params, state, params, **known(brick.asks().step, params))
    state = brick.end_round(state, **known(brick.asks().end, params))
    brick.metrics(state), brick.share(params, brick.commit(state))
    sent = brick.collect(state)
    return updates, brick.process(sent, state) if type(sent) is brick.receives else state


def bricks():
    for cls in (*fo.list_optim_modules().values(), *fo.list_optim_regularizers().values()):
        for label, brick in instances(cls).items():
            if label.startswith(("default", "all-changed", "example")):
                yield brick
    for cls in fo.list_rate_schedulers().values():
        for scheduler in instances(cls).values():
            yield fo.Optimizer(scheduler, scheduler, ["ridge"], ["momentum"])


def faults():
    for brick in bricks():
        for name, params in trees():
            try:
                with shapes_only():
                    updates, _ = jax.eval_shape(lambda tree, brick=brick: whole_round(brick, tree), params)
            except Exception as error:
                yield f"{brick} over {name}: {type(error).__name__}: {str(error).splitlines()[0]}"
            else:
                if [leaf.dtype for leaf in jax.tree.leaves(updates)] != [p.dtype for p in jax.tree.leaves(params)]:
                    yield f"{brick} over {name} gives {updates}"


def rounds():
    """Yield a federation for each aggregation, with its data."""
    data = FederatedData.from_clients([{"x": np.ones((4, 3), np.float32)}] * 5)
    for cls in Aggregator._registry.values():
        yield (
            Federation(
                lambda params, batch: batch["x"].sum(axis=1) * abs(params["a"].sum()).astype(batch["x"].dtype),
                fo.Optimizer(0.1, modules=["scaffold-client"]),
                fo.Optimizer(1.0, modules=["scaffold-server"]),
                batch_size=2,
                aggregation=next(iter(instances(cls).values())),
            ),
            data,
        )


def faults_of_rounds():
    for federation, data in rounds():
        for dtype in DTYPES:
            try:
                state = federation.init({"a": jnp.ones(3, dtype)}, data)
                jax.eval_shape(lambda state, data, run=federation.run: run(state, data, 1), state, data)
            except Exception as error:
                yield f"{federation.aggregation} over {dtype}: {type(error).__name__}: {str(error).splitlines()[0]}"


@pytest.mark.slow
def test_nothing_needs_implicit_promotion():
    flags = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "tests.test_strict_promotion"],
        cwd=root,
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "strict float64: 0 faults\n"


if __name__ == "__main__":
    found = [*faults(), *faults_of_rounds()]
    print(*found, sep="\n", end="\n" if found else "")
    print(jax.config.jax_numpy_dtype_promotion, jnp.ones(1).dtype, end=": ")
    print(len(found), "faults")
