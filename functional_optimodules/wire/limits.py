"""How much is taken from outside: bounds on messages, as a setting.

What is sent about parameters that are known is bounded by them. These bounds are for
the rest: for what a message says of parameters before there are any, for names, and
for how large a client's numbers may be.
"""

import dataclasses
from typing import ClassVar

from functional_optimodules.config.fields import Configured, hyperparameter


@dataclasses.dataclass(frozen=True)
class Limits(Configured):
    """What a facade takes from outside; what is above it is refused by name.

    Attributes:
      leaves: the most parameters that a message may speak of, to a server that knows none
        as yet. Each costs about a millisecond of compilation.
      bytes: the most bytes of these parameters together.
      magnitude: the largest modulus of a number that a client sends. The square of the
        default is finite in float32, and so is the sum of 10^19 such numbers; one near
        what honest clients send also keeps their digits in the running sum.
      name: the most characters of the name of a client, or of a parameter's path.
    """

    _owner: ClassVar[str] = "Limits"
    leaves: int = hyperparameter(default=4096, within="[1, inf)")
    bytes: int = hyperparameter(default=2**32, within="[1, inf)")
    magnitude: float = hyperparameter(default=2.0**63, within="(0, inf]")
    name: int = hyperparameter(default=1000, within="[1, inf)")


_limits = [Limits()]


def limits() -> Limits:
    """Return the bounds on what is taken from outside."""
    return _limits[0]


def set_limits(new: Limits | None) -> None:
    """Set the bounds on what is taken from outside, from now on, in this process.

    Args:
      new: the bounds; `None` for the default ones.

    Raises:
      TypeError: if it is anything else.
    """
    if new is not None and not isinstance(new, Limits):
        raise TypeError(f"set_limits: {type(new).__name__} should be `Limits`, or None")
    _limits[0] = new or Limits()
