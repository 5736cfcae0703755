"""What one round does, against NumPy: who counts how much, and what leaves no trace."""

import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.aux_var import FromClients, FromServer, Max, Min, PerClient, Scalar
from functional_optimodules.federated import FederatedData, Federation, clients_mesh
from functional_optimodules.types import Params

LRATE, CLIENTS, STEPS, BATCH = 0.1, 6, 3, 4
WHO = np.array([4, 0, 2])


def squares(params: Any, batch: Any) -> Any:
    """Half the squared distance to each example, whose gradient is the distance to their mean."""
    error = params["w"] - batch
    return 0.5 * jnp.sum(error**2, axis=-1), {"first": batch[:, 0]}


def start() -> Any:
    return {"w": jnp.array([1.0, -2.0])}


@functools.cache
def batches() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(CLIENTS, STEPS, BATCH, 2)).astype(np.float32)


@functools.cache
def masks() -> np.ndarray:
    real = np.ones((CLIENTS, STEPS, BATCH), bool)
    real[0, 1, 2:] = real[2, 0, 1:] = real[4, 2] = False
    return real


def scaffold(**options: Any) -> Federation:
    client = fo.Optimizer(LRATE, modules=["scaffold-client"])
    return Federation(squares, client, fo.Optimizer(1.0, modules=["scaffold-server"]), **options)


@functools.cache
def program(federation: Federation) -> Any:
    return jax.jit(
        lambda state, batches, who, steps, mask, weights, dropped: federation.round(
            state, batches, who, num_steps=steps, mask=mask, weights=weights, dropped=dropped
        )
    )


def one_round(
    federation: Federation,
    who: Any = WHO,
    state: Any = None,
    examples: Any = None,
    steps: Any = None,
    weights: Any = None,
    dropped: Any = None,
) -> Any:
    who = np.asarray(who)
    state = federation.init(start(), CLIENTS) if state is None else state
    examples = batches() if examples is None else examples
    steps = np.full(CLIENTS, STEPS) if steps is None else steps
    dropped = np.zeros(len(who), bool) if dropped is None else dropped
    weights = np.ones(len(who), np.float32) if weights is None else weights
    return program(federation)(state, examples[who], who, steps[who], masks()[who], weights, dropped)


def local_numpy(client: int, steps: int) -> tuple[np.ndarray, int]:
    """Where a client's plain steps lead, and over how many examples."""
    w, seen = np.array([1.0, -2.0]), 0
    for batch, real in zip(batches()[client][:steps], masks()[client][:steps], strict=True):
        if real.any():
            w = w - LRATE * (w - batch[real].mean(axis=0))
            seen += real.sum()
    return w, seen


def same(left: Any, right: Any, atol: float = 0.0) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.slow
def test_unequal_steps_and_masked_examples_with_given_weights_as_in_numpy() -> None:
    steps, weights = np.array([2, 3, 1, 3, 3, 3]), np.array([0.5, 2.0, 1.0], np.float32)
    state, metrics = one_round(scaffold(), steps=steps, weights=weights)
    ends = [local_numpy(client, steps[client]) for client in WHO]
    np.testing.assert_allclose(state.params["w"], np.average([w for w, _ in ends], axis=0, weights=weights), atol=1e-6)
    assert metrics["examples"].tolist() == [seen for _, seen in ends] == [8, 6, 1]


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_clients_count_alike_or_by_their_examples(weighting: Any) -> None:
    federation = scaffold(weighting=weighting)
    run = jax.jit(lambda state: federation.round(state, batches()[WHO], WHO, mask=masks()[WHO]))
    state, metrics = run(federation.init(start(), CLIENTS))
    ends = [local_numpy(client, STEPS) for client in WHO]
    weights = [seen if weighting == "examples" else 1 for _, seen in ends]
    np.testing.assert_allclose(state.params["w"], np.average([w for w, _ in ends], axis=0, weights=weights), atol=1e-6)
    first = [batches()[c][masks()[c]][:, 0].mean() for c in WHO]
    np.testing.assert_allclose(metrics["first"], first, atol=1e-6)


@pytest.mark.parametrize("garbage", [1e30, np.nan, np.inf])
def test_what_stands_in_masked_places_and_after_the_last_step_changes_no_bit(garbage: float) -> None:
    steps = np.array([2, 3, 1, 3, 3, 3])
    spoilt = batches().copy()
    spoilt[~masks()] = garbage
    for client, count in enumerate(steps):
        spoilt[client, count:] = garbage
    same(one_round(scaffold(), steps=steps), one_round(scaffold(), steps=steps, examples=spoilt))


def test_participants_in_any_order_give_the_same_state() -> None:
    same(one_round(scaffold(), [0, 2, 4])[0], one_round(scaffold(), [4, 0, 2])[0], atol=1e-6)


def test_all_clients_may_take_part_at_once_in_any_order() -> None:
    federation = scaffold()
    state, metrics = one_round(federation, [5, 3, 1, 0, 2, 4])
    assert state.server.modules["scaffold-server"].clients == CLIENTS
    ends = [local_numpy(client, STEPS)[0] for client in range(CLIENTS)]
    np.testing.assert_allclose(state.params["w"], np.mean(ends, axis=0), atol=1e-6)
    assert metrics["participants"].tolist() == [5, 3, 1, 0, 2, 4]


@pytest.fixture(scope="module")
def second() -> Any:
    """A state in which every client has a variate and the server one too."""
    return one_round(scaffold(), range(CLIENTS))[0]


def test_who_drops_out_leaves_the_state_as_if_never_sampled(second: Any) -> None:
    with_drop, metrics = one_round(scaffold(), [4, 0, 2], second, dropped=np.array([False, True, False]))
    without, _ = one_round(scaffold(), [4, 2], second)
    same(with_drop, without, atol=1e-7)
    assert metrics["joined"].tolist() == [True, False, True]
    assert not np.allclose(with_drop.params["w"], one_round(scaffold(), [4, 0, 2], second)[0].params["w"])
    for before, after in zip(second.bank, with_drop.bank, strict=True):
        assert np.array_equal(before[0], after[0])


def test_a_round_in_which_all_drop_out_only_counts(second: Any) -> None:
    state, _ = one_round(scaffold(), WHO, second, dropped=np.ones(3, bool))
    same(state._replace(round=second.round), second)
    assert state.round == second.round + 1


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["scan", "vmap"])
def test_a_client_that_sends_nan_is_named_and_may_be_left_out_as_one_that_dropped(second: Any, mapping: Any) -> None:
    poisoned = batches().copy()
    poisoned[0, 0, 0, 0] = np.nan
    state, metrics = one_round(scaffold(on_nonfinite="skip", mapping=mapping), WHO, second, poisoned)
    assert metrics["finite"].tolist() == metrics["joined"].tolist() == [True, False, True]
    same(state, one_round(scaffold(), [4, 2], second)[0], atol=1e-7)
    scaffold(on_nonfinite="skip").check(metrics)


def test_a_client_that_sends_nan_is_else_an_error_that_names_it_and_the_round(second: Any) -> None:
    poisoned = batches().copy()
    poisoned[0, 0, 0, 0] = np.inf
    federation = scaffold()
    state, metrics = one_round(federation, WHO, second, poisoned)
    assert not np.isfinite(state.params["w"]).all()
    with pytest.raises(FloatingPointError, match=r"in round 1, clients \[0\] sent"):
        federation.check(metrics)


class TestBank:
    @pytest.mark.parametrize(
        ("modules", "kept"),
        [
            ([], []),
            ([("l2-global-clipping", {"max_norm": 1.0})], []),
            (["scaffold-client"], [(6, 2), (6,)]),
            ([("momentum", {"round_reset": True})], []),
            (["momentum"], [(6, 2)]),
            ([("gaussian-noise", {"seed": 0, "safe_mode": False})], [(6,), (6,)]),
        ],
    )
    def test_holds_only_what_clients_keep_across_rounds(self, modules: Any, kept: Any) -> None:
        server = fo.Optimizer(1.0, modules=["scaffold-server"] if modules == ["scaffold-client"] else [])
        client = fo.Optimizer(LRATE, regularizers=["fedprox"], modules=modules)
        state = Federation(squares, client, server).init(start(), CLIENTS)
        assert [leaf.shape for leaf in state.bank] == kept
        assert state.slots.shape == ((6,) if kept else (0,))

    def test_keeps_the_clocks_of_rates_that_read_them(self) -> None:
        decay = fo.Optimizer(("exponential-decay", {"base": 0.1, "rate": 0.9, "step_level": True}))
        assert [leaf.shape for leaf in Federation(squares, decay).init(start(), CLIENTS).bank] == [(6,)]

    def test_names_of_what_scaffold_keeps_are_the_variate_and_whether_it_joined(self) -> None:
        federation = scaffold()
        saved = federation.encode(federation.init(start(), CLIENTS))
        assert [name.removeprefix("modules/scaffold-client/") for name in saved["bank"]] == ["local/w", "joined"]


class TestRemainder:
    @staticmethod
    def steps(remainder: Any, batch_size: int | None, epochs: int = 1) -> list[int]:
        """How many steps clients of 5, 8 and 3 examples take: each moves the parameter by -1."""
        data = FederatedData.from_clients([np.ones((n, 1), np.float32) for n in (5, 8, 3)])
        federation = Federation(
            lambda w, batch: w * batch[:, 0],
            fo.Optimizer(1.0),
            batch_size=batch_size,
            epochs=epochs,
            remainder=remainder,
        )
        state = federation.init(jnp.float32(0), data)
        run = jax.jit(lambda state, who: federation.round(state, data, who)[0].params)
        return [-int(run(state, np.array([client]))) for client in range(3)]

    def test_mask_takes_a_partial_step_more(self) -> None:
        assert self.steps("mask", 3) == [2, 3, 1]

    def test_drop_takes_full_batches_only(self) -> None:
        assert self.steps("drop", 3, epochs=2) == [2, 4, 2]

    def test_wrap_fills_the_last_batch(self) -> None:
        assert self.steps("wrap", 3) == [2, 3, 1]

    def test_without_a_batch_size_a_pass_is_one_step(self) -> None:
        assert self.steps("mask", None, epochs=3) == [3, 3, 3]

    @pytest.mark.slow
    @pytest.mark.parametrize("remainder", ["mask", "wrap"])
    def test_partial_batches_average_real_examples_or_repeat_the_first_ones(self, remainder: Any) -> None:
        values = np.array([[1.0], [10.0], [100.0]], np.float32)
        data = FederatedData.from_clients([values, np.full((2, 1), np.nan, np.float32)])
        federation = Federation(lambda w, batch: w * batch[:, 0], fo.Optimizer(1.0), batch_size=2, remainder=remainder)
        state, metrics = jax.jit(lambda s: federation.round(s, data, np.array([0])))(
            federation.init(jnp.float32(0), data)
        )
        taken = -float(state.params)
        pairs = [(a, b, c) for a in (1, 10, 100) for b in (1, 10, 100) for c in (1, 10, 100) if len({a, b, c}) == 3]
        last = {"mask": lambda a, c: c, "wrap": lambda a, c: (a + c) / 2}[remainder]
        assert any(abs(taken - ((a + b) / 2 + last(a, c))) < 1e-3 for a, b, c in pairs)
        assert metrics["examples"].tolist() == [3]

    @pytest.mark.slow
    @pytest.mark.parametrize(("sizes", "remainder"), [((5, 8), "wrap"), ((5, 8), "drop"), ((6, 6), "mask")])
    def test_a_scalar_loss_is_taken_where_all_batches_are_full(self, sizes: Any, remainder: Any) -> None:
        data = FederatedData.from_clients([np.ones((n, 1), np.float32) for n in sizes])
        federation = Federation(
            lambda w, batch: w * jnp.mean(batch), fo.Optimizer(1.0), batch_size=3, remainder=remainder
        )
        state = jax.jit(lambda s: federation.round(s, data, np.array([0])))(federation.init(jnp.float32(0), data))[0]
        assert float(state.params) == -(sizes[0] // 3 if remainder == "drop" else -(-sizes[0] // 3))


class Claim(FromClients):
    mine: PerClient[Scalar]


class Share(FromServer):
    yours: PerClient[Scalar]


class ClaimState(NamedTuple):
    share: jax.Array


class ClaimModule(fo.OptiModule, register=False):
    name: ClassVar[str] = "claim-client"
    aux_name: ClassVar[str] = "claim"
    sends = Claim
    receives = Share

    def init(self, params: Any) -> ClaimState:
        return ClaimState(jnp.zeros(()))

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return jax.tree.map(lambda g: g * 0 + state.share, updates), state

    def collect(self, state: Any) -> Claim:
        return Claim(state.share + 1)

    def process(self, aux: Any, state: Any) -> ClaimState:
        return ClaimState(aux.yours)


class ClaimsModule(fo.OptiModule, register=False):
    name: ClassVar[str] = "claim-server"
    aux_name: ClassVar[str] = "claim"
    sends = Share
    receives = Claim
    num_clients: int = CLIENTS

    def init(self, params: Any) -> ClaimState:
        return ClaimState(10.0 * jnp.arange(self.num_clients))

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return updates, state

    def collect(self, state: Any) -> Share:
        return Share(state.share)

    def process(self, aux: Any, state: Any) -> ClaimState:
        return ClaimState(aux.mine)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["scan", "vmap"])
def test_variables_per_client_reach_the_client_that_they_are_for_and_come_back_by_client(mapping: Any) -> None:
    federation = Federation(
        squares,
        fo.Optimizer(1.0, modules=[ClaimModule()]),
        fo.Optimizer(1.0, modules=[ClaimsModule()]),
        mapping=mapping,
    )
    state, _ = one_round(federation)
    assert state.server.modules["claim-server"].share.tolist() == [1, 0, 21, 0, 41, 0]
    # Each step subtracts the client's own share; client 4 takes two, the others three.
    np.testing.assert_allclose(state.params["w"], np.array([1, -2]) - (2 * 40 + 3 * 0 + 3 * 20) / 3, rtol=1e-6)


class Extremes(FromClients):
    largest: Max[Params]
    smallest: Min[Scalar]


class ExtremesState(NamedTuple):
    largest: Params
    smallest: jax.Array


class ExtremesModule(fo.OptiModule, register=False):
    """Says what the last gradient was, and its first element."""

    name: ClassVar[str] = "extremes-client"
    aux_name: ClassVar[str] = "extremes"
    sends = Extremes

    def init(self, params: Any) -> ExtremesState:
        return ExtremesState(jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return updates, ExtremesState(updates, updates["w"][0])

    def collect(self, state: Any) -> Extremes:
        return Extremes(*state)


class ExtremesServerModule(ExtremesModule, register=False):
    name: ClassVar[str] = "extremes-server"
    sends = None
    receives = Extremes

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return updates, state

    def collect(self, state: Any) -> None:
        return None

    def process(self, aux: Any, state: Any) -> ExtremesState:
        return ExtremesState(aux.largest, aux.smallest)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["scan", 2, clients_mesh(jax.devices()[:1])], ids=["scan", "chunks", "mesh"])
def test_the_server_gets_the_largest_and_the_smallest_of_those_who_joined(mapping: Any) -> None:
    client, server = (fo.Optimizer(LRATE, modules=[m]) for m in (ExtremesModule(), ExtremesServerModule()))
    federation = Federation(squares, client, server, mapping=mapping)
    state, _ = one_round(federation, steps=np.ones(CLIENTS, int), dropped=np.array([False, True, False]))
    gradients = np.stack([np.array([1, -2]) - batches()[who][0][masks()[who][0]].mean(axis=0) for who in (4, 2)])
    found = state.server.modules["extremes-server"]
    np.testing.assert_allclose(found.largest["w"], gradients.max(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.smallest, gradients[:, 0].min(), rtol=1e-6)
