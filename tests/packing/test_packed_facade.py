"""The facade packs small leaves by itself, and nothing but the speed tells."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.packing import policy as packed
from functional_optimodules.packing.adapter import Packs
from functional_optimodules.testing import checks_of, instances
from functional_optimodules.testing.trees import randoms

LAYERS = {f"{index:02d}": {"b": jnp.full(3, index / 9), "w": jnp.full((2, 3), 0.1)} for index in range(10)}
LARGE = {"large": jnp.ones((300, 300))}
PARAMS = LAYERS | LARGE
CLASSES = {**fo.list_optim_modules(), **fo.list_optim_regularizers()}
FACADE = {
    f"{name}-{check}": (instance, checks[check])
    for name, cls in CLASSES.items()
    for instance in list(instances(cls).values())[:1]
    for checks in [checks_of(instance)]
    for check in checks
    if checks[check].function.__module__.endswith(("facade", "exchange"))
}


def make():
    modules = [fo.ScaffoldClientModule(), fo.L2Clipping(0.5), fo.OptaxModule("lion"), fo.AdamModule(amsgrad=True)]
    return fo.Optimizer(0.1, w_decay=0.01, regularizers=["fedprox", "ridge"], modules=modules)


def packs(brick):
    return isinstance(brick._session.memory.fit.compiled.adapter, Packs)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


@pytest.fixture
def everything_is_packed(monkeypatch):
    monkeypatch.setattr(packed, "_FEWEST", 1)


@pytest.fixture
def nothing_is_packed():
    fo.set_small_leaf(0)
    yield
    fo.set_small_leaf(None)


def train(optimizer, params, steps, donate=False):
    for step in steps:
        optimizer.start_round()
        params = optimizer.apply_gradients(params, randoms(PARAMS, step), donate=donate)
    return params


@pytest.mark.slow
@pytest.mark.parametrize("name", FACADE)
@pytest.mark.usefixtures("everything_is_packed")
def test_the_contract_of_the_facade_is_kept_where_all_leaves_are_packed(name):
    instance, check = FACADE[name]
    check(instance)


def test_many_small_leaves_are_packed_and_large_ones_left_alone():
    optimizer = fo.Optimizer(0.1, modules=["adam"])
    optimizer.apply_gradients(PARAMS, PARAMS)
    state = optimizer._session.memory.state.modules["adam"]
    assert [leaf.shape for leaf in jax.tree.leaves(state.first)] == [(90,), (300, 300)]
    assert jax.tree.structure(optimizer.state.modules["adam"].first) == jax.tree.structure(PARAMS)


@pytest.mark.slow
def test_steps_and_states_are_those_of_an_optimizer_that_packs_nothing(nothing_is_packed):
    plain = make()
    expected = train(plain, PARAMS, range(4))
    fo.set_small_leaf(None)
    packing = make()
    found = train(packing, PARAMS, range(4))
    assert packs(packing)
    assert not packs(plain)
    close(found, expected)
    close(packing.state, plain.state)
    assert jax.tree.structure(packing.state) == jax.tree.structure(plain.state)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["packed", "plain"])
def test_a_state_saved_with_packing_is_restored_without_and_the_reverse(first, nothing_is_packed):
    sizes = {"packed": None, "plain": 0}
    fo.set_small_leaf(sizes.pop(first))
    saved, going_on = make(), make()
    halfway = train(saved, PARAMS, range(2))
    text = json.dumps(saved.get_state(), allow_nan=False)
    expected = train(saved, halfway, range(2, 4))
    fo.set_small_leaf(sizes.popitem()[1])
    for restored in (make(), going_on):
        if restored is going_on:
            train(restored, PARAMS, [7])
        restored.set_state(json.loads(text))
        assert json.dumps(restored.get_state()) == text
        close(train(restored, halfway, range(2, 4)), expected)


@pytest.mark.slow
def test_packed_parameters_and_trees_may_take_turns():
    expected, optimizer = train(make(), PARAMS, range(6)), make()
    params = PARAMS
    for step in range(6):
        gradients = randoms(PARAMS, step)
        params = fo.pack(params, small=[50, 10**6, 20][step // 2]) if step % 2 else fo.unpack(params)
        optimizer.start_round()
        params = optimizer.apply_gradients(params, fo.pack(gradients) if step == 3 else gradients)
        assert isinstance(params, fo.Packed) == bool(step % 2)
    close(fo.unpack(params), expected)


def test_updates_of_packed_parameters_are_packed():
    optimizer, tree = make(), fo.pack(PARAMS)
    updates = optimizer.compute_updates_from_gradients(tree, PARAMS)
    assert isinstance(updates, fo.Packed)
    close(fo.unpack(updates), make().compute_updates_from_gradients(PARAMS, PARAMS))
    momentum = fo.MomentumModule()
    assert isinstance(momentum.run(tree), fo.Packed)
    assert not isinstance(momentum.run(PARAMS), fo.Packed)


def test_a_refused_call_leaves_the_state_and_the_arrays():
    optimizer = make()
    params = train(optimizer, PARAMS, range(2))
    before = optimizer.get_state()
    wrong = params | {"00": {"b": jnp.ones(4), "w": params["00"]["w"]}}
    for call in (
        lambda: optimizer.apply_gradients(params, wrong, donate=True),
        lambda: optimizer.apply_gradients(wrong, params, donate=True),
        lambda: optimizer.apply_gradients(fo.pack(params), wrong, donate=True),
        lambda: optimizer.apply_gradients(fo.pack(wrong), params),
        lambda: optimizer.compute_updates_from_gradients(params, LAYERS),
    ):
        with pytest.raises(ValueError, match=r"the tree of [\w ]+ (has|lacks)"):
            call()
        assert optimizer.get_state() == before
    train(optimizer, params, [2])


def test_the_callers_arrays_are_donated_only_when_told():
    optimizer = fo.Optimizer(0.1, modules=["adam"])
    params, gradients = jax.tree.map(jnp.copy, PARAMS), randoms(PARAMS, 0)
    kept = optimizer.apply_gradients(params, gradients)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, gradients)))
    tree = fo.pack(jax.tree.map(jnp.copy, kept))
    optimizer.apply_gradients(tree, gradients, donate=True)
    assert all(leaf.is_deleted() for leaf in tree.parts)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((kept, gradients)))


@pytest.mark.parametrize("modules", [["momentum"], ["l2-global-clipping", "adam"]])
def test_a_donated_step_has_no_second_copy_of_parameters_or_state(modules, optimized):
    optimizer, tree = fo.Optimizer(0.1, modules=modules), fo.pack(PARAMS)
    optimizer.apply_gradients(tree, PARAMS)
    specs, compiled = optimizer._session.memory.fit
    step = compiled.apply_donated.lower(specs, optimizer._session.memory.state, tree, tree, {})
    memory = step.compile(optimized).memory_analysis()
    size = sum(leaf.nbytes for leaf in tree.parts)
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < size / 100


@pytest.mark.slow
def test_messages_of_packed_and_plain_peers_are_the_same(nothing_is_packed):
    server = fo.ScaffoldServerModule(num_clients=2)
    clients = {"plain": fo.ScaffoldClientModule(), "packed": fo.ScaffoldClientModule()}
    for round_ in range(3):
        for size, (name, client) in zip((0, None), clients.items(), strict=True):
            fo.set_small_leaf(size)
            client.run(randoms(PARAMS, round_))
            assert packs(client) == (name == "packed")
        server.process_aux_var({name: client.collect_aux_var() for name, client in clients.items()})
        server.run(PARAMS)
        for client in clients.values():
            client.process_aux_var(server.collect_aux_var())
    close(clients["packed"].state, clients["plain"].state)
    assert clients["packed"].collect_aux_var()["variables"].keys() == {"delta", "joined"}


@pytest.mark.slow
def test_sharded_parameters_are_followed_and_never_gathered():
    script = """
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        import functional_optimodules as fo

        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        def put(shape, *spec):
            return jax.device_put(jnp.ones(shape), NamedSharding(mesh, P(*spec)))
        tree = {
            f"{i:02d}": {"scale": put((16,)), "bias": put((16,), "model"), "kernel": put((8, 16), None, "model")}
            for i in range(10)
        }
        homes = jax.tree.map(lambda leaf: leaf.sharding, tree)
        optimizer = fo.Optimizer(0.1, w_decay=0.1, regularizers=["fedprox"], modules=["l2-global-clipping", "adam"])
        for params in (tree, fo.pack(tree)):
            twin = optimizer.bare()
            for _ in range(3):
                params = twin.apply_gradients(params, tree)
                twin.start_round()
            specs, compiled = twin._session.memory.fit
            assert len(compiled.adapter.packing.groups[0]) == 10, "only the replicated leaves are packed"
            assert jax.tree.map(lambda leaf: leaf.sharding, fo.unpack(params)) == homes
            found = twin.state.modules["adam"].first
            assert jax.tree.map(lambda leaf: leaf.sharding, found) == homes, found
            state = twin._session.memory.state
            text = compiled.apply.lower(specs, state, params, tree, {}).compile().as_text()
            assert not any(f" {name}(" in text for name in ("all-gather", "all-to-all", "collective-permute")), text
        assert compiled.apply._cache_size() == 2
    """
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment, timeout=300)


def test_a_facade_that_is_set_up_under_jit_refuses_and_stays_usable():
    optimizer = make()
    params = train(optimizer, PARAMS, range(2))
    before = optimizer.get_state()
    with pytest.raises(RuntimeError, match="under jit"):
        jax.jit(lambda x: (optimizer.setup(params), x)[1])(1.0)
    assert optimizer.get_state() == before
    train(optimizer, params, [2])


def test_gradients_of_another_shape_are_refused_though_their_buffers_end_alike():
    optimizer, tree = fo.Optimizer(0.1), fo.pack(PARAMS)
    with pytest.raises(ValueError, match=r"the tree of gradients has float32\[2,3\] at '00/b': expected float32\[3\]"):
        optimizer.apply_gradients(tree, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree))
    with pytest.raises(ValueError, match="the tree of gradients lacks the leaf '00/b'"):
        fo.AdamModule().run(None, tree)


@pytest.mark.slow
def test_packed_and_plain_arguments_may_be_mixed_in_one_call_and_results_have_the_form_of_what_was_given():
    few, tree, other = {"a": jnp.ones(3), "b": jnp.ones(2)}, fo.pack(PARAMS), fo.pack(PARAMS, small=12)
    assert isinstance(fo.AdamModule().run(fo.pack(few), few), fo.Packed)
    expected, optimizer = make().apply_gradients(PARAMS, PARAMS), make()
    for _ in range(2):
        twin = optimizer.bare()
        for _ in range(2):
            found = twin.apply_gradients(tree, other)
            assert found.packing == tree.packing
            assert twin.bare().compute_updates_from_gradients(tree, other).packing in (tree.packing, other.packing)
    close(fo.unpack(optimizer.apply_gradients(other, tree)), expected)


@pytest.mark.slow
def test_an_optax_module_that_is_put_bare_on_packed_parameters_gives_each_parameter_to_optax():
    module, tree = fo.OptaxModule("lamb"), fo.pack(PARAMS)
    expected, _ = module.update(PARAMS, module.init(PARAMS), PARAMS)
    found, _ = module.update(tree, module.init(tree), tree)
    close(fo.unpack(found), expected)
