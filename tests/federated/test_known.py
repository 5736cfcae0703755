"""What a round knows and bricks ask for: the numbers of NumPy, however participants are run."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.contract import KNOWN
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.numerics import cast_like, wide, zeros_wide

LRATE, CLIENTS, STEPS, BATCH = 0.2, 5, 3, 2
WHO = np.array([4, 0, 3])
TAKEN = np.array([3, 3, 2, 1, 2])
WEIGHTS = np.array([0.5, 2.0, 1.0], np.float32)
AT_END = ("coin", "delta", "examples", "full_gradient", "num_steps", "weight")


class Told(NamedTuple):
    told: dict[str, Any]


def nothing(params: Any, names: tuple[str, ...]) -> Told:
    return Told({name: zeros_wide(params) if KNOWN[name] else jnp.float32(0) for name in names})


def kept(told: dict[str, Any]) -> Told:
    return Told({name: jax.tree.map(lambda leaf: leaf.astype(wide(leaf).dtype), value) for name, value in told.items()})


def spoken(state: Told) -> dict[str, jax.Array]:
    """Each number that a brick was told, as a metric; of many the sum and that of squares."""
    found = {}
    for name, value in state.told.items():
        leaves = jax.tree.leaves(value)
        if sum(leaf.size for leaf in leaves) > 4:
            leaves = [sum(jnp.sum(leaf) for leaf in leaves), sum(jnp.sum(leaf**2) for leaf in leaves)]
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
        found |= {f"{name}-{place}": number for place, number in enumerate(flat)}
    return found


class CorrectedModule(fo.OptiModule[Told], register=False):
    """The step of SVRG: g(y) - g(x) + the mean gradient at x."""

    name = "corrected"
    packable = True

    def init(self, params: Any) -> Told:
        return nothing(params, ("lrate", "coin"))

    def update(
        self,
        updates: Any,
        state: Told,
        params: Any = None,
        *,
        anchor_gradient: Any,
        mean_gradient: Any,
        lrate: Any,
        coin: Any,
        **extra: Any,
    ) -> Any:
        made = jax.tree.map(lambda g, a, m: wide(g) - a + m, updates, anchor_gradient, mean_gradient)
        rates = state.told["lrate"] + lrate
        return cast_like(made, updates), Told({"lrate": rates, "coin": coin})

    def begin_round(self, state: Told, params: Any = None) -> Told:
        return jax.tree.map(jnp.zeros_like, state)

    def metrics(self, state: Told) -> Any:
        return spoken(state)


class EndModule(fo.OptiModule[Told], register=False):
    """Remembers all that it is told at a round's end."""

    name = "end"

    def init(self, params: Any) -> Told:
        return nothing(params, AT_END)

    def update(self, updates: Any, state: Told, params: Any = None, **extra: Any) -> Any:
        return updates, state

    def end_round(
        self,
        state: Told,
        *,
        delta: Any,
        num_steps: Any,
        weight: Any,
        examples: Any,
        full_gradient: Any,
        coin: Any,
        **known: Any,
    ) -> Told:
        told = {"delta": delta, "num_steps": num_steps, "weight": weight, "examples": examples}
        return kept(told | {"full_gradient": full_gradient, "coin": coin})

    def metrics(self, state: Told) -> Any:
        return spoken(state)


class UplinkModule(fo.OptiModule[Told], register=False):
    """The same, on the uplink."""

    name = "sent"

    def init(self, params: Any) -> Told:
        return nothing(params, AT_END)

    def update(
        self,
        updates: Any,
        state: Told,
        params: Any = None,
        *,
        delta: Any,
        num_steps: Any,
        weight: Any,
        examples: Any,
        full_gradient: Any,
        coin: Any,
        **extra: Any,
    ) -> Any:
        told = {"delta": delta, "num_steps": num_steps, "weight": weight, "examples": examples}
        return updates, kept(told | {"full_gradient": full_gradient, "coin": coin})

    def metrics(self, state: Told) -> Any:
        return spoken(state)


class ServerModule(fo.OptiModule[Told], register=False):
    """Remembers all that a server is told."""

    name = "heard"
    names = ("coin", "joined", "lrate", "mean_gradient")

    def init(self, params: Any) -> Told:
        return nothing(params, self.names)

    def update(
        self,
        updates: Any,
        state: Told,
        params: Any = None,
        *,
        joined: Any,
        mean_gradient: Any,
        lrate: Any,
        coin: Any,
        **extra: Any,
    ) -> Any:
        return updates, kept({"coin": coin, "joined": joined, "lrate": lrate, "mean_gradient": mean_gradient})

    def metrics(self, state: Told) -> Any:
        return spoken(state)


def asking(names: str, end: bool = False) -> fo.OptiModule[Told]:
    """A module that asks for something, in a step or at a round's end, and says the sum of it."""
    namespace: dict[str, Any] = {}
    nobody, asked = ("**known", "state"), (f"*, {names}, **known", f"summed(({names},))")
    (step, stepped), (ending, ended) = (nobody, asked) if end else (asked, nobody)
    exec(
        f"def update(self, updates, state, params=None, {step}): return updates, {stepped}\n"
        f"def end_round(self, state, {ending}): return {ended}",
        {"summed": summed},
        namespace,
    )
    body = namespace | {"name": "asking", "init": lambda self, params: nothing(params, ("coin",))}
    body["metrics"] = lambda self, state: state.told
    return type("AskingModule", (fo.OptiModule,), body, register=False)()


def summed(trees: Any) -> Told:
    return Told({"coin": sum((jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(trees)), jnp.float32(0))})


def squares(params: Any, batch: Any) -> Any:
    """Half a weighted squared distance to each example: curvatures differ from batch to batch."""
    x, scale = batch
    return 0.5 * jnp.sum(scale * (params["w"] - x) ** 2, axis=-1)


def slope(w: np.ndarray, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The gradient of the mean over all examples."""
    return (scale * (w - x)).reshape(-1, 2).mean(axis=0)


START = np.array([1.0, -2.0])


def start() -> Any:
    return {"w": jnp.asarray(START, jnp.float32)}


@functools.cache
def given() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (CLIENTS, STEPS, BATCH, 2)
    return rng.normal(size=shape).astype(np.float32), rng.uniform(0.5, 2, shape).astype(np.float32)


@functools.cache
def walk(corrected: bool, weights: tuple[float, ...], there: tuple[bool, ...]) -> Any:
    """SVRG, or plain steps, in float64: deltas, gradients over all batches, their mean, the new weights."""
    x, scale = (each.astype(float) for each in given())
    full = {c: slope(START, x[c, : TAKEN[c]], scale[c, : TAKEN[c]]) for c in WHO}
    heavy = np.array(weights) * np.array(there)
    mean = np.average([full[c] for c in WHO], axis=0, weights=heavy)
    deltas = {}
    for c in WHO:
        y = START
        for k in range(TAKEN[c]):
            step = slope(y, x[c, k], scale[c, k])
            y = y - LRATE * (step - slope(START, x[c, k], scale[c, k]) + mean if corrected else step)
        deltas[c] = y - START
    new = START + np.average([deltas[c] for c in WHO], axis=0, weights=heavy)
    return deltas, full, mean, new


def one_round(federation: Federation, dropped: Any = (False,) * 3, weights: Any = WEIGHTS) -> Any:
    batches = tuple(each[WHO] for each in given())
    state = federation.init(start(), CLIENTS)
    program = jax.jit(
        lambda state, weights, dropped: federation.round(
            state, batches, WHO, num_steps=TAKEN[WHO], weights=weights, dropped=dropped
        )
    )
    return program(state, weights, np.array(dropped))


def metric(metrics: Any, prefix: str, name: str) -> np.ndarray:
    """What bricks said by one name: a row for each participant, where it is not a server's."""
    places = sorted(key for key in metrics if key.startswith(f"{prefix}/{name}-"))
    assert places
    return np.stack([np.asarray(metrics[key]) for key in places], axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mapping", "dropped"), [("scan", (False,) * 3), ("vmap", (True, False, False)), (2, (True, False, False))]
)
def test_steps_with_the_anchors_and_the_mean_gradient_are_those_of_svrg(mapping: Any, dropped: Any) -> None:
    client = fo.Optimizer(LRATE, modules=[CorrectedModule()])
    federation = Federation(squares, client, fo.Optimizer(1.0, modules=[ServerModule()]), mapping=mapping)
    state, metrics = one_round(federation, dropped)
    _, _, mean, new = walk(True, tuple(WEIGHTS), tuple(not d for d in dropped))
    np.testing.assert_allclose(state.params["w"], new, atol=1e-6)
    np.testing.assert_allclose(metric(metrics, "server/heard", "mean_gradient"), mean, atol=1e-6)
    assert metrics["server/heard/joined-0"] == 3 - sum(dropped)
    assert metrics["server/heard/lrate-0"] == 1
    # The rate of each step that was taken, and none of another round's.
    np.testing.assert_allclose(metrics["client/corrected/lrate-0"], LRATE * TAKEN[WHO], rtol=1e-6)
    coins = np.asarray(metrics["client/corrected/coin-0"])
    assert set(coins) == {float(metrics["server/heard/coin-0"])}
    assert 0 <= coins[0] < 1


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["scan", "vmap", 2])
def test_what_is_told_at_the_end_of_a_round_is_the_same_to_the_clients_bricks_and_on_the_uplink(mapping: Any) -> None:
    client = fo.Optimizer(LRATE, modules=[EndModule()])
    federation = Federation(squares, client, uplink=[UplinkModule()], mapping=mapping)
    state, metrics = one_round(federation, (False, True, False))
    deltas, full, _, new = walk(False, tuple(WEIGHTS), (True, False, True))
    np.testing.assert_allclose(state.params["w"], new, atol=1e-6)
    for place in ("client/end", "uplink/sent"):
        found = {name: metric(metrics, place, name) for name in AT_END}
        np.testing.assert_allclose(found["delta"], [deltas[c] for c in WHO], atol=1e-6)
        np.testing.assert_allclose(found["full_gradient"], [full[c] for c in WHO], atol=1e-6)
        assert found["num_steps"][:, 0].tolist() == TAKEN[WHO].tolist()
        assert found["examples"][:, 0].tolist() == (BATCH * TAKEN[WHO]).tolist()
        np.testing.assert_array_equal(found["weight"][:, 0], WEIGHTS)
        assert len(set(found["coin"][:, 0])) == 1
    assert metrics["client/end/coin-0"][0] == metrics["uplink/sent/coin-0"][0]


SIZES = (4, 7, 3)


@functools.cache
def clients() -> list[Any]:
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(n, 2)).astype(np.float32), rng.uniform(0.5, 2, (n, 2)).astype(np.float32)) for n in SIZES]


@pytest.mark.slow
@pytest.mark.parametrize("remainder", ["mask", "drop"])
def test_the_gradient_over_all_data_is_over_each_example_once_whatever_the_steps_are(remainder: Any) -> None:
    client = fo.Optimizer(LRATE, modules=[EndModule()])
    federation = Federation(squares, client, batch_size=3, remainder=remainder, weighting="examples", steps=2)
    data = FederatedData.from_clients(clients())
    _, metrics = federation.run(federation.init(start(), data), data, 1, participants=3)
    who = np.asarray(metrics["participants"])[0]
    found = metric(metrics, "client/end", "full_gradient")[0]
    np.testing.assert_allclose(found, [slope(START, *clients()[c]) for c in who], atol=1e-6)
    assert metrics["client/end/weight-0"][0].tolist() == [SIZES[c] for c in who]
    assert metrics["client/end/num_steps-0"][0].tolist() == [2, 2, 2]


def test_the_mean_gradient_weighs_as_the_mean_of_deltas_does() -> None:
    server = fo.Optimizer(1.0, modules=[ServerModule()])
    data = FederatedData.from_clients(clients())
    for weighting, heavy in (("uniform", np.ones(3)), ("examples", SIZES)):
        federation = Federation(squares, fo.Optimizer(LRATE), server, batch_size=3, weighting=weighting)
        _, metrics = federation.round(federation.init(start(), data), data, np.arange(3))
        mean = np.average([slope(START, *each) for each in clients()], axis=0, weights=heavy)
        np.testing.assert_allclose(metric(metrics, "server/heard", "mean_gradient"), mean, atol=1e-6)


def test_a_coin_is_drawn_once_a_round_and_another_one_in_the_next() -> None:
    client, server = fo.Optimizer(LRATE, modules=[CorrectedModule()]), fo.Optimizer(1.0, modules=[ServerModule()])
    federation = Federation(squares, client, server, batch_size=4)
    data = FederatedData.from_clients(clients())
    _, metrics = federation.run(federation.init(start(), data), data, 40)
    coins = np.asarray(metrics["client/corrected/coin-0"])
    np.testing.assert_array_equal(coins, np.broadcast_to(metrics["server/heard/coin-0"][:, None], coins.shape))
    assert len(set(coins[:, 0])) == 40
    assert coins.min() >= 0
    assert coins.max() < 1
    # Of 40 uniform numbers the mean is within 4 deviations of 1/2.
    assert abs(coins[:, 0].mean() - 0.5) < 4 * np.sqrt(1 / 12 / 40)


def test_the_rate_that_bricks_are_told_is_that_of_the_step() -> None:
    client = fo.Optimizer(("inverse-scaling", {"base": 0.5, "rate": 1.0}), modules=[CorrectedModule()])
    federation = Federation(squares, client, batch_size=4, steps=3)
    data = FederatedData.from_clients(clients())
    _, metrics = federation.run(federation.init(start(), data), data, 1)
    expected = sum(0.5 / (1 + step) for step in range(3))
    np.testing.assert_allclose(metrics["client/corrected/lrate-0"], expected, rtol=1e-6)


def dots(federation: Federation) -> int:
    """How many products of matrices the program of a round has."""
    data = FederatedData.from_clients([np.ones((4, 3), np.float32)] * 2)
    state = federation.init(jnp.ones((3, 2)), data)
    text = jax.jit(federation.round).lower(state, data, np.arange(2)).as_text()
    return len(re.findall("stablehlo.dot_general", text))


def product(params: Any, batch: Any) -> Any:
    return jnp.sum((batch @ params) ** 2, axis=-1)


@pytest.mark.slow
def test_what_nobody_asks_for_is_not_computed() -> None:
    rate = 0.1
    plain = dots(Federation(product, fo.Optimizer(rate), batch_size=4))
    batch, params = jnp.ones((4, 3)), jnp.ones((3, 2))
    text = jax.jit(jax.value_and_grad(lambda p, b: product(p, b).mean())).lower(params, batch).as_text()
    assert plain == len(re.findall("stablehlo.dot_general", text))
    for names in ("lrate", "coin"):
        assert dots(Federation(product, fo.Optimizer(rate, modules=[asking(names)]), batch_size=4)) == plain
    for names in ("delta, num_steps, weight, examples, coin",):
        module = asking(names, end=True)
        assert dots(Federation(product, fo.Optimizer(rate, modules=[module]), batch_size=4)) == plain
        assert dots(Federation(product, fo.Optimizer(rate), batch_size=4, uplink=[asking(names)])) == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "end"), [("anchor_gradient", False), ("mean_gradient", False), ("full_gradient", True)]
)
def test_what_is_asked_for_costs_one_more_gradient(names: str, end: bool) -> None:
    plain = dots(Federation(product, fo.Optimizer(0.1), batch_size=4))
    asked = dots(Federation(product, fo.Optimizer(0.1, modules=[asking(names, end)]), batch_size=4))
    assert plain < asked <= 2 * plain


LAYERS = 6


def deep(params: Any, batch: Any) -> Any:
    x = batch
    for layer in sorted(params):
        x = jnp.tanh(x @ params[layer]["w"] + params[layer]["b"]) + x
    return jnp.sum(x**2, axis=-1)


def deep_params() -> Any:
    return {f"{i:02d}": {"b": jnp.zeros(3), "w": jnp.eye(3) * 0.5} for i in range(LAYERS)}


@pytest.mark.slow
@pytest.mark.parametrize("mapping", [2])
def test_many_small_parameters_are_told_of_as_unpacked_ones_are(mapping: Any) -> None:
    client = fo.Optimizer(0.05, modules=[CorrectedModule(), EndModule(), "momentum"])
    server = fo.Optimizer(1.0, modules=[ServerModule()])
    federation = Federation(deep, client, server, batch_size=4, uplink=[UplinkModule(), "momentum"], mapping=mapping)
    rng = np.random.default_rng(0)
    data = FederatedData.from_clients([rng.normal(size=(n, 3)).astype(np.float32) for n in (9, 4, 6)])
    found = []
    for small in (None, 0):
        fo.set_small_leaf(small)
        try:
            state = federation.init(deep_params(), data)
            assert (state.packing is None) == (small == 0)
            found.append(jax.jit(lambda state: federation.run(state, data, 2, participants=2))(state))
        finally:
            fo.set_small_leaf(None)
    (packed, said), (plain, told) = found
    for leaf, other in zip(jax.tree.leaves(packed.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-6)
    for place in ("client/end", "uplink/sent"):
        for name in AT_END:
            left, right = metric(said, place, name), metric(told, place, name)
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5, err_msg=f"{place}/{name}")


class CountState(NamedTuple):
    count: Any


class CountModule(fo.OptiModule[CountState], register=False):
    """Counts local steps, as an integer."""

    name = "count"

    def init(self, params: Any) -> CountState:
        return CountState(jnp.zeros((), jnp.int32))

    def update(self, updates: Any, state: CountState, params: Any = None, **extra: Any) -> Any:
        return updates, state

    def end_round(self, state: CountState, *, num_steps: Any, **known: Any) -> CountState:
        return CountState(state.count + num_steps)

    def metrics(self, state: CountState) -> Any:
        return {"count": state.count}


class RoundsModule(CountModule, register=False):
    """Counts rounds, and asks for nothing."""

    name = "rounds"

    def end_round(self, state: CountState, **known: Any) -> CountState:
        return CountState(state.count + 1)


class LastModule(CountModule, register=False):
    """Remembers the delta as it comes."""

    name = "last"

    def init(self, params: Any) -> CountState:
        return CountState(zeros_wide(params))

    def end_round(self, state: CountState, *, delta: Any, **known: Any) -> CountState:
        return CountState(delta)

    def metrics(self, state: CountState) -> Any:
        return {"count": sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state.count))}


def test_the_number_of_steps_is_an_integer_and_may_be_added_to_one() -> None:
    data = FederatedData.from_clients(clients())
    federation = Federation(squares, fo.Optimizer(LRATE, modules=[CountModule()]), batch_size=2)
    _, metrics = federation.run(federation.init(start(), data), data, 2)
    assert metrics["client/count/count"].dtype == jnp.int32
    each = np.array([-(-size // 2) for size in SIZES])[np.asarray(metrics["participants"])]
    assert metrics["client/count/count"].tolist() == (each * [[1], [2]]).tolist()


@pytest.mark.parametrize("uplink", [[], ["momentum"]])
def test_a_round_ends_for_a_brick_that_asks_for_nothing_too(uplink: Any) -> None:
    data = FederatedData.from_clients(clients())
    client = fo.Optimizer(LRATE, modules=[RoundsModule()])
    federation = Federation(squares, client, batch_size=4, uplink=uplink)
    _, metrics = federation.run(federation.init(start(), data), data, 2)
    assert metrics["client/rounds/count"].tolist() == [[1, 1, 1], [2, 2, 2]]


def test_a_delta_is_of_float32_where_parameters_are_of_less() -> None:
    def loss(params: Any, batch: Any) -> Any:
        return jnp.sum((params["w"] - batch.astype(jnp.bfloat16)) ** 2, axis=-1)

    data = FederatedData.from_clients([np.ones((4, 2), np.float32)] * 2)
    federation = Federation(loss, fo.Optimizer(LRATE, modules=[LastModule()]), uplink=["momentum"])
    _, metrics = federation.run(federation.init({"w": jnp.zeros(2, jnp.bfloat16)}, data), data, 1)
    assert metrics["client/last/count"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["client/last/count"], 2 * 2 * LRATE, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"on_nonfinite": "skip"}, {}])
def test_the_mean_gradient_is_without_those_that_are_left_out(options: Any) -> None:
    spoilt = [jax.tree.map(np.copy, each) for each in clients()]
    spoilt[1][0][:] = np.nan
    data = FederatedData.from_clients(spoilt)
    client, server = fo.Optimizer(LRATE, modules=[CorrectedModule()]), fo.Optimizer(1.0, modules=[ServerModule()])
    federation = Federation(squares, client, server, **options)
    dropped = None if options else np.array([False, True, False])
    state, metrics = federation.round(federation.init(start(), data), data, np.arange(3), dropped=dropped)
    assert metrics["joined"].tolist() == [True, False, True]
    mean = np.mean([slope(START, *clients()[c]) for c in (0, 2)], axis=0)
    np.testing.assert_allclose(metric(metrics, "server/heard", "mean_gradient"), mean, atol=1e-6)
    # One full batch: each steps by the mean gradient.
    np.testing.assert_allclose(state.params["w"], START - LRATE * mean, atol=1e-6)


@pytest.mark.slow
def test_the_pass_for_the_mean_gradient_copies_no_rows_of_other_clients(optimized: Any) -> None:
    data = FederatedData.from_clients([(np.ones((2, 100), np.float32),) * 2] * 1000)
    client = fo.Optimizer(0.1, modules=["momentum", CorrectedModule()])
    federation = Federation(squares, client, batch_size=2, mapping="scan")
    state = federation.init({"w": jnp.zeros(100)}, data)
    program = jax.jit(federation.round, donate_argnums=0).lower(state, data, np.arange(3)).compile(optimized)
    bank = sum(leaf.nbytes for leaf in state.bank)
    assert bank > 100 * 1000
    assert program.memory_analysis().temp_size_in_bytes < bank / 10
    assert program.memory_analysis().alias_size_in_bytes >= bank


@pytest.mark.parametrize(
    ("place", "module", "message"),
    [
        (
            "client",
            asking("delta"),
            "on the clients' side asks for 'delta' in `update`: there is anchor_gradient, coin",
        ),
        ("client", asking("value"), "asks for 'value' in `update`"),
        ("client", asking("joined", end=True), "asks for 'joined' in `end_round`: there is coin, delta"),
        ("client", asking("anchor_gradient", end=True), "asks for 'anchor_gradient' in `end_round`"),
        ("uplink", asking("anchor_gradient"), "on the uplink asks for 'anchor_gradient' in `update`"),
        ("uplink", asking("joined"), "on the uplink asks for 'joined'"),
        (
            "uplink",
            asking("delta", end=True),
            "asks for 'delta' in `end_round`: there is nothing, for it is not called",
        ),
        ("server", asking("delta"), "on the server asks for 'delta' in `update`: there is coin, joined"),
        ("server", asking("joined", end=True), "asks for 'joined' in `end_round`: there is nothing"),
    ],
)
def test_a_brick_that_asks_for_what_its_place_does_not_know_is_refused(place: str, module: Any, message: str) -> None:
    client = fo.Optimizer(0.1, modules=[module] if place == "client" else [])
    server = fo.Optimizer(1.0, modules=[module] if place == "server" else [])
    with pytest.raises(ValueError, match=message):
        Federation(squares, client, server, uplink=[module] if place == "uplink" else [])
