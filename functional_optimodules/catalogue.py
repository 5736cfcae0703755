"""The registered plug-ins, as text for a terminal and as the tables of the documentation.

All of it is read off the plug-ins themselves: a new one needs no line here.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

from functional_optimodules.brick import list_optim_modules, list_optim_regularizers
from functional_optimodules.config.fields import describe, field_types, nearest
from functional_optimodules.config.plugin import Plugin
from functional_optimodules.federated.aggregation import list_aggregators
from functional_optimodules.schedulers import list_rate_schedulers
from functional_optimodules.wrappers.wrapper import list_wrappers

KINDS: Mapping[str, Callable[[], Mapping[str, type[Plugin]]]] = {
    "modules": list_optim_modules,
    "regularizers": list_optim_regularizers,
    "schedulers": list_rate_schedulers,
    "wrappers": list_wrappers,
    "aggregators": list_aggregators,
}
"""What lists the plug-ins of each kind."""


def plugin_table(kinds: Iterable[str] = tuple(KINDS)) -> str:
    """Return the library's own plug-ins as Markdown: for each kind a heading and a table.

    Third parties' are left out: the documentation must not depend on what else was imported.
    """
    return "\n\n".join(_markdown(kind) for kind in kinds)


def plugin_list(kinds: Iterable[str] = tuple(KINDS)) -> str:
    """Return every registered plug-in, with a line for each hyper-parameter."""
    sections = ([kind.upper(), *itertools.starmap(_entry, KINDS[kind]().items())] for kind in kinds)
    return "\n\n\n".join(map("\n\n".join, sections))


def plugin_page(name: str) -> str:
    """Return all about the plug-ins of a name: docstring and hyper-parameters."""
    pages = []
    for kind, plugin in named(name):
        fields = [f"  {_line(field)}" for field in hyperparameters(plugin)]
        title = f"{name}  ({plugin.__name__}), one of the {kind}\n\n{inspect.getdoc(plugin)}"
        pages.append("\n".join([title, "\nHyper-parameters:", *fields] if fields else [title]))
    return "\n\n\n".join(pages)


def named(name: str) -> list[tuple[str, type[Plugin]]]:
    """Return the kind and the class of each registered plug-in of a name."""
    return [(kind, plugins()[name]) for kind, plugins in KINDS.items() if name in plugins()]


def unknown(word: str) -> str:
    """Say what there is instead of a word that is neither a kind nor a name."""
    names = {name for plugins in KINDS.values() for name in plugins()}
    return f"neither a kind ({', '.join(KINDS)}) nor a plug-in is named {word!r}: {nearest(word, {*KINDS, *names})}"


def summary(plugin: type[Plugin]) -> str:
    """Return the first line of a plug-in's docstring: its formula and its paper."""
    return (plugin.__doc__ or "").strip().partition("\n")[0].removesuffix(".")


def hyperparameters(plugin: type[Plugin]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the name, type, default and range of each hyper-parameter; empty where there is none."""
    types = field_types(plugin)
    for field in dataclasses.fields(plugin):
        default = "" if field.default is dataclasses.MISSING else repr(field.default)
        within = field.metadata["within"].text if "within" in field.metadata else ""
        yield field.name, describe(types[field.name]), default, within


def _entry(name: str, plugin: type[Plugin]) -> str:
    fields = [f"  {_line(field)}" for field in hyperparameters(plugin)]
    return "\n      ".join([f"  {name}  ({plugin.__name__})", summary(plugin), *fields])


def _line(hyperparameter: tuple[str, str, str, str]) -> str:
    field, kind, default, within = hyperparameter
    return f"{field}: {kind}{f' = {default}' if default else ', required'}{f', in {within}' if within else ''}"


def _markdown(kind: str) -> str:
    rows = [
        (f"`{name}`", f"`{plugin.__name__}`", "<br>".join(map(_cell, hyperparameters(plugin))), summary(plugin))
        for name, plugin in KINDS[kind]().items()
        if plugin.__module__.startswith(f"{__package__}.")
    ]
    header = ["| name | class | hyper-parameters | what it does |", "| --- | --- | --- | --- |"]
    table = ["| " + " | ".join(cell.replace("|", "\\|") or "–" for cell in row) + " |" for row in rows]
    return "\n".join([f"**{kind.capitalize()}**", "", *header, *table])


def _cell(hyperparameter: tuple[str, str, str, str]) -> str:
    field, _, default, within = hyperparameter
    return f"`{field}{f'={default}' if default else ''}`{f' in {within}' if within else ''}"
