"""Some of what `python -m tests.fuzz` does at length."""

from pathlib import Path

import pytest

from functional_optimodules.experiments.config import Experiment
from tests import fuzz


@pytest.mark.slow
def test_mutated_input_is_taken_or_refused_by_a_documented_exception_and_nothing_else() -> None:
    report = fuzz.fuzz(1500, seed=1)
    assert not report.faults
    for counts in report.counts.values():
        assert counts["taken"] > 0
        assert counts["ValueError"] > 0


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000])
def test_an_experiment_that_python_cannot_read_is_no_toml(value: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment.toml"
    file.write_text(f"seed = {value}")
    with pytest.raises(ValueError, match=r"experiment\.toml is no TOML"):
        Experiment.read(file)
