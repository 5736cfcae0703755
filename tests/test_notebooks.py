"""The notebooks run, and hold the outputs that their readers see."""

import base64
import io
import os
import re
import tokenize
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# A folder of a user or of the system, on Linux, macOS or Windows.
ABSOLUTE = re.compile(
    r"(?<![\w./:])/(?:Users|bin|builds|etc|home|lib|mnt|opt|private|proc|root|srv|tmp|usr|var|work(?:space)?)/"
    r"|(?<!\w)[A-Za-z]:\\\\?\w"
)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(output: Any) -> list[str]:
    return [
        output.get("text", ""),
        *(str(text) for kind, text in output.get("data", {}).items() if "image" not in kind),
    ]


def test_the_notebooks_are_there() -> None:
    names = ["diloco", "federated", "quickstart", "scaffold", "training", "write_your_own"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@EACH
def test_notebook_runs_without_errors_or_warnings(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    # Of a cache that others write to, JAX warns where it reads what they are writing.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(Path(os.environ["JAX_COMPILATION_CACHE_DIR"], path.stem)))
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", allow_errors=False, resources=resources).execute()
    assert [output for output in outputs(notebook) if output.get("name") == "stderr"] == []
    for ran, committed in zip(code_cells(notebook), code_cells(read(path)), strict=True):
        assert {output.output_type for output in ran.outputs} == {output.output_type for output in committed.outputs}


@EACH
def test_notebook_is_committed_as_it_ran_from_top_to_bottom(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not {output.output_type for cell in cells for output in cell.outputs} & {"error"}
    assert not {output.get("name") for cell in cells for output in cell.outputs} & {"stderr"}


@EACH
def test_notebook_is_committed_with_text_and_plots(path: Path) -> None:
    found = outputs(read(path))
    images = [output.data["image/png"] for output in found if "image/png" in output.get("data", {})]
    assert images
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert any(output.get("name") == "stdout" for output in found)


@EACH
def test_notebook_holds_nothing_of_the_machine_it_ran_on(path: Path) -> None:
    notebook = read(path)
    words = [cell.source for cell in notebook.cells] + [text for output in outputs(notebook) for text in texts(output)]
    assert [word for word in words if ABSOLUTE.search(word)] == []
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(cell.metadata == {} for cell in notebook.cells)


@pytest.mark.parametrize("text", ["see /home/ann/x.py", "File /usr/lib/python3/x.py", r"C:\Users\ann", "'/tmp/a'"])
def test_absolute_paths_are_recognized(text: str) -> None:
    assert ABSOLUTE.search(text)


def test_a_brick_with_auxiliary_variables_and_its_exchange_take_less_than_40_lines() -> None:
    notebook = read(next(path for path in NOTEBOOKS if path.stem == "write_your_own"))
    cells = code_cells(notebook)
    first = next(index for index, cell in enumerate(cells) if "OptiModule)" in cell.source)
    assert "process_aux_var" in cells[first + 1].source
    assert "json.dumps" in cells[first + 1].source
    assert sum(lines_of_code(cell.source) for cell in cells[first : first + 2]) < 40


def lines_of_code(source: str) -> int:
    """Count the lines that hold code: no blank line, comment or docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return len({t.start[0] for t in tokens if t.type not in silent and not t.string.startswith('"""')})
