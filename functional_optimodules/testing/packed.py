"""Check that a brick means the same on packed parameters."""

from collections.abc import Iterator

from functional_optimodules.brick import Brick
from functional_optimodules.packing.adapter import Adapter, adapted
from functional_optimodules.packing.policy import pack
from functional_optimodules.packing.tree import unpack
from functional_optimodules.testing.check import check
from functional_optimodules.testing.exchange import received
from functional_optimodules.testing.trees import (
    assert_same,
    compiled_step,
    end_round,
    leaves_without_keys,
    parameters,
    randoms,
)
from functional_optimodules.types import Params, PyTree


@check(Brick, scope="field")
def check_packed_is_as_unpacked(brick: Brick) -> None:
    """On packed parameters a brick gives the same updates, states and auxiliary variables."""
    # Leaves of one shape, which lie side by side, and of others.
    params = {"first": parameters(), "second": parameters()}
    packed = pack(params)
    advice = "leave out `packable = True`, or go through `map_parameters` for what is done to each parameter"
    plain, packs = adapted(brick.bare()), adapted(brick.bare(), packed.packing)
    state, model = plain.init(params), packs.init(packed)
    assert_same(
        leaves_without_keys(packs.portable(model)),
        leaves_without_keys(state),
        f"`init` differs on packed parameters: {advice}",
    )
    auxes, packed_state = received(brick, params), packs.adopt(state, model)
    for seed in range(3):
        gradients = randoms(params, seed)
        output, state = compiled_step(plain, gradients, state, params)
        found, packed_state = compiled_step(packs, pack(gradients, like=packed), packed_state, packed)
        assert_same(unpack(found), output, f"`update` differs on packed parameters: {advice}", close=True)

    def after(adapter: Adapter, state: PyTree, params: Params) -> Iterator[tuple[str, PyTree]]:
        yield "update", state
        yield "begin_round", adapter.begin_round(state, params)
        yield "end_round", end_round(adapter, state, params)
        yield "collect", adapter.collect(state)
        yield "commit", adapter.commit(state)
        yield "process", adapter.process(auxes, state)

    made = dict(after(packs, packed_state, packed))
    for name, expected in after(plain, state, params):
        broken = f"what `{name}` returns differs on packed parameters: {advice}"
        assert_same(unpack(made[name]), expected, broken, close=True)
