"""Regularizers: plug-ins that add the gradient of a penalty to the loss's."""

from typing import Any, ClassVar

from functional_optimodules.core.brick import Brick
from functional_optimodules.core.facade import CONFIG, FACADE


class Regularizer(Brick, kind="regularizer"):
    """A brick that adds a penalty's gradient, and needs the parameters for it.

    Its contract is that of a module, without auxiliary variables.
    """

    _final: ClassVar[frozenset[str]] = CONFIG | FACADE

    def run(self, gradients: Any, weights: Any) -> Any:  # type: ignore[override]
        """Add the penalty's gradient by one compiled `update`, and keep the new state.

        Args:
          gradients: a pytree of arrays. They are left intact.
          weights: the parameters, in the same container.

        Returns:
          The regularized gradients, of the same shapes and dtypes.

        Raises:
          ValueError: if the weights are `None`, or the structure, a shape or a
            dtype is not that of the state; the state stays as it was.
          RuntimeError: if called while tracing.
        """
        self.require(weights)
        return super().run(gradients, weights)

    def require(self, params: Any) -> Any:
        """Return the parameters, or raise a `ValueError` where there are none."""
        if params is None:
            raise ValueError(
                f"{type(self).__name__} needs the parameters: pass `params` to `update`, `weights` to `run`"
            )
        return params


def list_optim_regularizers() -> dict[str, type[Regularizer]]:
    """Return the registered regularizers by name."""
    return dict(sorted(Regularizer._registry.items()))
