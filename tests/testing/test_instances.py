"""Plug-ins made up from the types and ranges of fields."""

import subprocess
import sys
from typing import ClassVar, Literal

import jax.numpy as jnp
import pytest

from functional_optimodules import Regularizer, Scheduler, hyperparameter
from functional_optimodules.testing import instances

from .bricks import Kept


class Fields(Scheduler, register=False):
    name: ClassVar[str] = "fields"
    low: float = hyperparameter(within="(0, 1)")
    flag: bool = True
    maybe: int | None = None
    kind: Literal["a", "b", "c"] = "a"
    inner: float | Scheduler = 1.0
    bricks: tuple[Regularizer, ...] = ()

    def compute_value(self, step, round_):
        return jnp.float32(self.low)


def test_instances_have_other_values_of_every_field():
    found = instances(Fields)
    default, changed = found["default"], found["all-changed"]
    assert 0 < default.low < 1
    assert default == Fields(default.low)
    assert changed.low != default.low
    assert changed.flag is False
    assert isinstance(changed.maybe, int)
    assert changed.kind == "b"
    assert any(plugin.kind == "c" for plugin in found.values())
    assert any(isinstance(plugin.inner, Scheduler) for plugin in found.values())
    assert isinstance(changed.bricks[0], Regularizer)
    assert len(set(found.values())) == len(found)


def test_instances_ask_for_examples_where_nothing_can_be_made_up():
    class Named(Kept, register=False):
        text: str = "a"

    class Required(Kept, register=False):
        text: str

    class Shown(Kept, register=False):
        examples = ({"text": "b"},)
        text: str = "a"

    for cls in (Named, Required):
        with pytest.raises(AssertionError, match=r"'text'.*examples"):
            instances(cls)
    assert {plugin.text for plugin in instances(Shown).values()} == {"a", "b"}


def test_instances_skip_values_that_do_not_go_together():
    class Ordered(Kept, register=False):
        examples = ({"low": 0.1, "high": 0.2},)
        low: float = hyperparameter(default=0.0, within="[0, 1]")
        high: float = hyperparameter(default=0.3, within="[0, 1]")

        def validate(self):
            if self.low >= self.high:
                raise ValueError("low < high")

    assert all(plugin.low < plugin.high for plugin in instances(Ordered).values())


@pytest.mark.slow
def test_testing_needs_no_test_framework():
    program = "import sys, functional_optimodules.testing; sys.exit(bool({'pytest', 'hypothesis'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
