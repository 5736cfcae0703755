"""Adaptive clipping: rounds against algorithm 1 of Andrew et al. in NumPy float64, and the scale of its two noises."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from functional_optimodules.modules.adaptive_clipping import (
    AdaptiveClippingClientModule,
    AdaptiveClippingServerModule,
    ClippingBound,
    ClippingReport,
)

GAMMA, ETA, FIRST = 0.6, 0.5, 1.5
SCHEDULE = [[0, 1, 2, 3, 4], [1, 3], [2], [0, 2, 3], [4, 0], [0, 1, 2, 3, 4], [3, 4, 1]]
DELTAS = np.random.default_rng(5).normal(size=(len(SCHEDULE), 5, 6)) * np.geomspace(0.1, 2, 5)[:, None]
SIZE = 20_000
LEAST_P = 1e-3


def algorithm_1() -> list[tuple[np.ndarray, float]]:
    """Return the mean clipped delta and the next bound of each round, without noise."""
    bound, path = FIRST, []
    for who, deltas in zip(SCHEDULE, DELTAS, strict=True):
        norms = np.linalg.norm(deltas[who], axis=1)
        clipped = deltas[who] * np.minimum(1, bound / norms)[:, None]
        bound = bound * np.exp(-ETA * (np.mean(norms <= bound) - GAMMA))
        path.append((clipped.mean(0), bound))
    return path


def tree(vector: Any) -> Any:
    return {"a": jnp.asarray(vector[:4], jnp.float32).reshape(2, 2), "b": jnp.asarray(vector[4:], jnp.float32)}


def vector(params: Any) -> np.ndarray:
    return np.concatenate([np.ravel(params["a"]), np.ravel(params["b"])]).astype(np.float64)


def server_of(**fields: Any) -> AdaptiveClippingServerModule:
    defaults: dict[str, Any] = {"quantile": GAMMA, "bound_lrate": ETA, "initial_bound": FIRST, "seed": 0}
    return AdaptiveClippingServerModule(**(defaults | fields))


def reported(server: AdaptiveClippingServerModule, state: Any, inside: int, joined: int) -> Any:
    return server.process(ClippingReport(inside=jnp.int32(inside), joined=jnp.int32(joined)), state)


def test_rounds_of_the_pure_methods_are_the_papers() -> None:
    uplink, server, like = AdaptiveClippingClientModule(), server_of(), tree(np.zeros(6))
    state = server.init(like)
    for who, deltas, (mean, bound) in zip(SCHEDULE, DELTAS, algorithm_1(), strict=True):
        reports, total = [], np.zeros(6)
        for client in who:
            up = uplink.process(server.collect(state), uplink.init(like))
            sent, up = uplink.update(tree(deltas[client]), up, like)
            total += vector(sent)
            reports.append(uplink.collect(up))
        reduced = reports[0]
        for report in reports[1:]:
            reduced = reduced.merge(report)
        output, state = server.update(tree(total / len(who)), server.process(reduced, state), like)
        np.testing.assert_allclose(vector(output), mean, rtol=1e-5, atol=1e-6)
        assert float(server.metrics(state)["bound"]) == pytest.approx(bound, rel=1e-5)


def test_rounds_over_json_are_the_papers() -> None:
    uplinks = [AdaptiveClippingClientModule() for _ in range(5)]
    server = AdaptiveClippingServerModule.from_config(json.loads(json.dumps(server_of().get_config())))
    server.setup(tree(np.zeros(6)))
    for who, deltas, (mean, bound) in zip(SCHEDULE, DELTAS, algorithm_1(), strict=True):
        broadcast, messages, total = json.loads(json.dumps(server.collect_aux_var())), {}, np.zeros(6)
        for client in who:
            uplinks[client].process_aux_var(broadcast)
            total += vector(uplinks[client].run(tree(deltas[client])))
            messages[f"client-{client}"] = json.loads(json.dumps(uplinks[client].collect_aux_var()))
        server.process_aux_var(messages)
        output = server.run(tree(total / len(who)))
        np.testing.assert_allclose(vector(output), mean, rtol=1e-5, atol=1e-6)
        assert float(server.state.bound) == pytest.approx(bound, rel=1e-5)


def test_the_bound_settles_where_the_quantile_is() -> None:
    norms = jnp.array([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2])
    server = AdaptiveClippingServerModule(quantile=0.75, bound_lrate=0.2, initial_bound=100.0, seed=0)

    def turn(state: Any, _: None) -> Any:
        state = reported(server, state, jnp.sum(norms <= state.bound), len(norms))
        state = server.update(jnp.zeros(1), state)[1]
        return state, state.bound

    _, bounds = jax.lax.scan(turn, server.init(jnp.zeros(1)), None, 300)
    # With a share of 0.7 below 12.8, and of 0.8 from there on, it crosses 12.8 for ever, by small steps.
    np.testing.assert_allclose(bounds[-50:], 12.8, rtol=0.02)


def test_a_norm_equal_to_the_bound_is_within_it() -> None:
    uplink = AdaptiveClippingClientModule()
    state = uplink.process(ClippingBound(jnp.float32(5)), uplink.init(jnp.zeros(2)))
    for delta, inside, sent in (([3.0, 4.0], 1, [3.0, 4.0]), ([6.0, 8.0], 0, [3.0, 4.0]), ([0.0, 0.0], 1, [0.0, 0.0])):
        output, after = uplink.update(jnp.array(delta), state)
        np.testing.assert_allclose(output, sent, rtol=1e-6)
        assert (int(after.inside), int(after.joined)) == (inside, 1)


def test_without_a_bound_nothing_gets_through() -> None:
    np.testing.assert_array_equal(AdaptiveClippingClientModule().run({"w": jnp.ones(3)})["w"], 0)


def test_a_round_that_nobody_reports_leaves_the_bound() -> None:
    server = server_of(count_std=3.0)
    _, state = server.update(jnp.ones(2), server.init(jnp.zeros(2)))
    assert float(state.bound) == FIRST


@pytest.mark.slow
@pytest.mark.parametrize("safe_mode", [True, False])
def test_the_noise_on_the_mean_is_that_of_the_rounds_own_bound_and_of_no_other(safe_mode: bool) -> None:
    z, count_std, joined = 1.5, 1.0, 4
    # A large rate: the bound of this round is far from that of the next.
    server = server_of(noise_multiplier=z, count_std=count_std, bound_lrate=2.0, safe_mode=safe_mode)
    state = reported(server, server.init(jnp.zeros(SIZE)), joined, joined)
    output, after = server.update(jnp.full(SIZE, 7.0), state)
    sample = np.asarray(output, np.float64) - 7.0
    std = (z**-2 - (2 * count_std) ** -2) ** -0.5 * FIRST / joined
    assert not 0.9 < float(after.bound) / FIRST < 1.1
    assert stats.kstest(sample / std, "norm").pvalue > LEAST_P
    for wrong in (0.9, 1.1):
        assert stats.kstest(sample / (wrong * std), "norm").pvalue < LEAST_P
    again, _ = server.update(jnp.full(SIZE, 7.0), after)
    assert abs(np.corrcoef(sample, np.asarray(again))[0, 1]) < 5 / np.sqrt(SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("safe_mode", [True, False])
def test_the_noise_on_the_count_has_the_scale_asked_for_and_no_other(safe_mode: bool) -> None:
    count_std, joined, inside = 2.5, 10, 4
    server = server_of(count_std=count_std, safe_mode=safe_mode)
    states = jax.vmap(lambda i: server.fold_in(reported(server, server.init(jnp.zeros(1)), inside, joined), i))
    after = jax.jit(jax.vmap(lambda s: server.update(jnp.zeros(1), s)[1]))(states(jnp.arange(SIZE)))
    sample = np.asarray(after.share, np.float64) * joined - inside
    assert stats.kstest(sample / count_std, "norm").pvalue > LEAST_P
    for wrong in (0.9, 1.1):
        assert stats.kstest(sample / (wrong * count_std), "norm").pvalue < LEAST_P
    expected = FIRST * np.exp(-ETA * ((inside + sample) / joined - GAMMA))
    np.testing.assert_allclose(after.bound, expected, rtol=1e-4)


def test_a_resumed_run_draws_what_it_would_have_drawn() -> None:
    fields = {"noise_multiplier": 1.0, "count_std": 1.0, "seed": None}
    server, resumed = server_of(**fields), server_of(**fields)
    zeros = {"w": jnp.zeros(20)}
    first = np.asarray(server.run(zeros)["w"])
    resumed.set_state(json.loads(json.dumps(server.get_state())))
    second = np.asarray(server.run(zeros)["w"])
    np.testing.assert_array_equal(resumed.run(zeros)["w"], second)
    assert not (first == second).any()


@pytest.mark.parametrize("count_std", [0.0, 0.5])
def test_too_little_noise_on_the_count_is_refused(count_std: float) -> None:
    with pytest.raises(ValueError, match=rf"AdaptiveClippingServerModule: count_std={count_std} with noise_multiplier"):
        AdaptiveClippingServerModule(noise_multiplier=1.0, count_std=count_std)
