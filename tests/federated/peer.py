"""One process of several that run the experiment of `problem` together.

    python peer.py JOB OUTPUT [ADDRESS NUM_PROCESSES PROCESS_ID]

Without an address it is alone, with as many devices as XLA_FLAGS say.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from federated import problem
from functional_optimodules.federated import FederatedData, clients_mesh, processes

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


def own_data(mesh: Any) -> FederatedData:
    """Give this process's clients only, in no particular split."""
    own = {i: c for i, c in enumerate(problem.clients()) if (i * 5) % 7 % jax.process_count() == jax.process_index()}
    return FederatedData.from_local(own, mesh)


def experiment(output: Path) -> None:
    mesh = clients_mesh()
    federation = problem.federation(mapping=mesh)
    data = own_data(mesh)
    state, history = federation.fit(
        federation.init(problem.params(), data, seed=3), data, problem.ROUNDS, participants=problem.PARTICIPANTS
    )
    found = federation.evaluate(state.params, data)
    saved = federation.encode(state)
    if jax.process_index() == 0:
        np.savez(output, **problem.as_numpy(state.params), **history, each=np.asarray(found["loss"]))
    (output.parent / f"state-{jax.process_index()}.json").write_text(json.dumps(saved, allow_nan=False))


def mesh(output: Path) -> None:
    """What the tests of a mesh of one process look at."""
    mesh = clients_mesh()
    data = FederatedData.from_clients(problem.clients(), mesh)
    found: dict[str, Any] = {}
    federation = problem.federation(mapping=mesh)
    state = federation.init(problem.params(), data, seed=3)
    program = (
        jax.jit(lambda s, d: federation.run(s, d, 5, participants=3), donate_argnums=0).lower(state, data).compile()
    )
    text = program.as_text()
    found["collectives"] = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    found["shards"] = [len(leaf.sharding.device_set) for leaf in state.bank]
    state, history = program(state, data)
    found["each"] = np.asarray(federation.evaluate(state.params, data)["loss"]).tolist()
    found["saved"] = federation.encode(state)
    np.savez(output, **problem.as_numpy(state.params), **problem.as_numpy(history))

    noisy = problem.noisy_federation(mapping=mesh)
    found["draws"] = {k: np.asarray(v).tolist() for k, v in problem.run(noisy, data)[1].items()}
    even = problem.federation(mapping=mesh, sampling="by-device")
    draw = jax.jit(lambda s: even.sample(s, data, 5))
    slots, state = np.asarray(data.slots), even.init(problem.params(), data)
    samples = [np.asarray(draw(state._replace(round=r))).tolist() for r in range(60)]
    found["samples"] = samples
    found["devices"] = [[int(slots[c]) // data.per_shard for c in sample] for sample in samples]
    stateless = problem.Federation(problem.loss, problem.fo.Optimizer(0.1), mapping=mesh)
    batches = jax.tree.map(lambda leaf: np.stack([leaf[:1][None]] * 3), problem.clients()[0])
    state = stateless.init(problem.params(), 100)
    found["far"] = np.asarray(stateless.round(state, batches, [97, 5, 42])[1]["joined"]).tolist()
    found["aggregated"] = {name: problem.aggregated(name, data, mesh) for name in problem.AGGREGATIONS}
    (output.parent / "mesh.json").write_text(json.dumps(found))


def endless(output: Path) -> None:
    """Run until killed; save the first rounds, and say when they are saved."""
    mesh = clients_mesh()
    federation, data = problem.federation(mapping=mesh), own_data(mesh)

    def progress(state: Any, history: Any) -> None:
        if int(state.round) <= 6:
            saved_state(output, int(state.round)).write_text(json.dumps(federation.encode(state)))
        if int(state.round) == 6:
            print("saved", flush=True)

    state = federation.init(problem.params(), data, seed=3)
    federation.fit(state, data, 10**8, participants=3, every=2, callback=progress)


def resume(output: Path) -> None:
    """Take two rounds more from the fourth."""
    mesh = clients_mesh()
    federation, data = problem.federation(mapping=mesh), own_data(mesh)
    state = federation.init(problem.params(), data, seed=5)
    state = federation.decode(json.loads(saved_state(output, 4).read_text()), state)
    state, _ = federation.fit(state, data, 2, participants=3, every=2)
    saved_state(output, 0).write_text(json.dumps(federation.encode(state)))


def saved_state(output: Path, number: int) -> Path:
    return output.parent / f"round-{number}-of-process-{jax.process_index()}.json"


if __name__ == "__main__":
    job, output, *joint = sys.argv[1:]
    if joint:
        processes.start(joint[0], int(joint[1]), int(joint[2]))
    {"experiment": experiment, "mesh": mesh, "endless": endless, "resume": resume}[job](Path(output))
