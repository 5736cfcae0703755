"""States in Orbax as they are, and as plain arrays: every bit comes back, and runs go on as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.random.keys import is_key, words

from . import devices

pytestmark = pytest.mark.slow

PARAMS = {"layers": [{"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.ones(2)} for _ in range(2)]}
OPTIMIZERS = {
    "adam": fo.Optimizer(("warmup", {"warmup": 3, "base": 0.1}), 1e-3, modules=["l2-global-clipping", "adam"]),
    "secret-noise": fo.Optimizer(0.1, modules=["gaussian-noise", "tree-aggregation-noise", "adam"]),
    "noise": fo.Optimizer(0.1, modules=[("gaussian-noise", {"safe_mode": False}), "qsgd"]),
    "clipping": fo.Optimizer(0.1, modules=[("adaptive-clipping-server", {"noise_multiplier": 1.0, "count_std": 2.0})]),
    "optax": fo.Optimizer(0.1, modules=[("optax", {"transform": "scale_by_amsgrad"}), "momentum"]),
}
TARGETS: dict[str, Any] = {
    "concrete": lambda tree: tree,
    "abstract": lambda tree: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree),
}


def gradients(params: Any, step: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.sin(leaf + step), params)


def stepped(tx: fo.Optimizer, state: Any, params: Any, steps: int) -> Any:
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return state, params


def assert_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b), path
        np.testing.assert_array_equal(*(words(jnp.asarray(leaf)) for leaf in (a, b)), str(path))


def save(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path: Path, *target: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_comes_back_bit_by_bit_and_the_next_step_is_the_same(
    name: str, packed: bool, target: str, tmp_path: Path
) -> None:
    tx, params = OPTIMIZERS[name], fo.pack(PARAMS) if packed else PARAMS
    state, params = stepped(tx, tx.init(params), params, 2)
    save(tmp_path / "state", (state, params))
    found = restore(tmp_path / "state", TARGETS[target]((tx.init(params), params)))
    assert_bits(found, (state, params))
    assert_bits(stepped(tx, *found, 2), stepped(tx, state, params, 2))


def test_no_state_holds_keys_that_only_this_library_knows() -> None:
    for tx in OPTIMIZERS.values():
        for leaf in jax.tree.leaves(tx.init(PARAMS)):
            assert not is_key(leaf) or isinstance(jax.random.key_impl(leaf), str)


@pytest.mark.parametrize("name", ["secret-noise", "noise"])
def test_without_a_target_the_arrays_come_back_by_path(name: str, tmp_path: Path) -> None:
    tx, packed = OPTIMIZERS[name], fo.pack(PARAMS)
    state, _ = stepped(tx, tx.init(packed), packed, 2)
    save(tmp_path / "state", fo.to_arrays(state))
    assert_bits(fo.from_arrays(restore(tmp_path / "state"), tx.init(packed)), state)


def test_what_was_packed_one_way_is_restored_packed_another(tmp_path: Path) -> None:
    tx, packed = OPTIMIZERS["adam"], fo.pack(PARAMS)
    other = fo.pack(PARAMS, small=8)
    assert other.packing != packed.packing
    state, params = stepped(tx, tx.init(packed), packed, 2)
    save(tmp_path / "state", fo.to_arrays((state, params)))
    for like in (other, PARAMS):
        shapes = jax.eval_shape(lambda params: (tx.init(params), params), like)
        found = fo.from_arrays(restore(tmp_path / "state", fo.to_arrays(shapes)), shapes)
        assert_bits(fo.to_arrays(found), fo.to_arrays((state, params)))
        after = fo.unpack(stepped(tx, *found, 1)[1])
        expected = fo.unpack(stepped(tx, state, params, 1)[1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, expected)


def test_a_facade_goes_on_from_the_state_of_another(tmp_path: Path) -> None:
    config: Any = {"lrate": 0.1, "modules": ["gaussian-noise", "adam"]}
    first, second = (fo.Optimizer.from_config(config) for _ in range(2))
    first.apply_gradients(PARAMS, gradients(PARAMS, 0))
    save(tmp_path / "state", first.state)
    second.setup(PARAMS)
    found = restore(tmp_path / "state", second.state)
    second.set_state(second.save(found, PARAMS))
    assert_bits(second.state, first.state)
    after = [optimizer.apply_gradients(PARAMS, gradients(PARAMS, 1)) for optimizer in (first, second)]
    assert_bits(*after)


def test_an_nnx_optimizer_goes_on(tmp_path: Path) -> None:
    tx = OPTIMIZERS["secret-noise"]

    def made(seed: int) -> tuple[nnx.Linear, nnx.Optimizer]:
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda model: (model(jnp.ones((4, 3))) ** 2).mean())(model))

    first, second = made(0), made(1)
    step(*first)
    save(tmp_path / "state", nnx.state(first))
    nnx.update(second, restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(second))))
    assert_bits(nnx.state(second), nnx.state(first))
    for pair in (first, second):
        step(*pair)
    assert_bits(nnx.state(second), nnx.state(first))


def test_a_checkpoint_manager_keeps_train_states(tmp_path: Path) -> None:
    params, other = fo.pack(PARAMS), jax.tree.map(jnp.zeros_like, fo.pack(PARAMS))
    made = [TrainState.create(apply_fn=None, params=each, tx=OPTIMIZERS["secret-noise"]) for each in (params, other)]
    state = made[0].apply_gradients(grads=gradients(params, 0))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        found = manager.restore(1, args=ocp.args.StandardRestore(made[1]))
    assert_bits(found, state)
    assert_bits(found.apply_gradients(grads=gradients(params, 1)), state.apply_gradients(grads=gradients(params, 1)))


def test_arrays_of_another_optimizer_or_model_are_refused_by_path(tmp_path: Path) -> None:
    tx, other = fo.Optimizer(0.1, modules=["adam"]), fo.Optimizer(0.1, modules=["gaussian-noise", "adam"])
    save(tmp_path / "state", fo.to_arrays(tx.init(PARAMS)))
    arrays = restore(tmp_path / "state")
    lacks = r"lacks the leaf 'modules/gaussian-noise/key/words': .*; lacks the leaf 'modules/gaussian-noise/steps'"
    with pytest.raises(ValueError, match=f"what was saved {lacks}"):
        fo.from_arrays(arrays, other.init(PARAMS))
    with pytest.raises(ValueError, match=r"what was saved has a leaf 'modules/adam/first/layers/1/b' .* none was exp"):
        fo.from_arrays(arrays, tx.init({"layers": PARAMS["layers"][:1]}))
    wider = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    with pytest.raises(ValueError, match=r"float32\[2\] at 'modules/adam/first/layers/0/b': expected float32\[2,2\]"):
        fo.from_arrays(arrays, tx.init(wider))


def loss(params: Any, batch: Any) -> jax.Array:
    return ((params["w"] - batch) ** 2).sum(axis=-1) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def loss_with_stats(params: Any, stats: Any, batch: Any) -> Any:
    return loss(params, batch - stats["mean"]), {}, {"mean": 0.5 * stats["mean"] + 0.5 * batch.mean(axis=0)}


MANY = {"w": jnp.zeros(2), **{f"b-{number}": jnp.ones(number) for number in range(1, 7)}}  # clients pack these
DATA = FederatedData.from_clients([jnp.ones((count, 2)) * count for count in (4, 8, 2)])
FEDERATIONS = {
    "scaffold": Federation(
        loss,
        fo.Optimizer(0.1, modules=["scaffold-client"]),
        fo.Optimizer(1.0, modules=[("scaffold-server", {"num_clients": 3}), "adam"]),
        batch_size=2,
    ),
    "secret-noise": Federation(loss, fo.Optimizer(0.1, modules=["gaussian-noise"]), batch_size=2),
    "noise": Federation(loss, fo.Optimizer(0.1, modules=[("gaussian-noise", {"safe_mode": False})]), batch_size=2),
    "averaging": Federation(loss, fo.Optimizer(0.1), batch_size=2),
    "personal": Federation(loss, fo.Optimizer(0.1), batch_size=2, local=["b-*"], uplink=["top-k"]),
    "stats": Federation(
        loss_with_stats,
        fo.Optimizer(0.1),
        batch_size=2,
        remainder="drop",
        aggregation=("centered-clipping", {"radius": 1.0}),
    ),
}


def begun(name: str, rounds: int) -> Any:
    federation, stats = FEDERATIONS[name], {"mean": jnp.zeros(2)} if name == "stats" else None
    return federation.fit(federation.init(MANY, DATA, stats=stats), DATA, rounds)[0]


def test_federations_have_all_that_a_state_may_have() -> None:
    arrays = {name: FEDERATIONS[name].to_arrays(begun(name, 0)) for name in ("scaffold", "stats")}
    assert begun("scaffold", 0).packing is not None
    assert arrays["scaffold"]["bank"]["modules/scaffold-client/local"]["b-6"].shape == (3, 6)
    assert {"stats", "aggregation"} <= arrays["stats"].keys()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FEDERATIONS)
def test_a_federation_goes_on_bit_by_bit(name: str, target: str, tmp_path: Path) -> None:
    federation, state = FEDERATIONS[name], begun(name, 2)
    save(tmp_path / "plain", federation.to_arrays(state))
    like = begun(name, 0)
    arrays = restore(tmp_path / "plain", TARGETS[target](federation.to_arrays(like)))
    if state.bank:  # Orbax refuses arrays without elements
        save(tmp_path / "as-it-is", state)
        assert_bits(restore(tmp_path / "as-it-is", TARGETS[target](like)), state)
    assert_bits(federation.from_arrays(arrays, like), state)
    assert_bits(federation.from_arrays(restore(tmp_path / "plain"), like), state)
    expected = federation.fit(state, DATA, 2)[0]
    assert_bits(federation.fit(federation.from_arrays(arrays, like), DATA, 2)[0], expected)


def test_arrays_of_another_federation_are_refused() -> None:
    scaffold, averaging = FEDERATIONS["scaffold"], FEDERATIONS["averaging"]
    arrays, like = scaffold.to_arrays(begun("scaffold", 1)), begun("averaging", 0)
    with pytest.raises(ValueError, match="what was saved has a leaf 'bank/modules/scaffold-client"):
        averaging.from_arrays(arrays, like)
    fewer = averaging.init(MANY, 2)
    with pytest.raises(ValueError, match="what was saved is of 3 clients: expected 2"):
        averaging.from_arrays(averaging.to_arrays(like), fewer)


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("devices") / "out.json"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, devices.__file__, str(path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("job", devices.JOBS)
def test_on_four_devices(job: str, on_devices: dict[str, str]) -> None:
    assert not on_devices[job], on_devices[job]
