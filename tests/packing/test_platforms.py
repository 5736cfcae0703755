"""What is small depends on the platform that a program is compiled for, wherever JAX's default backend is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import functional_optimodules as fo
from functional_optimodules.packing.policy import platform_of, worthwhile
from functional_optimodules.packing.tree import Packing, Small

HERE = jax.devices()[0].platform
ELSEWHERE = "cpu" if HERE == "tpu" else "tpu"


@pytest.fixture
def default_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: ELSEWHERE)


def network(width: int) -> dict[str, Any]:
    return {f"layer_{at}/{shape}": jnp.ones(shape) for at in range(5) for shape in ((width, width), (width,))}


def packed_shapes(packing: Packing | None) -> set[tuple[int, ...]]:
    return set() if packing is None else {shape for group in packing.groups for shape in packing.shapes(group)}


@pytest.mark.usefixtures("default_elsewhere")
@pytest.mark.parametrize(
    "leaf",
    [
        jax.device_put(np.ones(3), jax.devices()[0]),
        jax.device_put(np.ones(3), NamedSharding(jax.make_mesh((1,), ("x",)), PartitionSpec())),
        jax.ShapeDtypeStruct((3,), np.float32, sharding=SingleDeviceSharding(jax.devices()[0])),
    ],
    ids=["on a device", "on a mesh", "described"],
)
def test_the_platform_of_a_tree_is_that_of_what_is_put_somewhere(leaf: Any) -> None:
    assert platform_of({"anywhere": jnp.ones(3), "there": leaf}) == HERE


@pytest.mark.usefixtures("default_elsewhere")
@pytest.mark.parametrize(
    "leaf",
    [
        jnp.ones(3),
        np.ones(3),
        jax.ShapeDtypeStruct((3,), np.float32),
        jax.ShapeDtypeStruct((4,), np.float32, sharding=NamedSharding(AbstractMesh((2,), ("x",)), PartitionSpec("x"))),
    ],
    ids=["uncommitted", "numpy", "shape", "abstract mesh"],
)
def test_what_may_go_anywhere_goes_to_the_default_backend(leaf: Any) -> None:
    assert platform_of([leaf]) == ELSEWHERE
    assert platform_of([]) == ELSEWHERE


@pytest.mark.usefixtures("default_elsewhere")
def test_under_a_trace_the_platform_is_the_default_backends() -> None:
    found = []
    jax.jit(lambda tree: found.append(platform_of(tree)))(jax.device_put(np.ones(3), jax.devices()[0]))
    assert found == [ELSEWHERE]


@pytest.mark.parametrize("width", [32, 33, 64, 128])
def test_on_a_tpu_vectors_are_packed_and_matrices_that_would_be_laid_out_anew_are_not(width: int) -> None:
    small = {(width,), (width, width)} if width <= 32 else {(width,)}
    assert packed_shapes(worthwhile(network(width), platform="tpu")) == small


def test_on_a_tpu_a_step_with_trees_in_and_out_packs_vectors_alone() -> None:
    for size, packs in ((100, True), (4096, True), (4097, False)):
        packing = worthwhile([jnp.ones(size)] * 5, platform="tpu", inside=True)
        assert packed_shapes(packing) == ({(size,)} if packs else set())
    assert packed_shapes(worthwhile(network(8), platform="tpu", inside=True)) == {(8,)}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_elsewhere_rank_does_not_matter(platform: str) -> None:
    for inside in (False, True):
        assert packed_shapes(worthwhile(network(64), platform=platform, inside=inside)) == {(64,), (64, 64)}


def test_a_chosen_size_holds_for_its_platform_alone() -> None:
    before = fo.small_leaf()
    fo.set_small_leaf(300, "tpu")
    try:
        assert fo.small_leaf("tpu") == 300
        assert fo.small_leaf() == before
        for inside in (False, True):
            assert packed_shapes(worthwhile(network(8), platform="tpu", inside=inside)) == {(8,), (8, 8)}
    finally:
        fo.set_small_leaf(None, "tpu")
    assert fo.small_leaf("tpu") > 300


@pytest.mark.parametrize("platform", ["cuda", "rocm", "", 3])
def test_a_platform_is_named_as_devices_name_it(platform: Any) -> None:
    with pytest.raises(ValueError, match=rf"platform={platform!r} should be 'cpu', 'gpu' or 'tpu'"):
        fo.set_small_leaf(300, platform)


@pytest.mark.usefixtures("default_elsewhere")
def test_arrays_on_a_device_are_packed_as_is_best_there() -> None:
    params = network(64)
    placed = jax.device_put(params, jax.devices()[0])
    expected = {name: packed_shapes(worthwhile(params, platform=name)) for name in (HERE, ELSEWHERE)}
    assert packed_shapes(fo.pack(placed).packing) == expected[HERE]
    assert packed_shapes(fo.pack(params).packing) == expected[ELSEWHERE]


def test_vectors_and_matrices_may_have_limits_of_their_own() -> None:
    packing = Packing.of(network(8), Small(vector=4 * 8, matrix=0))
    assert packed_shapes(packing) == {(8,)}
    assert {packing.specs.leaves[at].shape for at in packing.large} == {(8, 8)}
