"""What is refused, and how it is said."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from functional_optimodules.aux_var import FromClients, FromServer
from functional_optimodules.brick import OptiModule
from functional_optimodules.contract import Contract
from functional_optimodules.federated.batches import check_batches
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.stateful.leaves import traced
from functional_optimodules.types import PyTree

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation
    from functional_optimodules.federated.state import FederationState


def require_counterparts(client: Optimizer, uplink: Sequence[OptiModule], server: Optimizer) -> None:
    """Raise a `ValueError` if a module has no counterpart on the other side."""
    clients, servers = dict(client.channels()), server.channels()
    for name, module in ((name, module) for each in uplink for name, module in each.channels().items()):
        if name in clients:
            raise ValueError(f"Federation: two modules of a client exchange auxiliary variables named {name!r}")
        clients[name] = module
    for name in sorted(clients.keys() | servers.keys()):
        mine, theirs = clients.get(name), servers.get(name)
        if mine is None or theirs is None or not _pair(mine, theirs):
            raise ValueError(
                f"Federation: the auxiliary variables {name!r} have {mine!r} on the clients' side and {theirs!r} on "
                "the server's: expected a module and its counterpart"
            )
        if theirs.clients() is None and any(aux.is_per_client() for aux in (mine.sends, mine.receives) if aux):
            raise ValueError(f"Federation: {theirs!r} exchanges variables per client: give it num_clients")


def _pair(client: Contract, server: Contract) -> bool:
    up, down = client.sends or FromClients, client.receives or FromServer
    same = server.receives is client.sends and server.sends is client.receives
    return same and issubclass(up, FromClients) and issubclass(down, FromServer)


_IN_STEPS = frozenset({"lrate", "anchor_gradient", "mean_gradient", "coin"})
_AT_END = frozenset({"delta", "num_steps", "weight", "examples", "full_gradient", "coin"})
_ON_SERVER = frozenset({"lrate", "joined", "mean_gradient", "coin"})


def require_known(client: Optimizer, uplink: Sequence[OptiModule], server: Optimizer) -> None:
    """Raise a `ValueError` if a brick asks for what is not known where it stands."""
    places: tuple[tuple[str, Sequence[Contract], frozenset[str], frozenset[str]], ...] = (
        ("on the clients' side", (*client.regularizers, *client.modules), _IN_STEPS, _AT_END),
        ("on the uplink", uplink, _AT_END | {"lrate"}, frozenset()),
        ("on the server", (*server.regularizers, *server.modules), _ON_SERVER, frozenset()),
    )
    for where, bricks, in_step, at_end in places:
        for brick in bricks:
            asked = brick.asks()
            for names, known, method in ((asked.step, in_step, "update"), (asked.end, at_end, "end_round")):
                for name in sorted(names - known):
                    there = ", ".join(sorted(known)) or "nothing, for it is not called"
                    raise ValueError(f"Federation: {brick!r} {where} asks for {name!r} in `{method}`: there is {there}")


def require_together(federation: "Federation") -> None:
    """Raise a `ValueError` for options that exclude each other."""
    if sum((federation.epochs != 1, federation.steps is not None, federation.coin is not None)) > 1:
        raise ValueError(
            f"Federation: epochs={federation.epochs}, steps={federation.steps} and coin={federation.coin} each say how "
            "many local steps a round has: give one"
        )
    if not federation.fragments and not traced(federation.mixing) and federation.mixing != 0:
        raise ValueError(f"Federation: mixing={federation.mixing} is of fragments, and there are none")
    if federation.sums_only and not federation.aggregation.sums:
        raise ValueError(f"Federation: {federation.aggregation!r} needs each client's delta, and sums_only allows sums")


def check_rate(drop_rate: ArrayLike | None) -> None:
    """Raise a `ValueError` if a rate of drop-outs is no probability."""
    if drop_rate is None or traced(drop_rate):
        return
    rate = np.asarray(drop_rate)
    if rate.shape != () or rate.dtype.kind not in "bifu" or not 0 <= rate <= 1:
        raise ValueError(f"Federation: drop_rate={drop_rate!r} should be a number in [0, 1]")


def require_clients(server: Optimizer, total: int) -> None:
    """Raise a `ValueError` if a server's module was told of fewer clients than there are."""
    for module in server.modules:
        known = module.clients()
        if known is not None and not traced(known) and known < total:
            raise ValueError(
                f"Federation: there are {total} clients, and the server's {module!r} is for {known}: "
                f"give it num_clients={total}"
            )


def check_weights(weights: ArrayLike | None, count: int, whose: str) -> jax.Array | None:
    """Return how much each counts, as an array, or raise a `ValueError`; values that are traced are not checked."""
    if weights is None:
        return None
    if np.shape(weights) != (count,):
        raise ValueError(f"Federation: weights of shape {list(np.shape(weights))} for {count} {whose}")
    if not traced(weights):
        values = np.asarray(weights)
        if values.dtype.kind in "OSU" or not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
            raise ValueError(f"Federation: weights {values.tolist()} should be finite and >= 0, and not all 0")
    return jnp.asarray(weights)


class Given(NamedTuple):
    """What a caller says of the participants of a round; `None` for what was not given. See `Federation.round`."""

    participants: jax.Array
    num_steps: ArrayLike | None
    mask: ArrayLike | None
    weights: ArrayLike | None
    dropped: ArrayLike | None


def check_round(federation: "Federation", state: "FederationState", data: PyTree, given: Given) -> Given:
    """Return what a caller says, as arrays, the participants as int32[S].

    Raises:
      ValueError: if what a round takes does not go together. Values are checked
        where they are not traced.
    """
    chosen = given.participants
    if chosen.ndim != 1 or chosen.shape[0] == 0 or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(f"Federation: participants of {jax.typeof(chosen)}: expected integers along one axis")
    count = chosen.shape[0]
    if isinstance(data, FederatedData):
        check_batches(data, federation.batch_size, federation.remainder)
        if given.num_steps is not None or given.mask is not None:
            raise ValueError("Federation: num_steps and mask are for given batches: FederatedData has its own")
        if state.bank:
            _check_layout(state, data)
        total: int | None = data.num_clients
    else:
        _check_given(data, count, given.num_steps, given.mask)
        total = None if traced(state.num_clients) else int(state.num_clients)
    if total is not None:
        require_clients(federation.server, total)
    for name, values in (("dropped", given.dropped), ("num_steps", given.num_steps)):
        if values is not None and np.shape(values) != (count,):
            raise ValueError(f"Federation: {name} of shape {list(np.shape(values))} for {count} participants")
    if not traced(chosen):
        _check_clients(np.asarray(chosen), total)
    weights = check_weights(given.weights, count, "participants")
    given = given._replace(participants=chosen.astype(jnp.int32), weights=weights)
    arrays: PyTree = [None if each is None else jnp.asarray(each) for each in given]
    return Given(*arrays)


def _check_clients(chosen: NDArray[np.integer], total: int | None) -> None:
    wrong = [int(c) for c in chosen if c < 0 or (total is not None and c >= total)]
    if wrong:
        raise ValueError(f"Federation: participants {wrong} are out of range: there are {total} clients, from 0")
    clients, times = np.unique(chosen, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"Federation: participants {clients[times > 1].tolist()} are repeated: each takes part once")


def _check_layout(state: "FederationState", data: FederatedData) -> None:
    if state.slots.shape != data.slots.shape or state.bank[0].shape[0] != data.ids.shape[0]:
        raise ValueError(
            f"Federation: data of {data.num_clients} clients in {data.ids.shape[0]} slots, and a state made for "
            f"{state.slots.shape[0]} in {state.bank[0].shape[0]}: make the state with `init(params, data)`"
        )
    if not traced((state.slots, data.slots)) and not np.array_equal(state.slots, data.slots):
        raise ValueError("Federation: the state has its clients on other devices than the data: `init(params, data)`")


def _check_given(data: PyTree, count: int, num_steps: ArrayLike | None, mask: ArrayLike | None) -> None:
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
    if num_steps is not None and not traced(num_steps):
        steps = np.asarray(num_steps)
        if (steps < 0).any() or (steps > shape[1]).any():
            raise ValueError(f"Federation: num_steps={steps.tolist()} should be from 0 to the {shape[1]} given")


def check_sample(data: FederatedData, size: int | None, weights: ArrayLike | None) -> tuple[int, jax.Array | None]:
    """Return how many clients to sample, and how much each counts, or raise a `ValueError`."""
    if not isinstance(data, FederatedData):
        raise TypeError(f"Federation: `run` and `fit` take FederatedData, not {type(data).__name__}")
    return check_size(data.num_clients, size, weights)


def check_size(total: int, size: int | None, weights: ArrayLike | None) -> tuple[int, jax.Array | None]:
    """Return how many of so many clients to sample, and how much each counts, or raise a `ValueError`."""
    size = total if size is None else size
    if type(size) is not int or not 1 <= size <= total:
        raise ValueError(f"Federation: participants={size!r} should be from 1 to the {total} clients")
    return size, check_weights(weights, total, "clients")


def require_finite(history: Mapping[str, ArrayLike]) -> None:
    """Raise a `FloatingPointError` that names the first round, and its clients, with a value that is not finite."""
    rounds = np.atleast_1d(history["round"])
    finite, participants = (np.atleast_2d(history[name]) for name in ("finite", "participants"))
    for number, fine, clients in zip(rounds, finite, participants, strict=True):
        if not fine.all():
            raise FloatingPointError(
                f"Federation: in round {number}, clients {clients[~fine].tolist()} sent values that are not finite: "
                "lower the learning rates, look at their data, or leave such clients out with on_nonfinite='skip'"
            )
