"""Bricks that break the contract by one fault each, and the right ones that they are made of."""

import random
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from functional_optimodules import OptiModule, Regularizer, hyperparameter
from functional_optimodules.numerics import wide, zeros_wide
from functional_optimodules.random.chacha import CHACHA20


class State(NamedTuple):
    kept: Any


class Kept(OptiModule, register=False):
    """Right, and as dangerous as can be: the state is the last gradients themselves."""

    name: ClassVar[str] = "kept"

    def init(self, params):
        return State(jax.tree.map(jnp.zeros_like, params))

    def update(self, updates, state, params=None, **extra_args):
        return updates, State(updates)


class Sum(Kept, register=False):
    """Right: the sum of gradients. Those below are it, with one fault each."""

    name: ClassVar[str] = "sum"
    round_reset: bool = False

    def init(self, params):
        return State(zeros_wide(params))

    def update(self, updates, state, params=None, **extra_args):
        kept = jax.tree.map(lambda k, g: k + g.astype(k.dtype), state.kept, updates)
        return jax.tree.map(lambda k, g: k.astype(g.dtype), kept, updates), State(kept)


class Sentinel(Sum, register=False):
    def init(self, params):
        return State(0.0)


class DictState(Sum, register=False):
    def init(self, params):
        return {"kept": super().init(params).kept}


class Growing(Sum, register=False):
    def init(self, params):
        return State(())

    def update(self, updates, state, params=None, **extra_args):
        return updates, State(updates)


class Widening(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        updates, state = super().update(updates, state)
        return state.kept, state


class Flattening(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.leaves(updates), state


class Random(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g: g * random.random(), updates), state


class AskingTheHost(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g: jax.pure_callback(np.negative, g, g, vmap_method="sequential"), updates), state


class InPlace(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        updates["layer"] = jax.tree.map(jnp.negative, updates["layer"])
        return updates, state


class Smuggling(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        object.__setattr__(self, "last", jax.tree.map(jnp.copy, updates))
        return updates, state


class Aliasing(Sum, register=False):
    def init(self, params):
        return State(params)


class AliasingRound(Sum, register=False):
    def begin_round(self, state, params=None):
        return state if params is None else State(params)


class Twice(Sum, register=False):
    def init(self, params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State((zeros, zeros))

    def update(self, updates, state, params=None, **extra_args):
        return updates, state


class NarrowMoment(Sum, register=False):
    def init(self, params):
        return State(jax.tree.map(jnp.zeros_like, params))


class NarrowNorm(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        norm = optax.tree.norm(updates)
        return jax.tree.map(lambda g: jnp.where(norm > 1, g / norm, g).astype(g.dtype), updates), state


class NoiseBeforeASign(Kept, register=False):
    """Right: of what the noise adds, one value lies where float16 rounds it onto the jump."""

    name: ClassVar[str] = "noise-before-a-sign"

    def init(self, params):
        return State(jax.random.key(0))

    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g: jnp.sign(self.noisy(g) - 256), updates), state

    def noisy(self, updates):
        noise = jnp.full(updates.size, 8.0).at[:1].set(0.01).reshape(updates.shape)
        return (wide(updates) + noise).astype(updates.dtype)


class NarrowAndNoisy(NoiseBeforeASign, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g: self.noisy(g) / optax.tree.norm(updates).astype(g.dtype), updates), state


class RootAtZero(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(
            lambda g: g * jnp.sqrt(jnp.sum((g * g).astype(jnp.float32))).astype(g.dtype), updates
        ), state


class TraceAware(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        traced = isinstance(jax.tree.leaves(updates)[0], jax.core.Tracer)
        return jax.tree.map(lambda g: g * (1 + traced), updates), state


class AcrossClients(Sum, register=False):
    """Under vmap its result depends on the other clients."""

    def update(self, updates, state, params=None, **extra_args):
        def scale(g):
            return g / (1 + jnp.abs(g))

        @jax.custom_batching.custom_vmap
        def call(g):
            return scale(g)

        @call.def_vmap
        def batched(axis_size, in_batched, g):
            return scale(g) - jnp.mean(g), True

        return jax.tree.map(call, updates), state


class OnlyInScan(Sum, register=False):
    calls: ClassVar[Any] = None

    def update(self, updates, state, params=None, **extra_args):
        factor = next(self.calls)
        return jax.tree.map(lambda g: g * factor, updates), state


class WeakTyped(Sum, register=False):
    def init(self, params):
        return State(jnp.asarray(0.0))

    def update(self, updates, state, params=None, **extra_args):
        return updates, State(state.kept + jnp.float32(1))


class Implicit(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        steps = jnp.arange(1)[0] + 1
        return jax.tree.map(lambda g: (g * steps).astype(g.dtype), updates), state


class DroppingRound(Sum, register=False):
    def begin_round(self, state, params=None):
        return State(None)


class HalfReset(Sum, register=False):
    def begin_round(self, state, params=None):
        return state


class SameKey(Sum, register=False):
    def init(self, params):
        return State(jax.random.key(1))

    def update(self, updates, state, params=None, **extra_args):
        return updates, state

    def fold_in(self, state, integer):
        return state


class OwnGenerator(Sum, register=False):
    def init(self, params):
        return State(jax.random.key(1, impl=CHACHA20))

    def update(self, updates, state, params=None, **extra_args):
        return updates, state


class OldKey(Sum, register=False):
    def init(self, params):
        return State(jax.random.PRNGKey(1))

    def update(self, updates, state, params=None, **extra_args):
        return updates, state


class HiddenState(Sum, register=False):
    """Its facade's state is not all of it."""

    counts: ClassVar[dict[int, int]] = {}

    def update(self, updates, state, params=None, **extra_args):
        def count(_):
            self.counts[0] = self.counts.get(0, 0) + 1
            return jnp.float32(self.counts[0])

        seen = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), jnp.float32(0))
        return jax.tree.map(lambda g: g * seen.astype(g.dtype), updates), state


class DictOnly(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        return {name: updates[name] for name in updates}, state


class ListState(Sum, register=False):
    """Its state is a list of leaves: which one is whose depends on the container."""

    def init(self, params):
        return State(jax.tree.leaves(super().init(params).kept))

    def update(self, updates, state, params=None, **extra_args):
        leaves, treedef = jax.tree.flatten(updates)
        kept = [k + g for k, g in zip(state.kept, leaves, strict=True)]
        return jax.tree.unflatten(treedef, kept), State(kept)


class NeedsALeaf(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        largest = jnp.max(jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(updates)]))
        return jax.tree.map(lambda g: g / (1 + jnp.abs(largest)), updates), state


class DividesByCount(Sum, register=False):
    def update(self, updates, state, params=None, **extra_args):
        centre = sum(jnp.mean(g) for g in jax.tree.leaves(updates))
        return jax.tree.map(lambda g: g - centre, updates), state


class SilentlyReceiving(Sum, register=False):
    def process(self, aux, state):
        return state


class OwnEquality(Sum, register=False):
    """It compares by identity, so that an equal one is compiled anew."""

    def __eq__(self, other):
        return self is other

    __hash__ = object.__hash__


class NarrowMean(Regularizer, register=False):
    """It keeps a mean of the parameters in their dtype."""

    name: ClassVar[str] = "no-penalty"
    alpha: float = hyperparameter(default=0.1, within="[0, 1]")

    def init(self, params):
        return State(jax.tree.map(jnp.copy, params))

    def update(self, updates, state, params=None, **extra_args):
        moved = jax.tree.map(lambda k, p: (k + p) / 2, state.kept, self.require(params))
        return jax.tree.map(lambda g, k: g + self.alpha * k, updates, moved), State(moved)


class PerParameter(Sum, register=False):
    """It says that it treats elements alike, and subtracts the mean of each parameter."""

    packable: ClassVar[bool] = True

    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g: g - jnp.mean(g), updates), state
