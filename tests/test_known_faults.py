"""What declearn 2.9.1 gets wrong, and what is right: one test for each row of the table in the design."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import define_prng_impl
from scipy.special import erfinv

import functional_optimodules as fo
from functional_optimodules.modules.noise import NoiseState

RESETTING = ["adagrad", "adam", "ewma", "momentum", "rmsprop", "yogi", "yogi-momentum"]


def resumed(plugin):
    """Return a fresh object made from what was written to disk of another."""
    config, state = json.loads(json.dumps([plugin.get_config(), plugin.get_state()], allow_nan=False))
    fresh = type(plugin).from_config(config)
    fresh.set_state(state)
    return fresh


def rates(optimizer, steps):
    """Return the learning rate of each step, seen in what it makes of a gradient of 1."""
    one = {"w": jnp.ones(())}
    return [-float(optimizer.compute_updates_from_gradients(one, one)["w"]) for _ in range(steps)]


@pytest.mark.parametrize("name", RESETTING)
def test_configuration_keeps_round_reset(name):
    module = fo.OptiModule.from_specs(name, {"round_reset": True})
    copy = fo.OptiModule.from_specs(name, json.loads(json.dumps(module.get_config())))
    assert copy == module
    gradient = {"w": jnp.array([1.0, -2.0])}
    first = copy.run(gradient)
    copy.run({"w": jnp.array([30.0, 40.0])})
    copy.on_round_start()
    np.testing.assert_array_equal(copy.run(gradient)["w"], first["w"])


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_round_reset_forgets_the_maximum_of_amsgrad(name):
    module = fo.OptiModule.from_specs(name, {"amsgrad": True, "round_reset": True})
    module.on_round_start()
    module.run({"w": jnp.array([1e3, 1e3])})
    module.on_round_start()
    # The first step of Adam is g / (|g| + eps): a remembered maximum would make it 1e-5.
    np.testing.assert_allclose(module.run({"w": jnp.array([0.01, -0.01])})["w"], [1, -1], rtol=1e-4)


@pytest.mark.parametrize("pair", [["scaffold-client"] * 2, ["scaffold-client", "scaffold-server"]])
def test_two_scaffold_modules_in_one_optimizer_are_an_error_when_it_is_built(pair):
    with pytest.raises(ValueError, match="2 modules exchange auxiliary variables named 'scaffold'"):
        fo.Optimizer(lrate=0.1, modules=pair)


def test_scaffold_resumed_in_mid_round_sends_the_delta_of_the_whole_round():
    gradients = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}, {"w": jnp.array([5.0, 6.0])}]
    client = fo.ScaffoldClientModule()
    client.on_round_start()
    client.run(gradients[0])
    client.run(gradients[1])
    client = resumed(client)
    client.run(gradients[2])
    server = fo.ScaffoldServerModule()
    server.process_aux_var({"ada": client.collect_aux_var()})
    np.testing.assert_allclose(server.state.total["w"], [3, 2])


def test_lost_upload_leaves_the_servers_variate_the_mean_of_the_clients():
    def mean_of_locals():
        return np.mean([client.state.local["w"] for client in clients.values()], axis=0)

    clients = {name: fo.ScaffoldClientModule() for name in ("ada", "bea")}
    server = fo.ScaffoldServerModule(num_clients=2)
    variate = None
    for round_, lost in enumerate([None, "bea", None]):
        messages = {}
        for index, (name, client) in enumerate(clients.items()):
            if variate is not None:
                client.process_aux_var(variate)
            client.on_round_start()
            client.run({"w": jnp.array([1.0 + index, 10.0 * round_])})
            messages[name] = client.collect_aux_var()
            if name == lost:
                client.retract_aux_var()
                del messages[name]
        server.process_aux_var(messages)
        variate = server.collect_aux_var()
    for client in clients.values():
        client.process_aux_var(variate)
    # Both clients' last round was the third: each local variate is its gradient there.
    np.testing.assert_allclose(mean_of_locals(), [1.5, 20])
    np.testing.assert_allclose(server.state.total["w"] / 2, mean_of_locals())
    np.testing.assert_allclose(clients["ada"].state.correction["w"], [1 - 1.5, 0])


@pytest.mark.parametrize(("num_clients", "expected"), [(8, [0.5, 0.75]), (None, [2.0, 3.0])])
def test_scaffold_server_divides_by_all_clients_where_their_number_is_given(num_clients, expected):
    server, receiver = fo.ScaffoldServerModule(num_clients=num_clients), fo.ScaffoldClientModule()
    messages = {}
    for name, gradient in (("ada", [1.0, 2.0]), ("bea", [3.0, 4.0])):
        client = fo.ScaffoldClientModule()
        client.run({"w": jnp.array(gradient)})
        messages[name] = client.collect_aux_var()
    server.process_aux_var(messages)
    receiver.process_aux_var(server.collect_aux_var())
    # A client that never took a step has a variate of 0: what it corrects by is minus the server's.
    np.testing.assert_allclose(-receiver.state.correction["w"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("safe_mode", [True, False])
def test_resumed_run_draws_the_noise_that_it_would_have_drawn(safe_mode):
    zero = {"w": jnp.zeros(50)}
    module = fo.GaussianNoiseModule(safe_mode=safe_mode, seed=3)
    drawn = [np.asarray(module.run(zero)["w"]) for _ in range(2)]
    copy = resumed(module)
    following = np.asarray(module.run(zero)["w"])
    np.testing.assert_array_equal(copy.run(zero)["w"], following)
    assert not any(np.isin(following, earlier).any() for earlier in drawn)


@pytest.mark.parametrize("safe_mode", [True, False])
def test_clients_of_one_configuration_draw_different_noise(safe_mode):
    zero = {"w": jnp.zeros(50)}
    config = {"safe_mode": safe_mode, "seed": 3}
    clients = [fo.GaussianNoiseModule.from_config(config) for _ in range(2)]
    for identity, client in enumerate(clients):
        client.setup(zero, identity=identity)
    first, second = (np.asarray(client.run(zero)["w"]) for client in clients)
    assert not np.isin(first, second).any()


def stuck_generator(word):
    """Return a generator all of whose bits are 0, or 1: the ends of what a uniform number can be."""
    return define_prng_impl(
        key_shape=(1,),
        seed=lambda seed: jnp.zeros(1, jnp.uint32),
        split=lambda data, shape: jnp.zeros((*shape, 1), jnp.uint32),
        random_bits=lambda data, width, shape: jnp.full(shape, word & (2**width - 1), jnp.dtype(f"uint{width}")),
        fold_in=lambda data, integer: data,
        name=f"stuck{word % 2}",
        tag=f"stuck{word % 2}",
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("word", "top"), [(0, -1 + 2**-24), (2**64 - 1, 1 - 2**-23)])
def test_noise_is_finite_at_both_ends_of_the_uniform_numbers(dtype, word, top):
    module = fo.GaussianNoiseModule(std=2.0)
    state = NoiseState(jax.random.key(0, impl=stuck_generator(word)), jnp.zeros((), jnp.int32))
    noise = module.update({"w": jnp.zeros(3, dtype)}, state)[0]["w"]
    assert noise.dtype == dtype
    np.testing.assert_allclose(np.asarray(noise, np.float64), 2 * math.sqrt(2) * erfinv(top), rtol=0.03)


def test_fedprox_resumed_in_mid_round_pulls_to_the_weights_at_the_start_of_the_round():
    zero, start = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}
    regularizer = fo.FedProxRegularizer(alpha=0.5)
    regularizer.on_round_start()
    regularizer.run(zero, start)
    moved = resumed(regularizer).run(zero, {"w": jnp.array([3.0, -2.0])})
    np.testing.assert_allclose(moved["w"], [0.5 * (3 - 1), 0.5 * (-2 - 2)])


def test_first_step_of_a_round_has_that_rounds_rate():
    optimizer = fo.Optimizer(lrate=("exponential-decay", {"base": 0.8, "rate": 0.5, "step_level": False}))
    seen = []
    for _ in range(3):
        optimizer.start_round()
        seen += rates(optimizer, 2)
    np.testing.assert_allclose(seen, [0.8, 0.8, 0.4, 0.4, 0.2, 0.2], rtol=1e-6)


def test_very_first_rate_is_that_of_round_0_where_no_round_was_begun():
    # A round of index -1 has the rate base / 0 here.
    optimizer = fo.Optimizer(lrate=("inverse-scaling", {"base": 0.8, "rate": 1.0, "step_level": False}))
    np.testing.assert_allclose(rates(optimizer, 2), [0.8, 0.8], rtol=1e-6)


COSINE = ("cosine-annealing", {"base": 0.1, "max_lr": 0.9, "duration": 2})


def test_warmup_climbs_to_the_first_value_of_what_it_wraps():
    scheduler = fo.Warmup(COSINE, warmup=3)
    seen = [scheduler.get_next_rate() for _ in range(7)]
    np.testing.assert_allclose(seen, [0.3, 0.6, 0.9, 0.9, 0.5, 0.1, 0.1], rtol=1e-6)


def test_warmup_by_rounds_climbs_to_the_first_value_of_what_it_wraps():
    scheduler = fo.WarmupRounds(COSINE, warmup=3)
    seen = []
    for _ in range(4):
        scheduler.on_round_start()
        seen += [scheduler.get_next_rate() for _ in range(2)]
    np.testing.assert_allclose(seen, [0.3, 0.3, 0.6, 0.6, 0.9, 0.9, 0.9, 0.5], rtol=1e-6)


def test_warm_restarts_by_rounds_take_cycle_and_position_from_the_rounds():
    scheduler = fo.CosineAnnealingWarmRestarts(base=0.1, max_lr=0.9, period=2, t_mult=0.5, step_level=False)
    seen = []
    for _ in range(5):
        scheduler.on_round_start()
        seen += [scheduler.get_next_rate() for _ in range(3)]
    by_round = [0.9, 0.5, 0.45, (0.45 + 0.1) / 2, 0.225]
    np.testing.assert_allclose(seen, np.repeat(by_round, 3), rtol=1e-6)


def test_collecting_twice_sends_the_same_delta():
    client = fo.ScaffoldClientModule()
    client.run({"w": jnp.array([1.0, 2.0])})
    client.run({"w": jnp.array([3.0, -6.0])})
    message = client.collect_aux_var()
    assert client.collect_aux_var() == message
    server = fo.ScaffoldServerModule()
    server.process_aux_var({"ada": client.collect_aux_var()})
    np.testing.assert_allclose(server.state.total["w"], [2, -2])


@pytest.mark.parametrize("name", ["l2-clipping", "l2-global-clipping"])
def test_norm_of_float16_does_not_overflow(name):
    module = fo.OptiModule.from_specs(name, {"max_norm": 2.0})
    output = module.run({"w": jnp.full((256,), 256.0, jnp.float16)})["w"]
    assert output.dtype == jnp.float16
    # The norm is 256 * sqrt(256) = 4096, and its square, 2 ** 24, more than float16 holds.
    np.testing.assert_allclose(output, np.full(256, 256 * 2 / 4096))


@pytest.mark.parametrize("name", ["l2-clipping", "l2-global-clipping"])
def test_clipping_leaves_a_zero_gradient_and_its_derivative_alone(name):
    module = fo.OptiModule.from_specs(name)
    zero = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    np.testing.assert_array_equal(module.run(zero)["w"], np.zeros(3))
    slope = jax.grad(lambda g: sum(map(jnp.sum, jax.tree.leaves(module.update(g, module.init(g))[0]))))(zero)
    np.testing.assert_array_equal(slope["w"], np.ones(3))
    np.testing.assert_array_equal(slope["b"], np.ones(()))


@pytest.mark.parametrize("name", ["l2-clipping", "l2-global-clipping"])
def test_clipping_a_zero_gradient_to_zero_is_no_division_by_zero(name):
    module = fo.OptiModule.from_specs(name, {"max_norm": 0.0})
    zero = jnp.zeros(3)
    np.testing.assert_array_equal(module.run(zero), np.zeros(3))
    slope = jax.grad(lambda g: jnp.sum(module.update(g, module.init(g))[0]))(zero)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["adagrad", "adam", "rmsprop", "yogi"])
def test_root_of_a_zero_moment_keeps_a_zero_gradient_and_its_derivative_finite(name):
    module = fo.OptiModule.from_specs(name, {"eps": 0.25})
    zero = jnp.zeros(3)
    np.testing.assert_array_equal(module.run(zero), np.zeros(3))
    slope = jax.grad(lambda g: jnp.sum(module.update(g, module.init(g))[0]))(zero)
    # The root counts as constant where it is 0, which leaves g / eps.
    np.testing.assert_allclose(slope, np.full(3, 4.0), rtol=1e-6)
