"""Every key of the file is in the help and in the documentation, from the fields that the reader accepts."""

import dataclasses
from pathlib import Path

import pytest

from functional_optimodules.cli import main
from functional_optimodules.experiments import keys
from functional_optimodules.experiments.config import RoundsConfig
from functional_optimodules.federated import Federation

DOCUMENT = Path(__file__).parents[2] / "docs" / "experiments.md"


def test_all_that_a_federation_may_be_is_a_key() -> None:
    fields = {field.name for field in dataclasses.fields(Federation)} - {"loss_fn", "eval_fn", "client", "server"}
    assert fields < {field.name for field in dataclasses.fields(RoundsConfig)}
    config = RoundsConfig.from_config({"count": 1, "uplink": ["top-k"], "fragments": [["a"], ["b"]], "steps": 3})
    assert RoundsConfig.from_config(config.get_config()) == config


def test_each_key_says_what_it_does() -> None:
    found = list(keys.keys())
    assert len(found) == len({(key.table, key.name) for key in found}) > 35
    for key in found:
        assert len(key.meaning) > 10, key
        assert "Mesh" not in key.kind, key


def test_the_help_of_run_has_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    printed = capsys.readouterr().out
    assert "--override FIELD=VALUE" in printed
    assert "--cache DIR" in printed
    found = list(keys.keys())
    for key in found:
        assert f"\n  {key.name}: " in printed


def test_the_documentation_has_the_table_of_the_keys() -> None:
    """What `functional_optimodules.experiments.keys.markdown` returns stands between the markers."""
    _, table, _ = DOCUMENT.read_text(encoding="utf-8").replace("<!-- /keys -->", "<!-- keys -->").split("<!-- keys -->")
    assert table.strip() == keys.markdown().strip()
