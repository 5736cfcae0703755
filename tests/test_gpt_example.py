"""The GPT of the examples, tiny: runs that were stopped go on bit by bit, and losses are those of raw optax."""

import functools
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import optax
import pytest
from flax import nnx

import functional_optimodules as fo
from examples.gpt import compare, in_optax, text
from examples.gpt.model import GPT
from examples.gpt.plot import draw
from examples.gpt.train import train

FOLDER = Path(compare.__file__).parent
TINY = {"layers": 1, "width": 16, "heads": 2, "context": 16}

pytestmark = pytest.mark.slow


def run(file: str, steps: int, folder: Path) -> list[dict[str, float]]:
    optimizer = fo.Optimizer.from_config(json.loads((FOLDER / file).read_text()))
    return train(GPT(nnx.Rngs(0), **TINY), optimizer, steps, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what a short comparison finds, by the name of the run."""
    folder = tmp_path_factory.mktemp("gpt")
    return {name: compare.compare(name, 60, folder / file, **TINY) for name, (file, _) in compare.RUNS.items()}


@pytest.mark.parametrize("stop", [5, 6], ids=["between two batches of a step", "between two steps"])
def test_a_run_that_was_stopped_has_the_losses_of_one_that_was_not(stop: int, tmp_path: Path) -> None:
    whole, stopped = ([row["loss"] for row in run("muon.json", steps, tmp_path / str(steps))] for steps in (12, stop))
    assert stopped == whole[:stop]
    assert [row["loss"] for row in run("muon.json", 12, tmp_path / str(stop))] == whole
    assert len(set(whole)) == 12


def test_a_step_tells_what_the_file_asks_for_and_no_more(tmp_path: Path) -> None:
    watched = {"gradient_norm", "update_ratio", "l2-global-clipping/clipped"}
    of_groups = {f"groups/{group}/{what}" for group in ("matrices", "rest") for what in ("lrate", "update_ratio")}
    first, *_, last = run("muon.json", 4, tmp_path)
    assert first.keys() == {"loss", *watched, *of_groups}
    assert last.keys() == first.keys() | {"held_out", "held_out_averaged"}
    assert last["groups/matrices/lrate"] == pytest.approx(3 * last["groups/rest/lrate"])


def test_a_folder_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    run("muon.json", 1, tmp_path)
    with pytest.raises(ValueError, match="checkpoints of another optimizer: choose a new folder"):
        run("adamw.json", 2, tmp_path)


@pytest.mark.parametrize("name", compare.RUNS)
def test_losses_are_those_of_raw_optax(name: str, found) -> None:
    history, losses, difference = found[name]
    assert difference < compare.BOUND == 1e-5
    assert len(history) == len(losses) == 60
    assert np.mean(losses[-10:]) < losses[0] - 0.1
    assert history[-1]["held_out_averaged"] > history[-1]["held_out"]  # it lags behind where losses fall fast


def test_optax_with_another_beta_is_further_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(in_optax.schedule, weight_decay=0.1))
    make = optax.MultiSteps(chain, every_k_schedule=2).gradient_transformation
    monkeypatch.setitem(compare.RUNS, "AdamW", ("adamw.json", make))
    assert compare.compare("AdamW", 60, tmp_path, **TINY)[2] > 10 * compare.BOUND


def test_curves_are_drawn(found, tmp_path: Path) -> None:
    histories = {name: history for name, (history, _, _) in found.items()}
    draw(tmp_path / "curves.png", histories, {name: losses for name, (_, losses, _) in found.items()}, compare.BOUND)
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000


def test_the_command_trains_by_its_file_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("examples.gpt.model.GPT", functools.partial(GPT, **TINY))
    for steps in ("2", "3"):
        monkeypatch.setattr(sys, "argv", ["gpt", "--folder", str(tmp_path), "--steps", steps])
        runpy.run_module("examples.gpt", run_name="__main__")
        table, _, told = capsys.readouterr().out.strip().rpartition("\n")
        assert table.count("optax contrib.muon") == 6
        assert told.split()[0] == steps


def test_text_is_prose_that_is_held_out_from_training() -> None:
    train_text, held_out = text.read()
    assert len(held_out) > 40_000
    assert len(train_text) > 8 * len(held_out)
    assert b"augmented assignment" in train_text.tobytes()
    assert not np.array_equal(text.batch(train_text, 16, 4, 0), text.batch(train_text, 16, 4, 1))
