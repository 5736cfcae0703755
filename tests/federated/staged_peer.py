"""One process of those that run staged data over a mesh; see `peer`.

python staged_peer.py JOB OUTPUT [ADDRESS NUM_PROCESSES PROCESS_ID]
"""

import errno
import gc
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))

import functional_optimodules as fo
from federated import problem
from functional_optimodules.federated import (
    FederatedData,
    Federation,
    StagedData,
    StagedFederation,
    clients_mesh,
    processes,
)
from functional_optimodules.federated.driver import run_piece
from functional_optimodules.federated.staged import stage

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
ROUNDS = 7
OPTIONS: dict[str, Any] = {"participants": 3, "every": 2}
ARRAYS = jax.tree.map(lambda *parts: np.concatenate(parts), *problem.clients())


def digest(state: Any, history: Any) -> dict[str, Any]:
    """Return the parameters and the history, to the last bit."""
    return {name: np.asarray(value).tobytes().hex() for name, value in {**state.params, **history}.items()}


def straight(federation: Federation, params: Any, mesh: Mesh, rounds: int = ROUNDS) -> dict[str, Any]:
    """Run with everything on the devices."""
    data = FederatedData.from_clients(problem.clients(), mesh)
    return digest(*federation.fit(federation.init(params, data, seed=3), data, rounds, **OPTIONS))


def staged_run(federation: Federation, params: Any, folder: Path | None = None, **options: Any) -> dict[str, Any]:
    staged, data = StagedFederation(federation, folder), StagedData(ARRAYS, problem.SIZES)
    state, history = staged.fit(staged.init(params, data, seed=3), data, ROUNDS, **OPTIONS, **options)
    return digest(state.federation, history)


def federations(mesh: Mesh) -> dict[str, Federation]:
    return {
        "scaffold": problem.federation(mapping=mesh),
        "by device": problem.federation(mapping=mesh, sampling="by-device"),
        "keys": problem.noisy_federation(mapping=mesh),
        "fedavg": Federation(problem.loss, fo.Optimizer(0.2), batch_size=problem.BATCH, mapping=mesh),
        "local": Federation(problem.loss, fo.Optimizer(0.2), batch_size=problem.BATCH, mapping=mesh, local=["b"]),
    }


def mesh(folder: Path) -> None:
    """What the tests of a mesh of one process look at."""
    mesh, found = clients_mesh(), dict[str, Any]()
    found["same"] = {
        name: staged_run(each, problem.params()) == straight(each, problem.params(), mesh)
        for name, each in federations(mesh).items()
    }
    federation = problem.federation(mapping=mesh)
    both = Mesh(mesh.devices.reshape(2, 2), ("clients", "model"))
    split = {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
    params = {name: jax.device_put(value, NamedSharding(both, split[name])) for name, value in problem.params().items()}
    divided = problem.federation(mapping=both)
    found["same"]["model axis"] = staged_run(divided, params) == straight(divided, params, both)

    expected = straight(federation, problem.params(), mesh)
    usual, stage._usual = stage._usual, lambda drawn, shards: 1
    found["same"]["room that grows"] = staged_run(federation, problem.params()) == expected
    stage._usual = usual

    staged, data = StagedFederation(federation, folder / "mesh"), StagedData(ARRAYS, problem.SIZES)
    state, first = staged.fit(staged.init(problem.params(), data, seed=3), data, 4, **OPTIONS)
    found["collectives"] = collectives(federation, state, data)
    del state
    gc.collect()
    state, rest = staged.fit(staged.init(problem.params(), data), data, 3, **OPTIONS)
    history = {name: np.concatenate([first[name], rest[name]]) for name in first}
    found["same"]["resumed"] = digest(state.federation, history) == expected
    each, whole = staged.evaluate(state, data, at_once=5), FederatedData.from_clients(problem.clients(), mesh)
    every = federation.evaluate(state.federation.params, whole)
    found["same"]["evaluation"] = np.array_equal(each["loss"], every["loss"])
    np.savez(folder / "out.npz", **problem.as_numpy(state.federation.params), **history, each=each["loss"])
    (folder / "mesh.json").write_text(json.dumps(found))


def collectives(federation: Federation, state: Any, data: StagedData) -> dict[str, int]:
    """Count the exchanges of the program that runs a piece."""
    with stage.Stage(federation, state, data, 3, 2) as ready:
        ready.prepare(state, 4, 3)
        piece = ready._take()
        held = state.federation._replace(bank=piece.bank)
        program = run_piece.lower(federation, 3, None, 2, held, piece.block, None, None, np.int32(2)).compile()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", program.as_text())) for name in COLLECTIVES}


def several(folder: Path) -> None:
    """What two processes come to that are not interrupted."""
    federation, data = problem.federation(mapping=clients_mesh()), StagedData(ARRAYS, problem.SIZES)
    staged = StagedFederation(federation)
    state, history = staged.fit(staged.init(problem.params(), data, seed=3), data, ROUNDS, **OPTIONS)
    own = [client for client, shard in enumerate(state.shards.shard) if shard in state.shards.own]
    np.savez(
        folder / f"straight-{jax.process_index()}.npz",
        **problem.as_numpy(state.federation.params),
        **history,
        each=staged.evaluate(state, data, at_once=3)["loss"],
        own=own,
        models=[np.asarray(staged.model(state, client)["w"]) for client in own],
    )


def killed(folder: Path) -> None:
    """The second process is killed in the middle of a row."""
    write, left = os.pwritev, 6

    def pwritev(file: int, buffers: Any, at: int) -> int:
        nonlocal left
        left -= jax.process_index()
        if not left:
            write(file, buffers[:1], at)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, buffers, at)

    os.pwritev = pwritev  # type: ignore[assignment]
    staged_run(problem.federation(mapping=clients_mesh()), problem.params(), folder / "run")


def resumed(folder: Path) -> None:
    """Go on with what is there, to the end."""
    staged = StagedFederation(problem.federation(mapping=clients_mesh()), folder / "run")
    data = StagedData(ARRAYS, problem.SIZES)
    state = staged.init(problem.params(), data)
    done = int(state.federation.round)
    state, history = staged.fit(state, data, ROUNDS - done, **OPTIONS)
    np.savez(
        folder / f"resumed-{jax.process_index()}.npz", **problem.as_numpy(state.federation.params), **history, done=done
    )


def failing(folder: Path) -> None:
    """A disk is full in the second process; data differs; a file is missing there."""
    mesh, data = clients_mesh(), StagedData(ARRAYS, problem.SIZES)
    second, write, found = jax.process_index() == 1, os.pwritev, []

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def message(call: Any) -> None:
        try:
            call()
        except (ValueError, OSError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")

    federation = problem.federation(mapping=mesh)
    if second:
        os.pwritev = full  # type: ignore[assignment]
    message(lambda: staged_run(federation, problem.params(), folder / "full"))
    os.pwritev = write
    gc.collect()
    other = StagedData(ARRAYS, (*problem.SIZES[:-2], 2, 7)) if second else data
    message(lambda: StagedFederation(federation).init(problem.params(), other))
    (folder / f"errors-{jax.process_index()}.json").write_text(json.dumps(found))


def alone(folder: Path) -> None:
    """One process with what two have left."""
    data = StagedData(ARRAYS, problem.SIZES)
    try:
        StagedFederation(problem.federation(mapping=clients_mesh()), folder / "run").init(problem.params(), data)
    except ValueError as error:
        (folder / "alone.txt").write_text(str(error))


if __name__ == "__main__":
    job, output, *joint = sys.argv[1:]
    if joint:
        processes.start(joint[0], int(joint[1]), int(joint[2]))
    globals()[job](Path(output).parent)
