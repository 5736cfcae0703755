"""Between peers that exchange messages, every method has the numbers of the simulation."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import Client, Federation, Server
from functional_optimodules.modules.personal import ditto_loss

NAMES = [f"client-{number}" for number in range(8)]
ROUNDS = 4


def documented_methods():
    """Return every configuration of the page on algorithms, with its problem."""
    page = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text()
    source = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    problem = {}
    exec(source[: source.index("for name, options in methods.items()")], problem)
    return problem


PROBLEM = documented_methods()
QUICK = ["FedAvg", "SCAFFOLD", "Mime", "FedPer"]
MORE = {
    "Ditto": {
        "client": fo.Optimizer(0.05, regularizers=[("ditto", {"alpha": 0.1})]),
        "local": ["personal/**"],
    },
    "clients with noise of their own": {
        "client": fo.Optimizer(0.05, modules=[("gaussian-noise", {"std": 0.1, "seed": 3})]),
    },
    "a model of each client's own": {
        "client": fo.Optimizer(0.05, regularizers=[("fedprox", {"alpha": 0.1})], modules=["adam"]),
        "local": ["body/**"],
        "weighting": "examples",
    },
    "rates by round, momentum that is kept, two packed leaves": {
        "client": fo.Optimizer(
            ("inverse-scaling", {"base": 0.1, "rate": 0.5, "step_level": False}), modules=["momentum"]
        ),
        "epochs": 2,
    },
}


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in (*PROBLEM["methods"], *MORE)],
)
def test_a_method_between_peers_has_the_numbers_of_the_simulation(method):
    options = (PROBLEM["methods"] | MORE)[method]
    loss, params = PROBLEM["loss"], PROBLEM["params"]
    if method == "Ditto":
        loss, params = ditto_loss(loss), {"shared": params, "personal": params}
    federation = Federation(loss, **({"client": fo.Optimizer(0.05)} | {"batch_size": 12} | options))
    data = PROBLEM["data"]
    examples = [{"x": x, "y": y} for x, y in zip(PROBLEM["inputs"], PROBLEM["targets"], strict=True)]
    simulated = federation.init(params, data, seed=1)
    server = Server(federation, params, NAMES, seed=1)
    clients = [Client(federation, *each) for each in zip(NAMES, examples, strict=True)]
    one_round = jax.jit(federation.round)
    rng = np.random.default_rng(0)
    everyone = method in ("Scaffnew",)
    for number in range(ROUNDS):
        chosen = rng.permutation(8) if everyone else rng.choice(8, 6, replace=False)
        dropped = np.arange(len(chosen)) == number
        simulated, expected = one_round(simulated, data, jnp.asarray(chosen), dropped=dropped)
        found = None
        while found is None:
            for name, message in server.broadcast([NAMES[index] for index in chosen]).items():
                client = clients[NAMES.index(name)]
                client.begin(message.to_bytes() if number % 2 else message.to_json())
                report = client.report()
                if name != NAMES[chosen[number]]:  # the report of one is lost in each round
                    server.receive(name, report.to_json() if number % 2 else report.to_bytes())
            found = server.finish_round()
        assert found.keys() >= expected.keys()
        for name in expected:
            if name not in ("finite", "loss", "examples") and not name.startswith(("client/", "uplink/")):
                np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found["loss"][~dropped], expected["loss"][~dropped], rtol=1e-5)
        for new, old in zip(jax.tree.leaves(server.params), jax.tree.leaves(simulated.params), strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)
    model = clients[chosen[0]].model()
    assert jax.tree.structure(model) == jax.tree.structure(params)
