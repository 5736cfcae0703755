"""Live hyper-parameters: read, set, driven by schedulers, swept over and differentiated; and what is refused."""

import dataclasses
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.testing.instances import instances
from functional_optimodules.testing.trees import assert_same, known, parameters, randoms

PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([0.5])}
LIVE = fo.Optimizer(
    0.1,
    w_decay=0.01,
    modules=[("l2-global-clipping", {"max_norm": 2.0}), "adam"],
    live=["lrate", "w_decay", "modules/l2-global-clipping/*", "modules/adam/beta_1"],
)


def steps(tx, state, params, number=3):
    for index in range(number):
        updates, state = tx.update(randoms(params, index), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_live_values_are_those_of_the_configuration_and_make_the_same_steps():
    state = LIVE.init(PARAMS)
    assert set(state.live) == {"lrate", "w_decay", "modules/l2-global-clipping/max_norm", "modules/adam/beta_1"}
    assert LIVE.hyperparameters(state)["modules/adam/beta_1"] == np.float32(0.9)
    fixed = fo.Optimizer.from_config({**LIVE.get_config(), "live": []})
    found, _ = steps(LIVE, state, PARAMS)
    assert_same(found, steps(fixed, fixed.init(PARAMS), PARAMS)[0], "live numbers act otherwise", close=True)


def test_values_that_are_set_act_from_the_next_step_on_and_nothing_is_traced_anew():
    traces = 0

    @jax.jit
    def step(state, gradients, params):
        nonlocal traces
        traces += 1
        return LIVE.update(gradients, state, params)

    state = LIVE.init(PARAMS)
    _, state = step(state, PARAMS, PARAMS)
    values = {"lrate": 0.5, "modules/adam/beta_1": 0.5, "modules/l2-global-clipping/max_norm": 1}
    state = LIVE.with_hyperparameters(state, values)
    for path, value in values.items():
        assert LIVE.hyperparameters(state)[path] == value
    found, _ = step(state, PARAMS, PARAMS)
    assert traces == 1
    clip, adam = ("l2-global-clipping", {"max_norm": 1.0}), ("adam", {"beta_1": 0.5})
    other = fo.Optimizer(0.5, w_decay=0.01, modules=[clip, adam])
    expected, _ = other.update(PARAMS, state._replace(live={}), PARAMS)
    assert_same(found, expected, "a value that is set acts otherwise", close=True)


def test_the_facade_sets_and_saves_them():
    optimizer = fo.Optimizer.from_config(LIVE.get_config())
    with pytest.raises(ValueError, match=r"no state yet: call `setup\(params\)`"):
        optimizer.set_hyperparameters({"lrate": 0.5})
    with pytest.raises(ValueError, match="no state yet"):
        optimizer.hyperparameters()
    optimizer.apply_gradients(PARAMS, PARAMS)
    size = optimizer._session.memory.fit.compiled.apply._cache_size()
    optimizer.set_hyperparameters({"lrate": 0.5})
    found = optimizer.apply_gradients(PARAMS, PARAMS)
    assert optimizer._session.memory.fit.compiled.apply._cache_size() == size
    restored = fo.Optimizer.from_config(json.loads(json.dumps(optimizer.get_config())))
    restored.set_state(json.loads(json.dumps(optimizer.get_state())))
    assert float(restored.hyperparameters()["lrate"]) == 0.5
    assert_same(optimizer.apply_gradients(found, PARAMS), restored.apply_gradients(found, PARAMS), "restored otherwise")


def test_a_scheduler_may_drive_any_number():
    momentum = ("modules/momentum/beta", ("warmup", {"base": 0.8, "warmup": 2}))
    bound = ("modules/l2-clipping/max_norm", ("exponential-decay", {"base": 1.0, "rate": 0.1, "step_level": False}))
    tx = fo.Optimizer(1.0, modules=["l2-clipping", "momentum"], live=[momentum, bound])
    assert fo.Optimizer.from_config(json.loads(json.dumps(tx.get_config()))) == tx
    state, gradient, velocity = tx.init({"w": jnp.zeros(1)}), {"w": jnp.array([5.0])}, 0.0
    for round_, limit in enumerate([1.0, 0.1]):
        state = tx.begin_round(state)
        for step in range(2):
            beta = [0.4, 0.8, 0.8, 0.8][2 * round_ + step]
            assert tx.hyperparameters(state)["modules/momentum/beta"] == pytest.approx(beta)
            updates, state = jax.jit(tx.update)(gradient, state)
            velocity = beta * velocity + limit
            assert float(-updates["w"][0]) == pytest.approx(velocity, rel=1e-5)


def test_fields_of_schedulers_of_groups_and_of_wrappers_have_paths():
    tx = fo.Optimizer(
        ("warmup", {"warmup": 4, "base": ("cosine-annealing", {"base": 0.0, "max_lr": 1.0, "duration": 8})}),
        groups=[fo.Group("w", name="first", lrate=0.5, modules=["adam", "adam"])],
        wrappers=["ema"],
        live=["lrate/base/max_lr", "groups/first/lrate", "groups/first/modules/adam-2/eps", "wrappers/ema/decay"],
    )
    state = tx.init(PARAMS)
    values = {"lrate/base/max_lr": 2.0, "groups/first/lrate": 0.0}
    updates, new = jax.jit(tx.update)(PARAMS, tx.with_hyperparameters(state, values), PARAMS)
    assert float(jnp.abs(updates["w"]).max()) == 0
    assert float(updates["b"][0]) == pytest.approx(-0.5 * 2.0 / 4)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_every_number_of_every_module_may_be_live():
    params = parameters()
    for name, cls in fo.list_optim_modules().items():
        module = next(iter(instances(cls).values()))
        if name == "optax":
            continue  # its numbers are optax's
        if "seed" in vars(module):
            module = dataclasses.replace(module, seed=1)
        tx = fo.Optimizer(0.1, modules=[module])
        paths = [path for path in tx._hyperparameters if path.startswith("modules/")]
        live = fo.Optimizer(0.1, modules=[module], live=paths)
        state, extra = live.init(params), known(tx.asks().step - {"lrate"}, params)
        found, _ = jax.jit(live.update)(randoms(params, 1), state, params, **extra)
        expected, _ = jax.jit(tx.update)(randoms(params, 1), tx.init(params), params, **extra)
        assert_same(found, expected, f"{name} acts otherwise by live numbers", close=True)


def test_rates_betas_and_seeds_are_swept_over_in_one_program():
    lrates, betas, seeds = jnp.array([0.1, 0.01, 0.001]), jnp.array([0.5, 0.9, 0.99]), jnp.arange(3)
    traces = 0

    def train(lrate, beta, seed):
        nonlocal traces
        traces += 1
        params = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(seed), leaf.shape), PARAMS)
        state = LIVE.with_hyperparameters(LIVE.init(params), {"lrate": lrate, "modules/adam/beta_1": beta})

        def step(carry, _):
            params, state = carry
            updates, state = LIVE.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=5)[0][0]

    found = jax.jit(jax.vmap(train))(lrates, betas, seeds)
    assert traces == 1
    for index in range(3):
        expected = train(float(lrates[index]), float(betas[index]), seeds[index])
        assert_same(jax.tree.map(operator.itemgetter(index), found), expected, "a sweep differs", close=True)


def test_the_loss_after_twenty_steps_is_differentiated_by_the_betas():
    scales = jnp.array([1.0, 10.0, 0.1])

    def loss_after(betas):
        tx = fo.Optimizer(0.05, modules=[fo.AdamModule(beta_1=betas[0], beta_2=betas[1])])

        def step(carry, _):
            params, state = carry
            updates, state = tx.update({"w": scales * params["w"]}, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = {"w": jnp.array([1.0, -1.0, 2.0])}
        params, _ = jax.lax.scan(step, (start, tx.init(start)), length=20)[0]
        return (scales * params["w"] ** 2).sum() / 2

    betas = jnp.array([0.8, 0.95])
    found = jax.jit(jax.grad(loss_after))(betas)
    with jax.enable_x64(True):
        exact, by = loss_after, 1e-5
        wanted = [
            float((exact(np.float64(betas) + by * e) - exact(np.float64(betas) - by * e)) / (2 * by))
            for e in np.eye(2, dtype=np.float64)
        ]
    np.testing.assert_allclose(found, wanted, rtol=2e-2)


def test_rates_of_groups_may_be_traced():
    def first_update(rates):
        tx = fo.Optimizer(0.1, groups=[fo.Group("w", lrate=rates[0]), fo.Group("b", factor=rates[1])])
        assert "traced" in tx.tabulate(PARAMS)
        assert "Tracer" in repr(tx)
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        return -updates["w"].sum() - updates["b"].sum()

    found = jax.jit(jax.grad(first_update))(jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(found, [2.0, 0.1 * 0.5], rtol=1e-6)


def test_states_of_numpy_and_stacked_ones_are_set_too():
    state = LIVE.with_hyperparameters(jax.device_get(LIVE.init(PARAMS)), {"lrate": 0.5})
    assert LIVE.hyperparameters(state)["lrate"] == 0.5
    stacked = jax.vmap(lambda _: LIVE.init(PARAMS))(jnp.arange(3))
    set_each = jax.vmap(lambda state, rate: LIVE.with_hyperparameters(state, {"lrate": rate}))
    np.testing.assert_array_equal(set_each(stacked, jnp.arange(3.0)).live["lrate"], [0.0, 1.0, 2.0])


def test_moments_in_another_dtype_leave_live_numbers_as_they_are():
    state = fo.Optimizer(0.1, modules=["adam"], wrappers=["state-dtype"], live=["modules/**"]).init(PARAMS)
    assert state.modules["adam"].first["w"].dtype == jnp.bfloat16
    assert state.live["modules/adam/beta_1"] == np.float32(0.9)


def test_nnx_optimizers_are_read_and_set_in_place():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = fo.Optimizer(0.1, live=["lrate"])
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.opt_state.live["lrate"][...] = 0.0
    assert float(tx.hyperparameters(optimizer.opt_state)["lrate"]) == 0
    before = jax.tree.map(jnp.copy, nnx.state(model))
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model))
    assert_same(nnx.state(model), before, "a rate of 0 moves the parameters")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"lrate": -1.0}, ValueError, r"Optimizer: the hyper-parameter 'lrate' should be in \[0, inf\), not -1.0"),
        ({"modules/adam/beta_1": 1}, ValueError, r"AdamModule: .*'modules/adam/beta_1' should be in \[0, 1\), not 1.0"),
        ({"lrate": float("nan")}, ValueError, "not nan"),
        ({"lrate": 10**5000}, ValueError, r"'lrate' should be in \[0, inf\), not inf"),
        ({"lrate": 1e300}, ValueError, r"not 1e\+300, which is inf in float32"),
        ({"modules/adam/beta_1": 1 - 1e-9}, ValueError, "not 0.999999999, which is 1.0 in float32"),
        ([0.5], TypeError, "Optimizer: hyper-parameters are a mapping of paths to numbers, not \\[0.5\\]"),
        ({"lrate": "fast"}, TypeError, "should be a number, not 'fast'"),
        ({"lrate": True}, TypeError, "should be a number, not True"),
        ({"lrate": np.float64(0.1)}, TypeError, "of float32, not of float64"),
        ({"lrate": jnp.bfloat16(0.1)}, TypeError, "of float32, not of bfloat16"),
        ({"lrate": jnp.ones(2)}, ValueError, r"not of the shape \[2\]: use `vmap`"),
        ({"modules/adam/beta_2": 0.5}, ValueError, "'modules/adam/beta_2' is not live: `live` names 'lrate'"),
        (
            {"modules/adam/beta": 0.5},
            ValueError,
            "no real number 'modules/adam/beta': did you mean 'modules/adam/beta_",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_and_the_state_stays(values, error, message):
    optimizer = fo.Optimizer.from_config(LIVE.get_config())
    optimizer.setup(PARAMS)
    before = optimizer.get_state()
    with pytest.raises(error, match=message):
        optimizer.set_hyperparameters({"w_decay": 0.5, **values} if isinstance(values, dict) else values)
    assert optimizer.get_state() == before


@pytest.mark.parametrize(
    ("live", "message"),
    [
        (["lrat"], "no real number 'lrat': did you mean 'lrate'"),
        (["modules"], "'modules' is no number: it has 'modules/adam/beta_1'"),
        (["modules/adam/amsgrad"], "no real number 'modules/adam/amsgrad'"),
        (["modules/*/gamma"], r"live: the pattern 'modules/\*/gamma' matches no hyper-parameter"),
        (["lrate", ("lrate", ("warmup", {"base": 1.0, "warmup": 2}))], "'lrate' is live twice"),
    ],
)
def test_what_is_no_hyperparameter_cannot_be_live(live, message):
    with pytest.raises(ValueError, match=message):
        fo.Optimizer(0.1, modules=["adam"], live=live)


@pytest.mark.parametrize(
    "rate", [lambda step: 0.1, ("optax", {"schedule": "constant_schedule", "config": {"value": 0.1}})]
)
def test_a_rate_that_is_no_number_is_said_to_be_none(rate):
    with pytest.raises(ValueError, match=r"'lrate' is no number but .* a group's `factor`"):
        fo.Optimizer(rate, live=["lrate"])
    tx = fo.Optimizer(rate, groups=[fo.Group()], live=["groups/0/factor"])
    state = tx.with_hyperparameters(tx.init(PARAMS), {"groups/0/factor": 0.5})
    updates, _ = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -0.05 * PARAMS["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("other", "named"),
    [({"groups": [fo.Group()]}, "groups"), ({"wrappers": ["ema"]}, "wrappers"), ({"live": ["lrate"]}, "live")],
)
def test_a_step_from_the_state_of_another_optimizer_is_refused(other, named):
    one, two = fo.Optimizer(0.1), fo.Optimizer(0.1, **other)
    for tx, state in ((one, two.init(PARAMS)), (two, one.init(PARAMS))):
        with pytest.raises(ValueError, match=f"the state is of another optimizer: it has the {named} "):
            tx.update(PARAMS, state, PARAMS)


def test_a_saved_state_whose_live_value_is_out_of_its_range_is_refused():
    optimizer = fo.Optimizer.from_config(LIVE.get_config())
    optimizer.setup(PARAMS)
    before = optimizer.get_state()
    state = optimizer.state
    forged = state._replace(live={**state.live, "modules/adam/beta_1": jnp.float32(5.0)})
    for load in (optimizer.set_state, lambda saved: optimizer.load(saved, PARAMS)):
        with pytest.raises(ValueError, match=r"'modules/adam/beta_1' should be in \[0, 1\), not 5.0"):
            load(optimizer.save(forged, PARAMS))
    assert optimizer.get_state() == before


def test_what_a_scheduler_drives_cannot_be_set():
    tx = fo.Optimizer(0.1, live=[("lrate", ("warmup", {"base": 1.0, "warmup": 2}))])
    with pytest.raises(ValueError, match=r"'lrate' cannot be set: Warmup.* drives it"):
        tx.with_hyperparameters(tx.init(PARAMS), {"lrate": 0.5})


def test_rates_of_a_federation_are_set_and_nothing_is_compiled_anew():
    data = FederatedData.from_clients([randoms(jnp.zeros((4, 2)), seed) for seed in range(3)])
    start = {"w": jnp.zeros(2)}
    traces = 0

    def loss(params, x):
        nonlocal traces
        traces += 1
        return ((x - params["w"]) ** 2).sum(-1)

    def federation(rate, momentum, outer, live=True):
        client = fo.Optimizer(
            rate, modules=[("momentum", {"beta": momentum})], live=["lrate", "modules/momentum/beta"] if live else []
        )
        server = fo.Optimizer(outer, live=["lrate"] if live else [])
        return Federation(loss, client, server=server, batch_size=2)

    made = federation(0.1, 0.5, 1.0)
    state, _ = made.fit(made.init(start, data), data, 1)
    count = traces
    for rate, momentum, outer in ((0.05, 0.0, 0.5), (0.2, 0.9, 1.0)):
        client = {"lrate": rate, "modules/momentum/beta": momentum}
        found = made.with_hyperparameters(made.init(start, data), client=client, server={"lrate": outer})
        found, _ = made.fit(found, data, 1)
        other = federation(rate, momentum, outer, live=False)
        before = traces
        expected, _ = other.fit(other.init(start, data), data, 1)
        count += traces - before
        assert_same(found.params, expected.params, "a live rate acts otherwise", close=True)
    assert traces == count
    with pytest.raises(ValueError, match=r"'modules/momentum/beta' should be in \[0, 1\), not 2.0"):
        made.with_hyperparameters(state, client={"modules/momentum/beta": 2.0})
    with pytest.raises(ValueError, match="'w_decay' is not live"):
        made.with_hyperparameters(state, server={"w_decay": 0.1})


def test_a_rate_that_no_client_takes_may_be_set_in_a_federation():
    client = fo.Optimizer(0.1, groups=[fo.Group(lrate=0.2)], live=["lrate"])
    made = Federation(lambda params, x: ((x - params["w"]) ** 2).sum(-1), client, batch_size=2)
    state = made.init({"w": jnp.zeros(2)}, 3)
    assert_same(made.with_hyperparameters(state, client={"lrate": 0.5}), state, "it changes something")


def test_live_numbers_of_a_module_act_where_clients_keep_parameters_for_themselves():
    data = FederatedData.from_clients([randoms(jnp.zeros((4, 2)), seed) for seed in range(3)])
    start = {"w": jnp.zeros(2), "own": jnp.ones(2)}

    def trained(alpha, live, values):
        client = fo.Optimizer(
            0.1, modules=[("feddyn-client", {"alpha": alpha})], live=live, watch=["feddyn-client/norm_after"]
        )
        server = fo.Optimizer(1.0, modules=[("feddyn-server", {"num_clients": 3})])
        made = Federation(
            lambda params, x: ((x * params["own"] - params["w"]) ** 2).sum(-1),
            client,
            server=server,
            batch_size=2,
            local=["own"],
        )
        return made.fit(made.with_hyperparameters(made.init(start, data), client=values), data, 2)[0].params

    found = trained(0.1, ["modules/feddyn-client/alpha"], {"modules/feddyn-client/alpha": 0.5})
    assert_same(found, trained(0.5, [], {}), "a live number acts otherwise", close=True)
