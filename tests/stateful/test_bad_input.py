"""Bad input: each with an error that says what, found and expected, and with nothing changed."""

import copy
import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.testing.trees import ran
from functional_optimodules.wire.arrays import encode_array

GRADS = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array(3.0)}}


def wire(message: Any) -> Any:
    return json.loads(json.dumps(message, allow_nan=False))


def stepped(brick: Any) -> Any:
    ran(brick, GRADS, GRADS)
    return brick


def delta(**changes: Any) -> Any:
    """A client's message, mutilated: each keyword is a path of keys joined by two underscores."""
    return mutilated(stepped(fo.ScaffoldClientModule()).collect_aux_var(), **changes)


def mutilated(message: Any, **changes: Any) -> Any:
    message = wire(message)
    for keys, value in changes.items():
        *parents, last = keys.split("__")
        place = message
        for key in parents:
            place = place[key]
        if value is REMOVED:
            del place[last]
        else:
            place[last] = value
    return message


REMOVED = object()


def server_with_a_client() -> fo.ScaffoldServerModule:
    server = fo.ScaffoldServerModule()
    server.process_aux_var({"zoe": delta()})
    return server


def array(values: Any, dtype: Any = jnp.float32) -> dict[str, Any]:
    return encode_array(jnp.asarray(values, dtype))


def assert_refused(brick: Any, call: Callable[[], Any], error: type[Exception], *parts: str) -> None:
    before = brick.get_state()
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert brick.get_state() == before


GRADIENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a leaf too few": ({"a": GRADS["a"]}, ("lacks the leaf 'b/c'", "float32[]")),
    "a leaf too many": ({**GRADS, "d": jnp.ones(2)}, ("'d'", "float32[2]", "none was expected")),
    "another shape": ({**GRADS, "a": jnp.ones(3)}, ("'a'", "float32[3]", "expected float32[2]")),
    "another dtype": ({**GRADS, "a": jnp.ones(2, jnp.float16)}, ("'a'", "float16[2]", "expected float32[2]")),
    "None for a leaf": ({**GRADS, "a": None}, ("lacks the leaf 'a'",)),
    "another container": ([GRADS["a"], GRADS["b"]], ("'0'",)),
    "the same paths otherwise held": ({"a": GRADS["a"], "b/c": GRADS["b"]["c"]}, ("another container",)),
}


@pytest.mark.parametrize("make", [fo.MomentumModule, lambda: fo.Optimizer(0.1, modules=["adam"])])
@pytest.mark.parametrize("fault", GRADIENTS)
def test_gradients_of_another_structure_shape_or_dtype(make: Callable[[], Any], fault: str) -> None:
    brick, twin = stepped(make()), stepped(make())
    gradients, parts = GRADIENTS[fault]
    assert_refused(brick, lambda: brick.run(gradients), ValueError, *parts)
    np.testing.assert_array_equal(brick.run(GRADS)["a"], twin.run(GRADS)["a"])


def test_gradients_that_differ_from_a_restored_state() -> None:
    module = fo.MomentumModule()
    module.set_state(stepped(fo.MomentumModule()).get_state())
    gradients, parts = GRADIENTS["another shape"]
    assert_refused(module, lambda: module.run(gradients), ValueError, *parts)
    assert_refused(module, lambda: module.setup(gradients), ValueError, *parts)


def test_parameters_that_differ_from_the_gradients() -> None:
    module = fo.RidgeRegularizer()
    assert_refused(module, lambda: module.run(GRADS, {"a": GRADS["a"]}), ValueError, "tree of gradients", "'b/c'")
    stepped(module)
    assert_refused(module, lambda: module.run(GRADS, {"a": GRADS["a"]}), ValueError, "tree of parameters", "'b/c'")


def test_leaves_that_are_no_arrays() -> None:
    module = fo.MomentumModule()
    assert_refused(module, lambda: module.run({"a": "text"}), TypeError, "trees of arrays", "'a'", "'text'")


@pytest.mark.parametrize("name", ["fedprox", "lasso", "ridge"])
def test_a_regularizer_without_parameters(name: str) -> None:
    regularizer = fo.Regularizer.from_specs(name)
    assert_refused(regularizer, lambda: regularizer.run(GRADS, None), ValueError, type(regularizer).__name__, "weights")
    with pytest.raises(ValueError, match="needs the parameters"):
        regularizer.update(GRADS, regularizer.init(GRADS))
    optimizer = stepped(fo.Optimizer(0.1, regularizers=[name]))
    assert_refused(optimizer, lambda: optimizer.run(GRADS), ValueError, type(regularizer).__name__, "parameters")
    assert optimizer.run(GRADS, params=GRADS)["a"].shape == (2,)


def test_weight_decay_without_parameters() -> None:
    optimizer = stepped(fo.Optimizer(0.1, w_decay=0.01))
    assert_refused(optimizer, lambda: optimizer.run(GRADS), ValueError, "w_decay=0.01", "pass `params`")


NAN = array([1.0, np.nan])
FROM_CLIENT: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "no message": (3, TypeError, ("should be a message", "int")),
    "missing envelope key": (delta(params=REMOVED), KeyError, ("lacks the key 'params'",)),
    "unknown envelope key": (delta(extra=1), KeyError, ("unknown key 'extra'",)),
    "another pair's": (delta(aux_name="other"), ValueError, ("'other'", "'scaffold'")),
    "from the wrong side": (server_with_a_client().collect_aux_var(), TypeError, ("from a server", "from a client")),
    "a missing variable": (delta(variables__delta=REMOVED), KeyError, ("lacks the variable 'delta'",)),
    "an unknown variable": (delta(variables__deltas=1), KeyError, ("unknown variable 'deltas'", "'delta'")),
    "variables of the wrong kind": (delta(variables=[1]), TypeError, ("'variables' should be a mapping", "list")),
    "a number for a tree": (delta(variables__delta=1.0), TypeError, ("'delta'", "float")),
    "an array for a tree": (delta(variables__delta=array(1.0)), TypeError, ("'delta'", "shaped like the parameters")),
    "a number for an array": (delta(variables__joined=1), TypeError, ("'joined'", "should be an array", "int")),
    "a number for a leaf": (delta(variables__delta__a=[1, 2]), TypeError, ("'delta' at 'a'", "list")),
    "a missing leaf": (delta(variables__delta__a=REMOVED), ValueError, ("'delta'", "lacks the leaf 'a'")),
    "an unknown leaf": (delta(variables__delta__z=array(1.0)), ValueError, ("'delta'", "unknown leaf 'z'")),
    "a wrong shape of a leaf": (delta(variables__delta__a=array([1.0])), ValueError, ("at 'a'", "[1]", "[2]")),
    "a wrong shape of a scalar": (delta(variables__joined=array([1.0])), ValueError, ("'joined'", "[1]", "[]")),
    "integers for numbers": (delta(variables__delta__a=array([1, 2], jnp.int32)), TypeError, ("'a'", "int32")),
    "complex for real": (delta(variables__delta__a=array([1, 2], jnp.complex64)), TypeError, ("'a'", "complex64")),
    "complex for a scalar": (delta(variables__joined=array(1, jnp.complex64)), TypeError, ("'joined'", "complex64")),
    "a boolean for a scalar": (delta(variables__joined=array(1, jnp.bool)), TypeError, ("'joined'", "bool")),
    "a PRNG key for a scalar": (
        delta(variables__joined={"dtype": "key:threefry2x32", "shape": [], "data": "AAAAAAAAAAA="}),
        TypeError,
        ("'joined'", "key"),
    ),
    "not a number": (delta(variables__delta__a=NAN), ValueError, ("'delta' at 'a'", "not finite")),
    "infinity": (delta(variables__delta__a=array([np.inf, 0])), ValueError, ("'delta' at 'a'", "not finite")),
    "an infinite scalar": (delta(variables__joined=array(np.inf)), ValueError, ("'joined'", "not finite")),
    "wrong base64": (delta(variables__delta__a__data="AAAA*AAAAAA="), ValueError, ("'a'", "base64")),
    "a wrong byte count": (delta(variables__delta__a__data="AAAA"), ValueError, ("'a'", "3 bytes", "takes 8")),
    "an unknown dtype": (delta(variables__delta__a__dtype="float33"), ValueError, ("'a'", "'float33'")),
    "other parameters": (
        delta(params={"z": {"dtype": "float32", "shape": [2]}}),
        ValueError,
        ("'a'",),
    ),
    "a negative shape": (delta(params__a__shape=[-2]), ValueError, ("'a'", "[-2]", "non-negative")),
    "an absurd shape": (delta(params__a__shape=[2**40]), ValueError, ("'a'", str(2**40))),
    "parameters of the wrong kind": (delta(params=7), ValueError, ("'params'", "7")),
    "parameters without a shape": (delta(params__a__shape=REMOVED), ValueError, ("'params' at 'a'", "shape")),
}


@pytest.mark.parametrize("fault", FROM_CLIENT)
@pytest.mark.parametrize("new", [False, True])
def test_a_bad_message_of_one_client_names_it_and_folds_nobody_in(fault: str, new: bool) -> None:
    message, error, parts = FROM_CLIENT[fault]
    server = fo.ScaffoldServerModule() if new else server_with_a_client()
    assert_refused(server, lambda: server.process_aux_var({"ann": delta(), "eve": message}), error, "'eve'", *parts)
    server.process_aux_var({"ann": delta()})
    assert server.get_state()["clients"][-1] == "ann"


@pytest.mark.parametrize("fault", FROM_CLIENT)
def test_the_same_through_an_optimizer_of_several_modules(fault: str) -> None:
    message, error, parts = FROM_CLIENT[fault]
    server = fo.Optimizer(1.0, modules=["momentum", "scaffold-server"])
    call = lambda: server.process_aux_var({"scaffold": {"ann": delta(), "eve": message}})  # noqa: E731
    assert_refused(server, call, error, "'eve'", *parts)


def test_absurd_shapes_that_the_message_repeats_allocate_nothing() -> None:
    spec = {"dtype": "float32", "shape": [2**40]}
    message = delta(params={"a": spec}, variables__delta={"a": {**spec, "data": "AAAA"}})
    server = fo.ScaffoldServerModule()
    assert_refused(server, lambda: server.process_aux_var({"eve": message}), ValueError, "'eve'", "3 bytes")


FROM_SERVER = {
    "no message": (None, TypeError, ("should be a message", "NoneType")),
    "from the wrong side": (delta(), TypeError, ("from a client", "from a server")),
    "keyed by client": ({"ann": delta()}, KeyError, ("lacks the key", "'aux_name'")),
    "a missing variable": (
        mutilated(server_with_a_client().collect_aux_var(), variables={}),
        KeyError,
        ("lacks the variable 'variate'",),
    ),
    "not a number": (
        mutilated(server_with_a_client().collect_aux_var(), variables__variate__a=NAN),
        ValueError,
        ("'variate' at 'a'", "not finite"),
    ),
}


@pytest.mark.parametrize("fault", FROM_SERVER)
def test_a_bad_message_from_the_server_changes_nothing_on_the_client(fault: str) -> None:
    message, error, parts = FROM_SERVER[fault]
    client = stepped(fo.ScaffoldClientModule())
    assert_refused(client, lambda: client.process_aux_var(message), error, "ScaffoldClientModule", *parts)
    client.process_aux_var(server_with_a_client().collect_aux_var())


def test_no_client_at_all() -> None:
    server = server_with_a_client()
    assert_refused(server, lambda: server.process_aux_var({}), ValueError, "no client's message for 'scaffold'")


@pytest.mark.parametrize("payload", [delta(), [delta()], None])
def test_messages_that_are_not_keyed_by_client(payload: Any) -> None:
    server = server_with_a_client()
    assert_refused(server, lambda: server.process_aux_var(payload), TypeError, "keyed by client")


def test_a_client_whose_name_is_no_string() -> None:
    server = server_with_a_client()
    assert_refused(server, lambda: server.process_aux_var({1: delta()}), TypeError, "named by strings", "1")


def test_clients_that_disagree_about_the_parameters() -> None:
    other = fo.ScaffoldClientModule()
    other.run({"a": jnp.ones(5)})
    messages = {"ann": delta(), "eve": other.collect_aux_var()}
    server = fo.ScaffoldServerModule()
    assert_refused(server, lambda: server.process_aux_var(messages), ValueError, "'eve'", "float32[5]", "float32[2]")


def test_auxiliary_variables_for_nobody() -> None:
    optimizer = stepped(fo.Optimizer(0.1, modules=["adam", "scaffold-client"]))
    call = lambda: optimizer.process_aux_var({"scafold": {}})  # noqa: E731
    assert_refused(optimizer, call, KeyError, "'scafold'", "did you mean 'scaffold'")
    assert_refused(optimizer, lambda: optimizer.process_aux_var(None), TypeError, "mapping by name", "NoneType")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no module takes auxiliary variables named 'x'"):
        optimizer.process({"x": 1}, optimizer.init(GRADS))


def test_a_module_that_expects_none() -> None:
    module = stepped(fo.AdamModule())
    assert_refused(module, lambda: module.process_aux_var(delta()), NotImplementedError, "AdamModule receives no")
    with pytest.raises(NotImplementedError, match="AdamModule receives no auxiliary variables"):
        module.process(None, module.init(GRADS))


STATES: dict[str, tuple[Callable[[Any], Any], type[Exception], tuple[str, ...]]] = {
    "no mapping": (lambda s: [s], TypeError, ("a state is a mapping", "list")),
    "truncated": (lambda s: {"name": s["name"]}, KeyError, ("lacks the key 'params'",)),
    "unknown key": (lambda s: mutilated(s, nam="x"), KeyError, ("unknown key 'nam'", "'name'")),
    "another plug-in's": (lambda s: stepped(fo.EWMAModule()).get_state(), ValueError, ("'ewma'", "'adam'")),
    "without variables": (lambda s: mutilated(s, variables=None), ValueError, ("both be there, or neither",)),
    "a missing variable": (lambda s: mutilated(s, variables__first=REMOVED), KeyError, ("lacks", "'first'")),
    "an unknown variable": (
        lambda s: mutilated(s, variables__firts=1),
        KeyError,
        ("unknown variable 'firts'", "'first'"),
    ),
    "variables of the wrong kind": (lambda s: mutilated(s, variables=1), ValueError, ("'variables'", "1")),
    "a tree of the wrong kind": (lambda s: mutilated(s, variables__first=1), ValueError, ("'first'", "path", "int")),
    "a leaf of the wrong kind": (lambda s: mutilated(s, variables__first__a=1), ValueError, ("'first' at 'a'", "int")),
    "a missing leaf": (lambda s: mutilated(s, variables__first__a=REMOVED), ValueError, ("'first'", "lacks", "'a'")),
    "an unknown leaf": (lambda s: mutilated(s, variables__first__z=1), ValueError, ("'first'", "unknown leaf 'z'")),
    "a wrong shape": (lambda s: mutilated(s, variables__first__a=array([1.0])), ValueError, ("'a'", "[1]", "[2]")),
    "a wrong dtype": (
        lambda s: mutilated(s, variables__first__a=array([1, 2], jnp.int32)),
        ValueError,
        ("'first' at 'a'", "'int32'", "'float32'"),
    ),
    "wrong base64": (lambda s: mutilated(s, variables__first__a__data="?"), ValueError, ("'first' at 'a'", "base64")),
    "base64 of the wrong kind": (lambda s: mutilated(s, variables__first__a__data=5), ValueError, ("'a'", "base64")),
    "truncated base64": (
        lambda s: mutilated(s, variables__first__a__data="AAAAAAAA"),
        ValueError,
        ("6 bytes", "takes 8"),
    ),
    "other parameters": (
        lambda s: mutilated(s, params__a__shape=[3]),
        ValueError,
        ("float32[3]", "'a'", "float32[2]"),
    ),
    "an unknown dtype": (lambda s: mutilated(s, params__a__dtype="f8, )"), ValueError, ("'f8, )'", "no dtype")),
    "a dtype of 64 bits": (lambda s: mutilated(s, params__a__dtype="float64"), ValueError, ("jax_enable_x64",)),
    "a negative count": (lambda s: mutilated(s, rounds_begun=-1), ValueError, ("'rounds_begun'", "-1")),
    "a count beside variables": (lambda s: mutilated(s, rounds_begun=10**12), ValueError, ("'rounds_begun'",)),
    "a boolean for a count": (lambda s: mutilated(s, rounds_begun=True), ValueError, ("'rounds_begun'", "True")),
    "a number for a boolean": (lambda s: mutilated(s, message_out=1), ValueError, ("'message_out'", "1")),
    "clients of the wrong kind": (lambda s: mutilated(s, clients=[1]), ValueError, ("'clients'", "[1]")),
    "a client twice": (lambda s: mutilated(s, clients=["ann", "ann"]), ValueError, ("'clients'", "'ann'")),
}
for shape in ([2**40], [10**30, 0], [-2], [True, 2], [2.0], [1] * 65, "2", None, {"0": 2}):
    STATES[f"a shape of {str(shape)[:20]}"] = (
        lambda s, shape=shape: mutilated(s, params__a__shape=shape, variables__first__a__shape=shape),
        ValueError,
        ("'a'",),
    )


@pytest.mark.parametrize("fault", STATES)
@pytest.mark.parametrize("new", [False, True])
def test_a_bad_state(fault: str, new: bool) -> None:
    spoil, error, parts = STATES[fault]
    module = fo.AdamModule()
    saved = wire(stepped(fo.AdamModule()).get_state())
    if not new:
        stepped(stepped(module))
    elif fault == "other parameters":
        parts = ("'a'", "[2]", "[3]")
    assert_refused(module, lambda: module.set_state(spoil(copy.deepcopy(saved))), error, "AdamModule", *parts)
    module.set_state(saved)
    assert module.get_state() == saved


def test_the_state_of_an_optimizer_of_other_bricks() -> None:
    optimizer, other = fo.Optimizer(0.1, modules=["adam"]), fo.Optimizer(0.1, modules=["momentum", "adam"])
    stepped(optimizer), stepped(other)
    call = lambda: optimizer.set_state(other.get_state())  # noqa: E731
    assert_refused(optimizer, call, ValueError, "'optimizer momentum adam'", "'optimizer adam'")


CLOCKS = {
    "no mapping": (3, TypeError, ("mapping", "int")),
    "truncated": ({"name": "linear-decay"}, KeyError, ("'variables'",)),
    "another's": ({"name": "warmup", "variables": {}}, ValueError, ("'warmup'", "'linear-decay'")),
    "a missing variable": ({"name": "linear-decay", "variables": {}}, KeyError, ("'steps'",)),
}


@pytest.mark.parametrize("fault", CLOCKS)
def test_a_bad_state_of_a_scheduler(fault: str) -> None:
    saved, error, parts = CLOCKS[fault]
    scheduler = fo.LinearDecay(1.0, 0.1)
    scheduler.get_next_rate()
    assert_refused(scheduler, lambda: scheduler.set_state(saved), error, "LinearDecay", *parts)
    assert scheduler.get_next_rate() == pytest.approx(0.9)
