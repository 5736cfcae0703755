"""A client of a federation between machines.

    Begin(message): settle what the server has taken in; hold the parameters
    Fit: the local steps of a `Federation`'s round; or steps by one's own loop
    Report: the delta and auxiliary variables; what it keeps waits until this is known to count

It does the work of a simulated participant, `walk_round` and `send`, on the same key. What counts, and
what does not, is in `delivery`.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp

from functional_optimodules.config.fields import require_keys
from functional_optimodules.config.outside import quote
from functional_optimodules.federated import saving
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.loss import Metrics
from functional_optimodules.federated.models import ModelLoss
from functional_optimodules.federated.participant import Shared
from functional_optimodules.federated.protocol.delivery import Call, Journal
from functional_optimodules.federated.protocol.message import Carried, Message, opened
from functional_optimodules.federated.protocol.peer import Peer
from functional_optimodules.federated.protocol.programs import Begun, ClientPrograms, client_programs, params_of
from functional_optimodules.federated.protocol.reports import read_metrics
from functional_optimodules.federated.protocol.travel import Down
from functional_optimodules.stateful.alone import alone
from functional_optimodules.types import Json, Params, PyTree, Updates
from functional_optimodules.wire.checkpoint import Checkpoint, write_checkpoint
from functional_optimodules.wire.limits import limits
from functional_optimodules.wire.paths import PathTree, Spec, Specs, specs_from_json

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation

_ABOUT = ("kind", "era", "id", "round", "to", "client", "clients", "taken")
# Of a report that moves no state, nobody asks whether it has arrived.
_UNSETTLED = 1


@dataclass
class Work:
    """A round under way, of a client.

    Attributes:
      about: what the server's message is about.
      shared: what the participants share; `None` for a client that has lost what the server reckons with,
        and can but say so.
      begun: where it is, once it has taken a step of its own.
      steps: how many steps of its own it has taken.
      report: what it reported.
    """

    about: Mapping[str, Any]
    shared: Shared | None
    begun: Begun | None = None
    steps: int = 0
    report: Message | None = None


class Client(Peer):
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
      data: its examples, if it has some.
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
        super().__init__(federation)
        if not isinstance(name, str) or not 0 < len(name) <= limits().name:
            raise ValueError(f"Client: name={quote(name)} should be a name, of at most {limits().name} characters")
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
          The parameters to begin from, with what the client keeps for itself; `None` if it has lost what
          the server reckons with (see `lost`).

        Raises:
          StaleMessageError: if it is older than one that was heard; a `ValueError`.
          KeyError, TypeError, ValueError: if it is malformed, or for another client. Nothing changes then.
        """
        what = f"Client {self.name!r}: the message"
        received = opened(message)
        about = self._read_about(received, what)
        call = Call(about["era"], about["id"], about["round"], first=about["kind"] == "first")
        if not self.journal.is_new(call, what) and self._work is not None:
            return self.params
        # On copies, which take the place of what is there once all is done.
        journal, specs, shared = dataclasses.replace(self.journal), self._specs, None
        how = journal.hear(call, about["taken"])
        # What a client keeps of its parameters is not in each message, and their shapes are not known without.
        if how != "lost" or specs is not None or not self.federation.local:
            specs = specs or self._specs_within(received, what)
            programs, who = client_programs(self.federation, specs), jnp.int32(about["client"])
            down = self._read(programs, received, what)
            if how == "anew" or (how == "lost" and not programs.sides.kept):  # nothing that it could have lost
                if down.initial is None and programs.shapes.down.initial is not None:
                    raise ValueError(f"{what} lacks what a client begins from")
                journal.kept, journal.settled, how = programs.fresh(down, who), about["taken"], "anew"
            elif how == "on" and down.after is not None:
                journal.kept = programs.learned(cast(Rows, journal.kept), down.after, about["round"])
            if how != "lost":
                shared = programs.shared(down, about["round"], who)
        self.journal, self._specs, self._work = journal, specs, Work(about, shared)
        return self.params

    @property
    def lost(self) -> bool:
        """Whether the client has lost what the server reckons with, and can but say so, by `report`."""
        return self._work is not None and self._work.shared is None

    @property
    def params(self) -> Params:
        """The parameters where the client is in its round, with what it keeps for itself; `None` if it is `lost`.

        Raises:
          ValueError: before any round.
        """
        work = self._at_work()
        if work.begun is not None:
            return params_of(work.begun)
        return None if work.shared is None else params_of(self._begun(work.shared))

    @alone
    def fit(self) -> Metrics:
        """Take the round's local steps on the client's data, as a `Federation` does.

        Returns:
          The averages of its metrics over the examples that it stepped over; none in a first pass, or if it is
          `lost`.

        Raises:
          ValueError: before any round, or of a client without data, or one that has taken steps of its own.
        """
        work = self._at_work()
        if self.data is None:
            raise ValueError(f"Client {self.name!r} has no data: give it some, or call `apply_gradients` for each step")
        if work.begun is not None:
            raise ValueError(
                f"Client {self.name!r} has taken {work.steps} steps of its own in this round: `report` them"
            )
        if work.report is None:
            kept, examples = self.journal.kept, float(self.data.largest)
            if work.shared is None:
                self._say("lost", {}, 0.0, {})
            elif work.about["kind"] == "first":
                self._say("gradient", self._programs.gradient(work.shared, self.data, kept), examples, {})
            else:
                up, metrics, kept = self._programs.fit(work.shared, self.data, kept)
                self._say("report", up, examples, metrics, kept)
        told = cast(Message, work.report).about["metrics"]
        return {name: jnp.float32(math.nan if value is None else value) for name, value in told.items()}

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
          ValueError: before any round, in a first pass, if it is `lost`, or if gradients are not as the
            parameters are.
        """
        work, what = self._at_work(), f"Client {self.name!r}"
        if work.report is not None:
            raise ValueError(f"{what} has reported in this round: `begin` the next one")
        if work.shared is None:
            raise ValueError(f"{what} has lost what the server reckons with, and takes no steps: `report` says so")
        if work.about["kind"] == "first":
            raise ValueError(f"{what}: this pass asks for a gradient, not for steps: `report(gradient=...)`")
        programs = self._programs
        given = {"mean_gradient": work.shared.mean_gradient, "coin": work.shared.coin, **known}
        asked = programs.sides.client.brick.asks().step - {"lrate"}
        if missing := sorted(name for name in asked if given.get(name) is None):
            raise TypeError(f"{what}: a brick asks for {missing}: pass `apply_gradients(..., {missing[0]}=...)`")
        if unknown := sorted(known.keys() - {"anchor_gradient"}):
            raise TypeError(
                f"{what}: `apply_gradients` takes no {unknown[0]!r}: what is left to say is 'anchor_gradient'"
            )
        params, state = programs.start
        for name, tree, like in (("gradients", gradients, params), ("model's state", stats, state)):
            self._require_like(name, tree, like)
        self._require_like("anchor_gradient", known.get("anchor_gradient"), params)
        begun = work.begun or self._begun(work.shared)
        walked = programs.step(gradients, begun.walked, {name: given[name] for name in asked})
        work.begun = begun._replace(walked=walked if stats is None else walked._replace(stats=stats))
        work.steps += 1
        return self.params

    @alone
    def report(
        self,
        *,
        examples: float | None = None,
        metrics: Mapping[str, float] | None = None,
        gradient: PyTree = None,
        full_gradient: PyTree = None,
    ) -> Message:
        """Return what the server is to be told; the same again if asked again.

        Of a client with data that has taken no steps, those of `fit` are taken.

        Args:
          examples: how many examples the client has, of one with a loop of its own and no data; needed where
            they count.
          metrics: what its loop measured, by name.
          gradient: in a first pass of such a loop, that of its mean loss at the parameters.
          full_gradient: likewise, where a brick asks for it at a round's end.

        Raises:
          TypeError: if a brick asks for something that was not given.
          ValueError: before any round, or if nothing was done in it, or for what is not of its kind.
        """
        work, what = self._at_work(), f"Client {self.name!r}"
        if work.report is not None:
            return work.report
        if work.shared is None:
            self._say("lost", {}, 0.0, {})
        elif work.about["kind"] == "first" and (gradient is not None or self.data is None):
            if gradient is None:
                raise TypeError(f"{what}: this pass asks for a gradient: `report(gradient=...)`")
            self._require_like("gradient", gradient, self._programs.start[0])
            self._say("gradient", self._programs.told(gradient), self._examples(examples), {})
        elif work.begun is None:
            if self.data is None:
                raise ValueError(f"{what} has done nothing in this round: `fit`, or `apply_gradients`")
            if examples is not None or metrics is not None:
                raise ValueError(f"{what}: `fit` knows its examples and its metrics: leave both out")
            self.fit()
        else:
            sides = self._programs.sides
            if (
                full_gradient is None
                and "full_gradient" in sides.client.brick.asks().end | sides.uplink.brick.asks().step
            ):
                raise TypeError(f"{what}: a brick asks for the gradient over all data: `report(full_gradient=...)`")
            self._require_like("full_gradient", full_gradient, self._programs.start[0])
            measured = {name: float(value) for name, value in (metrics or {}).items()}
            finite = {name: value if math.isfinite(value) else None for name, value in measured.items()}
            own, count = read_metrics(finite, f"{what}: `report`"), self._examples(examples)
            up, told, kept = self._programs.end(work.shared, work.begun, count, work.steps, full_gradient)
            self._say("report", up, count, {**told, **own}, kept)
        return cast(Message, work.report)

    @alone
    def model(self) -> Any:
        """Return the client's model: the parameters, with what it keeps for itself, as `Federation.model` does.

        Raises:
          ValueError: before any round, or if it is `lost`.
        """
        work = self._at_work()
        if work.shared is None:
            raise ValueError(
                f"Client {self.name!r} has lost what the server reckons with: it has no model in this round"
            )
        begun = work.begun or self._begun(work.shared)
        params, stats = params_of(begun), begun.walked.stats
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
            "waiting": [ticket for ticket, _ in journal.waiting],
            "heard": None if journal.heard is None else list(map(int, dataclasses.astuple(journal.heard))),
            "kept": journal.kept is not None,
            "specs": None if pair is None else [None if tree is None else Specs.of(tree).to_json() for tree in pair],
        }
        rows = {f"waiting/{index}": row for index, (_, row) in enumerate(journal.waiting)}
        rows |= {} if journal.kept is None else {"kept": journal.kept}
        write_checkpoint(
            folder, "client", about, {name: self._programs.saved(row) for name, row in rows.items() if row}
        )

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
        settled, tickets, heard = about["settled"], about["waiting"], about["heard"]
        for name, value in (("settled", [settled]), ("waiting", tickets), ("heard", heard or [0] * 4)):
            if not isinstance(value, list) or not all(map(_is_count, value)) or (name == "heard" and len(value) != 4):
                raise ValueError(f"{what} has {name}: {quote(about[name])}")
        if not isinstance(about["kept"], bool) or ((about["kept"] or tickets) and about["specs"] is None):
            raise ValueError(f"{what} has kept: {quote(about['kept'])}, of parameters {quote(about['specs'])}")
        call = None if heard is None else Call(heard[0], heard[1], heard[2], first=bool(heard[3]))
        journal: Journal[Rows] = Journal(None, settled, (), call)
        specs = self._specs_saved(about["specs"], what)
        if specs is not None:
            programs = client_programs(self.federation, specs)
            like = programs.saved_like()
            names = (["kept"] if about["kept"] else []) + [f"waiting/{index}" for index in range(len(tickets))]
            parts = found.tree({name: like for name in names if like})
            rows = {name: programs.restored(parts.get(name, {})) for name in names}
            journal.kept = rows.pop("kept", None)
            journal.waiting = tuple(zip(tickets, rows.values(), strict=True))
        self.journal, self._specs, self._work = journal, specs, None

    def _specs_saved(self, saved: Json, what: str) -> Specs | None:
        """Return the container of the parameters and of the model's state, as a checkpoint has their shapes."""
        if saved is None:
            return None
        if not isinstance(saved, list) or len(saved) != 2 or saved[0] is None:
            raise ValueError(f"{what} has parameters and a state of shapes {quote(saved)}")
        params, stats = (None if each is None else specs_from_json(each, what) for each in saved)
        return self._specs_of(cast(Specs, params), stats)

    def _at_work(self) -> Work:
        if self._work is None:
            raise ValueError(f"Client {self.name!r} has heard of no round: `begin` one with a message of the server")
        return self._work

    @property
    def _programs(self) -> ClientPrograms:
        return client_programs(self.federation, cast(Specs, self._specs))

    def _begun(self, shared: Shared) -> Begun:
        return self._programs.begin(shared, self.journal.kept)

    def _examples(self, examples: float | None) -> float:
        """Return how many examples there are."""
        if self.data is not None and examples is None:
            return float(self.data.largest)
        asked = self.federation.client.asks().end.union(*(module.asks().step for module in self.federation.uplink))
        shared = cast(Shared, self._at_work().shared)
        count = "examples" in asked or (self.federation.weighting == "examples" and shared.given.weights is None)
        if examples is None and count:
            raise TypeError(f"Client {self.name!r}: how many examples it has counts: `report(examples=...)`")
        number = 1.0 if examples is None else float(examples)
        if not 0 <= number < 1e12:
            raise ValueError(f"Client {self.name!r}: examples={examples!r} should be a number of at least 0")
        return number

    def _require_like(self, name: str, tree: PyTree, like: PyTree) -> None:
        if tree is not None:
            Specs.of(like).require_shapes(tree, f"Client {self.name!r}: what is given as {name}")

    def _say(
        self, kind: str, up: PyTree, examples: float, metrics: Mapping[str, Any], kept: Rows | None = None
    ) -> None:
        work = self._at_work()
        numbers = {name: float(value) for name, value in metrics.items()}
        about: dict[str, Json] = {
            **{name: work.about[name] for name in ("era", "id", "round")},
            "kind": kind,
            "from": self.name,
            "ticket": _UNSETTLED if kept is None else self.journal.report(kept),
            "examples": examples,
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
        for name in ("era", "id", "round", "client", "clients", "taken"):
            most = 2**31 if name in ("round", "client", "clients") else 2**53
            if not _is_count(about[name]) or about[name] >= most:
                raise ValueError(f"{what} has {name}={quote(about[name])}: expected an integer in [0, {most})")
        if about["client"] >= about["clients"]:
            raise ValueError(f"{what} says client {about['client']} of {about['clients']}: expected less")
        return about

    def _specs_within(self, message: Message, what: str) -> Specs:
        """Return the container of the parameters and of the model's state, from the first message."""
        size = sum(math.prod(array.shape) * array.dtype.itemsize for array in message.arrays.values())
        if len(message.arrays) > 3 * limits().leaves or size > 3 * limits().bytes:
            raise ValueError(
                f"{what} has {len(message.arrays)} arrays of {size} bytes: expected at most {3 * limits().leaves} and "
                f"{3 * limits().bytes}, which `set_limits` sets"
            )
        params = _specs_below(message, "initial/0") or _specs_below(message, "params")
        stats = _specs_below(message, "initial/1") or _specs_below(message, "stats")
        if params is None:
            raise ValueError(f"{what} has no parameters")
        return self._specs_of(params, stats)

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

    def _read(self, programs: ClientPrograms, message: Message, what: str) -> Down:
        has = {path.split("/", 1)[0] for path in message.arrays}
        down: Down = message.tree(programs.shapes.sent(has, last=message.about["kind"] == "round"), what)
        return down


def _is_count(value: Json) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _specs_below(message: Message, prefix: str) -> Specs | None:
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
