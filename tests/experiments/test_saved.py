"""A folder of an experiment: overridden, held by one run, whole when the disk is full; compared and tried dry."""

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional_optimodules.cli import main
from functional_optimodules.experiments import run as running
from functional_optimodules.experiments import saved
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.grouping import simulation_of
from functional_optimodules.experiments.run import run_experiment
from functional_optimodules.experiments.simulation import Simulation
from functional_optimodules.experiments.traffic import Traffic

Write = Callable[..., Path]


def run(path: Path, output: str = "out", *overrides: str) -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    return run_experiment(path, path.parent / output, overrides, say=said.append, progress=False), said


@pytest.mark.slow
def test_a_saved_run_goes_on_with_other_fields_when_told_so_and_says_what_changed(regression: Write) -> None:
    before, _ = run(regression())
    longer = regression(("count = 4", "count = 6"))
    with pytest.raises(ValueError, match=r"client.lrate was 0.05, and is 0.01 here.*say --override"):
        run(regression(("count = 4", "count = 6"), ("lrate = 0.05", "lrate = 0.01")))
    with pytest.raises(ValueError, match=r"rounds.batch_size was 2, and is 3 here"):
        run(regression(("count = 4", "count = 6"), ("batch_size = 2", "batch_size = 3")), "out", "client.lrate=0.01")
    rows, said = run(longer, "out", "client.lrate=0.01", "client.modules.0.beta=0.25", "rounds.batch_size=3")
    assert rows[:4] == before
    assert len(rows) == 6
    assert [line for line in said if "from now on" in line] == [
        "client.lrate was 0.05, and is 0.01 from now on.",
        "client.modules.0.beta was 0.5, and is 0.25 from now on.",
        "rounds.batch_size was 2, and is 3 from now on.",
    ]
    config, _ = saved.read(longer.parent / "out")
    assert config["client"]["lrate"] == 0.01


@pytest.mark.slow
def test_decode_takes_named_changes_alone(regression: Write) -> None:
    path = regression()
    one = simulation_of(Experiment.read(path), path.parent)
    other = simulation_of(
        Experiment.read(regression(("lrate = 0.05", "lrate = 0.01"), ("batch_size = 2", "batch_size = 3"))), path.parent
    )
    payload = one.federation.encode(one.init())
    for changed in ((), ("client.lrate",), ("batch_size",), ("client",)):
        with pytest.raises(ValueError, match=r"was .*, and is .* here"):
            other.federation.decode(payload, other.init(), changed=changed)
    state = other.federation.decode(payload, other.init(), changed=("client.lrate", "batch_size"))
    assert int(state.round) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("client.lrate", "expected a field and its value, such as client.lrate=0.01"),
        ("seeds=[1, 2]", "expected a field"),
        ("client.lrat=1", "has no field 'client.lrat'"),
        ("client.lrate=fast", "--override client.lrate=fast: no scheduler is named 'fast'"),
        ("rounds.epochs=0", "epochs=0 should be in"),
    ],
)
def test_an_override_that_cannot_be_is_refused(
    regression: Write, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["run", str(regression()), "--override", override]) == 2
    assert message in capsys.readouterr().err


def test_an_override_of_what_is_swept_over_is_refused(regression: Write) -> None:
    with pytest.raises(ValueError, match=r"'client.lrate' is swept over"):
        run(regression(more="[sweep]\nclient.lrate = [1, 2]"), "out", "client.lrate=3")


@pytest.mark.slow
def test_a_run_that_was_cut_off_as_it_ended_ends(regression: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = regression()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    monkeypatch.undo()
    rows, _ = run(path)
    assert len(rows) == 4
    assert (path.parent / "out" / "summary.csv").exists()
    with pytest.raises(FileExistsError, match="finished run"):
        run(path)


def test_an_interrupted_command_says_how_to_go_on(
    regression: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run_experiment", stop)
    assert main(["run", str(regression())]) == 1
    assert "interrupted: the same command goes on" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused(regression: Write) -> None:
    path = regression()
    with saved.locked(path.parent / "out"), pytest.raises(FileExistsError, match="another run is at work in"):
        run(path)
    with saved.locked(path.parent / "out"):
        pass


class Killed(BaseException):
    """What ends a process, which no code of it sees."""


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def cut(folder: Path, number: int, error: BaseException) -> Iterator[None]:
    """Let the write of that number into a folder fail half done; what kills comes at renames and removals too."""
    writes, real = itertools.count(1), {"open": io.open, "replace": os.replace, "unlink": os.unlink}

    def due(path: Any) -> bool:
        return isinstance(path, Path) and folder in path.parents and next(writes) == number

    def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode[0] in "wa" and due(path):
            with real["open"](path, mode, encoding="utf-8") as file:
                file.write('{"cut')
            raise error
        return real["open"](path, mode, *args, **options)

    def renamed(name: str, path: Any, *args: Any) -> None:
        if isinstance(error, Killed) and due(path):
            raise error
        real[name](path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", opened)
        for name in ("replace", "unlink"):
            patch.setattr(os, name, functools.partial(renamed, name))
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("error", "writes"), [(Killed(), 19), (FULL, 11)])
def test_cut_off_at_any_write_a_run_goes_on_and_leaves_the_same_bits(
    regression: Write, monkeypatch: pytest.MonkeyPatch, error: BaseException, writes: int
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = regression()
    run(path, "whole")
    for number in itertools.count(1):
        folder = path.parent / f"cut-{number}"
        try:
            with cut(folder, number, error):
                run(path, folder.name)
            break
        except (Killed, OSError):
            pass
        run(path, folder.name)
        assert contents(folder) == contents(path.parent / "whole"), number
    assert number == writes + 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("client.lrate=0.01",)])
def test_cut_off_as_it_goes_on_a_run_is_not_taken_for_the_finished_one_that_it_was(
    regression: Write, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path, longer = regression(), regression(("count = 4", "count = 6"), name="longer.toml")
    run(path, "ended")
    shutil.copytree(path.parent / "ended", path.parent / "whole")
    run(longer, "whole", *more)
    for number in itertools.count(1):
        folder = path.parent / f"cut-{number}"
        shutil.copytree(path.parent / "ended", folder)
        try:
            with cut(folder, number, Killed()):
                run(longer, folder.name, *more)
            break
        except Killed:
            run(longer, folder.name, *more)
        assert contents(folder) == contents(path.parent / "whole"), number
    assert number > 10


def test_a_full_disk_leaves_what_was_saved_and_the_error_says_so(
    regression: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = regression()
    with cut(path.parent / "out", 7, FULL):
        assert main(["run", str(path), "--output", str(path.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert "out: No space left on device: the state after 2 rounds, saved before, is whole" in error
    assert len(saved.read(path.parent / "out")[1][0]["rows"]) == 2
    with cut(path.parent / "new", 1, FULL), pytest.raises(OSError, match="No space left on device: no round was saved"):
        run(path, "new")
    assert list((path.parent / "new").iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_before_a_round_is_run(
    regression: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Simulation, "advance", never)
    path = regression()
    (path.parent / "file").touch()
    with pytest.raises(OSError, match=r"cannot make the folder .*file: File exists"):
        run(path, "file")
    with pytest.raises(OSError, match=r"cannot make the folder .*file/out: Not a directory"):
        run(path, "file/out")
    (path.parent / "out").mkdir()
    (path.parent / "out" / "state.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write to .*out: No space left on device: no round was saved before"):
        run(path)


@pytest.mark.slow
def test_a_folder_without_a_round_is_begun_anew_whatever_it_was_to_be(regression: Write) -> None:
    path = regression(("lrate = 0.05", "lrate = 1e38"))
    with pytest.raises(FloatingPointError):
        run(path)
    assert main(["compare", str(path.parent / "out")]) == 2
    assert len(run(regression())[0]) == 4


@pytest.mark.slow
def test_fewer_rounds_than_there_are_is_refused(regression: Write) -> None:
    path = regression()
    with cut(path.parent / "out", 14, Killed()), pytest.raises(Killed):
        run(path)
    with pytest.raises(ValueError, match=r"out holds 4 rounds of this experiment, and rounds.count=3 here"):
        run(regression(("count = 4", "count = 3")))


@pytest.mark.parametrize("content", ["", "{}", '{"experiment": {}, "runs": [{}]}', '{"experiment": {}, "runs'])
def test_a_state_that_is_none_is_named(regression: Write, content: str) -> None:
    path = regression()
    (path.parent / "out").mkdir()
    (path.parent / "out" / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state.json is no saved state"):
        run(path)


@pytest.mark.slow
def test_compare_shows_last_rounds_side_by_side_and_what_differs(
    regression: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = regression()
    one, other, plot = (str(path.parent / name) for name in ("one", "other", "both.png"))
    run(path, "one")
    rows, _ = run(regression(("lrate = 0.05", "lrate = 0.01")), "other")
    assert main(["compare", one, other, "--plot", plot]) == 0
    printed = capsys.readouterr().out
    assert f"client.lrate: 0.05 in {one}, 0.01 in {other}" in printed
    assert f"{rows[-1]['test_loss']:.4g}" in printed
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    assert main(["compare", one, str(path.parent)]) == 2
    assert "holds no run: there is no state.json" in capsys.readouterr().err


def test_a_dry_run_says_what_would_run_and_writes_nothing(
    regression: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = regression(more="[sweep]\nclient.lrate = [0.1, 0.2]\n")
    before = set(path.parent.iterdir())
    assert main(["run", str(path), "--dry-run", "--output", str(path.parent / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2 runs of 4 rounds, in 1 program" in printed
    assert "client.lrate=0.2" in printed
    assert "2 of 4 clients in a round, 2 to 4 local steps each" in printed
    assert "16 bytes of parameters; in each run at most 128 bytes down and 128 up" in printed
    assert {each for each in path.parent.iterdir() if each.name != "__pycache__"} == before


def test_a_dry_run_of_what_cannot_run_says_nothing_but_why(
    regression: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = regression(more="[sweep]\nrounds.participants = [2, 9]\n")
    assert main(["run", str(path), "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "participants=9 should be from 1 to the 4 clients" in printed.err


def test_what_is_shared_by_turns_is_counted_in_its_turn() -> None:
    traffic = Traffic(params=(100, 40), down=8, up=4, total=200)
    assert [traffic.bytes_down(number, 3) for number in range(3)] == [324, 144, 324]
    assert traffic.bytes_up(1, 2) == 88
    assert traffic.bytes_up(1, 2, bits=9.0) == 2 + 8


@pytest.mark.slow
def test_fragments_and_local_parts_are_not_counted_where_they_are_not_sent(regression: Write) -> None:
    path = regression(("save_every = 2", 'save_every = 2\nfragments = [["w"]]'))
    rows, _ = run(path)
    assert [row["bytes_up"] for row in rows] == [2 * 16] * 4
    rows, _ = run(regression(("save_every = 2", 'save_every = 2\nlocal = ["w"]')), "local")
    assert [row["bytes_up"] for row in rows] == [2 * 4] * 4
    rows, _ = run(regression(("save_every = 2", 'save_every = 2\nfragments = [["w"], ["b"]]')), "turns")
    assert [row["bytes_up"] for row in rows] == [2 * 12, 2 * 4] * 2


def test_a_history_that_gets_new_columns_has_them_in_each_line(tmp_path: Path) -> None:
    history = saved.History(tmp_path, [{"round": 0, "loss": 1.0}])
    history.add([{"round": 1, "loss": float("nan")}])
    history.add([{"round": 0, "loss": 2.0, "bits": 3}])
    assert (tmp_path / "history.csv").read_text().split() == ["round,loss,bits", "0,1.0,", "1,nan,", "0,2.0,3"]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[1] == {"round": 1, "loss": None}
