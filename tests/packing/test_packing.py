"""Packed trees stand for the trees that they are made of."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import functional_optimodules as fo
from functional_optimodules.packing import policy as packed
from functional_optimodules.packing.buffers import cut, join
from functional_optimodules.packing.tree import Packing
from functional_optimodules.testing.trees import containers, randoms


def layers(count, size=5):
    return {
        f"layer-{i:03d}": {"b": jnp.full((size,), float(i)), "w": jnp.full((2, size), -float(i))} for i in range(count)
    }


MIXED = {
    "a": jnp.arange(3.0),
    "big": jnp.ones((64, 64)),
    "c": {"half": jnp.ones((2, 2), jnp.bfloat16), "count": jnp.int32(4)},
    "d": [jnp.ones((2, 3)), jnp.float32(7), jnp.zeros((0, 3)), jnp.arange(3.0) + 5],
    "z": jnp.ones((2,), jnp.complex64),
}


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_unpacking_gives_back_what_was_packed():
    tree = fo.pack(MIXED, small=1000)
    assert [leaf.shape for leaf in tree.buffers] == [(13,), (4,), (2,)]  # float32, bfloat16, complex64
    assert tree.large[0] is MIXED["big"]
    assert tree.large[1] is MIXED["c"]["count"]
    same(fo.unpack(tree), MIXED)
    same(jax.jit(fo.unpack)(tree), MIXED)
    same(jax.jit(lambda tree: fo.unpack(fo.pack(tree, small=1000)))(MIXED), MIXED)
    same(fo.unpack(jax.device_get(tree)), jax.device_get(MIXED))


@pytest.mark.parametrize("container", containers())
def test_any_container_comes_back(container):
    tree = containers()[container](jnp.arange(3.0), jnp.float32(2))
    same(fo.unpack(fo.pack(tree)), tree)


@pytest.mark.slow
def test_many_leaves_come_back_under_jit_vmap_and_a_leading_axis():
    tree = layers(50)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), tree)
    rows = fo.pack(tree).packing.pack(stack)
    same(jax.jit(fo.unpack)(fo.pack(tree)), tree)
    same(jax.vmap(fo.unpack)(rows), stack)
    same(fo.unpack(rows), stack)


def test_numbers_and_numpy_arrays_are_packed_as_jax_would_take_them():
    tree = fo.pack({"a": np.ones(2, np.float32), "b": 3.0})
    same(fo.unpack(tree), {"a": jnp.ones(2), "b": jnp.float32(3)})


def test_leaves_of_one_shape_are_neighbours():
    packing = fo.pack({"a": jnp.ones(3), "b": jnp.ones((1, 2)), "c": jnp.ones(3)}).packing
    assert list(packing.rows(packing.groups[0])) == [(0, 1, (1, 2)), (2, 2, (3,))]


def test_leaves_are_read_by_path():
    tree = fo.pack(MIXED, small=1000)
    np.testing.assert_array_equal(tree["d/3"], MIXED["d"][3])
    np.testing.assert_array_equal(tree["big"], MIXED["big"])
    assert "c/half" in tree
    assert "half" not in tree
    with pytest.raises(KeyError, match="no leaf has the path 'half': there are a, big, c/count"):
        tree["half"]


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)


def loss(tree):
    return sum(jnp.sum(jnp.sin(leaf) * (index + 1)) for index, leaf in enumerate(jax.tree.leaves(fo.unpack(tree))))


def hessian_times_ones(tree):
    return jax.jvp(jax.grad(loss), (tree,), (jax.tree.map(jnp.ones_like, tree),))[1]


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("derivative", [jax.grad(loss), hessian_times_ones])
def test_the_gradient_of_unpacking_is_one_concatenation_and_no_padding(count, derivative, optimized):
    tree = fo.pack(layers(count))
    names = list(primitives(jax.make_jaxpr(derivative)(tree).jaxpr))
    assert names.count("concatenate") == (1 if derivative is not hessian_times_ones else 2)
    assert "pad" not in names
    text = jax.jit(derivative).lower(tree).compile(optimized).as_text()
    assert " pad(" not in text
    expected = derivative(layers(count))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), fo.unpack(derivative(tree)), expected)


def test_the_forward_derivative_of_unpacking_is_one_split():
    tree = fo.pack(layers(50))
    ones = jax.tree.map(jnp.ones_like, tree)
    tangent, linear = jax.jvp(fo.unpack, (tree,), (ones,))[1], jax.linearize(fo.unpack, tree)[1]
    names = set(primitives(jax.make_jaxpr(linear)(ones).jaxpr))
    assert "split" in names
    assert not {"pad", "concatenate", "dynamic_slice", "gather"} & names
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 1), tangent)


def compiled_text(options, function, *args):
    return re.sub(r", metadata=\{[^}]*\}", "", jax.jit(function).lower(*args).compile(options).as_text())


def test_slices_of_one_size_share_a_kernel(optimized):
    text = compiled_text(optimized, fo.unpack, fo.pack({f"{i:03d}": jnp.eye(8) for i in range(200)}))
    bodies = re.findall(r"^%(?:fused|wrapped)_computation.*?^}", text, re.MULTILINE | re.DOTALL)
    assert len(bodies) >= 200
    assert len({re.sub(r"%[\w.-]+|\w+\.\d+|param_\d+", "", body) for body in bodies}) < 5


@pytest.mark.slow
def test_a_packed_model_of_many_layers_is_a_smaller_program_than_with_optax(optimized):
    params, x = {f"{i:03d}": jnp.eye(8) for i in range(100)}, jnp.ones((4, 8))

    def model(params):
        y = x
        for kernel in params.values():
            y = jnp.tanh(y @ kernel)
        return jnp.sum(y)

    def with_optax(params, state):
        updates, state = transform.update(jax.grad(model)(params), state, params)
        return optax.apply_updates(params, updates), state

    def with_packing(params, state):
        updates, state = optimizer.update(jax.grad(lambda p: model(fo.unpack(p)))(params), state, params)
        return optax.apply_updates(params, updates), state

    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    optimizer = fo.Optimizer(1e-3, modules=["l2-global-clipping", "adam"])
    tree = fo.pack(params)
    ours = compiled_text(optimized, with_packing, tree, optimizer.init(tree))
    theirs = compiled_text(optimized, with_optax, params, transform.init(params))
    assert ours.count(" = ") < theirs.count(" = ") / 2


class Centered(fo.OptiModule, register=False):
    """It says nothing of packing, and needs each parameter as the model has it."""

    def init(self, params):
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(self, updates, state, params=None, **extra_args):
        updates = jax.tree.map(lambda g: g - jnp.mean(g, keepdims=True), updates)
        return updates, optax.TraceState(jax.tree.map(jnp.add, state.trace, updates))


@pytest.mark.slow
@pytest.mark.parametrize("brick", [Centered(), fo.L2Clipping(1.0), fo.GaussianNoiseModule(seed=1)])
def test_what_is_done_to_each_parameter_is_done_to_it_as_the_model_has_it(brick):
    params = layers(12)
    gradients = randoms(params, 3)
    tree = fo.pack(params)
    chain = optax.chain(brick.to_optax(), optax.scale(-1.0))
    expected, state = chain.update(gradients, chain.init(params), params)
    found, packed_state = chain.update(updates=fo.pack(gradients, like=tree), state=chain.init(tree), params=tree)
    assert isinstance(found, fo.Packed)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
    jax.tree.map(close, fo.unpack(found), expected)
    if isinstance(brick, Centered):
        jax.tree.map(close, packed_state, state)


@pytest.mark.slow
def test_an_optimizer_packs_the_gradients_of_packed_parameters():
    optimizer = fo.Optimizer(0.1, w_decay=0.01, modules=["adam", Centered()])
    params = layers(12)
    tree, gradients = fo.pack(params), randoms(params, 1)
    found, _ = jax.jit(optimizer.update)(gradients, optimizer.init(tree), tree)
    expected, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), fo.unpack(found), expected)


def test_a_flax_training_state_stays_packed():
    params = layers(12)
    apply_fn = lambda params, x: sum(jnp.sum(leaf * x) for leaf in jax.tree.leaves(fo.unpack(params)))  # noqa: E731
    state = TrainState.create(apply_fn=apply_fn, params=fo.pack(params), tx=fo.Optimizer(0.1, modules=["momentum"]))

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(state.apply_fn)(state.params, 2.0))

    trained = step(step(state))
    assert all(len(jax.tree.leaves(node)) == 1 for node in (trained.params, trained.opt_state.modules["momentum"]))
    expected = jax.tree.map(lambda leaf: leaf - 0.1 * (2 + 2 * 1.9), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), fo.unpack(trained.params), expected)
    saved = state.tx.save(trained.opt_state, trained.params)
    same(fo.unpack(state.tx.load(saved, trained.params)), fo.unpack(trained.opt_state))
    same(state.tx.load(saved, params), fo.unpack(trained.opt_state))


def test_a_buffer_is_worth_it_for_some_leaves_only(monkeypatch):
    assert packed.worthwhile({"w": jnp.ones(3), "b": jnp.ones(3)}) is None
    assert packed.worthwhile(layers(50)).groups
    fo.set_small_leaf(0)
    try:
        assert fo.small_leaf() == 0
        assert packed.worthwhile(layers(50)) is None
        assert not fo.pack(layers(2)).buffers
    finally:
        fo.set_small_leaf(None)
    assert fo.small_leaf() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fo.pack(layers(2), small=-1), ValueError, "small=-1 should be a number of bytes"),
        (lambda: fo.pack(layers(2), small=1.5), ValueError, "small=1.5 should be"),
        (lambda: fo.pack(layers(2), like=layers(2)), TypeError, "like=dict should be a packed tree"),
        (lambda: fo.pack({"w": "text"}), TypeError, "at 'w' there is 'text'"),
        (lambda: fo.pack(layers(2, 4), like=fo.pack(layers(2))), ValueError, r"float32\[4\] at 'layer-000/b'.*\[5\]"),
        (lambda: fo.pack({"w": jnp.ones(2)}, like=fo.pack(layers(2))), ValueError, "another structure.*layer-000"),
        (
            lambda: fo.pack([jnp.ones(2), jnp.ones(2, jnp.float16)], like=fo.pack([jnp.ones(2), jnp.ones(2)])),
            ValueError,
            r"float32\[2\] at '0' and float16\[2\] at '1' would share a buffer",
        ),
        (lambda: cut(jnp.ones(3), ((2,), (2,))), ValueError, r"a buffer of shape \[3\]: expected 4"),
        (lambda: fo.map_parameters(jnp.add, fo.pack(layers(2)), layers(2)), ValueError, "expected all to be"),
        (lambda: fo.set_small_leaf(-3), ValueError, "-3 should be a number of bytes"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_joining_keeps_leading_axes():
    pieces = cut(join([jnp.ones((4, 2)), jnp.zeros((4, 3, 1))], ((2,), (3, 1))), ((2,), (3, 1)))
    assert [piece.shape for piece in pieces] == [(4, 2), (4, 3, 1)]


def test_equal_trees_are_packed_alike():
    one, other = (Packing.of(layers(3), 1000) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Packing.of(layers(3), 0)
    assert one != Packing.of(layers(4), 1000)
    assert repr(one) == "Packing(1 buffers of [6] leaves, 0 large leaves)"


class Halving(fo.MomentumModule, register=False):
    """It changes what it inherits, and says nothing of packing."""

    def update(self, updates, state, params=None, **extra_args):
        updates = jax.tree.map(lambda g: g / (1 + jnp.sqrt(jnp.sum(g * g))), updates)
        return super().update(updates, state, params, **extra_args)


def test_what_a_brick_says_of_its_methods_it_does_not_say_of_those_that_replace_them():
    params = layers(12)
    brick, tree = Halving(), fo.pack(params)
    assert not Halving.packable
    expected, _ = brick.update(params, brick.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), brick.run(params), expected)
    init, update = brick
    found, _ = update(tree, init(tree))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), fo.unpack(found), expected)


@pytest.mark.slow
@pytest.mark.parametrize("brick", [fo.L2Clipping(0.5), fo.OptaxModule("lion"), fo.AdamModule()])
def test_a_packed_part_of_a_tree_is_treated_as_the_tree_that_it_stands_for(brick):
    plain = {"body": layers(6), "head": jnp.ones(3)}
    nested = {"body": fo.pack(plain["body"]), "head": plain["head"]}
    expected, _ = brick.update(plain, brick.init(plain), plain)
    found, _ = brick.update(nested, brick.init(nested), nested)
    assert isinstance(found["body"], fo.Packed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), fo.unpack(found), expected)
    with pytest.raises(ValueError, match="a packed tree inside: pack the whole, or unpack the part"):
        fo.pack(nested)


@pytest.mark.parametrize("module", ["l2-clipping", "adam", ("optax", {"transform": "lion"})])
def test_optax_may_mask_the_parts_of_a_packed_tree(module):
    params = layers(6) | {"large": jnp.ones((100, 100))}
    tree = fo.pack(params)
    for large in (True, False):
        mask = lambda tree, large=large: jax.tree.map(lambda leaf: (leaf.size > 1000) == large, tree)  # noqa: E731
        transform = optax.masked(fo.Optimizer(0.1, modules=[module]).to_optax(), mask)
        found, _ = transform.update(tree, transform.init(tree), tree)
        expected, _ = transform.update(params, transform.init(params), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), fo.unpack(found), expected)


def test_numpy_arrays_share_a_buffer_if_jax_gives_them_one_dtype():
    tree = fo.pack({"a": np.ones(2), "b": np.ones(2, np.float32), "c": 1.0})
    assert [buffer.dtype for buffer in tree.buffers] == [jnp.float32]


def test_a_packed_tree_is_not_walked_by_number():
    with pytest.raises(TypeError, match="not iterable"):
        list(fo.pack(layers(2)))
