"""What the documents say is true: their code runs, their commands and files exist, their tables are the package's."""

import ast
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

import functional_optimodules as fo
from functional_optimodules import cli
from functional_optimodules.catalogue import plugin_table
from functional_optimodules.federated.aggregation import Aggregator
from functional_optimodules.testing import contract

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "functional_optimodules"
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
}
every_document = pytest.mark.parametrize("name", DOCUMENTS)


def blocks(language: str, name: str) -> list[tuple[int, str]]:
    """Return the code blocks of a language in a document, with the line that each starts at."""
    text = DOCUMENTS[name]
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def commands(program: str, name: str) -> list[list[str]]:
    """Return the arguments of each call of a program in a document, in its consoles and within its sentences."""
    consoles = [line for _, source in blocks("console", name) for line in source.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", DOCUMENTS[name], flags=re.MULTILINE | re.DOTALL)
    lines = [*consoles, *re.findall(r"`([^`]+)`", prose)]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


@pytest.fixture(scope="module")
def run_document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run a document from its first block to its last as one module, once, and return its names."""
    done: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in (fo.OptiModule, fo.Wrapper, Aggregator):
            patch.setattr(kind, "_registry", dict(kind._registry))
        patch.chdir(tmp_path_factory.mktemp("documents"))

        def run(name: str) -> dict[str, Any]:
            if name not in done:
                module = types.ModuleType(f"document_{Path(name).stem}")
                patch.setitem(sys.modules, module.__name__, module)
                for line, source in blocks("python", name):
                    # Blank lines before the source make errors point at the document's own lines.
                    exec(compile("\n" * line + source, name, "exec"), module.__dict__)
                done[name] = vars(module)
            return done[name]

        yield run


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DOCUMENTS if blocks("python", name)])
def test_every_example_runs(name: str, run_document: Any) -> None:
    run_document(name)


@pytest.mark.slow
def test_what_the_readme_restores_is_what_it_saved(run_document: Any) -> None:
    names = run_document("README.md")
    tx, params = names["tx"], nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert tx.get_config() == names["config"]
    assert tx.save(names["optimizer"].opt_state, params) == names["opt_state"]
    assert tx.save(tx.init(params), params) != names["opt_state"]


@pytest.mark.slow
def test_the_brick_of_the_documents_keeps_the_contract(run_document: Any) -> None:
    checks = dict(contract(run_document("docs/bricks.md")["LionModule"](beta_1=0.8)))
    assert "check_resume_in_mid_round" in checks
    for check in checks.values():
        check()


@pytest.mark.slow
def test_the_wrapper_of_the_documents_keeps_the_contract(run_document: Any) -> None:
    checks = dict(contract(run_document("docs/wrappers.md")["WeightClippingWrapper"](bound=0.5)))
    assert {"check_resume_in_mid_round", "check_parameters_may_be_lacking"} <= checks.keys()
    for check in checks.values():
        check()


def test_a_brick_needs_two_imports_of_the_package() -> None:
    _, source = blocks("python", "docs/bricks.md")[0]
    imported = re.findall(r"^(?:import|from) (functional_optimodules[\w.]*)", source, re.MULTILINE)
    assert imported == ["functional_optimodules", "functional_optimodules.numerics"]


@every_document
def test_every_block_is_of_a_language_that_is_tested(name: str) -> None:
    opened = re.findall(r"^```(.*)$", DOCUMENTS[name], re.MULTILINE)[::2]
    assert set(opened) <= {"python", "console", "toml"}


@pytest.mark.slow
def test_the_experiments_run(tmp_path: Path) -> None:
    experiments = [(f"{Path(name).stem}-{line}", source) for name in DOCUMENTS for line, source in blocks("toml", name)]
    assert experiments
    for stem, source in experiments:
        path = tmp_path / f"{stem}.toml"
        path.write_text(source, encoding="utf-8")
        assert cli.main(["run", str(path), "--output", str(tmp_path / stem)]) == 0


@every_document
def test_every_make_target_exists(name: str) -> None:
    named = {word for words in commands("make", name) for word in words if "=" not in word}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert named <= set(targets)
    assert name != "README.md" or {"demo", "test"} <= named


@every_document
def test_every_command_exists(name: str) -> None:
    for command, *options in commands("functional-optimodules", name):
        assert command in {each.name for each in cli.COMMANDS}
        assert command != "list" or cli.main([command, *options]) == 0


def test_the_command_of_the_readme_lists_one_plug_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert ["list", "adam"] in commands("functional-optimodules", "README.md")
    cli.main(["list", "adam"])
    printed = capsys.readouterr().out
    assert "AdamModule" in printed
    assert "YogiModule" not in printed


@every_document
def test_every_file_that_is_named_exists(name: str) -> None:
    links = [(ROOT / name).parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", DOCUMENTS[name])]
    top = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    paths = [ROOT / path for path in re.findall(rf"`((?:{top})/[^`\s]*)`", DOCUMENTS[name])]
    assert [str(path) for path in links + paths if not path.exists()] == []


def test_a_newcomer_finishes_the_readme_and_finds_every_page() -> None:
    readme = DOCUMENTS["README.md"]
    assert len(readme.splitlines()) <= 150
    assert [name for name in DOCUMENTS if name != "README.md" and f"]({name})" not in readme] == []


def test_the_table_of_plug_ins_is_what_the_command_prints() -> None:
    _, table, _ = re.split(r"<!-- /?plug-ins -->\n", DOCUMENTS["docs/plug-ins.md"])
    assert table.strip() == plugin_table().strip()
    command = [sys.executable, "-m", "functional_optimodules", "list", "--markdown"]
    printed = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert printed.strip() == table.strip()


def rooms() -> list[set[str]]:
    """Return the rooms of the package as the contributors' table lists them, line by line."""
    _, table = DOCUMENTS["CONTRIBUTING.md"].split("| room | what is in it |\n| --- | --- |\n")
    lines = table[: table.index("\n\n")].splitlines()
    return [set(re.findall(r"`(\w+)(?:\.py|/)`", line.split("|")[1])) for line in lines]


def imports_of(path: Path) -> set[str]:
    """Return the rooms of the package that a file imports, but for its types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in only_types:
            package, *inner = (node.module or "").split(".")
            if package == PACKAGE.name:
                found |= {inner[0]} if inner else {alias.name for alias in node.names}
    return found


def test_imports_point_one_way_in_the_order_that_contributors_read() -> None:
    order = rooms()
    files = {path.stem: [path] for path in PACKAGE.glob("*.py")}
    files |= {path.parent.name: sorted(path.parent.rglob("*.py")) for path in PACKAGE.glob("*/__init__.py")}
    assert files.keys() - set().union(*order) == {"__init__", "__main__", "catalogue", "cli"}  # put the others together
    wrong = []
    for number, line in enumerate(order):
        above = set().union(*order[: number + 1])
        wrong += [
            (room, name) for room in line for path in files[room] for name in imports_of(path) & files.keys() - above
        ]
    assert wrong == []
