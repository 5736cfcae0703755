"""What the participants of a round come to, one or together: what is summed in the loop over them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from functional_optimodules.aux_var import FromClients, Reduction
from functional_optimodules.federated.loss import Metrics
from functional_optimodules.federated.placement import SPLIT, WHOLE
from functional_optimodules.types import PyTree


class Totals(NamedTuple):
    """What the clients of a round came to together, in the carry of a loop; or what one of them did.

    Attributes:
      sums: the sums of the aggregation.
      auxes: their auxiliary variables, reduced, by name.
      stats: the sum of the model's states, where it has one.
      each: by name, float32[S], one value for each participant; 0 for those absent:
        `examples`, how many it has; `joined`, 1 if it took part to the end; `finite`, 1 if
        all that it sent is; what its bricks say; and the averages of its metrics over the
        examples that it stepped over. A scalar for one participant.
      rows: the deltas with their weights, along a leading axis of participants, where the
        aggregation needs each; 0 for those absent. Each stays on the device that ran it.
    """

    sums: PyTree
    auxes: dict[str, FromClients]
    stats: PyTree
    each: Metrics
    rows: PyTree

    def nothing(self, participants: tuple[int, ...] = ()) -> "Totals":
        """Return totals over no client, from such shapes of one."""

        def zeros(tree: PyTree, axes: tuple[int, ...] = ()) -> PyTree:
            return jax.tree.map(lambda leaf: jnp.zeros((*axes, *leaf.shape), leaf.dtype), tree)

        auxes = {name: aux.neutral() for name, aux in self.auxes.items()}
        each, rows = zeros(self.each, participants), zeros(self.rows, participants)
        return Totals(zeros(self.sums), auxes, zeros(self.stats), each, rows)

    def add(self, one: "Totals", index: jax.Array) -> "Totals":
        """Add what the participant of that index came to."""
        sums, stats = jax.tree.map(jnp.add, (self.sums, self.stats), (one.sums, one.stats))
        auxes = {name: aux.merge(one.auxes[name]) for name, aux in self.auxes.items()}
        each = jax.tree.map(lambda a, b: a.at[index].add(b), self.each, one.each)

        def add_row(rows: jax.Array, row: jax.Array) -> jax.Array:
            # By slices: on CPU a scatter goes from number to number.
            row = row + jax.lax.dynamic_index_in_dim(rows, index, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(rows, row, index, 0)

        return Totals(sums, auxes, stats, each, jax.tree.map(add_row, self.rows, one.rows))

    def across(self, axis: str, whole: bool) -> "Totals":
        """Add up the totals of all devices by one all-reduce, and one for each variable that is no sum."""
        # Of several dtypes; integers go through float32 exactly below 2**24.
        mine = self._replace(rows=())
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(mine)))
        alike = jax.tree.map(lambda leaf: leaf.astype(dtype), mine)
        # In one vector, what is split along another axis would be gathered.
        vector, restore = ravel_pytree(alike) if whole else (alike, lambda tree: tree)
        summed = jax.tree.map(lambda new, old: new.astype(old.dtype), restore(jax.lax.psum(vector, axis)), mine)

        def reduced(aux: FromClients, sums: FromClients) -> FromClients:
            others = {name: v.reduction for name, v in aux.variables().items() if v.reduction is not Reduction.SUM}
            return dataclasses.replace(sums, **{name: r.across(getattr(aux, name), axis) for name, r in others.items()})

        auxes = {name: reduced(aux, summed.auxes[name]) for name, aux in self.auxes.items()}
        return summed._replace(auxes=auxes, rows=self.rows)

    @classmethod
    def partition_specs(cls) -> "Totals":
        """Say how totals lie over a mesh once they are added up across it, as `shard_map` asks."""
        return cls(WHOLE, WHOLE, WHOLE, WHOLE, SPLIT)  # type: ignore[arg-type]
