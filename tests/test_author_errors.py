"""What authors get wrong is said by name, with the right code, whoever calls the brick, and of however many leaves."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo
from functional_optimodules.numerics import zeros_wide
from functional_optimodules.wire.messages import encode_message
from functional_optimodules.wire.paths import Specs


class State(NamedTuple):
    total: object


class Right(fo.OptiModule, register=False):
    name: ClassVar[str] = "right"

    def init(self, params):
        return State(zeros_wide(params))

    def update(self, updates, state, params=None, **extra_args):
        return updates, state


class Forgetting(Right, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return updates


class OnlyState(Right, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return state


class Three(Right, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return updates, state, None


class Reshaping(Right, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g: g[:1], updates), state


class Retyping(Right, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g: g.astype(jnp.float16), updates), state


class Listing(Right, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.leaves(updates), state


class Dropping(Right, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return updates, State(None)


class Narrowing(Right, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return updates, jax.tree.map(lambda t: t.astype(jnp.float16), state)


class Naming(Right, register=False):
    def init(self, params):
        return State("none yet")


class LosingRound(Right, register=False):
    def begin_round(self, state, params=None):
        return None


class Report(fo.FromClients):
    total: fo.Params


class Broadcast(fo.FromServer):
    total: fo.Params


class Server(Right, register=False):
    """A server's module, right but for the method that those below replace."""

    aux_name: ClassVar[str] = "report"
    sends = Broadcast
    receives = Report

    def collect(self, state):
        return Broadcast(state.total)

    def process(self, aux, state):
        return state


class LosingMessage(Server, register=False):
    def process(self, aux, state):
        return None


class SendingState(Server, register=False):
    def collect(self, state):
        return state


class LosingCommit(Server, register=False):
    def commit(self, state):
        return State(())


FAULTS = {
    Forgetting: r"Forgetting.update returned one dict: expected two values.*\n.*updates\n.*return updates, state",
    OnlyState: "OnlyState.update returned one State: expected two values",
    Three: "Three.update returned a tuple of 3: expected two values",
    Reshaping: r"Reshaping.update changed the updates at \['00'\] from float32\[3\] to float32\[1\]",
    Retyping: r"Retyping.update changed the updates at \['00'\] from float32\[3\] to float16\[3\]",
    Listing: r"Listing.update changed the structure of the updates, at \['00'\]",
    Dropping: r"Dropping.update changed the structure of the state, at .total\['00'\].*\n.*wrong:.*\n.*right:",
    Narrowing: r"Narrowing.update changed the state at .total\['00'\] from float32\[3\] to float16\[3\]",
    Naming: "Naming.init returned 'none yet' at .total: expected a `NamedTuple` of arrays",
    LosingRound: r"LosingRound.begin_round changed the structure of the state, at .*total\['00'\]",
}


def params(count):
    return {f"{index:02d}": jnp.ones(3) for index in range(count)}


def in_the_facade(brick, tree):
    brick.run(tree)
    brick.on_round_start()


def in_an_optimizer(brick, tree):
    optimizer = fo.Optimizer(0.1, modules=[brick])
    optimizer.apply_gradients(tree, tree)
    optimizer.start_round()


def in_pure_code(brick, tree):
    optimizer = fo.Optimizer(0.1, modules=["momentum", brick])
    state = jax.jit(optimizer.begin_round)(optimizer.init(tree))
    jax.jit(optimizer.update)(tree, state, tree)


@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize("call", [in_the_facade, in_an_optimizer, in_pure_code])
@pytest.mark.parametrize("cls", FAULTS)
def test_what_a_method_returns_is_checked_with_the_same_words_everywhere(cls, call, count):
    with pytest.raises(TypeError, match=FAULTS[cls]):
        call(cls(), params(count))


@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (LosingMessage, r"LosingMessage.process changed the structure of the state, at .*total\['00'\]"),
        (SendingState, "SendingState.collect returned State, and `sends` declares Broadcast"),
        (LosingCommit, r"LosingCommit.commit changed the structure of the state, at .*total\['00'\]"),
    ],
)
def test_what_the_methods_of_an_exchange_return_is_checked_too(cls, message, count):
    tree = params(count)
    bare, optimizer = cls(), fo.Optimizer(1.0, modules=[cls()])
    sent = {"name": encode_message(Report(tree), "report", Specs.of(tree))}

    def exchange(each):
        each.setup(tree)
        each.collect_aux_var()
        each.process_aux_var({"report": sent} if each is optimizer else sent)

    for each in (bare, optimizer):
        with pytest.raises(TypeError, match=message):
            exchange(each)


def test_a_chain_of_optax_says_it_too():
    with pytest.raises(TypeError, match=r"Forgetting.update returned one dict"):
        optax.chain(Forgetting().to_optax()).update(params(2), (State(params(2)),))


def test_a_right_brick_passes_everywhere():
    for call in (in_the_facade, in_an_optimizer, in_pure_code):
        call(Right(), params(10))


class Helped(fo.OptiModule, register=False):
    """Its `update` calls a helper, which treats elements alike."""

    name: ClassVar[str] = "helped"
    packable: ClassVar[bool] = True

    def init(self, params):
        return State(zeros_wide(params))

    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(self.scale, updates), state

    def scale(self, gradient):
        return gradient / 2


class HelpedOtherwise(Helped, register=False):
    def scale(self, gradient):
        return gradient / jnp.sqrt(jnp.sum(gradient**2))


def test_a_class_that_replaces_a_helper_is_not_packable_by_inheritance():
    assert Helped.packable
    assert not HelpedOtherwise.packable
    brick, tree = HelpedOtherwise(), params(10)
    expected, _ = brick.update(tree, brick.init(tree))
    np.testing.assert_allclose(expected["00"], np.full(3, 3**-0.5), rtol=1e-6)
    for found in (brick.run(tree), fo.Optimizer(-1.0 * -1.0, modules=[brick]).run(jax.tree.map(jnp.negative, tree))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_an_extra_argument_with_a_default_is_refused_as_a_chain_would_drop_it():
    with pytest.raises(
        TypeError, match=r"the extra argument factor=1.0 has a default.*\n.*wrong:.*\n.*\*, factor, \*\*"
    ):

        class Optional(Right, register=False):
            def update(self, updates, state, params=None, *, factor=1.0, **extra_args):
                return updates, state


class Scaled(Right, register=False):
    def update(self, updates, state, params=None, *, factor, **extra_args):
        return jax.tree.map(lambda g: factor * g, updates), state


def test_an_extra_argument_that_a_chain_drops_is_an_error_and_arrives_through_to_optax():
    tree = params(2)
    bare, whole = optax.chain(Scaled(), optax.scale(1.0)), optax.chain(Scaled().to_optax(), optax.scale(1.0))
    with pytest.raises(TypeError, match="factor"):
        bare.update(tree, bare.init(tree), tree, factor=1.5)
    np.testing.assert_array_equal(whole.update(tree, whole.init(tree), tree, factor=1.5)[0]["00"], np.full(3, 1.5))
    steps = optax.MultiSteps(Scaled().to_optax(), 1)
    np.testing.assert_array_equal(steps.update(tree, steps.init(tree), tree, factor=1.5)[0]["00"], np.full(3, 1.5))


def test_parameters_that_are_not_named_in_the_run_of_an_optimizer_are_refused():
    optimizer, tree = fo.Optimizer(0.1, modules=["adam"]), params(2)
    with pytest.raises(TypeError, match=r"by name.*\n.*wrong:.*\n.*right:  optimizer.run\(gradients, params=params\)"):
        optimizer.run(tree, tree)
    named, updates = optimizer.run(tree, params=tree), optimizer.bare().compute_updates_from_gradients(tree, tree)
    jax.tree.map(np.testing.assert_array_equal, named, updates)


def test_what_the_library_reads_of_fields_is_declared_by_the_contract():
    assert fo.MomentumModule(round_reset=True).restarts()
    assert not fo.MomentumModule().restarts()
    assert not Right().restarts()
    assert fo.ScaffoldServerModule(num_clients=3).clients() == 3
    assert Right().clients() is None
    assert fo.Optimizer(1.0, modules=["adam", "scaffold-server"]).serves()
    assert not fo.Optimizer(1.0, modules=["scaffold-client"]).serves()


def test_gradients_of_each_example_are_refused_with_a_hint():
    optimizer, tree = fo.Optimizer(0.1, modules=["adam"]), params(2)
    optimizer.apply_gradients(tree, tree)
    with pytest.raises(ValueError, match=r"leading axis of 5: of gradients of each example give the mean.*jax.vmap"):
        optimizer.apply_gradients(tree, jax.tree.map(lambda leaf: jnp.ones((5, *leaf.shape)), tree))


def test_arrays_of_numpy_in_pure_code_count_as_jax_would_take_them():
    optimizer, tree = fo.Optimizer(0.1, modules=["adam"]), params(2)
    doubles = jax.tree.map(lambda leaf: np.ones(leaf.shape), tree)
    updates, _ = optimizer.update(doubles, optimizer.init(tree), tree)
    np.testing.assert_allclose(updates["00"], np.full(3, -0.1), rtol=1e-5)
