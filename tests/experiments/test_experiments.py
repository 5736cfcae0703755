"""Experiments from a TOML file: results, resumption, refusals."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functional_optimodules.cli import main
from functional_optimodules.experiments import run as running
from functional_optimodules.experiments.config import Experiment

SCAFFOLD = """
seed = 1
[data]
split = "sorted"
num_clients = 6
[client]
lrate = 0.3
modules = ["scaffold-client"]
[server]
lrate = 1.0
modules = [["scaffold-server", { num_clients = 6 }]]
[rounds]
count = 5
participants = 3
batch_size = 64
save_every = 2
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "scaffold.toml"
    path.write_text(SCAFFOLD)
    return path


def change(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_a_run_leaves_history_curves_and_state(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = experiment.parent / "out"
    assert main(["run", str(experiment), "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {"state.json", "history.csv", "history.json", "curves.png"}
    history = json.loads((output / "history.json").read_text())
    rows = list(csv.DictReader((output / "history.csv").read_text().splitlines()))
    assert history["round"] == [1, 2, 3, 4, 5] == [int(row["round"]) for row in rows]
    assert history["participants"] == [3] * 5
    assert history["loss"] == [float(row["loss"]) for row in rows]
    assert history["accuracy"][-1] > history["accuracy"][0]
    assert f"{history['accuracy'][-1]:.4f} after 5 rounds" in capsys.readouterr().out


def test_a_run_that_was_cut_off_is_resumed_with_identical_results(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = experiment.parent / "whole", experiment.parent / "cut"
    running.run_experiment(experiment, whole, progress=False)
    write = running.write_history

    def stop(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "write_history", stop)
    with pytest.raises(KeyboardInterrupt):
        running.run_experiment(experiment, cut, progress=False)
    monkeypatch.undo()
    running.run_experiment(experiment, cut, progress=False)
    assert "Resuming after round 2 of 5" in capsys.readouterr().out
    assert (cut / "state.json").read_text() == (whole / "state.json").read_text()
    assert (cut / "history.csv").read_text() == (whole / "history.csv").read_text()


def test_a_finished_run_is_not_overwritten_but_may_be_continued(experiment: Path) -> None:
    output = experiment.parent / "out"
    running.run_experiment(experiment, output, progress=False)
    before = (output / "state.json").read_text()
    with pytest.raises(FileExistsError, match="finished run"):
        running.run_experiment(experiment, output, progress=False)
    assert (output / "state.json").read_text() == before
    history = running.run_experiment(change(experiment, "count = 5", "count = 6"), output, progress=False)
    assert history["round"] == [1, 2, 3, 4, 5, 6]


def test_the_state_of_another_experiment_is_refused_by_the_key_that_differs(experiment: Path) -> None:
    output = experiment.parent / "out"
    running.run_experiment(experiment, output, progress=False)
    with pytest.raises(ValueError, match=r"client.lrate was 0.3, and is 0.4 here"):
        running.run_experiment(change(experiment, "lrate = 0.3", "lrate = 0.4"), output, progress=False)


def test_a_folder_of_something_else_is_refused(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(experiment), "--output", str(experiment.parent)]) == 2
    assert "holds no experiment to resume" in capsys.readouterr().err


def test_data_come_from_an_archive_by_natural_clients(experiment: Path) -> None:
    rng = np.random.default_rng(0)
    x, y, writer = rng.integers(0, 255, (40, 4, 4), np.uint8), rng.integers(0, 3, 40), np.repeat([7, 3, 9, 5], 10)
    np.savez(experiment.parent / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y, writer=writer)
    change(
        experiment,
        'split = "sorted"\nnum_clients = 6',
        'source = "npz"\npath = "data.npz"\nsplit = "id"\nby = "writer"',
    )
    change(experiment, "num_clients = 6", "num_clients = 4")
    change(experiment, "batch_size = 64", "batch_size = 4")
    history = running.run_experiment(experiment, experiment.parent / "out", progress=False)
    assert len(history["round"]) == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count = 5", "count = 0", r"\[rounds\]: count=0 should be in \[1, inf\)"),
        ("count = 5", "", r"\[rounds\] lacks 'count'"),
        ("count = 5", "count = 'five'", "count='five' should be of type int"),
        ("participants", "participant", "did you mean 'participants'"),
        ("participants = 3", "participants = 7", "participants"),
        ('"sorted"', '"sortet"', "split='sortet' should be of type"),
        ('"scaffold-client"', '"scaffold-cliemt"', "no module is named 'scaffold-cliemt'"),
        ('modules = ["scaffold-client"]', "", "a module and its counterpart"),
        ("seed = 1", "seed = ", "is no TOML"),
        ("[data]", '[data]\nsource = "npz"', "source='npz' needs a 'path'"),
        ("[data]", '[data]\nsource = "npz"\npath = "none.npz"', "there is no file"),
    ],
)
def test_bad_experiments_are_refused_before_anything_is_written(
    experiment: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    output = experiment.parent / "out"
    assert main(["run", str(change(experiment, old, new)), "--output", str(output)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


def test_a_client_that_diverges_ends_the_run_and_is_named(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(experiment, "lrate = 0.3", "lrate = 1e38")
    assert main(["run", str(experiment), "--output", str(experiment.parent / "out")]) == 1
    assert re.search(r"round 0.*clients? \[", capsys.readouterr().err)


def test_an_experiment_says_all_of_its_values(experiment: Path) -> None:
    config = json.loads(json.dumps(Experiment.read(experiment).to_json()))
    assert config["rounds"]["epochs"] == 1
    assert config["client"]["modules"] == [["scaffold-client", {}]]
    assert Experiment.from_config(config).to_json() == Experiment.read(experiment).to_json()
