"""Every key of an experiment's file: read off the fields that the reader accepts, and their docstrings."""

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from functional_optimodules.config.fields import describe, field_types, to_json
from functional_optimodules.experiments.config import DataConfig, Experiment, ModelConfig, RoundsConfig, RunConfig
from functional_optimodules.federated import Federation
from functional_optimodules.optimizer import Optimizer

_PLACES: tuple[tuple[str, type[Any], tuple[type[Any], ...]], ...] = (
    ("", Experiment, (Experiment,)),
    ("[rounds]", RoundsConfig, (RunConfig, Federation)),
    ("[client] [server]", Optimizer, (Optimizer,)),
    ('[problem] of "digits" and "npz"', DataConfig, (DataConfig,)),
    ('[problem] of "digits" and "npz"', ModelConfig, (ModelConfig,)),
)
_REQUIRED = "required"
_AND_THE_MESH = "a mesh with an axis `clients` each on its own device", '`"mesh"` each on the device that owns it'


class Key(NamedTuple):
    """A key of the file.

    Attributes:
      table: where it stands; empty at the top.
      name: its name.
      kind: its type.
      default: its value if it is not given, as JSON; `required` where there is none, empty
        where nothing stands for it.
      within: its range, if it has one.
      meaning: what it does.
    """

    table: str
    name: str
    kind: str
    default: str
    within: str
    meaning: str


def keys() -> Iterator[Key]:
    """Yield every key."""
    for table, config, documented in _PLACES:
        types = field_types(config)  # type: ignore[arg-type]
        meanings = {name: meaning for cls in documented for name, meaning in _meanings(cls).items()}
        for field in dataclasses.fields(config):
            within = field.metadata["within"].text if "within" in field.metadata else ""
            meaning = meanings[field.name].replace(*_AND_THE_MESH)
            yield Key(table, field.name, _kind(types[field.name]), _default(field), within, meaning)


def text(width: int = 100) -> str:
    """Return all keys for a terminal."""
    lines, last = [], None
    for key in keys():
        if key.table != last:
            lines += ["", key.table or "at the top of the file"]
            last = key.table
        lines.append(f"  {key.name}: {_about(key)}")
        lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def markdown() -> str:
    """Return all keys as the tables of the documentation."""
    lines, last = [], None
    for key in keys():
        if key.table != last:
            title = key.table or "At the top of the file"
            lines += ["", f"**{title}**", "", "| key | type | what it says |", "| --- | --- | --- |"]
            last = key.table
        cells = f"`{key.name}`", _about(key), key.meaning
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines[1:])


def _about(key: Key) -> str:
    default = ", required" if key.default == _REQUIRED else f" = {key.default}" if key.default else ""
    return key.kind + default + (f", in {key.within}" if key.within else "")


def _kind(annotation: Any) -> str:
    kind = describe(annotation).replace("'", '"')
    kind = re.sub(r"Literal\[(.*?)\]", lambda choices: choices[1].replace(", ", " | "), kind)
    kind = re.sub("(RoundsConfig|Optimizer|DataConfig|ModelConfig)( \\(an instance.*)?$", "table", kind)
    kind = kind.replace(" (an instance, a name or a (name, config) pair)", " (a name, or a name with its fields)")
    kind = kind.replace(" (an instance or its configuration)", " (a table)")
    kind = re.sub(r"collections.abc.Mapping\[.*?\]", "table", kind)
    return kind.removesuffix(" | function of the step").removesuffix(" | None")


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return _REQUIRED
    table = isinstance(value, Optimizer | DataConfig | ModelConfig)
    return "" if value is None or table else json.dumps(to_json(value))


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Return what the docstring of a class says of each attribute."""
    _, _, rest = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    section = re.split(r"\n\n?(?=\S)", rest, maxsplit=1)[0]
    entries = re.split(r"^  (?=\S)", section, flags=re.MULTILINE)
    pairs = (entry.partition(":") for entry in entries if entry.strip())
    return {name.strip(): " ".join(meaning.split()) for name, _, meaning in pairs}
