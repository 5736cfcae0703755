"""FedACG: clients that start where the server's momentum would take it.

    Init: velocity = 0
    Share(x): x - momentum * velocity        # what clients start from
    Step(g):
        velocity = momentum * velocity + g
        g = velocity

g is what clients did from where they started, as a gradient. In the words of Kim et
al., m = -velocity is the server's momentum and l its weight: clients start from
x + l m, m becomes l m + D, D the mean of their deltas, and x becomes x + m, which is the mean
of where the clients ended. That holds for a server's learning rate of 1, as in the paper.

Clients are held near where they started by a penalty of beta / 2 * ||y - (x + l m)||²:
the regularizer `fedprox` with alpha = beta. The authors' code (commit 1b9b88c) has
1e-3 * ||y - (x + l m)||², which is an alpha of 2e-3.
"""

from typing import ClassVar, NamedTuple

import jax

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


class FedACGState(NamedTuple):
    """State of `FedACGModule`.

    Attributes:
      velocity: minus the server's momentum, shaped like the parameters, in at least
        float32.
    """

    velocity: PyTree


class FedACGModule(OptiModule[FedACGState]):
    """m ← λ·m + Δ, sending x + λ·m, on a server (Kim et al. 2024).

    Put it last among the modules, at a server's learning rate of 1: what it shares
    looks ahead by what it adds.

    Attributes:
      momentum: λ, the weight of the past momentum, and of what clients see of it.

    References:
      Kim, Kim and Han, "Communication-efficient federated learning with accelerated
      client gradient", CVPR 2024, arXiv:2201.03172.
    """

    name: ClassVar[str] = "fedacg"
    packable: ClassVar[bool] = True
    momentum: float = hyperparameter(default=0.85, within="[0, 1)")

    def init(self, params: Params) -> FedACGState:
        return FedACGState(velocity=zeros_wide(params))

    def update(
        self, updates: Updates, state: FedACGState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedACGState]:
        velocity = jax.tree.map(lambda v, g: self.momentum * v + wide(g), state.velocity, updates)
        return cast_like(velocity, updates), FedACGState(velocity)

    def share(self, params: Params, state: FedACGState) -> Params:
        ahead = jax.tree.map(lambda p, v: wide(p) - self.momentum * v, params, state.velocity)
        return cast_like(ahead, params)
