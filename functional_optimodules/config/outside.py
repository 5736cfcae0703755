"""What comes from outside: how deep it may nest, and how much of it an error quotes.

States, messages and configurations are read by recursion, and errors show what they
refuse. Both are bounded here, before anything else looks at the values.
"""

import itertools
import reprlib
from collections.abc import Mapping
from typing import Any

from functional_optimodules.types import Json

MOST_LEVELS = 100


def require_shallow(value: Json, what: str, most: int = MOST_LEVELS) -> None:
    """Check that a value does not nest too deep to be read, or to be shown in an error.

    Args:
      value: anything; what is no list, tuple or mapping has no inside.
      what: how the error names it.
      most: how many levels are taken.

    Raises:
      ValueError: if it has more levels, or contains itself.
    """
    level: list[Any] = [value]
    for _ in range(most):
        inside: list[Any] = []
        for node in level:
            if isinstance(node, Mapping):
                inside.extend(node.values())
            elif isinstance(node, list | tuple):
                inside.extend(node)
        # What contains itself twice would double at each level.
        level = list({id(node): node for node in inside if isinstance(node, Mapping | list | tuple)}.values())
        if not level:
            return
    raise ValueError(f"{what} nests more than {most} levels deep")


class _Quotes(reprlib.Repr):
    """Python's own short forms, of more than it shows by default, and of integers of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 12
        self.maxlong = 60
        self.maxstring = 160
        self.maxother = 400

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        # Python's own sorts all keys first.
        if x and level <= 0:
            return "{...}"
        items = itertools.islice(x.items(), self.maxdict)
        shown = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in items]
        return "{" + ", ".join(shown + ["..."] * (len(x) > self.maxdict)) + "}"

    def repr_int(self, x: int, level: int) -> str:
        # Python writes no integer of more than some thousands of digits.
        return super().repr_int(x, level) if x.bit_length() < 2048 else f"<an integer of {x.bit_length()} bits>"


_quotes = _Quotes()


def quote(value: object) -> str:
    """Return what `repr` would, shortened: for errors that show a value from outside.

    At most 4 levels, 12 items of each container and 160 characters of each string are
    shown. It raises nothing, and takes no longer for large values than for small ones.
    """
    text = _quotes.repr(value)
    return text if len(text) <= 1000 else f"{text[:600]}...{text[-300:]}"
