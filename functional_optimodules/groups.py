"""Groups of parameters: which parameters other rules hold for, by their paths, and a tree in parts.

Assign(groups, paths and shapes): each parameter to the first group that matches it, or to none
Part(tree, group):                the tree, with nothing where a parameter is not the group's
Merge(parts):                     one tree again
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.brick import OptiModule, Regularizer
from functional_optimodules.config.fields import Configured, hyperparameter
from functional_optimodules.config.outside import quote
from functional_optimodules.descent import adapters, is_zero, scaled, through
from functional_optimodules.hyperparameters import labelled
from functional_optimodules.metrics import Told
from functional_optimodules.packing.policy import packed_as
from functional_optimodules.packing.tree import Packed, Packing, is_packed, unpack
from functional_optimodules.schedulers import Scheduler, as_scheduler
from functional_optimodules.types import Json, Params, PyTree, Updates
from functional_optimodules.wire.paths import Specs, matching, show, unwrapped

Named: TypeAlias = str | tuple[str, Mapping[str, Json]]
"""A plug-in by its name, or by its name and its configuration."""
Rate: TypeAlias = float | jax.Array | Scheduler | tuple[str, Mapping[str, Json]] | Callable[[jax.Array], jax.Array]
"""A learning rate or weight decay, in any of its forms."""
Own: TypeAlias = float | Scheduler | Callable[[jax.Array], jax.Array] | None
"""What a group has of these: `None` for the optimizer's."""


class Claim(NamedTuple):
    """Which parameters a group claims: all of it that decides so, and hashable whatever its rules are.

    Attributes:
      name: the group's.
      patterns: over paths, of which any may match.
      ndim: the rank of its parameters; any if `None`.
      min_size: the fewest elements that they have.
      max_size: the most; any number if `None`.
    """

    name: str
    patterns: tuple[str, ...]
    ndim: int | None
    min_size: int
    max_size: int | None

    def fits(self, spec: jax.ShapeDtypeStruct) -> bool:
        """Whether a parameter of that shape may be the group's."""
        most = spec.size if self.max_size is None else self.max_size
        return self.ndim in (None, spec.ndim) and self.min_size <= spec.size <= most

    def bounds(self) -> str:
        """Write what is asked of shapes."""
        asked = {"ndim": self.ndim, "min_size": self.min_size or None, "max_size": self.max_size}
        return ", ".join(f"{name}={value}" for name, value in asked.items() if value is not None)


class GroupState(NamedTuple):
    """State of a `Group`.

    Attributes:
      lrate: clock of its learning rate; `()` where it has the optimizer's.
      w_decay: clock of its weight decay, likewise.
      regularizers: state of each of its regularizers by name.
      modules: state of each of its modules by name.
    """

    lrate: PyTree
    w_decay: PyTree
    regularizers: dict[str, PyTree]
    modules: dict[str, PyTree]


@dataclasses.dataclass(frozen=True, repr=False)
class Group(Configured):
    """What is done otherwise for some parameters of an `Optimizer`.

    Its gradients have gone through the optimizer's own regularizers and modules when they
    come to the group's:

        updates = -(factor * lrate * modules(regularizers(grads, params)) + w_decay * params)

    Attributes:
      match: a glob pattern over paths, or several, of which any may match: `*` is what is within
        one segment, `**` any number of segments, as in `"*/bias"` and `"**/norm*/**"`.
      name: what its state, hyper-parameters and metrics are found under; its place in the
        list by default.
      ndim: the rank that its parameters have; any if `None`.
      min_size: the fewest elements that they have.
      max_size: the most; any number if `None`.
      lrate: its learning rate, in any form that `Optimizer` takes; the optimizer's if `None`.
      factor: what the learning rate is multiplied by.
      w_decay: its rate of decoupled weight decay; the optimizer's if `None`.
      regularizers: instances, names or `(name, config)` pairs, applied in order.
      modules: the same, of modules. None may exchange auxiliary variables.
      frozen: whether its parameters stay as they are: they have no state, and count in no norm.

    Raises:
      ValueError: if it is frozen and has rules, or a module exchanges auxiliary variables.
    """

    _owner: ClassVar[str] = "Group"
    match: str | tuple[str, ...] = "**"
    name: str = hyperparameter(default="", omit=True)
    ndim: int | None = hyperparameter(default=None, within="[0, inf)", omit=True)
    min_size: int = hyperparameter(default=0, within="[0, inf)", omit=True)
    max_size: int | None = hyperparameter(default=None, within="[0, inf)", omit=True)
    lrate: Own = hyperparameter(default=None, within="[0, inf)", omit=True)  # noqa: RUF009
    factor: float = hyperparameter(default=1.0, within="[0, inf)", omit=True)
    w_decay: Own = hyperparameter(default=None, within="[0, inf)", omit=True)  # noqa: RUF009
    regularizers: tuple[Regularizer, ...] = hyperparameter(default=(), omit=True)
    modules: tuple[OptiModule, ...] = hyperparameter(default=(), omit=True)
    frozen: bool = hyperparameter(default=False, omit=True)

    if TYPE_CHECKING:  # what is accepted is more than what is stored

        def __init__(
            self,
            match: str | Sequence[str] = "**",
            name: str = "",
            ndim: int | None = None,
            min_size: int = 0,
            max_size: int | None = None,
            lrate: Rate | None = None,
            factor: float = 1.0,
            w_decay: Rate | None = None,
            regularizers: Sequence[Regularizer | Named] = (),
            modules: Sequence[OptiModule | Named] = (),
            frozen: bool = False,
        ) -> None: ...

    def validate(self) -> None:
        if not self.match and not isinstance(self.match, str):  # as "" is the path of a lone array
            raise ValueError("Group: match=() should have a pattern")
        if "/" in self.name:
            raise ValueError(f"Group: name={quote(self.name)} should have no slash: it is one segment of a path")
        rules = [name for name, _ in self._told() if name in ("lrate", "factor", "w_decay", "regularizers", "modules")]
        if self.frozen and rules:
            raise ValueError(
                f"Group: match={quote(self.match)} is frozen, and has {rules[0]}={quote(getattr(self, rules[0]))}"
            )
        for module in self.modules:
            for name in module.channels():
                raise ValueError(
                    f"Group: match={quote(self.match)} has a module that exchanges the auxiliary variables {name!r}, "
                    "which are about all parameters: it belongs to the optimizer's own `modules`"
                )

    def init(self, params: Params) -> GroupState:
        """Make the state, for what is its own of the parameters."""
        states = [
            {label: brick.init(params) for label, brick in adapters(bricks).items()}
            for bricks in (self.regularizers, self.modules)
        ]
        return GroupState((), (), *states)._replace(**{name: rate.init() for name, rate in self._rates.items()})

    def update(
        self,
        updates: Updates,
        state: GroupState,
        params: Params,
        rates: tuple[jax.Array, jax.Array | None],
        known: dict[str, PyTree],
        told: Told,
    ) -> tuple[Updates, GroupState]:
        """Take a step on what is its own.

        Args:
          updates: what came through the optimizer's own modules.
          state: the state.
          params: the parameters, or `None`.
          rates: the optimizer's learning rate, and that of its decay, or `None` where it has none.
          known: what bricks may ask for.
          told: takes what is said of the step.

        Returns:
          What is to be added to the parameters, and the new state.
        """
        own = {name: rate.value(getattr(state, name)) for name, rate in self._rates.items()}
        lrate, w_decay = own.get("lrate", rates[0]), own.get("w_decay", rates[1])
        if self.scales:
            lrate = lrate * jnp.asarray(self.factor).astype(lrate.dtype)
        chain, states = (self.regularizers, self.modules), (state.regularizers, state.modules)
        updates, *new = through(chain, states, updates, params, lrate, known, told)
        updates = scaled(updates, params, lrate, None if is_zero(self.w_decay) else w_decay)
        told.say("lrate", lambda: lrate)
        return updates, self.moved(GroupState(state.lrate, state.w_decay, *new), "advance")

    def moved(self, state: GroupState, how: Literal["advance", "begin_round"]) -> GroupState:
        """Return the state with its clocks after a step, or as a round begins."""
        return state._replace(**{name: getattr(rate, how)(getattr(state, name)) for name, rate in self._rates.items()})

    @property
    def _rates(self) -> dict[str, Scheduler]:
        rates = {"lrate": self.lrate, "w_decay": self.w_decay}
        return {name: as_scheduler(rate) for name, rate in rates.items() if rate is not None}

    @property
    def scales(self) -> bool:
        """Whether the learning rate has a factor: another one than the number 1."""
        return not (isinstance(self.factor, float) and self.factor == 1)

    def claim(self, name: str) -> Claim:
        """Return what it claims, under the name that it has among others."""
        patterns = (self.match,) if isinstance(self.match, str) else self.match
        return Claim(name, patterns, self.ndim, self.min_size, self.max_size)


def require_distinct(groups: Sequence[Group]) -> None:
    """Raise a `ValueError` if two groups have one name, or claim one parameter by its exact path."""
    named: dict[str, int] = {}
    exact: dict[tuple[str, str], int] = {}
    for place, group in enumerate(groups):
        claim = group.claim(group.name or str(place))
        if (other := named.setdefault(claim.name, place)) != place:
            raise ValueError(
                f"Optimizer: groups {other} and {place} are both named {quote(claim.name)}: use each name once"
            )
        for pattern in claim.patterns:
            other = exact.setdefault((pattern, claim.bounds()), place)
            if other != place and not set(pattern) & set("*?["):
                raise ValueError(f"Optimizer: groups {other} and {place} both claim the parameter {quote(pattern)}")


def assign(groups: Sequence[Group], specs: Specs) -> tuple[str | None, ...]:
    """Return the name of the group of each parameter, the first that matches; `None` where none does.

    Raises:
      ValueError: if there are parameters, and a pattern matches no path, or a group has no parameter,
        naming near paths.
    """
    return _assigned(_claims(groups), specs)


def _claims(groups: Sequence[Group]) -> tuple[Claim, ...]:
    return tuple(group.claim(name) for name, group in labelled(groups).items())


@functools.lru_cache(maxsize=512)
def _assigned(claims: tuple[Claim, ...], specs: Specs) -> tuple[str | None, ...]:
    members: dict[str, str] = {}
    for claim in claims if specs.paths else ():  # with a tree of no parameters, optax looks for them in states
        name = claim.name
        paths = matching(claim.patterns, specs.paths, f"Optimizer: group {name!r}")
        mine = [path for path in specs.paths if path in paths and claim.fits(specs.by_path[path])]
        if not mine:
            found = ", ".join(f"{path!r} is {show(specs.by_path[path])}" for path in sorted(paths)[:3])
            raise ValueError(f"Optimizer: group {name!r} has {claim.bounds()}, and what it matches has not: {found}")
        new = {path: name for path in mine if path not in members}
        if not new:
            taken = f"{mine[0]!r} is of group {members[mine[0]]!r}"
            raise ValueError(f"Optimizer: group {name!r} has no parameter, as others before it match all: {taken}")
        members |= new
    return tuple(members.get(path) for path in specs.paths)


class View:
    """How trees of some structure are taken in: packed as a state is, parted into groups, without what is frozen.

    Args:
      groups: the groups.
      packing: how the state is packed, where the trees are not.
      like: a tree of that structure, or what is shaped like it.
    """

    def __init__(self, groups: tuple[Group, ...], packing: Packing | None, like: PyTree) -> None:
        self._groups, self._packing = groups, packing
        self._frozen = {label for label, group in labelled(groups).items() if group.frozen}
        if not groups or like is None:
            return
        whole = self.whole(like)
        self._packed = whole.packing if is_packed(whole) else None
        if is_packed(whole):
            packing = whole.packing
            members = assign(groups, packing.specs)
            self._members = tuple(members[at] for at in (*(group[0] for group in packing.groups), *packing.large))
        else:
            self._treedef: Any = jax.tree.structure(whole)
            self._members = assign(groups, Specs.of(whole))

    def whole(self, tree: PyTree) -> Any:
        """Return a tree in the form that the rules are for; `None` for none."""
        if tree is None:
            return None
        tree = tree if self._packing is None else packed_as(unwrapped(tree), self._packing)
        return unpack(tree) if is_packed(tree) and _mixes(_claims(self._groups), tree.packing) else tree

    def thawed(self, whole: PyTree) -> Any:
        """Return it with nothing where a parameter is frozen."""
        return self._part(whole, lambda label: label not in self._frozen) if self._frozen else whole

    def of(self, label: str | None, whole: PyTree) -> Any:
        """Return it with nothing where a parameter is not of a group; `None` is for those of none."""
        return self._part(whole, lambda member: member == label)

    def merged(self, parts: Mapping[str | None, PyTree]) -> Any:
        """Return one tree, with what is each group's from the part by its name."""
        nodes = {label: self._nodes(part) for label, part in parts.items()}
        return self._tree([nodes[label][at] for at, label in enumerate(self._members)])

    def given(self, made: PyTree, still: PyTree, like: PyTree) -> Any:
        """Return what was made, with `still` for what is frozen, in the form of the tree that was taken in."""
        if self._frozen:
            made = self.merged({label: still if label in self._frozen else made for label in self._members})
        if is_packed(like):
            return packed_as(made, like.packing)
        made = unpack(made)
        # It is packed without the wrappers that nnx puts around parameters.
        return made if self._packing is None else jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(made))

    def _part(self, whole: PyTree, keep: Callable[[str | None], bool]) -> Any:
        if whole is None:
            return None
        nodes = zip(self._nodes(whole), self._members, strict=True)
        return self._tree([node if keep(member) else optax.MaskedNode() for node, member in nodes])

    def _nodes(self, tree: PyTree) -> list[PyTree]:
        return list(tree.parts) if is_packed(tree) else self._treedef.flatten_up_to(tree)

    def _tree(self, nodes: list[PyTree]) -> PyTree:
        return jax.tree.unflatten(self._treedef, nodes) if self._packed is None else Packed(self._packed, tuple(nodes))


@functools.lru_cache(maxsize=512)
def _mixes(claims: tuple[Claim, ...], packing: Packing) -> bool:
    """Whether a buffer has parameters of several groups."""
    members = _assigned(claims, packing.specs)
    return any(len({members[at] for at in group}) > 1 for group in packing.groups)
