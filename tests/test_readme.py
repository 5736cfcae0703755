"""What the README says is true: its code runs, its commands exist, its table is that of the plug-ins."""

import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import functional_optimodules as fo
from functional_optimodules.catalogue import plugin_table
from functional_optimodules.cli import main
from functional_optimodules.testing import contract

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
README = DOCUMENTS[0].read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[tuple[int, str]]:
    """Return the code blocks of a language, with the line that each starts at."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@pytest.fixture(scope="module")
def namespace() -> Iterator[dict[str, Any]]:
    """Run the README from its first block to its last, as one module."""
    module = types.ModuleType("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "readme", module)
        patch.setattr(fo.OptiModule, "_registry", dict(fo.OptiModule._registry))
        for line, source in blocks("python"):
            # Blank lines before the source make errors point at the README's own lines.
            exec(compile("\n" * line + source, "README.md", "exec"), module.__dict__)
        yield vars(module)


def test_every_example_runs(namespace: dict[str, Any]) -> None:
    assert len(blocks("python")) >= 5
    assert namespace["restored"] == namespace["tx"]


def test_the_brick_of_the_readme_keeps_the_contract(namespace: dict[str, Any]) -> None:
    checks = dict(contract(namespace["LionModule"](beta_1=0.8)))
    assert "check_resume_in_mid_round" in checks
    for check in checks.values():
        check()


def test_every_block_is_of_a_language_that_is_tested() -> None:
    for path in DOCUMENTS:
        opened = re.findall(r"^```(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)[::2]
        assert set(opened) <= {"python", "console", "toml"}, path.name


def test_the_experiments_run(tmp_path: Path) -> None:
    experiments = blocks("toml")
    assert experiments
    for line, source in experiments:
        path = tmp_path / f"line-{line}.toml"
        path.write_text(source, encoding="utf-8")
        assert main(["run", str(path), "--output", str(tmp_path / f"line-{line}")]) == 0


def test_the_examples_for_contributors_run() -> None:
    examples = blocks("python", DOCUMENTS[1].read_text(encoding="utf-8"))
    assert examples
    for line, source in examples:
        exec(compile("\n" * line + source, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    commands = "\n".join(source for _, source in blocks("console", text))
    named = set(re.findall(r"^make ([\w-]+)", commands, re.MULTILINE)) | set(re.findall(r"`make ([\w-]+)", text))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert named <= set(targets)
    assert path.name != "README.md" or {"demo", "test"} <= named


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_linked_exists(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_of_plug_ins_is_what_the_command_prints() -> None:
    _, table, _ = re.split(r"<!-- /?plug-ins -->\n", README)
    assert table.strip() == plugin_table().strip()
    command = [sys.executable, "-m", "functional_optimodules", "list", "--markdown"]
    printed = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert printed.strip() == table.strip()
