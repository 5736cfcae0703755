"""Check that a brick means the same on packed parameters."""

from typing import Any

import jax

from functional_optimodules.core.brick import Brick
from functional_optimodules.core.compiled import compiled
from functional_optimodules.core.encoding import is_key
from functional_optimodules.core.packed import pack, pack_auxes
from functional_optimodules.core.packing import unpack
from functional_optimodules.testing.check import check
from functional_optimodules.testing.exchange import received
from functional_optimodules.testing.trees import assert_same, compiled_step, parameters, randoms


@check(Brick, scope="field")
def check_packed_is_as_unpacked(brick: Any) -> None:
    """On packed parameters a brick gives the same updates, states and auxiliary variables."""
    # Leaves of one shape, which lie side by side, and of others.
    params = {"first": parameters(), "second": parameters()}
    packed = pack(params)
    advice = "leave out `packable = True`, or go through `map_parameters` for what is done to each parameter"
    state = brick.init(params)
    assert_same(
        _without_keys(unpack(brick.init(packed))),
        _without_keys(state),
        f"`init` differs on packed parameters: {advice}",
    )
    packed_state = compiled(brick.bare()).pack(packed.packing, state)
    auxes = received(brick, params)
    packed_auxes = pack_auxes(auxes, packed.packing)
    for seed in range(3):
        gradients = randoms(params, seed)
        output, state = compiled_step(brick.bare(), gradients, state, params)
        found, packed_state = compiled_step(brick.bare(), pack(gradients, like=packed), packed_state, packed)
        assert_same(unpack(found), output, f"`update` differs on packed parameters: {advice}", close=True)
    made = {
        "update": lambda state, params, auxes: state,
        "begin_round": lambda state, params, auxes: brick.begin_round(state, params),
        "collect": lambda state, params, auxes: brick.collect_channels(state),
        "commit": lambda state, params, auxes: brick.commit(state),
        "process": lambda state, params, auxes: brick.process_channels(auxes, state) if auxes else state,
    }
    for name, call in made.items():
        expected, found = call(state, params, auxes), unpack(call(packed_state, packed, packed_auxes))
        assert_same(found, expected, f"what `{name}` returns differs on packed parameters: {advice}", close=True)


def _without_keys(state: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(state) if not is_key(leaf)]
