"""What the type checker says of a brick: `OptiModule[State]` tells what `init` makes and `update` returns."""

from pathlib import Path

import mypy.api
import pytest

ROOT = Path(__file__).parents[1]
BRICK = """
from typing import ClassVar, NamedTuple

import jax

import functional_optimodules as fo
from functional_optimodules.types import PyTree, Updates


class Count(NamedTuple):
    steps: jax.Array


class Counting(fo.OptiModule[Count]):
    name: ClassVar[str] = "counting"

    def init(self, params: fo.Params) -> Count:
        return Count(jax.numpy.zeros((), int))

    def update(
        self, updates: Updates, state: Count, params: fo.Params = None, **extra_args: PyTree
    ) -> {returned}:
        return {value}
"""


def check(tmp_path: Path, returned: str, value: str) -> str:
    path = tmp_path / "brick.py"
    path.write_text(BRICK.format(returned=returned, value=value))
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    return mypy.api.run([*options, str(path)])[0]


@pytest.mark.slow
def test_a_right_brick_passes(tmp_path: Path) -> None:
    assert "no issues found" in check(tmp_path, "tuple[Updates, Count]", "updates, Count(state.steps + 1)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returned", "value", "message"),
    [
        ("Updates", "updates", 'incompatible with return type "tuple[object, Count]"'),
        ("tuple[Updates, Count]", "updates", 'got "object", expected "tuple[object, Count]"'),
        (
            "tuple[Updates, Count]",
            "updates, state.steps",
            'got "tuple[object, Array]", expected "tuple[object, Count]"',
        ),
    ],
)
def test_a_brick_whose_update_returns_no_state_is_refused(
    tmp_path: Path, returned: str, value: str, message: str
) -> None:
    assert message in check(tmp_path, returned, value)
