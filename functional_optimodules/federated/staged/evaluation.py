"""Evaluation on the data of more clients than fit the devices: some at a time, of which the next are read meanwhile."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from functional_optimodules.federated import evaluation
from functional_optimodules.federated.data import Integers
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.federation import Federation
from functional_optimodules.federated.options import History
from functional_optimodules.federated.placement import mesh_of
from functional_optimodules.federated.processes import naming_lost_peers
from functional_optimodules.federated.staged.data import StagedData
from functional_optimodules.federated.staged.peers import together
from functional_optimodules.federated.staged.shards import Shards
from functional_optimodules.federated.staged.stage import Block, Fresh, StagedState, read_block
from functional_optimodules.packing.tree import unpack
from functional_optimodules.types import HostArray, Params


class _Part(NamedTuple):
    """Some of the clients: who they are, their data, and that of local steps if it is another; and their rows."""

    clients: Integers
    blocks: list[Block]
    bank: Rows


def evaluate_staged(
    federation: Federation,
    model: Params | StagedState,
    data: StagedData,
    batch_size: int | None,
    key: jax.Array,
    steps: int,
    train: StagedData | None,
    at_once: int,
) -> History:
    """Return each client's loss and metrics; see `StagedFederation.evaluate`."""
    staged = model if isinstance(model, StagedState) else None
    shards = Shards.deal(mesh_of(federation.mapping), data) if staged is None else staged.shards
    slots = min(-(-at_once // len(shards.members)), max(map(len, shards.members)))
    fresh = None if staged is None else Fresh(federation, staged, slots)
    nobody = np.zeros((0, 0), np.int32)
    given = [
        (each, max(each.most_rows(members, slots) for members in shards.members))
        for each in (data, train)
        if each is not None
    ]

    def read(begin: int) -> _Part:
        split = [each[begin : begin + slots] for each in shards.members]
        bank: Rows = []
        if fresh is not None and staged is not None:
            own = {shard: split[shard] for shard in shards.own}
            wanted = {shard: np.ones(len(each), bool) for shard, each in own.items()}
            bank = fresh.read(staged.bank, own, fresh.keys(staged, own), wanted)
        blocks = [
            read_block(each, shards, split, slots, {shard: each.room(rows) for shard in shards.own}, nobody, 0)
            for each, rows in given
        ]
        return jax.block_until_ready(_Part(np.sort(np.concatenate(split)), blocks, bank))

    found: dict[str, HostArray] = {}
    with ThreadPoolExecutor(1) as worker:
        begins = range(0, max(map(len, shards.members)), slots)
        after = worker.submit(read, 0)
        for begin in begins:
            with together(shards.several):
                part = after.result()
            if begin + slots in begins:
                after = worker.submit(read, begin + slots)
            held = unpack(model) if staged is None else staged.federation._replace(bank=part.bank)
            with naming_lost_peers():
                own, local = part.blocks[0], None if train is None else part.blocks[1]
                by_name = evaluation.evaluate(federation, held, own, batch_size, key, steps, local)
                for name, values in by_name.items():
                    whole = found.setdefault(name, np.zeros(data.num_clients, values.dtype))
                    whole[part.clients] = np.asarray(values)[: len(part.clients)]
    return found
