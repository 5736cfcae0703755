"""What an experiment's file says: problem, optimizers, rounds, seeds, and what is swept over.

What a round may be is read off the fields of `Federation`: a new one needs no line here.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

from functional_optimodules.config.fields import Configured, FrozenConfig, field_types, hyperparameter, to_json
from functional_optimodules.config.plugin import UnknownPlugin
from functional_optimodules.experiments.problem import BUILT_IN, import_factory
from functional_optimodules.federated import Federation
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.types import Json


@dataclasses.dataclass(frozen=True)
class DataConfig(Configured):
    """The table `[data]`; in the table `[problem]`, arguments of `"digits"` and `"npz"`.

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
    """The table `[model]`, likewise.

    Attributes:
      hidden: widths of the hidden layers; none is multinomial logistic regression.
    """

    _owner: ClassVar[str] = "[model]"
    hidden: tuple[int, ...] = ()

    def validate(self) -> None:
        """Check that each layer has units.

        Raises:
          ValueError: if one has none.
        """
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"[model]: hidden={list(self.hidden)} should be widths of at least 1")


@dataclasses.dataclass(frozen=True)
class RunConfig(Configured):
    """What `[rounds]` says beside what a round is.

    Attributes:
      count: how many rounds.
      participants: clients sampled in a round; all if it is not given.
      drop_rate: the probability with which a participant drops out in mid-round.
      save_every: rounds between two saved states.
    """

    _owner: ClassVar[str] = "[rounds]"
    count: int = hyperparameter(within="[1, inf)")
    participants: int | None = hyperparameter(default=None, within="[1, inf)")
    drop_rate: float | None = hyperparameter(default=None, within="[0, 1]")
    save_every: int = hyperparameter(default=10, within="[1, inf)")


Mapped: TypeAlias = Literal["scan", "vmap", "mesh"] | int | None
"""As a federation's `mapping`, where a file says `"mesh"` for all devices."""

_ELSEWHERE = ("loss_fn", "eval_fn", "client", "server")


def _round_options() -> list[tuple[str, Any, Any]]:
    types = field_types(Federation) | {"mapping": Mapped}
    return [
        (
            each.name,
            types[each.name],
            dataclasses.field(default=each.default, default_factory=each.default_factory, metadata=each.metadata),  # type: ignore[call-overload]
        )
        for each in dataclasses.fields(Federation)
        if each.name not in _ELSEWHERE
    ]


if TYPE_CHECKING:

    class RoundsConfig(RunConfig, Federation):
        """The table `[rounds]`: the fields of `RunConfig`, and those of `Federation` but for losses and optimizers."""

        mapping: Mapped  # type: ignore[assignment]

else:
    RoundsConfig = dataclasses.make_dataclass(
        "RoundsConfig", _round_options(), bases=(RunConfig,), frozen=True, namespace={"__module__": __name__}
    )


@dataclasses.dataclass(frozen=True)
class Experiment(Configured):
    """A whole experiment.

    Attributes:
      rounds: the table `[rounds]`.
      client: the table `[client]`, the configuration of the clients' `Optimizer`.
      server: the table `[server]`, that of the server's.
      problem: the table `[problem]`: `factory`, a function that returns the `Problem`,
        as `"module:function"`, or `"digits"` or `"npz"`; and its arguments by name.
      data: the table `[data]`, of the built-in problems.
      model: the table `[model]`, of the built-in problems.
      seed: where the split, the initial parameters and all draws come from.
      seeds: several, in the place of one: the experiment is run with each.
      sweep: the table `[sweep]`: for each of some fields, such as `client.lrate` or
        `client.modules.0.beta`, the list of its values. All combinations are run.
    """

    _owner: ClassVar[str] = "the experiment"
    rounds: RoundsConfig
    client: Optimizer
    server: Optimizer = dataclasses.field(default_factory=lambda: Optimizer(1.0))
    problem: Mapping[str, Json] | None = None
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    seed: int = hyperparameter(default=0, within="[0, 4294967295]")
    seeds: tuple[int, ...] = ()
    sweep: Mapping[str, Json] = FrozenConfig({})

    def validate(self) -> None:
        """Check that the problem names its factory, and each seed is one.

        Raises:
          KeyError: if the factory is missing.
          TypeError: if it is no text.
          ValueError: if a seed is out of range, or given twice.
        """
        if self.problem is not None:
            if "factory" not in self.problem:
                raise KeyError("[problem] needs a value for 'factory'")
            if not isinstance(self.problem["factory"], str):
                raise TypeError(f"[problem]: factory={self.problem['factory']!r} should be of type str")
        if len(set(self.seeds)) < len(self.seeds) or not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"the experiment: seeds={list(self.seeds)} should be different, and in [0, 4294967295]")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an experiment's file, and import first the module that its problem's factory is in.

        What that module declares, the file may name: modules, regularizers, schedulers and
        aggregators.

        Raises:
          FileNotFoundError: if there is none.
          KeyError: if a key or a plug-in is missing or unknown, or the factory's module.
          TypeError: if a value has a wrong type.
          ValueError: if it is no TOML, a value is out of its range, or values do not go together.
        """
        try:
            config = tomllib.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # it may also nest deeper, or count higher, than Python reads
            raise ValueError(f"{path} is no TOML: {error}") from None
        if factory := _factory(config):
            import_factory(factory, path.parent)
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Json]) -> Self:
        """Build an experiment from the values of its file. Raises as `read` does."""
        for table in ("data", "model"):
            if table in config and config.get("problem") is not None:
                raise ValueError(f"the experiment has both [problem] and [{table}], which is of the built-in ones")
        try:
            tables = {name: table.from_config(config[name]) for name, table in _TABLES.items() if name in config}
        except UnknownPlugin as error:
            own = _factory(config).partition(":")[0]
            imported = f"functional_optimodules and {own}" if own else "functional_optimodules"
            raise UnknownPlugin(f"{error.args[0]} (imported: {imported})") from None
        return super().from_config({**config, **tables})

    def get_config(self) -> dict[str, Json]:
        """Return the experiment as JSON values, as it is saved beside its results."""
        unused = ("data", "model") if self.problem is not None else ("problem",)
        tables = {name: _whole(getattr(self, name)) for name in _TABLES}
        return {name: value for name, value in {**super().get_config(), **tables}.items() if name not in unused}


def _whole(table: Configured) -> dict[str, Json]:
    """Return a configuration with what it leaves out while it has its default, so that all fields have paths."""
    fields = dataclasses.fields(table)  # type: ignore[arg-type]
    config = {field.name: to_json(field.default) for field in fields if field.metadata.get("omit")}
    config |= table.get_config()
    return {**config, "groups": [_whole(group) for group in table.groups]} if isinstance(table, Optimizer) else config


def _factory(config: Mapping[str, Json]) -> str:
    """Return what a file calls its factory; empty for none that is a text, or a built-in one."""
    problem = config.get("problem")
    name = problem.get("factory") if isinstance(problem, Mapping) else None
    return name if isinstance(name, str) and name not in BUILT_IN else ""


_TABLES: dict[str, type[Configured]] = {
    name: kind
    for name, kind in field_types(Experiment).items()
    if isinstance(kind, type) and issubclass(kind, Configured)
}
