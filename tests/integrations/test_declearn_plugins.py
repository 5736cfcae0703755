"""Bricks as declearn's plug-ins: what its own tests ask of each that is registered, and the exchange of pairs."""

import functools
import importlib
import json
import subprocess
import sys
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo

pytest.importorskip("declearn", reason="the reference has no release for this Python", exc_type=ImportError)

from declearn.model.api import Vector
from declearn.model.sklearn import NumpyVector
from declearn.optimizer import Optimizer, list_optim_modules, list_optim_regularizers
from declearn.optimizer import modules as reference
from declearn.optimizer.regularizers import Regularizer
from declearn.utils.serialize import json_deserialize, json_serialize, msgpack_deserialize, msgpack_serialize

from functional_optimodules.integrations.declearn import to_declearn
from functional_optimodules.integrations.declearn.carriers import carrier_of
from functional_optimodules.modules.scaffold import ScaffoldDelta

from .model import Model

REGISTERED = {
    name: cls for name, cls in {**list_optim_modules(), **list_optim_regularizers()}.items() if name.startswith("fo-")
}
every_plugin = pytest.mark.parametrize("cls", REGISTERED.values(), ids=REGISTERED.keys())


@functools.cache
def vector_type(framework):
    """Return a type of Vector and what makes its coefficients; that 64-bit mode is turned on for JAX's is undone."""
    if framework == "numpy":
        return NumpyVector, np.asarray
    if framework == "torch":
        torch = pytest.importorskip("torch")
        return importlib.import_module("declearn.model.torch").TorchVector, torch.tensor
    pytest.importorskip("haiku")
    try:
        return importlib.import_module("declearn.model.haiku").JaxNumpyVector, jnp.asarray
    finally:
        jax.config.update("jax_enable_x64", False)


def normal(seed, framework="numpy", dtype=np.float32):
    rng = np.random.default_rng(seed)
    cls, make = vector_type(framework)
    return cls({name: make(rng.normal(size=shape).astype(dtype)) for name, shape in {"w": (4, 2), "b": (3,)}.items()})


def build(cls, **config):
    """Make an instance, of no configuration where a brick has defaults."""
    config = {**(dict(cls.kind.examples[-1]) if cls.kind.examples else {}), **config}
    return cls.from_config(config)


def run(plugin, framework="numpy", dtype=np.float32):
    gradients, weights = normal(0, framework, dtype), normal(1, framework, dtype)
    output = plugin.run(gradients, weights) if isinstance(plugin, Regularizer) else plugin.run(gradients)
    return gradients, output


def assert_json_serializable(values):
    assert isinstance(values, dict)
    assert json_deserialize(json_serialize(values)) == values


@pytest.mark.slow
def test_declearn_is_imported_only_when_asked_for():
    script = (
        "import sys, functional_optimodules, functional_optimodules.federated; assert 'declearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_declearn_can_run_is_registered_under_a_name_of_its_own():
    assert {"fo-adam", "fo-scaffold-client", "fo-scaffold-server", "fo-optax", "fo-fedprox"} <= REGISTERED.keys()
    assert all(cls.name == name == f"fo-{cls.kind.name}" for name, cls in REGISTERED.items())


@every_plugin
def test_a_plugin_is_rebuilt_from_its_configuration_and_from_its_name(cls):
    plugin = build(cls)
    assert_json_serializable(plugin.get_config())
    base = Regularizer if issubclass(cls, Regularizer) else reference.OptiModule
    for copy in (cls.from_config(plugin.get_config()), base.from_specs(plugin.name, plugin.get_config())):
        assert type(copy) is cls
        assert copy.get_config() == plugin.get_config()
        assert copy.brick == plugin.brick


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@every_plugin
def test_a_run_gives_a_vector_of_the_same_specs_and_equal_in_each_framework(cls, framework):
    # What draws noise draws the same for the same seed.
    config = {"seed": 0} if "seed" in build(cls).get_config() else {}
    _, expected = run(build(cls, **config))
    gradients, output = run(build(cls, **config), framework)
    assert type(output) is type(gradients)
    assert list(output.coefs) == list(gradients.coefs)
    assert output.shapes() == gradients.shapes()
    assert output.dtypes() == gradients.dtypes()
    for name, values in output.coefs.items():
        np.testing.assert_allclose(np.asarray(values), expected.coefs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@every_plugin
def test_what_is_collected_and_the_state_are_json_values_and_are_restored(cls):
    if issubclass(cls, Regularizer):
        pytest.skip("declearn's regularizers have no state to save, and collect nothing")
    plugin = build(cls)
    initial = plugin.get_state()
    assert_json_serializable(initial)
    run(plugin)
    collected = plugin.collect_aux_var()
    assert collected is None or json_deserialize(json_serialize(collected)) == collected
    state = plugin.get_state()
    assert_json_serializable(state)
    other = build(cls)
    other.set_state(state)
    assert other.get_state() == state
    plugin.set_state(initial)
    assert plugin.get_state() == initial
    for key in state.keys() - {"round"}:  # there is none before a server's first
        with pytest.raises(KeyError, match=key):
            plugin.set_state({name: value for name, value in state.items() if name != key})
    assert plugin.get_state() == initial


@pytest.mark.parametrize("x64", [False, True])
def test_float64_comes_out_as_float64_and_is_computed_in_it_in_64_bit_mode(x64):
    with jax.enable_x64(x64):
        _, output = run(to_declearn(fo.AdamModule()), dtype=np.float64)
    _, expected = run(reference.AdamModule(), dtype=np.float64)
    assert set(output.dtypes().values()) == {"float64"}
    for name, values in expected.coefs.items():
        np.testing.assert_allclose(output.coefs[name], values, rtol=1e-14 if x64 else 1e-5)
        assert x64 or (output.coefs[name] != values).any()


def test_declearns_optimizer_takes_bricks_by_instance_and_by_name():
    mine = Optimizer(
        lrate=0.1,
        regularizers=[to_declearn(fo.FedProxRegularizer(alpha=0.5))],
        modules=[("fo-momentum", {"beta": 0.5, "nesterov": True}), to_declearn(fo.AdamModule(amsgrad=True))],
    )
    theirs = Optimizer(
        lrate=0.1,
        regularizers=[("fedprox", {"alpha": 0.5})],
        modules=[("momentum", {"beta": 0.5, "nesterov": True}), ("adam", {"amsgrad": True})],
    )
    copy = Optimizer.from_config(json.loads(json.dumps(mine.get_config())))
    models = [Model(normal(99)) for _ in range(3)]
    for round_ in range(2):
        for optimizer, model in zip((mine, copy, theirs), models, strict=True):
            optimizer.start_round()
            for step in range(3):
                optimizer.apply_gradients(model, normal((round_, step)) + model.weights)
        copy.set_state(mine.get_state())
    for name, values in models[2].weights.coefs.items():
        for model in models[:2]:
            np.testing.assert_allclose(model.weights.coefs[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("serialize", [json_serialize, msgpack_serialize])
def test_scaffold_is_declearns_own_over_what_is_sent_and_summed(serialize):
    deserialize = {json_serialize: json_deserialize, msgpack_serialize: msgpack_deserialize}[serialize]
    server, theirs = to_declearn(fo.ScaffoldServerModule()), reference.ScaffoldServerModule()
    clients = [to_declearn(fo.ScaffoldClientModule()) for _ in range(3)]
    others = [reference.ScaffoldClientModule() for _ in range(3)]
    for round_ in range(3):
        for side, peers in ((server, clients), (theirs, others)):
            broadcast = side.collect_aux_var()
            for client in peers if broadcast is not None else ():
                client.process_aux_var(deserialize(serialize(broadcast)))
        # A client that takes no part in the first round hears of the variate before it has seen a gradient.
        active = [0, 1] if round_ == 0 else [0, 1, 2]
        for index in active:
            for step in range(1 + index):
                gradients = normal((round_, step, index))
                mine, expected = clients[index].run(gradients), others[index].run(gradients)
                for name, values in expected.coefs.items():
                    np.testing.assert_allclose(mine.coefs[name], values, rtol=1e-5, atol=1e-6)
        for side, peers in ((server, clients), (theirs, others)):
            sent = [deserialize(serialize(peers[index].collect_aux_var())) for index in active]
            side.process_aux_var(sum(sent))
    assert sorted(server.get_state()["clients"]) == sorted(client.client for client in clients)


def collected(seed=0):
    client = to_declearn(fo.ScaffoldClientModule())
    client.run(normal(seed))
    return client.collect_aux_var()


def test_what_is_carried_shares_its_vectors():
    aux = collected()
    assert aux.to_dict()["delta"] is aux.delta
    assert isinstance(aux.delta, NumpyVector)


def test_secure_aggregation_sums_variables_and_leaves_the_clients_in_clear():
    from declearn.secagg.masking import MaskingDecrypter, MaskingEncrypter  # it takes a while to import

    auxes = [collected(seed) for seed in range(2)]
    keys = [[7], [-7]]
    encrypters = [
        MaskingEncrypter([abs(key[0])] if key[0] > 0 else [], [abs(key[0])] if key[0] < 0 else []) for key in keys
    ]
    decrypted = MaskingDecrypter(n_peers=2).decrypt_aggregate(
        encrypters[0].encrypt_aggregate(auxes[0]) + encrypters[1].encrypt_aggregate(auxes[1])
    )
    assert decrypted.clients == auxes[0].clients | auxes[1].clients
    for name, values in decrypted.delta.coefs.items():
        np.testing.assert_allclose(values, (auxes[0].delta + auxes[1].delta).coefs[name], atol=1e-4)


def test_an_upload_that_is_summed_twice_is_refused():
    aux = collected()
    with pytest.raises(ValueError, match="would be counted twice"):
        aux + aux


def test_uploads_about_different_parameters_are_not_summed():
    other = to_declearn(fo.ScaffoldClientModule())
    other.run(NumpyVector({"w": np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match="different parameters"):
        collected() + other.collect_aux_var()


def test_what_servers_send_is_neither_summed_nor_encrypted():
    server = to_declearn(fo.ScaffoldServerModule())
    server.process_aux_var(collected())
    aux = server.collect_aux_var()
    with pytest.raises(NotImplementedError, match="comes from a server"):
        aux + aux
    with pytest.raises(NotImplementedError, match="is not summed"):
        aux.prepare_for_secagg()


def spoiled(**changes):
    aux = collected()
    for name, value in changes.items():
        setattr(aux, name, value)
    return aux


@pytest.mark.parametrize(
    ("aux", "error", "words"),
    [
        (lambda: spoiled(delta=0.0), TypeError, ("'delta'", "a Vector")),
        (lambda: spoiled(delta=NumpyVector({"w": np.ones((4, 2))})), ValueError, ("lacks the leaf 'b'",)),
        (
            lambda: spoiled(delta=NumpyVector({"w": np.ones((4, 2)), "b": np.ones(4)})),
            ValueError,
            ("'b'", "(4,)", "(3,)"),
        ),
        (lambda: spoiled(delta=np.nan * normal(0)), ValueError, ("not finite",)),
        (lambda: spoiled(delta=NumpyVector({"w": np.ones((4, 2)), "b": "bbb"})), TypeError, ("'b'", "of numbers")),
        (lambda: spoiled(delta=1e30 * normal(0)), ValueError, ("9.22e+18", "Limits")),
        (lambda: spoiled(params={}), ValueError, ("lacks the leaf",)),
        (lambda: spoiled(clients={"one", "two", "three"}), ValueError, ("num_clients=2", "4 clients")),
        (lambda: spoiled(clients={"a" * 2000}), ValueError, ("at most 1000 characters",)),
        (lambda: {"delta": normal(0)}, TypeError, ("ScaffoldDelta", "dict")),
        (lambda: reference.ScaffoldAuxVar(delta=0.0), TypeError, ("ScaffoldDelta", "ScaffoldAuxVar")),
    ],
)
def test_what_a_server_cannot_take_is_refused_and_leaves_its_state(aux, error, words):
    server = to_declearn(fo.ScaffoldServerModule(num_clients=2))
    server.process_aux_var(collected(1))
    before = server.get_state()
    with pytest.raises(error) as caught:
        server.process_aux_var(aux())
    assert all(word in str(caught.value) for word in words)
    assert server.get_state() == before


@pytest.mark.parametrize(("inside", "joined", "words"), [(4, 3, "'inside' is 4"), (1, -1, "'joined' is -1")])
def test_a_count_of_clients_is_at_most_as_many_as_there_are(inside, joined, words):
    server, clients = to_declearn(fo.AdaptiveClippingServerModule()), []
    for index in range(3):
        client = to_declearn(fo.AdaptiveClippingClientModule())
        client.run(normal(index))
        clients.append(client)
    total = sum(client.collect_aux_var() for client in clients)
    server.process_aux_var(total)
    total.inside, total.joined = inside, joined
    with pytest.raises(ValueError, match=words):
        server.process_aux_var(total)


def test_what_is_not_finite_in_float32_is_not_finite():
    server, client = to_declearn(fo.ScaffoldServerModule()), to_declearn(fo.ScaffoldClientModule())
    server.process_aux_var(collected())
    broadcast = server.collect_aux_var()
    broadcast.variate = 1e300 * normal(0, dtype=np.float64)
    with pytest.raises(ValueError, match="not finite"):
        client.process_aux_var(broadcast)


def test_a_module_that_receives_nothing_says_so():
    with pytest.raises(NotImplementedError, match="AdamModule receives no auxiliary variables"):
        to_declearn(fo.AdamModule()).process_aux_var(collected())


class Crowd(fo.FromClients):
    clients: fo.Scalar


class OtherClients(fo.OptiModule, register=False):
    name: ClassVar[str] = "other-clients"
    sends = Crowd

    def init(self, params):
        return ()

    def update(self, updates, state, params=None, **extra_args):
        return updates, state


def test_what_declearn_cannot_run_is_refused_with_the_reason():
    with pytest.raises(TypeError, match="FedDynClientModule asks for 'delta' of the round"):
        to_declearn(fo.FedDynClientModule())
    with pytest.raises(TypeError, match="WeightDecayModule needs the parameters"):
        to_declearn(fo.WeightDecayModule())
    with pytest.raises(TypeError, match="FedACGModule chooses the parameters that are sent"):
        to_declearn(fo.FedACGModule())
    with pytest.raises(TypeError, match=r"OtherClients has variables named \['clients'\]"):
        to_declearn(OtherClients())
    with pytest.raises(TypeError, match="not Optimizer"):
        to_declearn(fo.Optimizer(0.1))
    assert not {"fo-feddyn-client", "fo-fedacg"} & REGISTERED.keys()


class Extremes(fo.FromClients):
    highest: fo.Max[fo.Params]
    lowest: fo.Min[fo.Scalar]
    steps: fo.Scalar


class ExtremesState(NamedTuple):
    steps: jax.Array


class ExtremesServer(fo.OptiModule[ExtremesState], register=False):
    name: ClassVar[str] = "extremes-server"
    receives = Extremes

    def init(self, params):
        return ExtremesState(jnp.zeros((), jnp.int32))

    def update(self, updates, state, params=None, **extra_args):
        return updates, state

    def process(self, aux, state):
        return ExtremesState(state.steps + aux.steps.astype(jnp.int32))


def test_each_variable_is_reduced_as_it_is_declared():
    spec = {"w": {"dtype": "float32", "shape": [2]}}
    left, right = (
        carrier_of(Extremes)(
            params=spec, clients={name}, highest=NumpyVector({"w": np.float32(values)}), lowest=values[0], steps=2
        )
        for name, values in (("a", [1, 5]), ("b", [3, 2]))
    )
    total = left + right
    np.testing.assert_array_equal(total.highest.coefs["w"], [3, 5])
    assert (total.lowest, total.steps, total.clients) == (1, 4, {"a", "b"})
    server = to_declearn(ExtremesServer())
    server.process_aux_var(total)
    server.process_aux_var(right)
    assert server._session.snapshot().steps == 6
    with pytest.raises(NotImplementedError, match="Extremes is not summed"):
        total.prepare_for_secagg()


def test_there_is_one_carrier_for_a_type():
    assert carrier_of(ScaffoldDelta) is type(collected())
    assert isinstance(collected().delta, Vector)
