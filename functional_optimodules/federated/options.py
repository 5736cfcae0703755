"""The options of a federation, by name, and the type of the history that it leaves."""

from typing import Any, Literal, TypeAlias

from jax.sharding import Mesh
from numpy.typing import NDArray

Remainder: TypeAlias = Literal["mask", "drop", "wrap"]
"""What becomes of a last, partial batch."""
Weighting: TypeAlias = Literal["uniform", "examples"]
"""How clients count in the mean."""
Sampling: TypeAlias = Literal["uniform", "by-device"]
"""How participants are drawn."""
OnNonfinite: TypeAlias = Literal["error", "skip"]
"""What becomes of a client that sends a value that is not finite."""
Execution: TypeAlias = Literal["scan", "vmap"] | int | Mesh | None
"""How participants are mapped to devices and to time."""

History: TypeAlias = dict[str, NDArray[Any]]
"""Metrics by name, with a leading axis of rounds."""
