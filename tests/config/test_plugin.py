"""Plug-ins: declaration, registration, and the configuration that is derived from the fields."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo
from functional_optimodules.config.fields import FrozenConfig, Interval, check_fields, differences, hyperparameter


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (fo.OptiModule, fo.Regularizer, fo.Scheduler):
        monkeypatch.setattr(kind, "_registry", dict(kind._registry))


class Doubled(fo.OptiModule, register=False):
    """A module of which tests derive others."""

    name: ClassVar[str] = "doubled"

    def init(self, params: Any) -> Any:
        return optax.EmptyState()

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda g: 2 * g, updates), state


class Fields(Doubled, register=False):
    rate: float = fo.hyperparameter(within="(0, 1]")
    steps: int = fo.hyperparameter(default=3, within="[1, inf)")
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    label: str | None = None
    sizes: tuple[int, ...] = ()
    extras: Mapping[str, Any] = fo.hyperparameter(default=FrozenConfig({}))
    inner: fo.OptiModule | None = None


GOOD: dict[str, Any] = {
    "rate": 0.5,
    "steps": 7,
    "flag": True,
    "mode": "slow",
    "label": "here",
    "sizes": (1, 2),
    "extras": {"x": [1, {"y": None}]},
    "inner": ("momentum", {"beta": 0.25}),
}


def test_declaring_a_subclass_registers_it_and_its_fields_are_the_configuration() -> None:
    class Mine(Doubled):
        name: ClassVar[str] = "mine"
        rate: float = 0.5

    assert fo.list_optim_modules()["mine"] is Mine
    assert "mine" not in fo.list_optim_regularizers()
    assert fo.OptiModule.from_specs("mine", {"rate": 2}) == Mine(2.0)
    assert Mine().get_config() == {"rate": 0.5}


def test_register_false_does_not_register() -> None:
    assert "doubled" not in fo.list_optim_modules()


def test_a_second_class_of_a_taken_name_is_an_error_that_names_both() -> None:
    before = fo.list_optim_modules()
    with pytest.raises(ValueError, match=r"'adam' is taken by the module .*adaptive.AdamModule.*give .*Impostor"):

        class Impostor(Doubled):
            name: ClassVar[str] = "adam"

    assert fo.list_optim_modules() == before


def test_names_of_different_kinds_do_not_meet() -> None:
    class Adam(fo.LassoRegularizer):
        name: ClassVar[str] = "adam"

    assert fo.list_optim_regularizers()["adam"] is Adam
    assert fo.list_optim_modules()["adam"] is fo.AdamModule


def test_the_same_class_declared_again_replaces_itself() -> None:
    def declare() -> type:
        class Again(Doubled):
            name: ClassVar[str] = "again"

        return Again

    declare()
    second = declare()
    assert fo.list_optim_modules()["again"] is second


@pytest.mark.parametrize("name", [None, "", 3])
def test_a_registered_class_needs_a_name(name: Any) -> None:
    body = {} if name is None else {"name": name}
    with pytest.raises(TypeError, match="Nameless needs a class attribute `name`"):
        type(fo.OptiModule)("Nameless", (fo.OptiModule,), body)


@pytest.mark.parametrize("field", ["run", "state", "init", "update", "get_config", "aux_name", "validate"])
def test_a_field_that_would_shadow_an_inherited_attribute_is_refused(field: str) -> None:
    with pytest.raises(TypeError, match=f"Shadow.*{field!r}"):
        type(fo.OptiModule)("Shadow", (Doubled,), {"__annotations__": {field: float}, field: 1.0}, register=False)


@pytest.mark.parametrize("method", ["run", "get_state", "process_aux_var", "from_config", "__init__", "__post_init__"])
def test_methods_of_the_facade_are_final(method: str) -> None:
    with pytest.raises(TypeError, match=f"Overrider must not define '{method}'"):
        type(fo.OptiModule)("Overrider", (Doubled,), {method: lambda self: None}, register=False)


def test_plugins_are_frozen_and_equal_ones_hash_equal() -> None:
    module = Fields(**GOOD)
    assert module == Fields(**GOOD)
    assert hash(module) == hash(Fields(**GOOD))
    assert module != Fields(**{**GOOD, "rate": 0.25})
    with pytest.raises(AttributeError):
        module.rate = 0.1  # type: ignore[misc]


def test_configurations_survive_json() -> None:
    module = Fields(**GOOD)
    config = module.get_config()
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    assert Fields.from_config(json.loads(json.dumps(config))) == module
    assert config["inner"] == ["momentum", {"beta": 0.25, "nesterov": False, "round_reset": False}]


def test_an_infinite_hyperparameter_survives_strict_json() -> None:
    config = fo.L2Clipping(float("inf")).get_config()
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    assert fo.L2Clipping.from_config(config) == fo.L2Clipping(float("inf"))


@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), jnp.array(0.5), np.float64(0.5)])
def test_zero_dimensional_arrays_become_numbers(number: Any) -> None:
    value = Fields(rate=number).rate
    assert type(value) is float
    assert value == 0.5


WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("rate", 0, ValueError, r"Fields: rate=0.0 should be in \(0, 1\]"),
    ("rate", 1.5, ValueError, r"Fields: rate=1.5 should be in \(0, 1\]"),
    ("rate", float("nan"), ValueError, r"Fields: rate=nan should be in \(0, 1\]"),
    ("rate", "0.5", TypeError, "Fields: rate='0.5' should be of type float"),
    ("rate", True, TypeError, "Fields: rate=True should be of type float"),
    ("rate", None, TypeError, "Fields: rate=None should be of type float"),
    ("rate", [0.5], TypeError, "Fields: rate=.* should be of type float"),
    ("rate", np.ones(2), TypeError, "Fields: rate=.* should be of type float"),
    ("rate", 1j, TypeError, "Fields: rate=1j should be of type float"),
    ("rate", 10**400, TypeError, "Fields: rate=1000.* should be of type float: int too large"),
    ("steps", 0, ValueError, r"Fields: steps=0 should be in \[1, inf\)"),
    ("steps", 2.0, TypeError, "Fields: steps=2.0 should be of type int"),
    ("steps", True, TypeError, "Fields: steps=True should be of type int"),
    ("flag", 1, TypeError, "Fields: flag=1 should be of type bool"),
    ("mode", "medium", TypeError, "Fields: mode='medium' should be of type Literal"),
    ("label", 3, TypeError, r"Fields: label=3 should be of type str \| None"),
    ("sizes", (1, "2"), TypeError, "Fields: sizes=.* should be of type list of int"),
    ("sizes", 5, TypeError, "Fields: sizes=5 should be of type list of int"),
    ("extras", [1], TypeError, "Fields: extras=.* should be of type"),
    ("extras", {"f": len}, TypeError, "Fields: extras=.*not made of JSON values"),
    ("extras", {"f": float("nan")}, TypeError, "Fields: extras=.*not made of JSON values"),
    ("inner", "adma", KeyError, "no module is named 'adma': did you mean 'adam'"),
    ("inner", ("adam", {"beta": 1}), KeyError, "AdamModule has no field 'beta': did you mean 'beta_"),
    ("inner", 3, TypeError, r"Fields: inner=3 should be of type OptiModule .*an instance, a name.* \| None"),
]


@pytest.mark.parametrize(("field", "value", "error", "message"), WRONG)
def test_a_hyperparameter_of_a_wrong_type_or_out_of_range_is_named(
    field: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Fields(**{"rate": 0.5, field: value})


def test_a_plugin_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Optimizer: modules=.*RidgeRegularizer.*should be of type list of OptiModule"):
        fo.Optimizer(0.1, modules=[fo.RidgeRegularizer()])
    with pytest.raises(TypeError, match=r"'adam' names AdamModule, which is no MomentumModule"):
        fo.MomentumModule.from_specs("adam")


@pytest.mark.parametrize("kind", [fo.OptiModule, fo.Regularizer, fo.Scheduler])
def test_an_unknown_name_lists_what_there_is(kind: Any) -> None:
    with pytest.raises(KeyError) as caught:
        kind.from_specs("qqqqqq")
    for name in kind._registry:
        assert repr(name) in str(caught.value)
    with pytest.raises(TypeError, match="named by a string"):
        kind.from_specs(["qqqqqq"])


def test_unused_and_missing_keys_are_named() -> None:
    with pytest.raises(KeyError, match="Fields has no field 'rat': did you mean 'rate'"):
        Fields.from_config({"rate": 0.5, "rat": 1})
    with pytest.raises(KeyError, match="Fields needs a value for 'rate'"):
        Fields.from_config({})
    with pytest.raises(TypeError, match="Fields: a configuration is a mapping"):
        Fields.from_config([("rate", 0.5)])  # type: ignore[arg-type]


def test_two_modules_of_one_aux_name_are_refused_when_the_optimizer_is_built() -> None:
    with pytest.raises(ValueError, match="2 modules exchange auxiliary variables named 'scaffold'"):
        fo.Optimizer(0.1, modules=["scaffold-client", "scaffold-server"])


def test_what_cannot_be_written_in_a_configuration_is_named() -> None:
    with pytest.raises(TypeError, match=r"Optimizer: lrate=<function .*cannot be written"):
        fo.Optimizer(lambda step: 0.1).get_config()


def test_traced_hyperparameters_skip_the_checks() -> None:
    gradients = {"w": jnp.ones(2)}

    def first(rate: jax.Array) -> jax.Array:
        module = fo.EWMAModule(beta=rate)
        return module.update(gradients, module.init(gradients))[0]["w"].sum()

    np.testing.assert_allclose(jax.vmap(first)(jnp.array([0.0, 0.75])), [2.0, 0.5])
    np.testing.assert_allclose(jax.jit(jax.grad(first))(0.5), -2.0)


def test_a_module_given_to_an_optimizer_leaves_its_state_behind() -> None:
    module = fo.MomentumModule()
    module.run({"w": jnp.ones(2)})
    optimizer = fo.Optimizer(1.0, modules=[module])
    assert optimizer.modules[0] == module
    assert optimizer.modules[0].state is None


@pytest.mark.parametrize("text", ["", "0, 1", "[0 1]", "[1, 0]", "(a, b)", "[0, 1", "[nan, 1]"])
def test_a_malformed_interval_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected an interval"):
        Interval(text)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5], [1, -1e-9]),
        ("(0, inf)", [1e-9, 1e300], [0, float("inf")]),
        ("[1, inf]", [float("inf")], [0]),
    ],
)
def test_an_interval_holds_its_closed_ends_only(text: str, inside: list[float], outside: list[float]) -> None:
    assert all(value in Interval(text) for value in inside)
    assert not any(value in Interval(text) for value in outside)


State = TypeVar("State")


class Stateful(fo.Scheduler, Generic[State], register=False):
    """A plug-in whose subclasses say of what type their state is."""

    rate: float = 1.0


class Counting(Stateful[int], register=False):
    inner: Stateful[Any] | None = None


def test_a_plugin_may_be_generic() -> None:
    module = Counting(2, inner=Counting(rate=3))
    assert Counting.from_config({"rate": 2.0, "inner": None}) == Counting(2.0)
    assert module.inner == Counting(3.0)
    with pytest.raises(TypeError, match=r"Counting: inner=3 should be of type Stateful .*an instance, .* \| None"):
        Counting(inner=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'rate' is an attribute of the class"):
        type(fo.Scheduler)("Shadow", (HasRate, Stateful), {"__annotations__": {"rate": int}}, register=False)


class HasRate:
    """A class that is no dataclass."""

    rate = 1


@dataclasses.dataclass(frozen=True)
class Options:
    """A dataclass that is no plug-in."""

    mode: Literal["fast", "slow"] = "fast"
    size: int | None = hyperparameter(default=None, within="[1, inf)")
    rate: float = 1

    def __post_init__(self) -> None:
        check_fields(self, "Options", mismatch=ValueError)


def test_the_fields_of_any_frozen_dataclass_are_coerced_and_checked() -> None:
    assert type(Options(rate=2).rate) is float
    assert Options(size=3).size == 3
    for options, message in (
        ({"mode": "medium"}, r"Options: mode='medium' should be of type Literal\['fast', 'slow'\]"),
        ({"size": 0}, r"Options: size=0 should be in \[1, inf\)"),
        ({"size": 1.5}, r"Options: size=1.5 should be of type int \| None"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**options)  # type: ignore[arg-type]


def test_differences_name_each_key_and_both_values() -> None:
    was = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": 3}
    now = {"a": {"b": 2, "c": [1, 3]}, "f": 4, "e": 3}
    assert list(differences(was, now)) == [("a.b", 1, 2), ("a.c", [1, 2], [1, 3]), ("f", None, 4)]
    assert list(differences({"a": 1}, 2)) == [("", {"a": 1}, 2)]
    assert list(differences(was, json.loads(json.dumps(was)))) == []
