"""A mesh of clients and of devices that share a model; and rounds compiled for TPUs that are only described.

The latter need the compiler for TPUs, on Linux and x86, which `make test` installs, and are skipped without.
"""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import functional_optimodules as fo
from benchmarks.scale.exchanges import members
from functional_optimodules.federated import FederatedData, Federation, clients_mesh
from functional_optimodules.federated.execution import chunk_size
from functional_optimodules.federated.placement import device_of
from functional_optimodules.packing.policy import platform_of

ROOT = Path(__file__).parents[2]
LIBTPU = Path(sys.prefix, "libtpu")  # where `make test` puts it
TPU = (
    pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="libtpu is for Linux on x86"),
    pytest.mark.skipif(
        not LIBTPU.exists() and importlib.util.find_spec("libtpu") is None,
        reason="the compiler for TPUs is not installed: `make test` does that",
    ),
)


def tpu(test: Any) -> Any:
    for mark in TPU:
        test = mark(test)
    return test


def decides_by_its_own_platform() -> None:
    """Run in a process whose default backend is the CPU, and which knows of chips that are described."""
    from benchmarks.scale.topology_worker import Case, lower, make_mesh

    mesh = make_mesh((2, 2), 1)
    assert (jax.default_backend(), device_of(mesh).platform) == ("cpu", "tpu")
    small = {"w": jax.ShapeDtypeStruct((100, 10), np.float32)}
    assert (chunk_size(mesh, 1000, small, True), chunk_size(None, 1000, small, True)) == (250, 10)
    described = jax.ShapeDtypeStruct((3,), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    assert platform_of({"here": jnp.ones(3), "there": described}) == "tpu"
    # Biases are packed on a TPU, and matrices of that size are not.
    shapes = {f"layer_{index}/{shape}": shape for index in range(4) for shape in ((64, 64), (64,))}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    found = {}
    for name, mapping in (("tpu", mesh), ("cpu", None)):
        federation = Federation(loss, fo.Optimizer(0.1), batch_size=4, mapping=mapping)
        state = jax.eval_shape(lambda tree, federation=federation: federation.init(tree, 100), params)
        found[name] = len(state.packing.large)
    assert found == {"tpu": 4, "cpu": 0}, found
    # What is written for CPUs, a gradient with its long axis last and slices at offsets from a branch, is not there.
    lowered, _ = lower(Case(chips=(2, 2), method="fedavg", clients=100, participants=100))
    assert not re.search(r"optimization_barrier %\w+ : tensor<(\d+x)*10x64xf32>", lowered.as_text())


@pytest.mark.slow
@tpu
def test_a_mesh_of_another_backend_than_the_default_one_decides_by_its_own_platform() -> None:
    job = "from federated.test_topology import decides_by_its_own_platform as job; job()"
    in_process("-c", f"import benchmarks.chips; {job}")


@pytest.mark.slow
@tpu
def test_a_round_on_four_chips_has_one_all_reduce_and_no_other_collective() -> None:
    cases = [
        {"chips": [2, 2], "clients": 100, "participants": 20, "method": method, "rounds": rounds}
        for method in ("fedavg", "scaffold")
        for rounds in (0, 10)
    ]
    for case, found in zip(cases, compiled(cases), strict=True):
        assert found["collectives"] == {"all-reduce": 1}, case


# 2,048 of 10,240 clients of 100 examples, in batches of 20, on 256 chips.
SMALL = {"chips": [16, 16], "clients": 10_240, "participants": 2048, "examples": 100, "batch": 20}
LARGE = {"chips": [16, 16], "model": "large", "group": 16, "clients": 1024, "participants": 256}


def in_process(*command: str, given: str = "", flags: str = "") -> str:
    """Run a Python process, whose platform is its own to choose, and return what it prints."""
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), str(LIBTPU), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"}
    started = [sys.executable, *command]
    done = subprocess.run(started, input=given, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(cases: list[Any]) -> list[Any]:
    """Return what the compiler for TPUs says of rounds."""
    lines = "".join(f"{json.dumps(('compile', case))}\n" for case in cases)
    return [json.loads(line) for line in in_process("-m", "benchmarks.scale.topology_worker", given=lines).splitlines()]


@pytest.mark.slow
@tpu
def test_a_round_on_256_chips_has_one_all_reduce_and_little_temporary_memory() -> None:
    cases = [{**SMALL, "method": method, "rounds": rounds} for method in ("fedavg", "scaffold") for rounds in (0, 10)]
    for case, found in zip(cases, compiled(cases), strict=True):
        # The program of ten rounds is a loop, whose body holds that of each.
        assert found["collectives"] == {"all-reduce": 1}, case
        # The rows of the eight clients that a chip runs at once, as they are kept and as they are used.
        rows = 2 * 8 * 4 * 50_890 if case["method"] == "scaffold" else 0
        assert found["temporary"] < max(1.6e6, rows), case


@pytest.mark.slow
@tpu
def test_the_bank_of_a_million_clients_is_not_copied() -> None:
    case = {"chips": [16, 16], "method": "scaffold", "clients": 1_000_000, "participants": 2048}
    (found,) = compiled([case])
    bank, data = 4 * 50_890 * 1_000_000 / 256, 4 * 20 * 785 * 1_000_000 / 256
    assert found["arguments"] > bank
    # The data is copied once, in bfloat16.
    assert found["temporary"] < 0.6 * data + 20e6


@pytest.mark.slow
@tpu
def test_a_large_model_is_split_over_groups_of_chips_and_never_whole_on_one() -> None:
    share = 4 * 101e6 / 16
    rows = {"fedavg": 0, "scaffold": 1024 // 16}
    cases = [{**LARGE, "method": method} for method in rows]
    for case, found in zip(cases, compiled(cases), strict=True):
        assert found["collectives"].pop("all-reduce within a group") > 0, case
        assert found["collectives"] == {"all-reduce": 1}, case
        # The model, and for SCAFFOLD the server's variate and the bank's rows; activations, and some copies of a model.
        assert found["arguments"] < (2 + rows[case["method"]]) * 1.1 * share, case
        assert found["temporary"] < 10 * share, case


SPLIT = {"up": PartitionSpec(None, "model"), "bias": PartitionSpec("model"), "down": PartitionSpec("model")}


def start() -> Any:
    rng = np.random.default_rng(1)
    shapes = {"up": (8, 16), "bias": (16,), "down": (16, 8), "scale": ()}
    return {name: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32) for name, shape in shapes.items()}


def loss(params: Any, batch: Any) -> Any:
    hidden = jax.nn.gelu(batch @ params["up"] + params["bias"]) @ params["down"]
    return jnp.mean((params["scale"] * batch + hidden - jnp.roll(batch, 1, axis=-1)) ** 2, axis=-1)


def train(mesh: Any, params: Any) -> Any:
    """Some rounds of SCAFFOLD, saved in between and evaluated: what comes of them, the first state, and its program."""
    rng = np.random.default_rng(0)
    clients = [rng.normal(size=(n, 8)).astype(np.float32) + n / 9 for n in (3, 9, 4, 12, 6, 2, 8, 5, 7, 10)]
    data = FederatedData.from_clients(clients, mesh)
    client = fo.Optimizer(0.05, modules=["scaffold-client", "momentum"])
    server = fo.Optimizer(0.7, modules=[("scaffold-server", {"num_clients": 10}), "momentum"])
    federation = Federation(loss, client, server, batch_size=4, weighting="examples", mapping=mesh)
    state = federation.init(params, data, seed=3)
    program = jax.jit(lambda s, d: federation.run(s, d, 2, participants=6)).lower(state, data).compile()
    state, history = program(state, data)
    saved = json.loads(json.dumps(federation.encode(state), allow_nan=False))
    after, more = program(federation.decode(saved, state), data)
    each = federation.evaluate(after.params, data)
    return jax.device_get((after.params, history, more, each)), state, program.as_text()


def on_two_axes() -> None:
    """Run in a process of eight devices."""
    devices = np.array(jax.devices())
    expected, _, _ = train(clients_mesh(devices[:4]), start())
    mesh = Mesh(devices.reshape(4, 2), ("clients", "model"), axis_types=(AxisType.Auto,) * 2)
    split = {name: jax.device_put(start()[name], NamedSharding(mesh, spec)) for name, spec in SPLIT.items()}
    found, state, text = train(mesh, start() | split)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)
    shards = {name: leaf.addressable_shards[0].data.shape for name, leaf in state.params.items()}
    assert shards == {"up": (8, 8), "bias": (8,), "down": (8, 8), "scale": ()}, shards
    rows = {leaf.addressable_shards[0].data.shape for leaf in state.bank}
    assert rows == {(3, 8, 8), (3, 8), (3,)}, rows
    groups = {tuple(map(tuple, members(line) or ())) for line in text.splitlines() if " all-reduce(" in line}
    assert groups == {((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))}, groups


@pytest.mark.slow
def test_a_model_split_along_a_second_axis_comes_to_the_same_and_stays_split() -> None:
    code = "from federated.test_topology import on_two_axes; on_two_axes()"
    in_process("-c", code, flags=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8")


def test_several_processes_take_no_mesh_of_two_axes() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("clients", "model"))
    with pytest.raises(ValueError, match=r"a mesh has one axis, 'clients', and not \('clients', 'model'\)"):
        FederatedData.from_local({0: np.zeros((2, 8), np.float32)}, mesh)
