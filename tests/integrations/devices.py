"""What is made, saved and restored on several devices: `python devices.py out.json` plays four on one CPU."""

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation, clients_mesh
from functional_optimodules.random.keys import words

TX = fo.Optimizer(0.1, modules=["gaussian-noise", "qsgd", "adam"])
PARAMS = {"w": np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4), "b": np.ones(4, np.float32)}


def mesh(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("rows",), axis_types=(AxisType.Auto,))


def shardings(tree: Any, count: int) -> Any:
    """Return how a tree lies on so many devices: matrices split by rows."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh(count), PartitionSpec("rows") if leaf.ndim == 2 else PartitionSpec()), tree
    )


def init(params: Any, entropy: Any) -> Any:
    with fo.entropy(entropy):
        return TX.init(params)


def targets(count: int, params: Any = PARAMS) -> Any:
    """Return the shapes of the parameters and the state, as they lie on so many devices."""
    shapes = params, jax.eval_shape(init, params, fo.draw_entropy())
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings(shapes, count),
    )


def made(count: int) -> Any:
    """Return parameters and a state after two steps, on so many devices."""
    places = shardings(targets(count), count)
    params = jax.device_put(PARAMS, places[0])
    return stepped(params, jax.jit(init, out_shardings=places[1])(params, fo.draw_entropy()))


@jax.jit
def stepped(params: Any, state: Any) -> Any:
    for _ in range(2):
        updates, state = TX.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def through_orbax(tree: Any, target: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "saved", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(Path(folder) / "saved", target)


def assert_bits(found: Any, expected: Any) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(words(a), words(b), jax.tree_util.keystr(path))


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(words(a), words(b), rtol=1e-5, atol=1e-6)


def assert_placed(found: Any, target: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def a_sharded_init_gives_each_call_its_own_keys() -> None:
    places = shardings(targets(4), 4)
    params = jax.device_put(PARAMS, places[0])
    program = jax.jit(init, out_shardings=places[1]).lower(params, fo.draw_entropy()).compile()
    first, second = (program(params, fo.draw_entropy()) for _ in range(2))
    assert_placed(first, targets(4)[1])
    assert {shard.data.shape for shard in first.modules["adam"].first["w"].addressable_shards} == {(2, 4)}
    keys = [words(state.modules[name].key) for state in (first, second) for name in ("gaussian-noise", "qsgd")]
    assert len({tuple(np.asarray(key).tolist()[:2]) for key in keys}) == 4
    zeros, module = jnp.zeros(8), TX.modules[0]
    noise = [module.update(zeros, state.modules["gaussian-noise"])[0] for state in (first, second)]
    assert (noise[0] != noise[1]).all()
    again = np.arange(10, dtype=np.uint32)
    assert_bits(program(params, again), program(params, again))


def a_sharded_init_has_no_collective_and_no_array_on_one_device() -> None:
    places = shardings(targets(4), 4)
    text = jax.jit(init, out_shardings=places[1]).lower(*targets(4)[:1], fo.draw_entropy()).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))
    assert "f32[8,4]" not in text
    assert "f32[2,4]" in text


def a_state_of_four_devices_goes_on_with_two_and_with_one() -> None:
    state = made(4)
    for count in (2, 1):
        found = through_orbax(state, targets(count))
        assert_bits(found, state)
        assert_placed(found, targets(count))
        assert_close(stepped(*found), stepped(*state))


def a_plain_state_of_four_devices_is_restored_straight_onto_two() -> None:
    state, target = made(4), targets(2)
    arrays = through_orbax(fo.to_arrays(state), fo.to_arrays(target))
    assert_placed(arrays, fo.to_arrays(target))
    found = fo.from_arrays(arrays, target)
    assert_bits(found, state)
    assert_placed(found, target)


def a_packed_state_of_four_devices_goes_on_with_two() -> None:
    places = [NamedSharding(mesh(count), PartitionSpec()) for count in (4, 2)]
    packed = [fo.pack(jax.device_put(PARAMS, place)) for place in places]
    state, like = (
        jax.device_put((params, TX.init(params)), place) for params, place in zip(packed, places, strict=True)
    )
    state = stepped(*state)
    found = through_orbax(state, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
    assert_bits(found, state)
    assert_close(stepped(*found), stepped(*state))
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    arrays = through_orbax(fo.to_arrays(state), fo.to_arrays(target))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(arrays[0])} == {2}
    assert_bits(fo.from_arrays(arrays, like), state)


def loss(params: Any, batch: Any) -> jax.Array:
    return ((params["w"] - batch) ** 2).sum(axis=-1)


def federation(count: int, num_clients: int) -> tuple[Federation, Any, FederatedData]:
    over = clients_mesh(jax.devices()[:count]) if count > 1 else None
    made = Federation(
        loss,
        fo.Optimizer(0.1, modules=["scaffold-client", ("gaussian-noise", {"std": 0.01, "seed": 1})]),
        fo.Optimizer(1.0, modules=[("scaffold-server", {"num_clients": num_clients}), "adam"]),
        batch_size=2,
        **({} if over is None else {"mapping": over}),
    )
    clients = [np.full((2 + number, 3), number, np.float32) for number in range(num_clients)]
    data = FederatedData.from_clients(clients, **({} if over is None else {"mesh": over}))
    return made, made.init({"w": jnp.zeros(3)}, data), data


def a_federation_of_four_devices_goes_on_with_three_and_with_one() -> None:
    for num_clients in (8, 5):
        on_four, state, data = federation(4, num_clients)
        state, _ = on_four.fit(state, data, 2)
        arrays = on_four.to_arrays(state)
        blocks = [{str(shard.index) for shard in leaf.addressable_shards} for leaf in jax.tree.leaves(arrays["bank"])]
        assert set(map(len, blocks)) == {4 if num_clients == 8 else 1}
        expected, _ = on_four.fit(on_four.from_arrays(arrays, state), data, 2)
        for count in (3, 1):
            other, like, same_data = federation(count, num_clients)
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, other.to_arrays(like))
            found = through_orbax(arrays, target)
            assert_placed(found, target)
            new = other.from_arrays(found, like)
            assert_placed(new.bank, like.bank)
            assert_bits(other.to_arrays(new), arrays)
            after, _ = other.fit(new, same_data, 2)
            assert_close(other.to_arrays(after), on_four.to_arrays(expected))


def a_model_of_nnx_is_made_sharded() -> None:
    @nnx.jit
    def create(entropy: jax.Array) -> Any:
        kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("rows", None))
        model = nnx.Linear(8, 4, kernel_init=kernel, rngs=nnx.Rngs(0))
        with fo.entropy(entropy):
            optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        state = nnx.state((model, optimizer))
        nnx.update((model, optimizer), jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return model, optimizer

    with jax.set_mesh(mesh(4)):
        pairs = [create(fo.draw_entropy()) for _ in range(2)]
        states = [nnx.state(optimizer) for _, optimizer in pairs]
    keys = [np.asarray(state["opt_state"]["modules"]["gaussian-noise"]["key"]["words"][...]) for state in states]
    assert (keys[0] != keys[1]).any()
    first = states[0]["opt_state"]["modules"]["adam"]["first"]["kernel"][...]
    assert {shard.data.shape for shard in first.addressable_shards} == {(2, 4)}


def a_train_state_of_linen_is_made_sharded() -> None:
    module = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("rows", None)))

    def create(key: jax.Array, entropy: jax.Array) -> TrainState:
        params = module.init(key, jnp.ones((1, 8)))["params"]
        with fo.entropy(entropy):
            return TrainState.create(apply_fn=module.apply, params=params, tx=TX)

    given = jax.random.key(0), fo.draw_entropy()
    places = nn.get_sharding(jax.eval_shape(create, *given), mesh(4))
    state = jax.jit(create, out_shardings=places)(*given)
    first = state.opt_state.modules["adam"].first["kernel"].value
    assert {shard.data.shape for shard in first.addressable_shards} == {(2, 4)}
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    assert_bits(through_orbax(state, target), state)


JOBS = {name: value for name, value in list(globals().items()) if name.startswith("a_")}


def main(path: str) -> None:
    """Run all, and write what went wrong with each."""
    found = {}
    for name, job in JOBS.items():
        try:
            job()
            found[name] = ""
        except Exception:  # what is wrong with one, the test of that one says
            found[name] = traceback.format_exc()
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
