"""What is refused, and how it is said."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.core.aux_var import AuxVar, FromClients, FromServer
from functional_optimodules.federated.batches import check_batches
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.mapping import check_mapping

_CHOICES = {
    "remainder": ("mask", "drop", "wrap"),
    "weighting": ("uniform", "examples"),
    "sampling": ("uniform", "by-device"),
    "on_nonfinite": ("error", "skip"),
}


def check_options(federation: Any) -> None:
    """Raise a `ValueError` for an option of a federation that is out of range."""
    for name, options in _CHOICES.items():
        value = getattr(federation, name)
        if value not in options:
            raise ValueError(f"Federation: {name}={value!r} should be one of {options}")
    for name in ("epochs", "batch_size"):
        value = getattr(federation, name)
        if not (type(value) is int and value >= 1) and not (value is None and name == "batch_size"):
            raise ValueError(f"Federation: {name}={value!r} should be an integer of at least 1")
    check_mapping(federation.mapping)


def check_counterparts(client: Any, server: Any) -> None:
    """Raise a `ValueError` if a module has no counterpart on the other side."""
    clients, servers = client.channels(), server.channels()
    for name in sorted(clients.keys() | servers.keys()):
        mine, theirs = clients.get(name), servers.get(name)
        pair = mine is not None and theirs is not None
        if not pair or not (_on_side(mine, FromClients) and _on_side(theirs, FromServer) and _match(mine, theirs)):
            raise ValueError(
                f"Federation: the auxiliary variables {name!r} have {mine!r} on the clients' side and {theirs!r} on "
                "the server's: expected a module and its counterpart"
            )
        per_client = any("per-client" in marks for aux in (mine.sends, mine.receives) if aux for marks in _marks(aux))
        if per_client and getattr(theirs, "num_clients", None) is None:
            raise ValueError(
                f"Federation: {theirs!r} exchanges variables per client: give it their number, num_clients"
            )


def _on_side(module: Any, side: type[AuxVar]) -> bool:
    other = FromServer if side is FromClients else FromClients
    return issubclass(module.sends or side, side) and issubclass(module.receives or other, other)


def _match(mine: Any, theirs: Any) -> bool:
    return mine.sends is theirs.receives and mine.receives is theirs.sends


def _marks(aux: Any) -> Any:
    return aux.variables().values()


def check_round(
    federation: Any, state: Any, data: Any, participants: Any, num_steps: Any, mask: Any, weights: Any, dropped: Any
) -> jax.Array:
    """Return the participants of a round, as int32[S].

    Raises:
      ValueError: if what a round takes does not go together. Values are checked
        where they are not traced.
    """
    chosen = jnp.asarray(participants)
    if chosen.ndim != 1 or chosen.shape[0] == 0 or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(
            f"Federation: participants of {chosen.dtype}{list(chosen.shape)}: expected integers along one axis"
        )
    count = chosen.shape[0]
    if isinstance(data, FederatedData):
        check_batches(data, federation.batch_size, federation.remainder)
        if num_steps is not None or mask is not None:
            raise ValueError("Federation: num_steps and mask are for given batches: FederatedData has its own")
        _check_layout(state, data)
    else:
        _check_given(data, count, num_steps, mask)
    for name, values in (("weights", weights), ("dropped", dropped), ("num_steps", num_steps)):
        if values is not None and np.shape(values) != (count,):
            raise ValueError(f"Federation: {name} of shape {list(np.shape(values))} for {count} participants")
    if (
        weights is not None
        and not _traced(weights)
        and not (np.isfinite(weights).all() and (np.asarray(weights) >= 0).all())
    ):
        raise ValueError(f"Federation: weights {np.asarray(weights).tolist()} should be finite and >= 0")
    if not _traced(chosen):
        _check_clients(np.asarray(chosen), _known(state, data))
    return chosen.astype(jnp.int32)


def _traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _known(state: Any, data: Any) -> int | None:
    if isinstance(data, FederatedData):
        return data.num_clients
    return None if _traced(state.num_clients) else int(state.num_clients)


def _check_clients(chosen: np.ndarray[Any, Any], known: int | None) -> None:
    wrong = [int(c) for c in chosen if c < 0 or (known is not None and c >= known)]
    if wrong:
        raise ValueError(f"Federation: participants {wrong} are out of range: there are {known} clients, from 0")
    clients, times = np.unique(chosen, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"Federation: participants {clients[times > 1].tolist()} are repeated: each takes part once")


def _check_layout(state: Any, data: FederatedData) -> None:
    if not state.bank:
        return
    if state.slots.shape != data.slots.shape or state.bank[0].shape[0] != data.ids.shape[0]:
        raise ValueError(
            f"Federation: data of {data.num_clients} clients in {data.ids.shape[0]} slots, and a state made for "
            f"{state.slots.shape[0]} in {state.bank[0].shape[0]}: make the state with `init(params, data)`"
        )
    if not _traced(state.slots) and not _traced(data.slots) and not np.array_equal(state.slots, data.slots):
        raise ValueError("Federation: the state has its clients on other devices than the data: `init(params, data)`")


def _check_given(data: Any, count: int, num_steps: Any, mask: Any) -> None:
    shapes = {np.shape(leaf)[:3] for leaf in jax.tree.leaves(data)}
    if len(shapes) != 1 or len(shape := shapes.pop()) < 3:
        raise ValueError(
            "Federation: batches should be arrays of participants x steps x examples, alike in these, not of shapes "
            f"{[list(np.shape(leaf)) for leaf in jax.tree.leaves(data)]}"
        )
    if shape[0] != count:
        raise ValueError(f"Federation: batches of {shape[0]} clients for {count} participants")
    if mask is not None and np.shape(mask) != shape:
        raise ValueError(f"Federation: a mask of shape {list(np.shape(mask))} for batches of {list(shape)}")
    if num_steps is not None and not _traced(num_steps):
        steps = np.asarray(num_steps)
        if (steps < 0).any() or (steps > shape[1]).any():
            raise ValueError(f"Federation: num_steps={steps.tolist()} should be from 0 to the {shape[1]} given")


def check_sample(data: FederatedData, participants: int | None, weights: Any) -> int:
    """Return how many clients to sample, or raise a `ValueError`."""
    if not isinstance(data, FederatedData):
        raise TypeError(f"Federation: `run` and `fit` take FederatedData, not {type(data).__name__}")
    size = data.num_clients if participants is None else participants
    if type(size) is not int or not 1 <= size <= data.num_clients:
        raise ValueError(f"Federation: participants={size!r} should be from 1 to the {data.num_clients} clients")
    if weights is not None and np.shape(weights) != (data.num_clients,):
        raise ValueError(f"Federation: weights of shape {list(np.shape(weights))} for {data.num_clients} clients")
    return size


def check_names(metrics: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if `evaluate` returns a metric under a name that is taken."""
    for name in sorted(metrics.keys() & found.keys()):
        raise ValueError(f"Federation: `evaluate` returns a metric {name!r}, which a round has too: rename it")


def check_history(federation: Any, history: Mapping[str, Any]) -> None:
    """Raise a `FloatingPointError` that names the first round, and its clients, with a value that is not finite."""
    if federation.on_nonfinite == "skip":
        return
    rounds = np.atleast_1d(history["round"])
    finite, participants = (np.atleast_2d(history[name]) for name in ("finite", "participants"))
    for number, fine, clients in zip(rounds, finite, participants, strict=True):
        if not fine.all():
            raise FloatingPointError(
                f"Federation: in round {number}, clients {clients[~fine].tolist()} sent values that are not finite: "
                "lower the learning rates, look at their data, or leave such clients out with on_nonfinite='skip'"
            )
