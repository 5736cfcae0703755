"""Experiments from a TOML file: results, resumption, refusals."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functional_optimodules.cli import main
from functional_optimodules.experiments import data, saved
from functional_optimodules.experiments import run as running
from functional_optimodules.experiments.config import DataConfig, Experiment

FILES = {"state.json", "history.csv", "history.jsonl", "clients.csv", "summary.csv"}

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


NATURAL = """
seed = 1
[data]
source = "npz"
path = "data.npz"
split = "id"
by = "writer"
[client]
lrate = 0.3
[rounds]
count = 5
participants = 3
batch_size = 4
save_every = 2
"""


def change(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.slow
def test_a_run_leaves_history_curves_and_state(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = experiment.parent / "out"
    assert main(["run", str(experiment), "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == FILES | {"curves.png"}
    history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((output / "history.csv").read_text().splitlines()))
    assert [row["round"] for row in history] == [0, 1, 2, 3, 4] == [int(row["round"]) for row in table]
    assert {row["participants"] for row in history} == {3}
    assert [row["loss"] for row in history] == [float(row["loss"]) for row in table]
    assert history[-1]["accuracy"] > history[0]["accuracy"]
    assert f"{history[-1]['accuracy']:.4g}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_cut_off_is_resumed_with_identical_results(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = experiment.parent / "whole", experiment.parent / "cut"
    running.run_experiment(experiment, whole, progress=False)
    add = saved.History.add

    def stop(*args: Any) -> None:
        add(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(saved.History, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        running.run_experiment(experiment, cut, progress=False)
    monkeypatch.undo()
    running.run_experiment(experiment, cut, progress=False)
    assert "Resuming after 2 of 5 rounds" in capsys.readouterr().out
    assert (cut / "state.json").read_text() == (whole / "state.json").read_text()
    for name in FILES:
        assert (cut / name).read_text() == (whole / name).read_text()


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten_but_may_be_continued(experiment: Path) -> None:
    output = experiment.parent / "out"
    running.run_experiment(experiment, output, progress=False)
    before = (output / "state.json").read_text()
    with pytest.raises(FileExistsError, match="finished run"):
        running.run_experiment(experiment, output, progress=False)
    assert (output / "state.json").read_text() == before
    history = running.run_experiment(change(experiment, "count = 5", "count = 6"), output, progress=False)
    assert [row["round"] for row in history] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_the_state_of_another_experiment_is_refused_by_the_key_that_differs(experiment: Path) -> None:
    output = experiment.parent / "out"
    running.run_experiment(experiment, output, progress=False)
    with pytest.raises(ValueError, match=r"client.lrate was 0.3, and is 0.4 here"):
        running.run_experiment(change(experiment, "lrate = 0.3", "lrate = 0.4"), output, progress=False)


def test_a_folder_of_something_else_is_refused(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(experiment), "--output", str(experiment.parent)]) == 2
    assert "holds no experiment to resume" in capsys.readouterr().err


def archive(experiment: Path, **change: Any) -> Path:
    """Write an archive of 40 images of 4 writers, and let an experiment take its data from there."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (40, 4, 4), np.uint8), rng.integers(0, 3, 40)
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "writer": np.repeat([7, 3, 9, 5], 10), **change}
    np.savez(experiment.parent / "data.npz", **arrays)
    experiment.write_text(NATURAL)
    return experiment


@pytest.mark.slow
def test_data_come_from_an_archive_by_natural_clients(experiment: Path) -> None:
    history = running.run_experiment(archive(experiment), experiment.parent / "out", progress=False)
    assert len(history) == 5
    by_letter = np.repeat(["g", "c", "i", "e"], 10)
    archive_ = archive(experiment, writer=by_letter)
    assert running.run_experiment(archive_, experiment.parent / "again", progress=False) == history


ONES = np.ones((40, 16), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"y_train": np.repeat(["cat", "dog"], 20)},
            r"'y_train' of data.npz is <U3\[40\]: expected labels, 40 int",
        ),
        ({"y_test": np.full(40, 0.5)}, r"'y_test' of data.npz is float64\[40\]: expected labels"),
        ({"y_test": np.full(40, -1)}, "'y_test' .* expected labels, 40 integers from 0"),
        ({"y_test": np.full(40, np.nan)}, "'y_test' .* expected labels"),
        ({"y_train": np.eye(40, dtype=int)}, r"'y_train' of data.npz is int64\[40, 40\]: expected labels"),
        ({"y_train": np.zeros(39, int)}, r"'y_train' of data.npz is int64\[39\]: expected labels, 40 integers"),
        ({"x_train": np.repeat("pixel", 40)}, r"'x_train' of data.npz is <U5\[40\]: expected numbers"),
        ({"x_train": np.float32(1)}, r"'x_train' of data.npz is float32\[\]: expected numbers, one row an example"),
        (
            {"x_test": ONES[:0], "y_test": np.zeros(0, int)},
            r"'x_test' of data.npz is float32\[0, 16\]: expected",
        ),
        ({"x_test": ONES[:, :15]}, r"'x_test' of data.npz is float32\[40, 15\]: expected 16 numbers an example"),
        ({"writer": np.zeros(10)}, r"'writer' of data.npz is float64\[10\]: expected the clients of 40"),
        ({"x_train": np.array([None] * 40)}, "data.npz is no archive of plain arrays.*Object arrays"),
    ],
)
def test_an_array_that_does_not_fit_is_named_with_what_is_expected(
    experiment: Path, capsys: pytest.CaptureFixture[str], arrays: dict[str, Any], message: str
) -> None:
    output = experiment.parent / "out"
    assert main(["run", str(archive(experiment, **arrays)), "--output", str(output)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()


def test_whole_numbers_are_labels_though_they_be_floats(experiment: Path) -> None:
    archive(experiment, y_test=np.zeros(40), y_train=np.arange(40.0) % 3)
    problem = data.load(Experiment.read(experiment).data, 0, experiment.parent)
    assert problem.classes == 3
    assert problem.test.y.dtype == np.int32


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", "npy", "cut short", "a piece left out", "newer"])
def test_a_file_that_is_no_archive_is_named(
    experiment: Path, capsys: pytest.CaptureFixture[str], content: bytes | str
) -> None:
    path = archive(experiment).parent / "data.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut short":
        path.write_bytes(path.read_bytes()[:-200])
    elif content == "a piece left out":
        path.write_bytes(path.read_bytes()[300:])
    elif content == "newer":
        whole = bytearray(path.read_bytes())
        whole[whole.index(b"PK\x01\x02") + 6] = 200  # the version that it takes to read it
        path.write_bytes(whole)
    else:
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    assert main(["run", str(experiment)]) == 2
    assert "data.npz is no archive of plain arrays" in capsys.readouterr().err


def test_clients_of_a_few_labels_share_each_of_them_evenly(experiment: Path) -> None:
    change(experiment, 'split = "sorted"\nnum_clients = 6', 'split = "labels"\nlabels = 3\nnum_clients = 8')
    problem = data.load(Experiment.read(experiment).data, 0, experiment.parent)
    assert [set(client.y) for client in problem.clients] == [{i, i + 1, (i + 2) % 10} for i in range(8)]


@pytest.mark.parametrize(
    ("labels", "clients", "message"),
    [
        (11, 10, "labels=11 for each client, of 10"),
        (2, 6, "leaves no client the label 7: take more clients"),
    ],
)
def test_labels_that_no_client_has_or_there_are_none_of_are_refused(labels: int, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(DataConfig(split="labels", labels=labels, num_clients=clients), 0, Path())


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "sklearn", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("bare")
def test_without_the_extras_an_archive_is_run_and_all_but_the_curves_is_written(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = experiment.parent / "out"
    assert main(["run", str(archive(experiment)), "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == FILES
    printed, errors = capsys.readouterr()
    assert "No curves were drawn: they need matplotlib: install with `pip install" in printed
    assert "Curves:" not in printed
    assert errors == ""


@pytest.mark.usefixtures("bare")
def test_without_scikit_learn_the_digits_are_refused_once_the_file_is_read(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(experiment)]) == 2
    assert "the digits need scikit-learn: install with `pip install" in capsys.readouterr().err
    assert main(["run", str(change(experiment, "count = 5", "count = 0"))]) == 2
    assert "count=0 should be in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count = 5", "count = 0", r"\[rounds\]: count=0 should be in \[1, inf\)"),
        ("count = 5", "", r"\[rounds\] needs a value for 'count'"),
        ("count = 5", "count = 'five'", "count='five' should be of type int"),
        ("participants", "participant", "did you mean 'participants'"),
        ("participants = 3", "participants = 7", "participants"),
        ('"sorted"', '"sortet"', "split='sortet' should be of type"),
        ('"scaffold-client"', '"scaffold-cliemt"', "no module is named 'scaffold-cliemt'"),
        ('modules = ["scaffold-client"]', "", "a module and its counterpart"),
        ("seed = 1", "seed = ", "is no TOML"),
        ("[data]", '[data]\nsource = "npz"', "source='npz' needs a 'path'"),
        ('"sorted"', '"id"\nby = "writer"', "split='id' needs source='npz' and 'by'"),
        ("[data]", "[model]\nhidden = 3\n[data]", r"\[model\]: hidden=3 should be of type list of int"),
        ("[data]", "[model]\nhidden = [8, -3]\n[data]", r"\[model\]: hidden=\[8, -3\] should be widths of at least 1"),
        ("count = 5", "count = 5\nmapping = -5", r"\[rounds\]: mapping=-5 should be in \[1, inf\)"),
        ("count = 5", "count = 5\nmapping = 'mash'", r"\[rounds\]: mapping='mash' should be of type"),
        ("seed = 1", "seed = 1\nmodel = 3", r"\[model\]: a configuration is a mapping, not 3"),
        ("seed = 1", "seed = -1", r"the experiment: seed=-1 should be in \[0, 4294967295\]"),
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


@pytest.mark.slow
def test_a_client_that_diverges_ends_the_run_and_is_named(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(experiment, "lrate = 0.3", "lrate = 1e38")
    assert main(["run", str(experiment), "--output", str(experiment.parent / "out")]) == 1
    assert re.search(r"round 0.*clients? \[", capsys.readouterr().err)


def test_an_experiment_says_all_of_its_values(experiment: Path) -> None:
    config = json.loads(json.dumps(Experiment.read(experiment).get_config()))
    assert config["rounds"]["epochs"] == 1
    assert config["client"]["modules"] == [["scaffold-client", {}]]
    assert Experiment.from_config(config) == Experiment.read(experiment)
    assert Experiment.from_config(config).get_config() == config
