"""Groups of parameters: whose rules apply where, packed or not, saved, between clients, and what is refused."""

import functools
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.testing.trees import assert_same, randoms

MUON = ("optax", {"transform": "contrib.muon", "config": {"ns_steps": 3}})


def network(layers=3):
    shapes = {f"layer_{i}": {"kernel": (4, 4), "bias": (4,), "norm": {"scale": (4,)}} for i in range(layers)}
    return randoms(jax.tree.map(jnp.zeros, {**shapes, "head": (4, 2)}, is_leaf=lambda x: type(x) is tuple), 0)


def optax_equal(lrate=0.1):
    """Clipping over all, momentum for matrices, Adam for vectors, nothing for the head: in optax."""
    label = lambda path, leaf: "still" if path[0].key == "head" else ("matrix" if leaf.ndim == 2 else "vector")  # noqa: E731
    rules = {
        "matrix": optax.chain(optax.trace(0.9), optax.scale(-0.05)),
        "vector": optax.chain(optax.scale_by_adam(b2=0.99, eps=1e-7), optax.scale(-lrate)),
        "still": optax.set_to_zero(),
    }
    return optax.partition(rules, lambda params: jax.tree_util.tree_map_with_path(label, params))


OURS = fo.Optimizer(
    0.1,
    groups=[
        fo.Group("head", frozen=True),
        fo.Group(ndim=2, name="matrices", lrate=0.05, modules=[("momentum", {"beta": 0.9})]),
        fo.Group(modules=["adam"]),
    ],
)


def steps(tx, params, grads_of, number=4):
    state, step = tx.init(params), jax.jit(tx.update)
    for index in range(number):
        updates, state = step(grads_of(index), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_the_numbers_are_those_of_optax_partition():
    params = network()
    expected, _ = steps(optax_equal(), params, functools.partial(randoms, params))
    found, state = steps(OURS, params, functools.partial(randoms, params))
    assert_same(found, expected, "groups are not optax.partition", close=True)
    np.testing.assert_array_equal(found["head"], params["head"])
    assert {path.shape for path in jax.tree.leaves(state.groups["matrices"].modules)} == {(4, 4)}


def test_what_stands_before_the_groups_sees_all_that_is_not_frozen():
    params, bound = network(), 0.3
    clipped = fo.Optimizer(1.0, modules=[("l2-global-clipping", {"max_norm": bound})], groups=OURS.groups[:1])
    gradients = randoms(params, 1)
    updates, state = clipped.update(gradients, clipped.init(params), params)
    assert optax.tree.norm(updates) == pytest.approx(bound, rel=1e-5)
    assert float(jnp.abs(updates["head"]).max()) == 0
    assert "head" not in str(jax.tree_util.tree_leaves_with_path(state))


@pytest.mark.parametrize("pack", [OURS.pack, fo.pack], ids=["by group", "by dtype alone"])
def test_packed_parameters_take_the_same_steps(pack):
    params = network()
    expected, _ = steps(OURS, params, functools.partial(randoms, params))
    packed = pack(params)
    found, state = steps(OURS, packed, lambda index: fo.pack(randoms(params, index), like=packed))
    assert_same(found.unpack(), expected, "packed groups differ", close=True)
    again = OURS.load(OURS.save(state, packed), params)
    assert_same(again, steps(OURS, params, functools.partial(randoms, params))[1], "saved otherwise", close=True)


def test_each_group_has_buffers_of_its_own():
    packed = OURS.pack(network(8))
    owners = [{packed.packing.specs.paths[at].split("/")[-1] for at in group} for group in packed.packing.groups]
    assert sorted(map(sorted, owners)) == [["bias", "scale"], ["kernel"]]


def test_inside_of_a_step_the_state_alone_is_packed():
    params = network(8)
    packs = fo.Optimizer.from_config({**OURS.get_config(), "packed": True})
    assert "Packed" in repr(packs.init(params))
    expected, plain = steps(OURS, params, functools.partial(randoms, params))
    found, state = steps(packs, params, functools.partial(randoms, params))
    assert_same(found, expected, "packed inside differs", close=True)
    assert_same(fo.unpack(state), plain, "its state is another", close=True)
    restored = packs.load(json.loads(json.dumps(packs.save(state, params))), params)
    assert_same(restored, state, "a packed state is not restored as it was")
    assert_same(packs.load(OURS.save(plain, params), params), state, "nor from a state that is not packed", close=True)


def test_the_facade_is_the_pure_optimizer_and_its_state_is_json():
    params = network()
    expected, _ = steps(OURS, params, functools.partial(randoms, params), 5)
    first, second = (fo.Optimizer.from_config(json.loads(json.dumps(OURS.get_config()))) for _ in range(2))
    found = params
    for index in range(5):
        optimizer = first if index < 3 else second
        if index == 3:
            second.set_state(json.loads(json.dumps(first.get_state())))
        found = optimizer.apply_gradients(found, randoms(params, index))
    assert_same(found, expected, "the facade differs", close=True)


def test_rates_of_a_group_have_clocks_of_their_own():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    halves = ("exponential-decay", {"base": 1.0, "rate": 0.5})
    by_round = ("exponential-decay", {"base": 1.0, "rate": 0.1, "step_level": False})
    tx = fo.Optimizer(
        halves,
        groups=[fo.Group("a", lrate=by_round), fo.Group("b", factor=3.0), fo.Group("c", w_decay=0.25, lrate=0.0)],
    )
    state, found = tx.init(params), []
    for round_ in range(2):
        state = tx.begin_round(state, params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            found.append([float(-updates[name][0]) for name in "abc"])
        assert int(state.groups["0"].lrate.rounds) == round_ + 1
    assert np.allclose(found, [[1, 3, 0.25], [1, 1.5, 0.25], [0.1, 0.75, 0.25], [0.1, 0.375, 0.25]])


def test_round_reset_restarts_a_group_with_the_parameters_and_without():
    params = network()
    reset = [("momentum", {"round_reset": True})]
    tx = fo.Optimizer(0.1, groups=[fo.Group(ndim=2, modules=reset), fo.Group(regularizers=["fedprox"], modules=reset)])
    _, state = steps(tx, params, functools.partial(randoms, params))
    begun = tx.begin_round(state, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(begun.groups["0"].modules))
    assert_same(tx.begin_round(state).groups["0"], begun.groups["0"], "a round is begun otherwise")


def test_muon_for_matrices_and_adamw_for_the_rest_is_a_configuration():
    adamw = ["adam", ["weight-decay", {"rate": 1e-4}]]
    config = {
        "lrate": 3e-4,
        "groups": [
            {"match": "**/kernel", "ndim": 2, "lrate": 0.02, "modules": [list(MUON)]},
            {"match": "**", "modules": adamw},
        ],
    }
    params, tx = network(), fo.Optimizer.from_config(config)
    found, _ = steps(tx, params, functools.partial(randoms, params))
    alone = fo.Optimizer(0.02, modules=[MUON])
    expected, _ = steps(alone, params, functools.partial(randoms, params))
    np.testing.assert_allclose(found["layer_1"]["kernel"], expected["layer_1"]["kernel"], rtol=1e-5)
    rest = fo.Optimizer(3e-4, modules=adamw)
    expected, _ = steps(rest, params, functools.partial(randoms, params))
    np.testing.assert_allclose(found["head"], expected["head"], rtol=1e-6)
    assert fo.Optimizer.from_config(json.loads(json.dumps(tx.get_config()))) == tx


class Model(nnx.Module):
    def __init__(self, rngs):
        self.more = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(4)])
        self.first, self.norm, self.last = (
            nnx.Linear(3, 4, rngs=rngs),
            nnx.LayerNorm(4, rngs=rngs),
            nnx.Linear(4, 2, rngs=rngs),
        )

    def __call__(self, x):
        for layer in self.more:
            x = jnp.tanh(layer(x))
        return self.last(jax.nn.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("packed", [False, True])
def test_flax_takes_it_and_saves_it(packed):
    model, x = Model(nnx.Rngs(0)), randoms(jnp.zeros((8, 3)), 1)
    tx = fo.Optimizer(
        0.1, groups=[fo.Group("norm/*", frozen=True), fo.Group(ndim=2, modules=["adam"]), fo.Group()], packed=packed
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    train_state = TrainState.create(apply_fn=None, params=plain, tx=tx)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: (model(x) ** 2).mean())(model))

    def of_params(params):
        return (nnx.merge(nnx.graphdef(model), nnx.State(params))(x) ** 2).mean()

    before = plain["norm"]["scale"]
    saved = None
    for index in range(4):
        if index == 2:
            saved = json.loads(json.dumps(tx.save(optimizer.opt_state, nnx.state(model, nnx.Param))))
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            tx.restore(optimizer, saved, model)
        step(model, optimizer)
        train_state = train_state.apply_gradients(grads=jax.grad(of_params)(train_state.params))
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_same(found, train_state.params, "nnx.Optimizer and TrainState differ", close=True)
    np.testing.assert_array_equal(found["norm"]["scale"], before)


def test_clients_of_a_federation_have_groups_packed_or_not():
    params = {f"w{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)} for i in range(6)}

    def loss(params, batch):
        for layer in params.values():
            batch = jnp.tanh(batch @ layer["kernel"] + layer["bias"])
        return (batch**2).sum(axis=-1)

    client = fo.Optimizer(
        0.1,
        modules=["l2-global-clipping"],
        groups=[fo.Group("w0/*", frozen=True), fo.Group(ndim=2, modules=["momentum"]), fo.Group(factor=0.5)],
        watch=["gradient_norm", "groups/1/update_norm"],
    )
    server = fo.Optimizer(1.0, groups=[fo.Group("*/bias", modules=["adam"], lrate=0.1)])
    data = FederatedData.from_clients([randoms(jnp.zeros((4, 2)), seed) for seed in range(3)])
    found = []
    for small in (None, 0):
        fo.set_small_leaf(small)
        try:
            federation = Federation(loss, client, server=server, batch_size=2)
            state, history = federation.fit(federation.init(params, data), data, 2)
        finally:
            fo.set_small_leaf(None)
        assert (state.packing is None) == (small == 0)
        assert {"client/gradient_norm", "client/groups/1/update_norm"} <= set(history)
        found.append(state.params)
    assert_same(found[0], found[1], "packing changes a federation", close=True)
    np.testing.assert_array_equal(found[0]["w0"]["kernel"], params["w0"]["kernel"])


def test_a_table_says_what_applies_to_each_parameter():
    lines = OURS.tabulate(network(1)).splitlines()
    table = {line.split()[0]: line for line in lines}
    assert "frozen" in table["head"]
    assert table["head"].endswith(" 0")
    assert "matrices" in table["layer_0/kernel"]
    assert "momentum" in table["layer_0/kernel"]
    assert "lrate=0.05" in table["layer_0/kernel"]
    assert table["layer_0/kernel"].endswith(" 64")
    assert "adam" in table["layer_0/bias"]
    assert table["layer_0/bias"].endswith(" 32")
    assert OURS.tabulate(jax.eval_shape(network)) == OURS.tabulate(network())


def test_a_table_is_there_for_an_optimizer_without_a_state():
    assert fo.Optimizer(0.1).tabulate(jnp.ones(2)).splitlines()[1].endswith("lrate=0.1  0")


def test_optax_finds_the_parameters_in_a_state_of_groups():
    params = network()
    state = OURS.init(params)
    doubled = optax.tree.map_params(OURS, lambda leaf: leaf + 1, state)
    velocity = doubled.groups["matrices"].modules["momentum"].velocity
    np.testing.assert_array_equal(velocity["layer_0"]["kernel"], jnp.ones((4, 4)))
    assert_same(doubled.lrate, state.lrate, "a clock is taken for a parameter")
    assert OURS.update({}, OURS.init({}), {})[0] == {}


@pytest.mark.slow
def test_sharded_parameters_are_followed_packed_by_group_or_not():
    script = """
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        import functional_optimodules as fo

        mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        def put(shape, *spec):
            return jax.device_put(jnp.ones(shape), NamedSharding(mesh, P(*spec)))
        def layer():
            return {"scale": put((8,)), "bias": put((8,)), "kernel": put((8, 16), None, "model")}
        params = {f"{i}": layer() for i in range(6)}
        homes = jax.tree.map(lambda leaf: leaf.sharding, params)
        still, matrices = fo.Group("0/*", frozen=True), fo.Group(ndim=2, modules=["momentum"])
        groups = [still, matrices, fo.Group("*/scale", modules=["adam"])]
        tx = fo.Optimizer(0.1, modules=["l2-global-clipping"], groups=groups)
        expected = tx.bare().apply_gradients(jax.tree.map(jnp.ones_like, params), params)
        inside = fo.Optimizer.from_config({**tx.get_config(), "packed": True})
        for tree, twin in ((params, tx.bare()), (tx.pack(params), tx.bare()), (params, inside)):
            found = fo.unpack(twin.apply_gradients(tree, params))
            assert jax.tree.map(lambda leaf: leaf.sharding, found) == homes
            state = twin.state.groups["1"].modules["momentum"].velocity
            for name, layer in state.items():
                assert not jax.tree.leaves((layer["scale"], layer["bias"])), layer
                kernel = jax.tree.leaves(layer["kernel"])
                assert [leaf.sharding for leaf in kernel] == ([] if name == "0" else [homes[name]["kernel"]])
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
                assert jnp.allclose(a, b)
    """
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("group", "named"),
    [
        ({"match": "**/kernle"}, ["'**/kernle'", "matches no path"]),
        ({"match": "**/kernel", "ndim": 3}, ["ndim=3", "float32[4,4]"]),
        ({"match": "head", "max_size": 2}, ["max_size=2", "'head' is float32[4,2]"]),
    ],
)
def test_a_group_of_no_parameter_is_an_error_that_names_near_ones(group, named):
    tx = fo.Optimizer(0.1, groups=[group])
    for call in (tx.init, tx.pack, tx.tabulate, tx.setup):
        with pytest.raises(ValueError, match="group '0'") as error:
            call(network())
        assert all(word in str(error.value) for word in named)


def test_a_group_whose_parameters_are_all_taken_is_an_error():
    with pytest.raises(ValueError, match="'1' has no parameter, as others before it match all: 'head' is of group '0'"):
        fo.Optimizer(0.1, groups=[fo.Group("**"), fo.Group("head")]).init(network())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "head"}, {"match": ["a", "head"]}], "groups 0 and 1 both claim the parameter 'head'"),
        ([{"name": "a"}, {"name": "a"}], "both named 'a'"),
        ([{"match": "x", "name": "1"}, {"match": "**"}], "both named '1'"),
        ([{"name": "a/b"}], "no slash"),
        ([{"match": []}], "should have a pattern"),
        ([{"frozen": True, "lrate": 0.1}], "is frozen, and has lrate=0.1"),
        ([{"modules": ["scaffold-client"]}], "exchanges the auxiliary variables 'scaffold'"),
    ],
)
def test_groups_that_cannot_be_are_refused_as_they_are_built(groups, message):
    with pytest.raises(ValueError, match=message):
        fo.Optimizer.from_config({"lrate": 0.1, "groups": groups})


def test_what_is_frozen_cannot_be_told_of_to_a_server():
    with pytest.raises(ValueError, match=r"group '0' is frozen, and a module exchanges .*'scaffold'"):
        fo.Optimizer(0.1, modules=["scaffold-client"], groups=[fo.Group("head", frozen=True)])


@pytest.mark.parametrize("field", ["lrate", "factor", "ndim"])
def test_a_field_of_a_group_is_named_where_it_is_out_of_range(field):
    with pytest.raises(ValueError, match=rf"Group: {field}=-1.* should be in \[0, inf\)"):
        fo.Optimizer.from_config({"lrate": 0.1, "groups": [{field: -1}]})


def test_an_unknown_field_of_a_group_names_near_ones():
    with pytest.raises(KeyError, match="Group has no field 'lr'"):
        fo.Optimizer.from_config({"lrate": 0.1, "groups": [{"lr": 1}]})


def test_a_state_of_other_groups_is_refused_and_says_what_differs():
    params = network()
    saved = OURS.save(OURS.init(params), params)
    other = fo.Optimizer(0.1, groups=[*OURS.groups[:2], fo.Group(modules=["yogi"])])
    with pytest.raises(ValueError, match=r"\[2 adam\].*not of .*\[2 yogi\]"):
        other.load(saved, params)
    moved = fo.Optimizer(
        0.1,
        groups=[
            OURS.groups[0],
            fo.Group("layer_0/kernel", name="matrices", lrate=0.05, modules=["momentum"]),
            OURS.groups[2],
        ],
    )
    with pytest.raises(ValueError, match=r"'groups/2/modules/adam/first' at 'layer_1/kernel'"):
        moved.load(saved, params)
