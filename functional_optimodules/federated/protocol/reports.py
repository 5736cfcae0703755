"""What a server takes of a client's report, and what it refuses.

A report comes from outside: whatever it says is checked before it is used, and what is refused
did not arrive.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np

from functional_optimodules.aux_var import FromClients
from functional_optimodules.config.fields import Configured, hyperparameter, require_keys
from functional_optimodules.config.outside import quote
from functional_optimodules.federated.loss import RESERVED
from functional_optimodules.federated.options import OnNonfinite
from functional_optimodules.federated.protocol.message import Message
from functional_optimodules.federated.protocol.travel import Up
from functional_optimodules.types import HostArray
from functional_optimodules.wire.limits import limits
from functional_optimodules.wire.paths import Specs, by_path

ABOUT = ("kind", "era", "id", "round", "from", "ticket", "examples", "metrics")
"""What a report says of itself."""
_MOST_METRICS = 64
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Bounds(Configured):
    """What of a client's report is refused, whatever else it says; beside `Limits`, which bounds its numbers.

    Attributes:
      most_examples: how many examples a client may say it has.
      most_bytes: how many bytes a report may have; `None` for twice what one takes that is not
        compressed, and 1 MiB.
    """

    _owner: ClassVar[str] = "Bounds"
    most_examples: float = hyperparameter(default=2.0**32, within="[1, 1099511627776]")
    most_bytes: int | None = hyperparameter(default=None, within="[1, inf)")


class Arrived(NamedTuple):
    """A report that arrived.

    Attributes:
      lost: whether its client says that it has lost its state.
      up: what it holds; `None` if that is lost, or not finite.
      examples: how many the client has.
      metrics: what it measured.
    """

    lost: bool
    up: Up | None
    examples: float
    metrics: Mapping[str, float]


def read_report(
    report: Message, specs: Specs, bounds: Bounds, on_nonfinite: OnNonfinite, what: str
) -> tuple[int, Arrived]:
    """Return a report's ticket, and what it holds.

    Args:
      report: the report, which answers the broadcast.
      specs: what it must hold.
      bounds: what is refused.
      on_nonfinite: whether what is not finite is refused too, or only left out.
      what: how errors name it.

    Raises:
      FloatingPointError: if it has a number that is not finite, and such are refused.
      KeyError: if it lacks something, or says what is not asked for.
      ValueError: if something is malformed, or beyond the bounds.
    """
    about: Mapping[str, Any] = report.about
    require_keys(about, ABOUT, what)
    ticket, examples, metrics = about["ticket"], about["examples"], about["metrics"]
    if not isinstance(ticket, int) or isinstance(ticket, bool) or not 0 < ticket < 2**53:
        raise ValueError(f"{what} has the ticket {quote(ticket)}: expected an integer in [1, 2**53)")
    # A weight so small that its inverse is no number would leave the mean without one.
    if not _is_number(examples) or not (examples == 0 or 1e-6 <= examples <= bounds.most_examples):
        raise ValueError(f"{what} says it has {quote(examples)} examples: expected 0 to {bounds.most_examples}")
    told = read_metrics(metrics, what)
    if about["kind"] == "lost":
        return ticket, Arrived(True, None, float(examples), told)
    up: Up = report.tree(specs, what)
    bound = limits().magnitude
    beyond = {path: most for path, leaf in by_path(up).items() if (most := _beyond(leaf, bound))}
    for path, most in beyond.items():
        if math.isfinite(most):
            raise ValueError(f"{what}: {path!r} has {most}: expected at most {bound}, which `set_limits` sets")
        if on_nonfinite == "error":
            raise FloatingPointError(
                f"{what}: {path!r} has values that are not finite: lower the learning rates, look at its data, or "
                "leave such clients out with on_nonfinite='skip'"
            )
    for name, aux in up.auxes.items():
        _require_range(aux, f"{what}, {name!r},")
    return ticket, Arrived(False, None if beyond else up, float(examples), told)


def read_metrics(metrics: object, what: str) -> dict[str, float]:
    """Return metrics by name, of which `None` stands for what is not finite.

    Raises:
      ValueError: if they are malformed, too many, or one has a name that means something else.
    """
    if not isinstance(metrics, Mapping) or len(metrics) > _MOST_METRICS:
        raise ValueError(f"{what} has the metrics {quote(metrics)}: expected a mapping of at most {_MOST_METRICS}")
    found = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or len(name) > limits().name or name in RESERVED[:-1]:
            raise ValueError(f"{what} has a metric named {quote(name)}: expected a name that means nothing else")
        if value is not None and not (_is_number(value) and abs(value) <= _LARGEST):
            raise ValueError(f"{what} has the metric {quote(name)} of {quote(value)}: expected a number, or null")
        found[name] = math.nan if value is None else float(value)
    return found


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _beyond(leaf: HostArray, bound: float) -> float:
    """Return the largest modulus of an array's real numbers, if that is not finite or beyond a bound; else 0."""
    if not leaf.size or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return 0.0
    numbers = leaf.reshape(-1).view(leaf.real.dtype)
    with np.errstate(all="ignore"):
        # None is larger than the root of the sum of squares, which takes one fast pass.
        if numbers.dtype.kind == "f" and float(np.dot(numbers, numbers)) <= min(bound**2, 1e38):
            return 0.0
        largest = float(np.maximum(abs(float(numbers.max())), abs(float(numbers.min()))))
    return 0.0 if math.isfinite(largest) and largest <= bound else largest


def _require_range(aux: FromClients, what: str) -> None:
    """Raise a `ValueError` for a variable out of its range."""
    for name, variable in aux.variables().items():
        value = getattr(aux, name)
        if (variable.flag and value not in (0, 1)) or (variable.amount and value < 0):
            raise ValueError(f"{what} has {name}={value}: expected {'0 or 1' if variable.flag else 'at least 0'}")
