"""What an experiment's file says: data and split, model, optimizers, rounds, mapping, seed."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from functional_optimodules.config.fields import Configured, field_types, hyperparameter
from functional_optimodules.federated.options import Execution, OnNonfinite, Weighting
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.types import Json


@dataclasses.dataclass(frozen=True)
class DataConfig(Configured):
    """The table `[data]`.

    Attributes:
      source: `"digits"`, scikit-learn's 1,797 images, or `"npz"`, a NumPy archive
        with `x_train`, `y_train`, `x_test` and `y_test`.
      path: the archive, from the folder of the experiment's file.
      split: how examples are dealt out to clients: `"iid"`, `"dirichlet"` (label
        skew by `alpha`), `"sorted"` (by label, but for a share `similarity` dealt
        out at random), `"labels"` (client i has the labels i, i + 1, ..., of which
        it shares each with the others who have it) or `"id"` (by the archive's
        array `by`).
      num_clients: the number of clients; with `"id"` it follows from the data.
      alpha: concentration of the Dirichlet distribution.
      similarity: share of examples that are dealt out at random.
      labels: how many labels a client has.
      by: name of the archive's array of each training example's client.
    """

    _owner: ClassVar[str] = "[data]"
    source: Literal["digits", "npz"] = "digits"
    path: str | None = None
    split: Literal["iid", "dirichlet", "sorted", "labels", "id"] = "iid"
    num_clients: int = hyperparameter(default=10, within="[1, inf)")
    alpha: float = hyperparameter(default=0.5, within="(0, inf)")
    similarity: float = hyperparameter(default=0.0, within="[0, 1]")
    labels: int = hyperparameter(default=2, within="[1, inf)")
    by: str | None = None

    def validate(self) -> None:
        """Check that what the source and the split need is there.

        Raises:
          KeyError: if it is not.
        """
        if self.source == "npz" and self.path is None:
            raise KeyError("[data]: source='npz' needs a 'path'")
        if self.split == "id" and (self.by is None or self.source != "npz"):
            raise KeyError(
                "[data]: split='id' needs source='npz' and 'by', the archive's array of each example's client"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Configured):
    """The table `[model]`.

    Attributes:
      hidden: widths of the hidden layers; none is multinomial logistic regression.
    """

    _owner: ClassVar[str] = "[model]"
    hidden: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class RoundsConfig(Configured):
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

    _owner: ClassVar[str] = "[rounds]"
    count: int = hyperparameter(within="[1, inf)")
    participants: int | None = hyperparameter(default=None, within="[1, inf)")
    batch_size: int | None = hyperparameter(default=None, within="[1, inf)")
    epochs: int = hyperparameter(default=1, within="[1, inf)")
    weighting: Weighting = "uniform"
    mapping: Execution | Literal["mesh"] = None
    on_nonfinite: OnNonfinite = "error"
    save_every: int = hyperparameter(default=10, within="[1, inf)")


@dataclasses.dataclass(frozen=True)
class Experiment(Configured):
    """A whole experiment.

    Attributes:
      rounds: the table `[rounds]`.
      client: the table `[client]`, the configuration of the clients' `Optimizer`.
      server: the table `[server]`, that of the server's.
      data: the table `[data]`.
      model: the table `[model]`.
      seed: where the split, the initial parameters and all draws come from.
    """

    _owner: ClassVar[str] = "the experiment"
    rounds: RoundsConfig
    client: Optimizer
    server: Optimizer = dataclasses.field(default_factory=lambda: Optimizer(1.0))
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    seed: int = hyperparameter(default=0, within="[0, 4294967295]")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an experiment's file.

        Raises:
          FileNotFoundError: if there is none.
          KeyError: if a key is missing or unknown.
          TypeError: if a value has a wrong type.
          ValueError: if it is no TOML, a value is out of its range, or values do not go together.
        """
        try:
            config = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is no TOML: {error}") from None
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Json]) -> Self:
        """Build an experiment from the values of its file. Raises as `read` does."""
        tables = {name: table.from_config(config[name]) for name, table in _TABLES.items() if name in config}
        return super().from_config({**config, **tables})

    def get_config(self) -> dict[str, Json]:
        """Return the experiment as JSON values, as it is saved beside its results."""
        return {"seed": self.seed, **{name: getattr(self, name).get_config() for name in _TABLES}}


_TABLES: dict[str, type[Configured]] = {
    name: kind for name, kind in field_types(Experiment).items() if issubclass(kind, Configured)
}
