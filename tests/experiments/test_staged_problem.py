"""A problem whose clients are staged: run from a file, cut off and resumed, beside the same clients on the device."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from functional_optimodules.experiments import saved
from functional_optimodules.experiments.run import dry_run, run_experiment

pytestmark = pytest.mark.slow

Write = Callable[..., Path]

STAGED = """
import jax
import numpy as np

import regression
from functional_optimodules.federated import StagedData


def make(seed, **more):
    problem = regression.make(seed, **more)
    sizes = [len(share["y"]) for share in problem.data]
    return problem._replace(data=StagedData(jax.tree.map(lambda *each: np.concatenate(each), *problem.data), sizes))
"""
SCAFFOLD = (
    ('modules = [["momentum", { beta = 0.5 }]]', 'modules = ["scaffold-client"]'),
    ("count = 4", "count = 7"),
)
SERVER = '[server]\nlrate = 1.0\nmodules = [["scaffold-server", { num_clients = 4 }]]\n'


@pytest.fixture
def both(regression: Write) -> tuple[Path, Path]:
    on_device = regression(*SCAFFOLD, more=SERVER)
    (on_device.parent / "staged.py").write_text(STAGED)
    factory = ('factory = "regression:make"', 'factory = "staged:make"')
    return on_device, regression(*SCAFFOLD, factory, more=SERVER, name="staged.toml")


def run(path: Path, output: str, *overrides: str) -> list[dict[str, Any]]:
    return run_experiment(path, path.parent / output, overrides, say=lambda line: None, progress=False)


def by_client(folder: Path) -> list[dict[str, str]]:
    with (folder / "clients.csv").open() as file:
        return list(csv.DictReader(file))


def test_it_gives_the_numbers_of_the_same_clients_on_the_device(both: tuple[Path, Path]) -> None:
    on_device, staged = both
    assert run(staged, "staged") == run(on_device, "whole")
    assert by_client(staged.parent / "staged") == by_client(staged.parent / "whole")


def test_cut_off_between_any_two_saves_it_goes_on_with_the_same_numbers(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device, staged = both
    expected = run(on_device, "whole")
    write, left = saved.write, 0

    def failing(*args: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(saved, "write", failing)
    for last in (2, 3):  # the first is of a run without a round
        left = last
        with pytest.raises(OSError, match="cannot write to"):
            run(staged, f"cut-{last}")
        left = -1
        assert run(staged, f"cut-{last}") == expected


def test_of_several_seeds_each_has_its_own_clients(both: tuple[Path, Path]) -> None:
    on_device, staged = both
    for path in both:
        path.write_text(path.read_text().replace("seed = 3", "seeds = [3, 4]"))
    expected = {(row["seed"], row["round"]): row for row in run(on_device, "whole")}
    found = run(staged, "staged")
    assert len(found) == 14
    for row in found:
        assert row == pytest.approx(expected[row["seed"], row["round"]], rel=1e-5)


def test_a_dry_run_says_what_it_would_run(both: tuple[Path, Path]) -> None:
    lines: list[str] = []
    dry_run(both[1], say=lines.append)
    assert "  2 of 4 clients in a round, 2 to 4 local steps each" in lines


def test_what_is_saved_grows_with_no_client(both: tuple[Path, Path]) -> None:
    run(both[1], "staged")
    state = json.loads((both[1].parent / "staged" / "state.json").read_text())["runs"][0]["state"]
    assert state["clients"] == []
    assert all(array["shape"][0] == 0 for array in state["bank"].values())
