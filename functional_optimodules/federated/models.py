"""Flax models in a federation, as they are: what is trained, what is averaged, what is drawn anew.

Parameters are trained. The rest of a model's state, such as the statistics of batch
normalization, is averaged over the participants. Dropout draws from the round's key,
by client and step, whatever keys the model was made with.
"""

import abc
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from functional_optimodules.random.keys import is_key
from functional_optimodules.types import Params, PyTree
from functional_optimodules.wire.paths import Specs


class ModelLoss(abc.ABC):
    """A loss of a Flax model, in the form of those of models with a state: `(params, state, batch, key)`."""

    @abc.abstractmethod
    def __call__(self, params: Params, stats: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
        """Return the loss, its metrics and the model's new state."""

    @abc.abstractmethod
    def taken_apart(self, model: Any) -> tuple[Params, PyTree]:
        """Return the parameters of a model, and its other state.

        Raises:
          TypeError: if it is not such a model.
        """

    @abc.abstractmethod
    def put_together(self, params: Params, stats: PyTree) -> Any:
        """Return a model of such parameters and such a state."""


@dataclasses.dataclass(frozen=True)
class NnxLoss(ModelLoss):
    """A loss of an `nnx.Module`.

    Attributes:
      graphdef: the module without its arrays.
      specs: what is trained of it, and its other state.
      rngs: the shapes of its random streams.
      wrt: which of its variables are trained.
      loss: `(model, batch) -> loss` or `(loss, metrics)`.
    """

    graphdef: Any
    specs: Specs
    rngs: Specs
    wrt: Any
    loss: Callable[..., PyTree]

    @classmethod
    def of(cls, model: Any, loss: Callable[..., PyTree], wrt: Any) -> "NnxLoss":
        """Return the loss of a model as it is."""
        nnx = _nnx()

        graphdef, params, rngs, stats = nnx.split(_module(model), wrt, nnx.RngState, ...)
        return cls(graphdef, Specs.of((params, stats)), Specs.of(rngs), wrt, loss)

    def evaluating(self, model: Any) -> "NnxLoss":
        """Return the loss of a model in its evaluation mode."""
        nnx = _nnx()

        twin = nnx.merge(*nnx.split(model))
        twin.eval()
        return NnxLoss.of(twin, self.loss, self.wrt)

    def __call__(self, params: Params, stats: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
        nnx = _nnx()

        model = self._merged(params, stats, key)
        value, metrics = _pair(self.loss(model, batch))
        return value, metrics, nnx.split(model, self.wrt, nnx.RngState, ...)[3]

    def taken_apart(self, model: Any) -> tuple[Params, PyTree]:
        nnx = _nnx()

        _, params, _, stats = nnx.split(_module(model), self.wrt, nnx.RngState, ...)
        self.specs.require_same(Specs.of((params, stats)), "Federation: the model")
        return params, stats

    def put_together(self, params: Params, stats: PyTree) -> Any:
        return self._merged(params, stats, jax.random.key(0))

    def _merged(self, params: Params, stats: PyTree, key: jax.Array) -> Any:
        nnx = _nnx()

        streams = []
        for index, spec in enumerate(self.rngs.leaves):
            own = jax.random.fold_in(key, index)
            fresh = own if spec.shape == () else jax.random.split(own, spec.shape)
            streams.append(fresh if is_key(spec) else jnp.zeros(spec.shape, spec.dtype))
        rngs = jax.tree.unflatten(self.rngs.treedef, streams)
        # Variables may only be written to in the trace that made them: these are made here.
        return nnx.merge(self.graphdef, *jax.tree.map(lambda leaf: leaf, (params, rngs, stats)))


def _nnx() -> Any:
    # Imported here, for it takes long, and who has other models needs none of it.
    from flax import nnx

    return nnx


def _module(model: Any) -> Any:
    nnx = _nnx()

    if not isinstance(model, nnx.Module):
        raise TypeError(f"Federation: expected an `nnx.Module`, not {type(model).__name__}")
    return model


@dataclasses.dataclass(frozen=True)
class LinenLoss(ModelLoss):
    """A loss of a linen module.

    Attributes:
      module: the module.
      loss: `(apply, batch) -> loss` or `(loss, metrics)`, or with a third argument `train`,
        whether it is in training.
      rngs: the names of the random streams that it draws from.
      train: whether the module's state moves.
    """

    module: Any
    loss: Callable[..., PyTree]
    rngs: tuple[str, ...]
    train: bool

    def __call__(self, params: Params, stats: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
        keys = {name: jax.random.fold_in(key, index) for index, name in enumerate(self.rngs)}

        def apply(*args: Any, **kwargs: Any) -> Any:
            nonlocal stats
            variables = {"params": params, **stats}
            if not (self.train and stats):
                return self.module.apply(variables, *args, rngs=keys, **kwargs)
            output, new = self.module.apply(variables, *args, rngs=keys, mutable=list(stats), **kwargs)
            stats = {**stats, **{name: new[name] for name in stats if name in new}}
            return output

        told = {"train": self.train} if "train" in inspect.signature(self.loss).parameters else {}
        value, metrics = _pair(self.loss(apply, batch, **told))
        return value, metrics, stats

    def taken_apart(self, model: Any) -> tuple[Params, PyTree]:
        if not isinstance(model, Mapping) or "params" not in model:
            raise TypeError(
                f"Federation: expected the variables of a linen module, as `module.init` returns them, not {model!r}"
            )
        # Of a `FrozenDict` it is a copy in plain dicts, as `apply` returns what has moved.
        plain = getattr(model, "unfreeze", lambda: model)()
        return plain["params"], {name: tree for name, tree in plain.items() if name != "params"}

    def put_together(self, params: Params, stats: PyTree) -> Any:
        return {"params": params, **stats}


def _pair(output: PyTree) -> tuple[PyTree, PyTree]:
    return output if isinstance(output, tuple) and len(output) == 2 else (output, {})
