"""Compiled programs that are kept: the next process compiles none, and gets the same numbers."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from functional_optimodules.cli import main

PROGRAM = """
import collections, sys
import jax
from functional_optimodules.cli import main

seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **about: seen.update([event.rpartition("/")[2]]))
assert main(["run", *sys.argv[1:]]) == 0
print(seen["compile_requests_use_cache"], seen["cache_misses"], seen["cache_hits"])
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(regression: Callable[..., Path]) -> None:
    path = regression(more="[sweep]\nclient.lrate = [0.02, 0.05]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_PERSISTENT_CACHE")}

    def counts(output: str) -> list[int]:
        command = [sys.executable, "-c", PROGRAM, str(path), "--output", str(path.parent / output), "--cache"]
        done = subprocess.run(
            [*command, str(path.parent / "cache")], capture_output=True, text=True, encoding="utf-8", env=environment
        )
        assert done.returncode == 0, done.stderr
        return [int(count) for count in done.stdout.splitlines()[-1].split()]

    asked, missed, hit = counts("cold")
    assert (missed, hit) == (asked, 0)
    kept = {file.name for file in (path.parent / "cache").iterdir() if file.name.endswith("-cache")}
    assert len(kept) == asked > 10
    assert counts("warm") == [asked, 0, asked]
    assert {file.name for file in (path.parent / "cache").iterdir() if file.name.endswith("-cache")} == kept
    cold, warm = ((path.parent / name / "state.json").read_bytes() for name in ("cold", "warm"))
    assert cold == warm


@pytest.mark.parametrize("folder", ["file", "file/within"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    regression: Callable[..., Path], capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    path = regression()
    (path.parent / "file").touch()
    assert main(["run", str(path), "--output", str(path.parent / "out"), "--cache", str(path.parent / folder)]) == 2
    assert f"cannot keep compiled programs in {path.parent / folder}: " in capsys.readouterr().err
    assert not (path.parent / "out").exists()
