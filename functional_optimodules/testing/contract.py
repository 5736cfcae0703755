"""Which checks a plug-in has to pass."""

import functools
from collections.abc import Callable, Iterator

from functional_optimodules.config.plugin import Plugin
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.testing import (
    aggregators,
    configs,
    exchange,
    facade,
    lowering,
    packed,
    pure,
    rounds,
    schedulers,
    tracing,
    wrappers,
)
from functional_optimodules.testing.check import Check
from functional_optimodules.testing.instances import instances
from functional_optimodules.testing.wrappers import carrier
from functional_optimodules.wrappers.wrapper import Wrapper

_MODULES = (configs, pure, tracing, rounds, facade, exchange, packed, schedulers, aggregators, lowering, wrappers)


def checks_of(plugin: Plugin | type[Plugin]) -> dict[str, Check]:
    """Return the checks that concern a plug-in, by name; a wrapper's are also those of an optimizer that has it."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    found = {name: value for module in _MODULES for name, value in vars(module).items() if isinstance(value, Check)}
    kinds = (cls, Optimizer) if issubclass(cls, Wrapper) else (cls,)
    return {name: check for name, check in found.items() if any(issubclass(kind, check.kind) for kind in kinds)}


def contract(plugin: Plugin | type[Plugin]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the name of each check of a plug-in, and a function without arguments that runs it.

    Args:
      plugin: a plug-in, or a class of them, of which the plug-ins that `instances`
        makes up are checked: the first by all checks, the others by those that may
        tell them apart.

    Yields:
      Pairs of a name, such as `"check_resume_in_mid_round-beta=0.5"`, and a function
      that raises an `AssertionError` if the contract is broken.
    """
    found = instances(plugin) if isinstance(plugin, type) else {"": plugin}
    for index, (label, instance) in enumerate(found.items()):
        scopes = {"field", *([] if "=" in label else ["instance"]), *([] if index else ["class"])}
        for name, check in checks_of(instance).items():
            if check.scope in scopes:
                subject = instance if isinstance(instance, check.kind) else carrier(instance)
                yield "-".join(filter(None, (name, label))), functools.partial(check, subject)
