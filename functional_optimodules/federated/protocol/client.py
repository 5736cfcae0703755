"""A client of a federation between machines.

    Begin(message): settle what the server has taken in; hold the parameters
    Fit: the local steps of a `Federation`'s round; or steps by one's own loop
    Report: the delta and auxiliary variables; what it keeps waits until this is known to count

It does the work of a simulated participant: `walk_round` and `send`, on the same key.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp

from functional_optimodules.config.fields import require_keys
from functional_optimodules.config.outside import quote
from functional_optimodules.federated import saving
from functional_optimodules.federated.checks import Given
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.loss import Averages, Metrics
from functional_optimodules.federated.models import ModelLoss
from functional_optimodules.federated.participant import Shared, Walked, full_gradient, learned, send, take_part
from functional_optimodules.federated.protocol.alone import Alone, alone
from functional_optimodules.federated.protocol.delivery import Call, Journal
from functional_optimodules.federated.protocol.message import Carried, Message, opened
from functional_optimodules.federated.protocol.travel import Down, Shapes, Up
from functional_optimodules.federated.sides import Own, sides_of
from functional_optimodules.federated.state import fresh_row
from functional_optimodules.packing.policy import worthwhile
from functional_optimodules.packing.tree import unpack
from functional_optimodules.types import Json, Params, PyTree, Updates
from functional_optimodules.wire.checkpoint import Checkpoint, write_checkpoint
from functional_optimodules.wire.paths import PathTree, Spec, Specs, specs_from_json

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation

_ABOUT = ("kind", "era", "round", "id", "to", "client", "clients", "taken")


@dataclass
class Work:
    """A round under way, of a client.

    Attributes:
      about: what the server's message is about.
      shared: what the participants share.
      lost: whether the client has lost what the server reckons with, and can but say so.
      begun: before its first step of its own: the parameters then, what it has, and where it is.
      steps: how many steps of its own it has taken.
      report: what it reported.
    """

    about: Mapping[str, Any]
    shared: Shared
    lost: bool
    begun: tuple[Params, Own, Walked] | None = None
    steps: int = 0
    report: Message | None = None


class Client(Alone):
    """A client of a federation between machines.

        client = Client(federation, "a", data)
        client.begin(message)
        client.fit()                       # or: params = client.apply_gradients(gradients), step by step
        report = client.report()           # to the server, by any means

    Whatever becomes of the report, the next `begin` finds out whether it counts. Several threads may
    call it: one call waits for another.

    Attributes:
      federation: what the server was made from, too.
      name: the client's name.
      journal: what it keeps, and what of that counts.
    """

    def __init__(self, federation: "Federation", name: str, data: PyTree = None, *, like: PyTree = None) -> None:
        """Make a client, before it has heard of anything.

        Args:
          federation: the federation, as the server has it.
          name: its name.
          data: its examples, as for `FederatedData.from_clients`; `None` for one with a loop of its own.
          like: the parameters, of which only the container and the shapes count; or the pair of them and
            the model's state, of a loss that has such. `None` for dicts of dicts, by path. Not needed
            where the federation was made `from_nnx`.

        Raises:
          ValueError: as `FederatedData.from_clients` does.
        """
        super().__init__()
        if not isinstance(name, str) or not name:
            raise ValueError(f"Client: name={quote(name)} should be a name")
        self.federation = dataclasses.replace(federation, mapping=None)
        self.name = name
        self.data = None if data is None else FederatedData.from_clients([data])
        self.journal: Journal[Rows] = Journal()
        self._like = like
        self._specs: Specs | None = None
        self._work: Work | None = None

    @alone
    def begin(self, message: Carried) -> Params:
        """Begin a round, or its second pass, with what the server sent; or find that it has begun.

        Args:
          message: the message, in any form.

        Returns:
          The parameters to begin from, with what the client keeps for itself.

        Raises:
          StaleMessageError: if it is of an earlier round than the last one; a `ValueError`.
          KeyError, TypeError, ValueError: if it is malformed, or for another client. Nothing changes then.
        """
        what = f"Client {self.name!r}: the message"
        received = opened(message)
        about = self._read_about(received, what)
        call = Call(about["era"], about["round"], about["id"], about["kind"] == "first")
        if not self.journal.is_new(call, what) and self._work is not None:
            return self.params
        specs = self._specs or self._specs_within(received, what)
        programs = _programs(self.federation, specs)
        down = self._read(programs.shapes, received, what)
        who = jnp.int32(about["client"])

        def fresh() -> Rows:
            params, stats = down.initial or jax.tree.map(jnp.zeros_like, programs.start)
            return programs.fresh(params, stats, who)

        if about["taken"] == 0 and self.journal.kept is None and down.initial is None and programs.shapes.down.initial:
            raise ValueError(f"{what} lacks what a client begins from")
        self._specs = specs
        lost = not self.journal.hear(call, about["taken"], fresh)
        if not lost and down.after is not None and self.journal.kept is not None:
            self.journal.kept = programs.learned(self.journal.kept, down.after, about["round"])
        self._work = Work(about, programs.shared(down, about, who), lost)
        return self.params

    @property
    def params(self) -> Params:
        """The parameters where the client is in its round, with what it keeps for itself.

        Raises:
          ValueError: before any round.
        """
        work, programs = self._at_work()
        if work.begun is not None:
            return unpack(work.begun[2].y)
        if work.lost:
            return unpack(work.shared.params)
        return programs.begin(work.shared, self.journal.kept)[0]

    @alone
    def fit(self) -> Metrics:
        """Take the round's local steps on the client's data, as a `Federation` does.

        Returns:
          The averages of its metrics over the examples that it stepped over; none in a first pass.

        Raises:
          ValueError: before any round, or of a client without data, or one that has taken steps of its own.
        """
        work, programs = self._at_work()
        if self.data is None:
            raise ValueError(f"Client {self.name!r} has no data: give it some, or call `apply_gradients` for each step")
        if work.begun is not None:
            raise ValueError(
                f"Client {self.name!r} has taken {work.steps} steps of its own in this round: `report` them"
            )
        if work.report is None:
            if work.lost:
                self._say(work, "lost", {}, 0.0, {})
            elif work.about["kind"] == "first":
                up, examples = programs.gradient(work.shared, self.data, self.journal.kept)
                self._say(work, "gradient", up, float(examples), {})
            else:
                up, examples, metrics, kept = programs.fit(work.shared, self.data, self.journal.kept)
                self._say(work, "report", up, float(examples), metrics, kept)
        metrics = work.report.about["metrics"] if work.report else {}
        return {name: jnp.float32(math.nan if value is None else value) for name, value in metrics.items()}

    @alone
    def apply_gradients(self, gradients: Updates, *, stats: PyTree = None, **known: PyTree) -> Params:
        """Take one local step, in a loop of one's own.

        Args:
          gradients: the gradients at `params`, in the same container.
          stats: the model's state after it, where it has one.
          **known: what the client's bricks ask for in a step, but for the rate: `anchor_gradient`.

        Returns:
          The parameters after it.

        Raises:
          TypeError: if a brick asks for something else.
          ValueError: before any round, in a first pass, or if gradients are not as the parameters are.
        """
        work, programs = self._at_work()
        if work.about["kind"] == "first":
            raise ValueError(
                f"Client {self.name!r}: this pass asks for a gradient, not for steps: `report(gradient=...)`"
            )
        if work.report is not None:
            raise ValueError(f"Client {self.name!r} has reported in this round: `begin` the next one")
        given = {"mean_gradient": work.shared.mean_gradient, "coin": work.shared.coin, **known}
        asked = programs.sides.client.brick.asks().step - {"lrate"}
        if missing := sorted(name for name in asked if given.get(name) is None):
            raise TypeError(
                f"Client {self.name!r}: a brick asks for {missing}: pass `apply_gradients(..., {missing[0]}=...)`"
            )
        if work.lost:
            return self.params
        params, stats_specs = programs.start
        Specs.of(params).require_shapes(gradients, f"Client {self.name!r}: the gradients")
        if stats is not None:
            Specs.of(stats_specs).require_shapes(stats, f"Client {self.name!r}: the model's state")
        if work.begun is None:
            _, *begun = programs.begin(work.shared, self.journal.kept)
            work.begun = tuple(begun)  # type: ignore[assignment]
        start, own, walked = work.begun  # type: ignore[misc]
        walked = programs.step(gradients, walked, {name: given[name] for name in asked})
        work.begun = start, own, walked if stats is None else walked._replace(stats=stats)
        work.steps += 1
        return self.params

    @alone
    def report(
        self,
        *,
        examples: float = 1.0,
        metrics: Mapping[str, float] | None = None,
        gradient: PyTree = None,
        full_gradient: PyTree = None,
    ) -> Message:
        """Return what the server is to be told; the same again if asked again.

        Of a client with data that has taken no steps, those of `fit` are taken.

        Args:
          examples: how many examples the client has, of one with a loop of its own.
          metrics: what its loop measured, by name.
          gradient: in a first pass, that of its mean loss at the parameters.
          full_gradient: likewise, where a brick asks for it at a round's end.

        Raises:
          TypeError: if a brick asks for something that was not given.
          ValueError: before any round, or if nothing was done in it.
        """
        work, programs = self._at_work()
        if work.report is None and work.begun is None and self.data is not None:
            self.fit()
        if work.report is not None:
            return work.report
        first = work.about["kind"] == "first"
        if work.lost:
            self._say(work, "lost", {}, 0.0, {})
        elif first:
            if gradient is None:
                raise TypeError(f"Client {self.name!r}: this pass asks for a gradient: `report(gradient=...)`")
            self._say(work, "gradient", programs.told(gradient), examples, {})
        elif work.begun is None:
            raise ValueError(f"Client {self.name!r} has done nothing in this round: `fit`, or `apply_gradients`")
        else:
            asked = programs.sides.client.brick.asks().end | programs.sides.uplink.brick.asks().step
            if full_gradient is None and "full_gradient" in asked:
                raise TypeError(
                    f"Client {self.name!r}: a brick asks for the gradient over all data: `report(full_gradient=...)`"
                )
            up, told, kept = programs.end(work.shared, work.begun, examples, work.steps, full_gradient)
            self._say(work, "report", up, examples, {**told, **(metrics or {})}, kept)
        assert work.report is not None
        return work.report

    @alone
    def model(self) -> Any:
        """Return the client's model: the parameters, with what it keeps for itself, as `Federation.model` does."""
        work, programs = self._at_work()
        params, stats = self.params, work.shared.stats
        if work.begun is not None:
            stats = work.begun[2].stats
        elif not work.lost:
            stats = programs.begin(work.shared, self.journal.kept)[3].stats
        loss = self.federation.loss_fn
        if isinstance(loss, ModelLoss):
            return loss.put_together(params, stats)
        return params if stats is None else (params, stats)

    @alone
    def save(self, folder: str | Path) -> None:
        """Keep the client in a folder, in the place of what it had: the old or the new, whenever this process dies.

        After `report` and before that is sent is the time: a client that was restored from before may find
        that the server has taken in what it knows nothing of, and begins anew. Of a round under way nothing else
        is kept.

        Raises:
          OSError: if the disk is full, or fails; the folder has what it had before.
        """
        journal, specs = self.journal, self._specs
        pair = None if specs is None else jax.tree.unflatten(specs.treedef, specs.leaves)
        about = {
            "federation": saving.describe(self.federation),
            "name": self.name,
            "settled": journal.settled,
            "waiting": None if journal.waiting is None else journal.waiting[0],
            "heard": None if journal.heard is None else list(dataclasses.astuple(journal.heard)),
            "kept": journal.kept is not None,
            "specs": None if pair is None else [None if tree is None else Specs.of(tree).to_json() for tree in pair],
        }
        rows = {"kept": journal.kept, "waiting": None if journal.waiting is None else journal.waiting[1]}
        tree = {} if specs is None else self._parts(specs, rows)
        write_checkpoint(folder, "client", about, tree)

    @alone
    def load(self, folder: str | Path, *, changed: Collection[str] = ()) -> None:
        """Take over what was saved in a folder. A round under way is given up.

        Args:
          folder: the folder.
          changed: fields in which the federation may differ from the saved one, as the errors name them.

        Raises:
          FileNotFoundError: if there is no checkpoint.
          ValueError: if it is damaged, another client's, of another federation, or of other shapes: it
            names each difference. The client stays as it was.
        """
        what = f"Client {self.name!r}: the checkpoint in {folder}"
        found = Checkpoint.open(folder)
        about = found.about
        if found.kind != "client":
            raise ValueError(f"{what} is that of a {quote(found.kind)}")
        require_keys(about, ("federation", "name", "settled", "waiting", "heard", "kept", "specs"), what)
        if about["name"] != self.name:
            raise ValueError(f"{what} is that of the client {quote(about['name'])}")
        saving.require_alike(about["federation"], self.federation, changed, what)
        settled, last, told = about["settled"], about["waiting"], about["heard"]
        if not _is_count(settled) or not (last is None or _is_count(last)) or type(about["kept"]) is not bool:
            raise ValueError(f"{what} has {quote({name: about[name] for name in ('settled', 'waiting', 'kept')})}")
        if told is not None and not (isinstance(told, list) and len(told) == 4 and all(map(_is_count, told[:3]))):
            raise ValueError(f"{what} says it has heard {quote(told)}: expected an era, a round, an id and a pass")
        heard = None if told is None else Call(told[0], told[1], told[2], first=bool(told[3]))
        journal: Journal[Rows] = Journal()
        specs = None
        if about["specs"] is not None:
            params, stats = (None if told is None else specs_from_json(told, what) for told in about["specs"])
            specs = self._specs_of(cast(Specs, params), stats)
            sides = _programs(self.federation, specs).sides
            start: Any = jax.tree.unflatten(specs.treedef, specs.leaves)
            like = sides.row(sides.fresh(*jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), start)))
            rows = {"kept": like if about["kept"] else None, "waiting": like if about["waiting"] else None}
            parts = jax.tree.map(jnp.asarray, found.tree(self._parts(specs, rows)))
            read = {name: None if row is None else self._row(specs, parts.get(name, {})) for name, row in rows.items()}
            waiting = None if read["waiting"] is None else (last, read["waiting"])
            journal = Journal(read["kept"], settled, waiting, heard)
        self.journal, self._specs, self._work = journal, specs, None

    def _parts(self, specs: Specs, rows: Mapping[str, Rows | None]) -> dict[str, PyTree]:
        """Return rows by the names of their parts, as they are over the parameters' own container."""
        sides = _programs(self.federation, specs).sides
        return {
            name: {part: sides.client.portable(tree) for part, tree in sides.parts(row).items()}
            for name, row in rows.items()
            if row
        }

    def _row(self, specs: Specs, parts: Mapping[str, PyTree]) -> Rows:
        sides = _programs(self.federation, specs).sides
        return sides.as_row([sides.client.adopt(parts[name], kept) for name, kept in sides.kept.items()])

    def _at_work(self) -> tuple[Work, "_Programs"]:
        if self._work is None or self._specs is None:
            raise ValueError(f"Client {self.name!r} has heard of no round: `begin` one with a message of the server")
        return self._work, _programs(self.federation, self._specs)

    def _say(
        self, work: Work, kind: str, up: PyTree, examples: float, metrics: Mapping[str, Any], kept: Rows | None = None
    ) -> None:
        ticket = self.journal.report(kept) if kept is not None else _UNSETTLED
        numbers = {name: float(value) for name, value in metrics.items()}
        about: dict[str, Json] = {
            "kind": kind,
            "round": work.about["round"],
            "id": work.about["id"],
            "from": self.name,
            "ticket": ticket,
            "examples": float(examples),
            "metrics": {name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }
        work.report = Message.of(about, up)

    def _read_about(self, message: Message, what: str) -> Mapping[str, Any]:
        about = message.about
        require_keys(about, _ABOUT, what)
        if about["to"] != self.name:
            raise ValueError(f"{what} is for {quote(about['to'])}")
        if about["kind"] not in ("first", "round"):
            raise ValueError(f"{what} is a {quote(about['kind'])}: expected 'first' or 'round'")
        for name, most in (
            ("era", 2**53),
            ("round", 2**31),
            ("id", 2**53),
            ("taken", 2**53),
            ("clients", 2**31),
            ("client", 2**31),
        ):
            if type(about[name]) is not int or not 0 <= about[name] < most:
                raise ValueError(f"{what} has {name}={quote(about[name])}: expected an integer in [0, {most})")
        if about["client"] >= about["clients"]:
            raise ValueError(f"{what} says client {about['client']} of {about['clients']}: expected less")
        return about

    def _specs_of(self, params: Specs, stats: Specs | None) -> Specs:
        """Return the container of the parameters and of the model's state, of which the paths are known."""
        loss, like = self.federation.loss_fn, self._like
        own = getattr(loss, "specs", None)
        if isinstance(own, Specs):
            return own
        if like is None:
            return Specs.of((_nested(params), None if stats is None else _nested(stats)))
        if isinstance(loss, ModelLoss):
            return Specs.of(loss.taken_apart(like))
        return Specs.of(like if stats is not None else (like, None))

    def _specs_within(self, message: Message, what: str) -> Specs:
        """Return the container of the parameters and of the model's state, from the first message."""
        params = _specs_within(message, "initial/0") or _specs_within(message, "params")
        stats = _specs_within(message, "initial/1") or _specs_within(message, "stats")
        if params is None:
            raise ValueError(f"{what} has no parameters")
        return self._specs_of(params, stats)

    def _read(self, shapes: Shapes, message: Message, what: str) -> Down:
        has = {path.split("/", 1)[0] for path in message.arrays}
        down: Down = message.tree(shapes.sent(has, last=message.about["kind"] == "round"), what)
        return down


# Of what does not move the state, nobody asks whether it has arrived.
_UNSETTLED = 1


def _is_count(value: Json) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _specs_within(message: Message, prefix: str) -> Specs | None:
    """Return the shapes of the arrays below a path; `None` if there is none."""
    leaves = PathTree()
    for path, array in message.arrays.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            leaves[path.removeprefix(prefix).removeprefix("/")] = Spec(array.shape, array.dtype)
    return Specs.of(leaves) if leaves else None


def _nested(specs: Specs) -> PyTree:
    """Return the shapes of leaves by path in dicts of dicts.

    Raises:
      ValueError: if one path leads through another.
    """
    root: dict[str, Any] = {}
    for path, spec in specs.by_path.items():
        if path == "":
            return spec
        node, (*within, last) = root, path.split("/")
        for name in within:
            node = node.setdefault(name, {})
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"the path {quote(path)} leads through another parameter's")
        node[last] = spec
    return root


class _Programs:
    """The compiled parts of a client, for one federation and one kind of parameters.

    Attributes:
      start: the shapes of the parameters and of the model's state.
      sides: both sides.
      shapes: what messages must hold.
      begin: `(shared, row) -> params, start, own, walked`.
      fit: `(shared, data, row) -> up, examples, metrics, row`.
      gradient: `(shared, data, row) -> up, examples`.
      step: `(gradients, walked, known) -> walked`.
      end: `(shared, begun, examples, steps, full_gradient) -> up, metrics, row`.
    """

    def __init__(self, federation: "Federation", params: Params, stats: PyTree) -> None:
        self.federation, self.start = federation, (params, stats)
        packing = None if federation.local or federation.fragments else worthwhile(params)
        self.sides = sides_of(federation, params, stats, packing)
        self.shapes = Shapes.of(federation, self.sides, params, stats)
        self.begin, self.fit, self.gradient = jax.jit(self._begin), jax.jit(self._fit), jax.jit(self._gradient)
        self.step, self.end = jax.jit(self._step), jax.jit(self._end)

    def fresh(self, params: Params, stats: PyTree, who: jax.Array) -> Rows:
        """Return the row of a client that begins anew."""
        # Not compiled: keys are drawn from the system's entropy, where nothing says which.
        return fresh_row(self.sides, self.sides.fresh(params, stats), who)

    def learned(self, row: Rows, after: Params, now: int) -> Rows:
        """Return the row of a client that was told the parameters of the round after its last report."""
        held = self.sides.client.hold(jax.tree.map(jnp.asarray, after))
        return learned(self.sides, row, held, jnp.int32(now))

    def shared(self, down: Down, about: Mapping[str, Any], who: jax.Array) -> Shared:
        """Return what the participants share, from what a client was sent."""
        hold, total = self.sides.client.hold, about["clients"]
        arrays: Down = jax.tree.map(jnp.asarray, down)

        def widened(leaf: jax.Array) -> jax.Array:
            return jnp.broadcast_to(leaf, (total, *leaf.shape))

        weights = None if arrays.weight is None else arrays.weight[None]
        return Shared(
            params=hold(arrays.params),
            stats=arrays.stats,
            broadcast={name: aux.map_per_client(widened).map_shaped(hold) for name, aux in arrays.broadcast.items()},
            key=jax.random.wrap_key_data(cast(jax.Array, arrays.key)),
            round=jnp.int32(about["round"]),
            coin=arrays.coin,
            steps=arrays.steps,
            mean_gradient=None if arrays.mean_gradient is None else hold(arrays.mean_gradient),
            aggregation=(),
            given=Given(who[None], None, None, weights, None),
        )

    def told(self, gradient: PyTree) -> Up:
        """Return a gradient of a client's own in the form in which it travels."""
        Specs.of(self.start[0]).require_shapes(gradient, "Client: the gradient")
        shared = self.sides.shared(gradient) if self.sides.params.own else gradient
        wide = jax.tree.map(lambda leaf, spec: jnp.asarray(leaf, spec.dtype), shared, self._gradient_shapes())
        return Up(wide, {}, None)

    def _gradient_shapes(self) -> PyTree:
        return self.shapes.gradient.tree(self.shapes.gradient.by_path).delta

    def _begin(self, shared: Shared, row: Rows) -> tuple[Params, Params, Own, Walked]:
        sides = self.sides
        own = sides.restored(row, shared.params)
        start = sides.whole(shared.params, own, shared.round)
        own = sides.hear(shared.broadcast, shared.given.participants[0], own, start)
        stats = sides.stats.whole(shared.stats, own.stats)
        return unpack(start), start, own, Walked(start, own.client, stats, Averages({}, jnp.float32(0)))

    def _fit(self, shared: Shared, data: FederatedData, row: Rows) -> tuple[Up, jax.Array, Metrics, Rows]:
        zero = jnp.int32(0)
        sent, ended = take_part(self.federation, self.sides, shared, data, zero, zero, row)
        return Up.of(self.sides, sent), sent.examples, sent.each, self.sides.row(self.sides.commit(ended))

    def _gradient(self, shared: Shared, data: FederatedData, row: Rows) -> tuple[Up, jax.Array]:
        zero, sides = jnp.int32(0), self.sides
        own = sides.restored(row, shared.params)
        gradient = full_gradient(self.federation, sides, own, shared, data, zero, zero)
        return Up(sides.client.free(sides.shared(gradient)), {}, None), data.sizes[0].astype(jnp.float32)

    def _step(self, gradients: Updates, walked: Walked, known: dict[str, PyTree]) -> Walked:
        y, state = self.sides.client.apply(self.sides.client.hold(gradients), walked.state, walked.y, **known)
        return walked._replace(y=y, state=state)

    def _end(
        self,
        shared: Shared,
        begun: tuple[Params, Own, Walked],
        examples: jax.Array,
        steps: jax.Array,
        full_gradient: PyTree,
    ) -> tuple[Up, Metrics, Rows]:
        sides = self.sides
        examples = jnp.float32(examples)
        uniform = self.federation.weighting == "uniform"
        weight = jnp.float32(1) if uniform else examples
        if shared.given.weights is not None:
            weight = jnp.asarray(shared.given.weights)[0]
        known: dict[str, Callable[[], PyTree]] = {
            "num_steps": lambda: jnp.int32(steps),
            "full_gradient": lambda: sides.client.hold(full_gradient),
        }
        sent, ended = send(sides, shared, *begun, weight, examples, known)
        return Up.of(sides, sent), sent.each, sides.row(sides.commit(ended))


@functools.lru_cache(maxsize=32)
def _programs(federation: "Federation", specs: Specs) -> _Programs:
    return _Programs(federation, *jax.tree.unflatten(specs.treedef, specs.leaves))
