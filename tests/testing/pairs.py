"""A pair of bricks that exchange auxiliary variables, and clients that break the contract by one fault each."""

import random
from typing import ClassVar

import jax
import jax.numpy as jnp

from functional_optimodules import FromClients, FromServer, Params, Scalar

from .bricks import State, Sum


class Numbers(FromClients):
    total: Params
    count: Scalar


class Orders(FromServer):
    mean: Params


class Unanswered(FromServer):
    mean: Params


class Sending(Sum, register=False):
    """Right: the client of a pair. Those below are it, with one fault each."""

    name: ClassVar[str] = "sending"
    aux_name: ClassVar[str] = "pair"
    sends = Numbers
    receives = Orders

    def collect(self, state):
        return Numbers(state.kept, jnp.ones((), jnp.int32))

    def commit(self, state):
        return State(jax.tree.map(jnp.zeros_like, state.kept))

    def process(self, aux, state):
        return State(jax.tree.map(jnp.subtract, state.kept, aux.mean))


class Serving(Sum, register=False):
    """Right: the server of the pair."""

    name: ClassVar[str] = "serving"
    aux_name: ClassVar[str] = "pair"
    sends = Orders
    receives = Numbers

    def collect(self, state):
        return Orders(state.kept)

    def process(self, aux, state):
        return State(jax.tree.map(lambda k, t: k + t / aux.count.astype(t.dtype), state.kept, aux.total))


class HalfForgetting(Serving, register=False):
    def forget(self, state, *, aux):
        return State(jax.tree.map(lambda k, t: k - t / (2 * aux.count).astype(t.dtype), state.kept, aux.total))


class RandomCollect(Sending, register=False):
    def collect(self, state):
        return Numbers(jax.tree.map(lambda k: k * random.random(), state.kept), jnp.ones((), jnp.int32))


class EmptyingCollect(Sending, register=False):
    def collect(self, state):
        aux = super().collect(Sending.commit(self, state))
        state.kept["layer"] = jax.tree.map(jnp.zeros_like, state.kept["layer"])
        return aux


class SendingUndeclared(Sending, register=False):
    sends = None


class SendingElse(Sending, register=False):
    def collect(self, state):
        return Orders(state.kept)


class Unheard(Sending, register=False):
    receives = Unanswered


class Reshaping(Sending, register=False):
    def process(self, aux, state):
        return State(jax.tree.map(lambda k: k[None], state.kept))


class ForgettingRound(Sending, register=False):
    """Where a round begins without the parameters, it forgets to begin it: the sum goes on over rounds."""

    def begin_round(self, state, params=None):
        return state if params is None else State(jax.tree.map(jnp.zeros_like, state.kept))

    def commit(self, state):
        return state
