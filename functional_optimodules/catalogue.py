"""The registered plug-ins, as text for a terminal and as the table of the README.

All of it is read off the plug-ins themselves: a new one needs no line here.
"""

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from functional_optimodules.core.brick import list_optim_modules
from functional_optimodules.core.fields import describe
from functional_optimodules.core.plugin import Plugin, field_types
from functional_optimodules.core.regularizer import list_optim_regularizers
from functional_optimodules.core.scheduler import list_rate_schedulers

KINDS: Mapping[str, Any] = {
    "modules": list_optim_modules,
    "regularizers": list_optim_regularizers,
    "schedulers": list_rate_schedulers,
}
"""What lists the plug-ins of each kind."""


def plugin_table(kinds: Iterable[str] = tuple(KINDS)) -> str:
    """Return the library's own plug-ins as Markdown: for each kind a heading and a table.

    Third parties' are left out: the README must not depend on what else was imported.
    """
    return "\n\n".join(_markdown(kind) for kind in kinds)


def plugin_list(kinds: Iterable[str] = tuple(KINDS)) -> str:
    """Return every registered plug-in, with a line for each hyper-parameter."""
    sections = []
    for kind in kinds:
        entries = [_entry(name, plugin) for name, plugin in KINDS[kind]().items()]
        sections.append("\n\n".join([kind.upper(), *entries]))
    return "\n\n\n".join(sections)


def summary(plugin: type[Plugin]) -> str:
    """Return the first line of a plug-in's docstring: its formula and its paper."""
    return (plugin.__doc__ or "").strip().partition("\n")[0].removesuffix(".")


def hyperparameters(plugin: type[Plugin]) -> list[tuple[str, str, str, str]]:
    """Return the name, type, default and range of each hyper-parameter; empty where there is none."""
    types = field_types(plugin)
    return [
        (
            field.name,
            describe(types[field.name]),
            "" if field.default is dataclasses.MISSING else repr(field.default),
            field.metadata["within"].text if "within" in field.metadata else "",
        )
        for field in dataclasses.fields(plugin)  # type: ignore[arg-type]
    ]


def _entry(name: str, plugin: type[Plugin]) -> str:
    lines = [f"{name}  ({plugin.__name__})", summary(plugin)]
    for field, kind, default, within in hyperparameters(plugin):
        lines.append(
            f"  {field}: {kind}{f' = {default}' if default else ', required'}{f', in {within}' if within else ''}"
        )
    return textwrap.indent("\n".join(lines), "  ").replace("\n  ", "\n      ").rstrip()


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
