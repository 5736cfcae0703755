"""What one file runs: each combination of the values that it sweeps over, with each seed.

A field is named by its path in the file: `client.lrate`, `rounds.batch_size`. A
number picks from a list, and of a plug-in what follows is its field:
`client.modules.0.beta`.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from functional_optimodules.config.fields import nearest
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.types import Json

ELSEWHERE = ("rounds.count", "rounds.save_every", "seeds", "sweep")


class Trial(NamedTuple):
    """One of the runs of a file.

    Attributes:
      values: what it has of each swept field, and of `seed` where there are several.
      experiment: the experiment with these.
    """

    values: dict[str, Json]
    experiment: Experiment

    @property
    def label(self) -> str:
        """Its values, as one reads them; empty for the only one."""
        return ", ".join(f"{path}={value}" for path, value in self.values.items())


def trials(experiment: Experiment) -> list[Trial]:
    """Return each run of an experiment.

    Raises:
      KeyError: if a swept field is unknown.
      TypeError: if its values are no list.
      ValueError: if a field is given several times, or is the same for all runs; or as
        `Experiment.from_config` does, naming the value.
    """
    axes = dict(swept(experiment.sweep))
    if experiment.seeds:
        if "seed" in axes:
            raise ValueError("the experiment has both 'seeds' and a sweep over 'seed': give one")
        axes["seed"] = list(experiment.seeds)
    alone = {**experiment.get_config(), "seeds": [], "sweep": {}}
    if experiment.problem is not None:  # which arguments a factory has by default, the file does not say
        arguments = (path.removeprefix("problem.") for path in axes if path.startswith("problem."))
        alone["problem"] = {**dict.fromkeys(arguments), **alone["problem"]}
    for path, values in axes.items():
        if path.startswith(ELSEWHERE):
            raise ValueError(f"[sweep]: {path!r} is the same for all runs of a file")
        get_at(alone, path, "[sweep]")
        if len({repr(value) for value in values}) < len(values):
            raise ValueError(f"[sweep]: the values of {path!r} should be different, not {values}")
    found = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        config: Any = alone
        for path, value in chosen.items():
            config = set_at(config, path, value)
        try:
            one = Experiment.from_config(config)
        except (KeyError, TypeError, ValueError) as error:
            raise type(error)(f"[sweep]: {chosen}: {error.args[0]}") from None
        read = one.get_config()
        found.append(Trial({path: get_at(read, path) for path in axes}, one))
    return found


def swept(node: Mapping[str, Json], path: str = "") -> Iterator[tuple[str, list[Json]]]:
    """Yield the path of each field of a table `[sweep]`, with its values; raises as `trials` does."""
    # A key of TOML that is dotted and not quoted makes tables.
    for key, value in node.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from swept(value, name)
        elif not isinstance(value, list) or not value:
            raise TypeError(f"[sweep]: {name}={value!r} should be a list of values")
        else:
            yield name, value


def get_at(config: Json, path: str, what: str = "the experiment") -> Any:
    """Return the value of a field.

    Raises:
      KeyError: if there is none of that path.
    """
    for key in path.split("."):
        inner, place = _step(config, key, path, what)
        config = inner[place]
    return config


def set_at(config: Json, path: str, value: Any, what: str = "the experiment") -> Any:
    """Return a configuration with another value of a field; raises as `get_at` does."""
    return _with(config, path.split("."), value, path, what)


def _with(config: Json, keys: list[str], value: Any, path: str, what: str) -> Any:
    inner, place = _step(config, keys[0], path, what)
    new = inner.copy()
    new[place] = _with(inner[place], keys[1:], value, path, what) if keys[1:] else value
    return new if inner is config else [config[0], new]  # type: ignore[index]


def _step(config: Json, key: str, path: str, what: str) -> tuple[Any, Any]:
    if isinstance(config, list) and len(config) == 2 and isinstance(config[1], dict) and not key.isdigit():
        config = config[1]  # a plug-in is a name and its fields
    if isinstance(config, list) and key.isdigit() and int(key) < len(config):
        return config, int(key)
    if isinstance(config, dict) and key in config:
        return config, key
    known = config if isinstance(config, dict) else map(str, range(len(config) if isinstance(config, list) else 0))
    raise KeyError(f"{what} has no field {path!r}: at {key!r}, {nearest(key, known)}")
