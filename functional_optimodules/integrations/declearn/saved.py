"""What declearn saved: configurations and states of its optimizers, for ours to go on from.

A rate of declearn is computed one step before it is used, and so its clocks are one step
ahead. What it does not save begins anew: FedProx's reference, SCAFFOLD's sum of a round
under way, the position of noise.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from declearn.model.api import Vector
from declearn.utils.serialize import json_deserialize

from functional_optimodules.config.outside import quote
from functional_optimodules.integrations.declearn.plugins import PREFIX
from functional_optimodules.integrations.declearn.vectors import arrays_of
from functional_optimodules.modules.adaptive import AdaGradState, AdamState, RMSPropState
from functional_optimodules.modules.momentum import EWMAState, MomentumState
from functional_optimodules.modules.scaffold import ScaffoldClientState, ScaffoldServerState
from functional_optimodules.optimizer import Optimizer, OptimizerState
from functional_optimodules.schedulers import Clock, Scheduler, WarmupClock, as_scheduler
from functional_optimodules.types import Json, Params, PyTree
from functional_optimodules.wire.paths import leaf_paths


def from_declearn_config(config: Mapping[str, Any]) -> Optimizer:
    """Return the optimizer of a configuration that declearn wrote.

    Args:
      config: what `declearn.optimizer.Optimizer.get_config` returned, or its JSON values. As
        declearn leaves `round_reset` out of it, that is false.

    Raises:
      KeyError: if there is no plug-in of a name, or a field is missing or unknown.
      TypeError, ValueError: if a field is of the wrong type, or out of its range.
    """
    plugins = {key: [_own(specs) for specs in config[key]] for key in ("regularizers", "modules") if key in config}
    return Optimizer.from_config({**config, **plugins})


def _own(specs: Json) -> Json:
    if isinstance(specs, str):
        return specs.removeprefix(PREFIX)
    name, config = specs
    return name.removeprefix(PREFIX), config


def from_declearn_state(
    state: Mapping[str, Any] | str, optimizer: Optimizer, params: Params | Vector[Any]
) -> dict[str, Json]:
    """Return a state that declearn saved, as `get_state` of an optimizer of ours writes it.

        optimizer.set_state(from_declearn_state(state, optimizer, params))     # to go on by the facade
        optimizer.load(from_declearn_state(state, optimizer, params), params)  # or by the pure methods

    A client of SCAFFOLD is told from others by the `uuid` in its state: a server that goes on
    from here knows it under that name.

    Args:
      state: what `declearn.optimizer.Optimizer.get_state` returned, or the JSON text of it that
        declearn's `json_serialize` or `json_dump` wrote.
      optimizer: the optimizer of the same configuration; it is left as it is.
      params: the parameters, a pytree of arrays whose paths are the names of declearn's
        coefficients, or declearn's Vector of them.

    Raises:
      KeyError: if a key is missing.
      TypeError: if a plug-in, or a warm-up of a warm-up, has no counterpart in what declearn saves.
      ValueError: if the state is of other modules, or of other parameters.
    """
    saved: Any = json_deserialize(state) if isinstance(state, str) else state
    if isinstance(params, Vector):
        params = jax.tree.map(jnp.asarray, arrays_of(params))
    new = optimizer.init(params)
    if [name.removeprefix(PREFIX) for name, _ in saved["modules"]] != [module.name for module in optimizer.modules]:
        names = [name for name, _ in saved["modules"]]
        raise ValueError(
            f"the state is of the modules {quote(names)}: expected {[module.name for module in optimizer.modules]}"
        )
    modules, clients = {}, list[str]()
    for (label, like), module, (name, each) in zip(
        new.modules.items(), optimizer.modules, saved["modules"], strict=True
    ):
        if name.startswith(PREFIX):
            own = {key: value for key, value in each.items() if key != "client"}
            modules[label] = like if own["variables"] is None else module.load(own, params)
            clients += own["clients"]
        elif module.name in _STATES:
            modules[label] = _STATES[module.name](each, like)
            clients += each.get("clients", [])
        elif jax.tree.leaves(like) and each:
            raise TypeError(f"{type(module).__name__}: declearn saved {quote(sorted(each))}, which is not known here")
        else:
            modules[label] = like
    lrate = _clock(as_scheduler(optimizer.lrate), saved["lrate"])
    w_decay = _clock(as_scheduler(optimizer.w_decay), saved["w_decay"])
    whole = optimizer.save(OptimizerState(lrate, w_decay, new.regularizers, modules), params)
    return {**whole, "clients": sorted(clients)}


def _clock(scheduler: Scheduler, saved: Mapping[str, int]) -> PyTree:
    """Return the time of a scheduler: the step to come, and the rounds that have begun."""
    steps, rounds = max(saved["steps"] - 1, 0), saved["rounds"] + 1
    if not isinstance(scheduler.init(), WarmupClock):
        return _time(steps, rounds)
    wrapped = as_scheduler(cast(Any, scheduler).base)
    if isinstance(wrapped.init(), WarmupClock):
        raise TypeError(
            f"{type(scheduler).__name__}: of a warm-up of a warm-up, declearn saves no time of the inner one"
        )
    if "warmup_steps" in saved:
        inner = _time(max(steps - saved["warmup_steps"], 0), max(rounds - cast(Any, scheduler).warmup, 0))
    else:
        climbed = steps - cast(Any, scheduler).warmup
        inner = _time(max(climbed, 0), min(rounds - saved["full_warmup_rounds"], rounds))
    return WarmupClock(*_time(steps, rounds), inner)


def _time(steps: int, rounds: int) -> Clock:
    return Clock(jnp.array(steps, jnp.int32), jnp.array(rounds, jnp.int32))


def _tree(value: Vector[Any] | float | None, like: PyTree) -> PyTree:
    """Return a Vector as a tree like another: what was no Vector as yet is one number everywhere."""
    if not isinstance(value, Vector):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.0 if value is None else value), like)
    found, paths = arrays_of(value), leaf_paths(like)
    if found.keys() != set(paths):
        raise ValueError(f"the state is of the parameters {quote(sorted(found))}: expected {quote(sorted(paths))}")
    leaves = []
    for path, leaf in zip(paths, jax.tree.leaves(like), strict=True):
        if found[path].shape != leaf.shape:
            raise ValueError(f"the state has the shape {found[path].shape} at {path!r}: expected {leaf.shape}")
        leaves.append(jnp.asarray(found[path], leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _adam(saved: Mapping[str, Any], like: AdamState) -> AdamState:
    return AdamState(
        steps=jnp.array(saved["steps"], like.steps.dtype),
        first=_tree(saved["momentum"]["state"], like.first),
        second=_tree(saved["velocity"]["state"], like.second),
        largest=None if like.largest is None else _tree(saved["vmax"], like.largest),
    )


def _scaffold_client(saved: Mapping[str, Any], like: ScaffoldClientState) -> ScaffoldClientState:
    local = _tree(saved["state"], like.local)
    joined = jnp.array(isinstance(saved["state"], Vector), like.joined.dtype)
    correction = jax.tree.map(jnp.subtract, local, _tree(saved["sglob"], like.local))
    return like._replace(local=local, correction=correction, joined=joined)


def _scaffold_server(saved: Mapping[str, Any], like: ScaffoldServerState) -> ScaffoldServerState:
    clients = jnp.array(len(saved["clients"]), like.clients.dtype)
    return ScaffoldServerState(_tree(saved["s_state"], like.total), clients)


def _average(saved: Mapping[str, Any], like: EWMAState) -> EWMAState:
    return EWMAState(_tree(saved["state"], like.average))


_STATES: dict[str, Callable[[Mapping[str, Any], Any], Any]] = {
    "adagrad": lambda saved, like: AdaGradState(_tree(saved["state"], like.total)),
    "adam": _adam,
    "ewma": _average,
    "momentum": lambda saved, like: MomentumState(_tree(saved["velocity"], like.velocity)),
    "rmsprop": lambda saved, like: RMSPropState(_tree(saved["state"], like.second)),
    "scaffold-client": _scaffold_client,
    "scaffold-server": _scaffold_server,
    "yogi": _adam,
    "yogi-momentum": _average,
}
"""How each module's state is read; of one that is not there, declearn saves nothing."""
