"""What signatures speak of."""

import enum
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import jax
import numpy as np

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    State = TypeVar("State", default=Any)
else:
    from typing import TypeVar

    State = TypeVar("State")


class Mark(enum.Enum):
    """What the annotation of an auxiliary variable says of it."""

    SHAPED = "shaped like the parameters"
    SCALAR = "one number"
    AMOUNT = "at least 0"
    FLAG = "0 or 1"
    NEWCOMER = "1 from a client that was not heard of before"
    PER_CLIENT = "one for each client"

    def __repr__(self) -> str:
        return self.value


PyTree: TypeAlias = Any
"""A pytree of arrays: dicts, lists, dataclasses, `nnx.State`, in any nesting."""
Params: TypeAlias = Annotated[PyTree, Mark.SHAPED]
"""The parameters, a pytree of arrays; as an auxiliary variable, one that is shaped like them."""
Updates: TypeAlias = object
"""Gradients, or what bricks made of them: a pytree shaped like the parameters.

It is not `Any`, for a type checker to see where an `update` returns them alone.
"""
Json: TypeAlias = Any
"""A value that `json.dumps` takes: `None`, a bool, number or string, or lists and dicts with string keys of these."""
HostArray: TypeAlias = np.ndarray[Any, Any]
"""An array of NumPy, of any shape and dtype."""
Leaf: TypeAlias = jax.Array | HostArray | jax.ShapeDtypeStruct
"""An array, or what describes one by shape and dtype."""
