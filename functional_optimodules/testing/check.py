"""What a check is: a named function of a plug-in that raises an `AssertionError`."""

import functools
import random
from collections.abc import Callable
from typing import Any, Literal
from unittest import mock

from functional_optimodules.config.plugin import Plugin

Scope = Literal["class", "instance", "field"]


class Check:
    """A check of plug-ins, with the same result in each run: keys that nobody gave a seed for are the same too.

    Attributes:
      kind: the class of the plug-ins that it concerns.
      scope: which instances of a class it may tell apart: none, those that differ
        in many fields, or those that differ in one.
    """

    def __init__(self, function: Callable[[Any], None], kind: type[Plugin], scope: Scope) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.kind = kind
        self.scope = scope

    def __call__(self, plugin: Plugin) -> None:
        try:
            with mock.patch("secrets.randbits", random.Random(0).getrandbits):
                self.function(plugin)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(
                f"{plugin!r} breaks the contract, in {self.function.__name__}:\n"
                f"  {self.function.__doc__}\n"
                f"{kind}{error}"
            ) from error


def check(kind: type[Plugin], scope: Scope = "instance") -> Callable[[Callable[[Any], None]], Check]:
    """Make a function a check of one kind of plug-ins."""
    return lambda function: Check(function, kind, scope)
