"""Models of which clients keep a part, or one, to themselves.

    ditto     a model of one's own beside the shared one, held near it
              grads of `personal` += alpha * (personal - shared at the start of the round)
    fedrep    a head of one's own on a shared body, the one trained after the other
              grads of the body = 0 in the first steps of a round, those of the head after

What is a client's own is said to the federation, which neither sends nor averages
it: `Federation(..., local=["personal/**"])`, `Federation(..., local=["head/**"])`.
"""

import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.brick import OptiModule, Regularizer
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.regularizers import ReferenceState, add_scaled
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.paths import leaf_paths, matching

_SHARED, _PERSONAL = "shared", "personal"


def ditto_loss(loss_fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return the loss of Ditto: that of the shared model and that of the client's own, added.

    The gradient of either model is its own loss's. Metrics are those of the client's
    own model.

    Args:
      loss_fn: `(params, batch)` or `(params, batch, key)` to a loss, alone or with a
        dict of metrics.

    Returns:
      A loss of the same arguments, over parameters `{"shared": params, "personal": params}`.
    """

    # Its signature is that of the loss, which says whether it takes a key.
    @functools.wraps(loss_fn)
    def both(params: Params, *args: PyTree) -> PyTree:
        try:
            shared, personal = params[_SHARED], params[_PERSONAL]
        except (KeyError, TypeError, IndexError):
            raise ValueError(
                f"ditto_loss: expected parameters {{{_SHARED!r}: params, {_PERSONAL!r}: params}}, found "
                f"{jax.tree.structure(params)}"
            ) from None
        general, own = loss_fn(shared, *args), loss_fn(personal, *args)
        if isinstance(own, tuple):
            return general[0] + own[0], own[1]
        return general + own

    return both


class DittoRegularizer(Regularizer[ReferenceState]):
    """α/2·‖v − w‖² of a client's own model, w the shared one at the start of the round (Li et al. 2021).

        Init(alpha):
            reference = 0; awaits = true
        Round(weights):
            reference = weights; awaits = false     # awaits = true if they are not given
        Step(grads, weights):
            if awaits: reference = weights; awaits = false
            grads["personal"] += alpha * (weights["personal"] - reference["shared"])

    The parameters are `{"shared": params, "personal": params}`, with the loss that
    `ditto_loss` makes. Gradients of all else stay as they are.

    Attributes:
      alpha: weight of the penalty, lambda in the paper.

    References:
      Li et al., "Ditto: fair and robust federated learning through personalization",
      algorithm 1, ICML 2021, arXiv:2012.04221.
    """

    name: ClassVar[str] = "ditto"
    alpha: float = hyperparameter(default=0.1, within="[0, inf)")

    def init(self, params: Params) -> ReferenceState:
        return ReferenceState.new(params)

    def begin_round(self, state: ReferenceState, params: Params = None) -> ReferenceState:
        return state.begun(params)

    def update(
        self, updates: Updates, state: ReferenceState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, ReferenceState]:
        weights = self.require(params)
        state = state.stepped(weights)
        paths, leaves = leaf_paths(updates), jax.tree.leaves(updates)
        own, near = jax.tree.leaves(weights), dict(zip(paths, jax.tree.leaves(state.reference), strict=True))
        for index, path in enumerate(paths):
            part, _, rest = path.partition("/")
            if part != _PERSONAL:
                continue
            twin = f"{_SHARED}/{rest}" if rest else _SHARED
            if twin not in near:
                raise ValueError(f"{type(self).__name__}: the parameter {path!r} has no counterpart at {twin!r}")
            leaves[index] = add_scaled(leaves[index], self.alpha, jnp.subtract, own[index], near[twin])
        output: Updates = jax.tree.unflatten(jax.tree.structure(updates), leaves)
        return output, state


class FedRepState(NamedTuple):
    """State of `FedRepModule`.

    Attributes:
      steps: int32 scalar, how many steps were taken in this round.
    """

    steps: jax.Array


class FedRepModule(OptiModule[FedRepState]):
    """The head first, then the body: g of the one whose turn it is, 0 of the other (Collins et al. 2021).

        Init(head, head_steps):
            steps = 0
        Round:
            steps = 0
        Step(grads):
            if steps < head_steps: grads of what is not in the head = 0
            else: grads of what is in the head = 0
            steps += 1

    Put it last among the modules, and leave out decoupled weight decay: what comes
    after it, such as momentum, moves parameters whose gradient is 0 too. With no
    pattern there is no head, and each step moves everything.

    Attributes:
      head: patterns of the paths of the head's parameters, such as `head/**`: `*` is
        anything within a segment, `**` any number of segments.
      head_steps: how many steps at the start of each round are the head's.

    Raises:
      ValueError: in `update`, if a pattern matches no parameter.

    References:
      Collins et al., "Exploiting shared representations for personalized federated
      learning", algorithm 1, ICML 2021, arXiv:2102.07078.
    """

    name: ClassVar[str] = "fedrep"
    examples = ({"head": ["**"], "head_steps": 1}, {"head": ["**/[bw]*"], "head_steps": 2})
    head: tuple[str, ...]
    head_steps: int = hyperparameter(within="[0, 2147483647]")

    def init(self, params: Params) -> FedRepState:
        return FedRepState(jnp.zeros((), jnp.int32))

    def begin_round(self, state: FedRepState, params: Params = None) -> FedRepState:
        return FedRepState(jnp.zeros((), jnp.int32))

    def update(
        self, updates: Updates, state: FedRepState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedRepState]:
        new = FedRepState(optax.safe_increment(state.steps))
        paths, leaves = leaf_paths(updates), jax.tree.leaves(updates)
        if not self.head or not paths:
            return updates, new
        heads = matching(self.head, paths, f"{type(self).__name__}: head")
        turn = state.steps < self.head_steps

        def moved(path: str, gradient: jax.Array) -> jax.Array:
            return jnp.where(turn if path in heads else ~turn, gradient, jnp.zeros_like(gradient))

        moving = map(moved, paths, leaves)
        output: Updates = jax.tree.unflatten(jax.tree.structure(updates), moving)
        return output, new
