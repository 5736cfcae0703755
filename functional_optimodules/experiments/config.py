"""What an experiment's file says: data and split, model, optimizers, rounds, mapping, seed."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from functional_optimodules.core.fields import Interval, Mismatch, coerce, describe, nearest
from functional_optimodules.optimizer import Optimizer


def _within(text: str) -> Any:
    return {"within": Interval(text)}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The table `[data]`.

    Attributes:
      source: `"digits"`, scikit-learn's 1,797 images, or `"npz"`, a NumPy archive
        with `x_train`, `y_train`, `x_test` and `y_test`.
      path: the archive.
      split: how examples are dealt out to clients: `"iid"`, `"dirichlet"` (label
        skew by `alpha`), `"sorted"` (by label, but for a share `similarity` dealt
        out at random) or `"id"` (by the archive's array `by`).
      num_clients: the number of clients; with `"id"` it follows from the data.
      alpha: concentration of the Dirichlet distribution, > 0.
      similarity: share of examples that are dealt out at random, in [0, 1].
      by: name of the archive's array of each training example's client.
    """

    source: Literal["digits", "npz"] = "digits"
    path: str | None = None
    split: Literal["iid", "dirichlet", "sorted", "id"] = "iid"
    num_clients: int = dataclasses.field(default=10, metadata=_within("[1, inf)"))
    alpha: float = dataclasses.field(default=0.5, metadata=_within("(0, inf)"))
    similarity: float = dataclasses.field(default=0.0, metadata=_within("[0, 1]"))
    by: str | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The table `[model]`.

    Attributes:
      hidden: widths of the hidden layers; none is multinomial logistic regression.
    """

    hidden: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    """The table `[rounds]`.

    Attributes:
      count: how many rounds.
      participants: clients sampled in a round; all if it is not given.
      batch_size: examples in a local batch; all of the client's if not given.
      epochs: local passes in a round.
      weighting: how clients count in the mean.
      mapping: `"scan"`, `"vmap"`, a chunk size, or `"mesh"` for all devices.
      on_nonfinite: `"error"` or `"skip"`, for clients that send such values.
      save_every: rounds between two saved states.
    """

    count: int = dataclasses.field(metadata=_within("[1, inf)"))
    participants: int | None = dataclasses.field(default=None, metadata=_within("[1, inf)"))
    batch_size: int | None = dataclasses.field(default=None, metadata=_within("[1, inf)"))
    epochs: int = dataclasses.field(default=1, metadata=_within("[1, inf)"))
    weighting: Literal["uniform", "examples"] = "uniform"
    mapping: int | Literal["scan", "vmap", "mesh"] | None = None
    on_nonfinite: Literal["error", "skip"] = "error"
    save_every: int = dataclasses.field(default=10, metadata=_within("[1, inf)"))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole experiment.

    Attributes:
      rounds: the table `[rounds]`.
      client: the table `[client]`, the configuration of the clients' `Optimizer`.
      server: the table `[server]`, that of the server's.
      data: the table `[data]`.
      model: the table `[model]`.
      seed: where the split, the initial parameters and all draws come from.
    """

    rounds: RoundsConfig
    client: Mapping[str, Any]
    server: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"lrate": 1.0})
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    seed: int = dataclasses.field(default=0, metadata=_within("[0, 4294967295]"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an experiment's file.

        Raises:
          FileNotFoundError: if there is none.
          KeyError: if a key is missing or unknown.
          TypeError: if a value has a wrong type.
          ValueError: if it is no TOML, or a value is out of its range.
        """
        try:
            config = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is no TOML: {error}") from None
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an experiment from the values of its file. Raises as `read` does."""
        config = dict(config)
        for name, table in (("rounds", RoundsConfig), ("data", DataConfig), ("model", ModelConfig)):
            if name in config:
                config[name] = _build(table, config[name], f"[{name}]")
        experiment = _build(cls, config, "the experiment")
        for name in ("client", "server"):
            Optimizer.from_config(getattr(experiment, name))
        if experiment.data.source == "npz" and experiment.data.path is None:
            raise KeyError("[data]: source='npz' needs a 'path'")
        if experiment.data.split == "id" and experiment.data.by is None:
            raise KeyError("[data]: split='id' needs 'by', the archive's array of each example's client")
        return experiment

    def to_json(self) -> dict[str, Any]:
        """Return the experiment as JSON values, as it is saved beside its results."""
        config = {**vars(self), **{name: vars(getattr(self, name)) for name in ("rounds", "data", "model")}}
        for name in ("client", "server"):
            config[name] = Optimizer.from_config(getattr(self, name)).get_config()
        config["model"] = {"hidden": list(self.model.hidden)}
        return config


def _build(cls: Any, config: Any, where: str) -> Any:
    if not isinstance(config, Mapping):
        raise TypeError(f"{where} should be a table, not {config!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in config:
        if key not in fields:
            raise KeyError(f"{where} has an unknown key {key!r}: {nearest(key, fields)}")
    values = {}
    for name, field in fields.items():
        if name not in config:
            if field.default is field.default_factory is dataclasses.MISSING:
                raise KeyError(f"{where} lacks {name!r}")
            continue
        try:
            values[name] = value = coerce(config[name], field.type)
        except Mismatch:
            raise TypeError(f"{where}: {name}={config[name]!r} should be of type {describe(field.type)}") from None
        within = field.metadata.get("within")
        if within is not None and value is not None and value not in within:
            raise ValueError(f"{where}: {name}={value!r} should be in {within.text}")
    return cls(**values)
