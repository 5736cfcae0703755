"""What devices exchange, from the text of a compiled program."""

import math
import re

import numpy as np

COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"


def members(text):
    """Return which chips exchange something, group by group, from the text of a collective; `None` for all."""
    if given := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})?\}", text):
        groups = re.findall(r"\{([\d,]+)\}", given[1] or "")
        return [list(map(int, group.split(","))) for group in groups] or None
    if given := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = (tuple(map(int, part.split(","))) if part else None for part in given.groups())
        return np.arange(np.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
    if given := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}:]*)\}", text):
        mesh = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", given[1])}
        used = [list(mesh).index(name) for name in re.findall(r"'(\w+)'", given[2])]
        chips = np.arange(math.prod(mesh.values())).reshape(*mesh.values())
        within = math.prod(chips.shape[axis] for axis in used)
        return np.moveaxis(chips, used, range(-len(used), 0)).reshape(-1, within).tolist()
    raise ValueError(f"what takes part in {text!r}?")


def count(text, group):
    """Count the collectives of a program: those within groups of chips that share a model, and others."""
    found = {}
    for line in text.splitlines():
        if name := re.search(rf" ({COLLECTIVES})(?:-start)?\(", line):
            parts = members(line)
            within = parts is not None and all(len({chip // group for chip in part}) == 1 for part in parts)
            key = f"{name[1]} within a group" if within else name[1]
            found[key] = found.get(key, 0) + 1
    return found
