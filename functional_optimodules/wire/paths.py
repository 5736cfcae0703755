"""Parameter trees by path: what a state or a message needs to know of the model.

A path is a leaf's key path joined by `/`, as in `encoder/0/kernel`. Two
containers with the same paths hold the same parameters, be they dicts, tuples,
dataclasses or `nnx.State`.
"""

import functools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, PyTreeDef

from functional_optimodules.config.fields import nearest
from functional_optimodules.config.outside import quote
from functional_optimodules.types import Json, Leaf, PyTree
from functional_optimodules.wire.limits import limits

Spec = jax.ShapeDtypeStruct
_MOST_SHOWN = 20


class ParamsNeeded(ValueError):
    """The parameters' values are needed, and were not given."""


class PathTree(dict[str, PyTree]):
    """A flat dict keyed by path: the container of parameters whose own is not known yet.

    It is a pytree of its own type, so that the parameter-shaped parts of a
    state made over it can be told from the state's other parts.
    """


jax.tree_util.register_pytree_with_keys(
    PathTree,
    lambda tree: ([(DictKey(path), tree[path]) for path in sorted(tree)], tuple(sorted(tree))),
    lambda paths, leaves: PathTree(zip(paths, leaves, strict=True)),
)


def is_path_tree(node: PyTree) -> bool:
    """Whether a node is a `PathTree`; an `is_leaf` for `jax.tree` functions."""
    return isinstance(node, PathTree)


def keystr(path: Iterable[object]) -> str:
    """Write a key path as `encoder/0/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def unwrapped(tree: PyTree) -> PyTree:
    """Return a tree without the wrappers that `flax.nnx` puts around leaves."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:  # a tree can only hold such if it was imported
        return tree
    is_wrapper: Callable[[object], bool] = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda node: node.get_raw_value() if is_wrapper(node) else node, tree, is_leaf=is_wrapper)


def leaf_paths(tree: PyTree) -> list[str]:
    """Return the path of each leaf, in the order of `jax.tree.leaves`.

    The wrapper that `flax.nnx.State` puts around its leaves is no part of a path.

    Raises:
      ValueError: if two paths would be written alike.
    """
    paths = [keystr(path) for path, _ in jax.tree.leaves_with_path(unwrapped(tree))]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two parameters have the path {twice!r}: rename one, for messages to tell them apart")
    return paths


def by_path(tree: PyTree) -> PathTree:
    """Return the leaves of a tree, keyed by path."""
    return PathTree(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def matching(patterns: Iterable[str], paths: Iterable[str], what: str, kind: str = "path") -> frozenset[str]:
    """Return the paths that any of some glob patterns match.

    `*` and `?` stand for what is within one segment of a path, `[...]` for one character, and
    `**` for any number of segments: `*/bias`, `**/norm*/**`.

    Raises:
      ValueError: if a pattern matches no path, naming near ones, or has more than 16 stars.
    """
    known, found = list(paths), set[str]()
    for pattern in patterns:
        if pattern.count("*") > _MOST_STARS:  # it would be compared with a path in more ways than there is time for
            raise ValueError(f"{what}: the pattern {quote(pattern)} has more than {_MOST_STARS} stars")
        try:
            regex = re.compile("".join(_regex(token) for token in _TOKEN.findall(pattern)))
        except re.error as error:
            raise ValueError(f"{what}: the pattern {pattern!r} cannot be read: {error.msg}") from None
        matched = [path for path in known if regex.fullmatch(path)]
        if not matched:
            raise ValueError(f"{what}: the pattern {pattern!r} matches no {kind}: {nearest(pattern, known)}")
        found.update(matched)
    return frozenset(found)


_MOST_STARS = 16
_TOKEN = re.compile(r"\*\*/|/\*\*|\*\*|\[[^]/]+\]|.")
# `**` may stand for nothing, and then takes a slash with it.
_GLOBS = {"**/": "(?:[^/]+/)*", "/**": "(?:/[^/]+)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _regex(token: str) -> str:
    if token in _GLOBS or not token[1:]:
        return _GLOBS.get(token) or re.escape(token)
    others = token[1] == "!"
    characters = re.sub(r"[\\^\[&~|]", r"\\\g<0>", token[1 + others : -1])
    return f"[^/{characters}]" if others else f"[{characters}]"


class Specs:
    """The parameters' container, and the path, shape and dtype of each leaf. Hashable.

    Attributes:
      treedef: the container.
      paths: the path of each leaf, in the container's order.
      leaves: the shape and dtype of each leaf, in the same order.
    """

    def __init__(self, treedef: PyTreeDef, paths: Iterable[str], leaves: Iterable[Spec]) -> None:
        self.treedef = treedef
        self.paths = tuple(paths)
        self.leaves = tuple(Spec(leaf.shape, leaf.dtype) for leaf in leaves)
        self._key = (treedef, self.paths, self.leaves)
        self._hash = hash(self._key)

    @classmethod
    def of(cls, tree: PyTree) -> "Specs":
        """Return the specs of a tree of arrays, numbers or `ShapeDtypeStruct`s."""
        leaves, treedef = jax.tree.flatten(tree)
        paths = leaf_paths(tree)
        return cls(treedef, paths, [_spec_of(leaf, path) for path, leaf in zip(paths, leaves, strict=True)])

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Specs) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    @property
    def by_path(self) -> PathTree:
        """The specs of the leaves, keyed by path."""
        return PathTree(zip(self.paths, self.leaves, strict=True))

    @functools.cached_property
    def hung(self) -> bool:
        """Whether the container is the parameters' own, and not a `PathTree`."""
        return self.treedef != jax.tree.structure(self.by_path)

    def flat(self) -> "Specs":
        """Return the same parameters in a `PathTree`."""
        return Specs.of(self.by_path)

    def tree(self, by_path: Mapping[str, PyTree]) -> PyTree:
        """Put leaves keyed by path into the container."""
        return jax.tree.unflatten(self.treedef, [by_path[path] for path in self.paths])

    def leaves_of(self, tree: PyTree) -> list[PyTree]:
        """Return the leaves of a tree in this container, in the order of `paths`."""
        return self.treedef.flatten_up_to(tree)

    @functools.cached_property
    def _names(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        # NumPy takes longer to name a dtype than all else here.
        leaves = zip(self.paths, self.leaves, strict=True)
        return {path: (str(leaf.dtype), leaf.shape) for path, leaf in sorted(leaves)}

    def to_json(self) -> dict[str, PyTree]:
        """Write the specs as `{path: {"dtype": ..., "shape": [...]}}`."""
        return {path: {"dtype": dtype, "shape": list(shape)} for path, (dtype, shape) in self._names.items()}

    def require_same(self, other: "Specs", what: str) -> None:
        """Raise a `ValueError` naming the first leaf in which the other's parameters differ."""
        for difference in self.differences(other):
            raise ValueError(f"{what} {difference}")

    def require_all_same(self, other: "Specs", what: str) -> None:
        """Raise a `ValueError` naming the leaves in which the other's parameters differ."""
        if found := list(self.differences(other)):
            more = f"; and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
            raise ValueError(f"{what} {'; '.join(found[:_MOST_SHOWN])}{more}")

    def differences(self, other: "Specs") -> Iterator[str]:
        """Yield what differs in the other's parameters, leaf by leaf."""
        if other is self:
            return
        mine, theirs = self.by_path, other.by_path
        for path in sorted(mine.keys() | theirs.keys()):
            if path not in theirs:
                yield f"lacks the leaf {path!r}: expected {show(mine[path])}"
            elif path not in mine:
                yield f"has a leaf {path!r} ({show(theirs[path])}) where none was expected"
            elif show(mine[path]) != show(theirs[path]):
                yield f"has {show(theirs[path])} at {path!r}: expected {show(mine[path])}"

    def require_shapes(self, tree: PyTree, what: str) -> None:
        """Raise a `ValueError` naming the first leaf whose path or shape is not as here; its dtype may differ."""
        found, mine = Specs.of(tree), self.by_path
        leaves = [
            Spec(leaf.shape, (mine if path in mine else found.by_path)[path].dtype)
            for path, leaf in found.by_path.items()
        ]
        self.require_same(Specs(found.treedef, found.paths, leaves), what)

    def require_tree(self, tree: PyTree, what: str) -> None:
        """Raise a `ValueError` if a tree's container or leaves differ from these specs."""
        leaves, treedef = jax.tree.flatten(tree)
        alike = treedef == self.treedef
        pairs = list(zip(leaves, self.leaves, strict=True)) if alike else []
        if alike and all(leaf.shape == spec.shape and leaf.dtype == spec.dtype for leaf, spec in pairs):
            return
        try:
            self.require_same(Specs.of(tree), what)
        except ValueError as error:
            batch = pairs[0][0].shape[:1] if pairs else ()
            if not batch or any(leaf.shape != (*batch, *spec.shape) for leaf, spec in pairs):
                raise
            raise ValueError(
                f"{error}. Every leaf has a leading axis of {batch[0]}: of gradients of each example give the mean, or "
                "map the pure `update` over them by `jax.vmap`"
            ) from None
        raise ValueError(f"{what} is in another container than before: {treedef}, expected {self.treedef}")


def _spec_of(leaf: Any, path: str) -> Any:
    if isinstance(leaf, Spec | jax.Array):
        return leaf
    # NumPy arrays and Python numbers take the dtype that JAX would give them.
    try:
        return jax.eval_shape(jnp.asarray, leaf)
    except TypeError:
        raise TypeError(f"parameters and gradients are trees of arrays: at {path!r} there is {quote(leaf)}") from None


def require_name(name: Json, what: str) -> None:
    """Raise a `ValueError` for a name from outside that is no string, or longer than is taken."""
    if not isinstance(name, str) or len(name) > limits().name:
        raise ValueError(f"{what} should be a string of at most {limits().name} characters, not {quote(name)}")


def show(spec: Leaf) -> str:
    """Write a shape and dtype as `float32[3,4]`."""
    return f"{spec.dtype}[{','.join(map(str, spec.shape))}]"


def specs_from_json(payload: Json, what: str, known: Specs | None = None, most: float = math.inf) -> Specs:
    """Read what `Specs.to_json` wrote, over a `PathTree`.

    Args:
      payload: what was written.
      what: how errors name it.
      known: the specs that it should be of, if there are any: they are returned where it is.
      most: how many parameters are taken, beyond as many as are known.

    Raises:
      ValueError: if it is malformed, or above what is taken; the error names the path.
    """
    if not isinstance(payload, Mapping):
        raise ValueError(f"{what}: 'params' should map each path to a dtype and a shape, not {quote(payload)}")
    if known is not None and payload == known.to_json():
        return known
    if len(payload) > most and (known is None or len(payload) > len(known.paths)):
        raise ValueError(f"{what} speaks of {len(payload)} parameters, where at most {most} are taken: see `Limits`")
    leaves = PathTree()
    for path, spec in payload.items():
        require_name(path, f"{what}: a path in 'params'")
        if not isinstance(spec, Mapping) or set(spec) != {"dtype", "shape"}:
            raise ValueError(f"{what}: 'params' at {path!r} should have a dtype and a shape, not {quote(spec)}")
        at = f"{what} at {path!r}"
        leaves[path] = Spec(read_shape(spec["shape"], at), read_dtype(spec["dtype"], at))
    return Specs.of(leaves)


_MOST_AXES = 64


def read_shape(shape: Json, what: str) -> tuple[int, ...]:
    """Check a shape read from JSON."""
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{what}: shape {quote(shape)} should be a list of non-negative integers")
    if len(shape) > _MOST_AXES:
        raise ValueError(f"{what}: a shape of {len(shape)} axes, where NumPy has at most {_MOST_AXES}")
    if math.prod(max(size, 1) for size in shape) > 2**40:
        raise ValueError(f"{what}: shape {quote(shape)} is larger than any array that could be meant")
    return tuple(shape)


# NumPy would parse any other string as a description of records.
_DTYPES = {one.dtype.name: one.dtype for one in vars(jnp).values() if isinstance(getattr(one, "dtype", 0), np.dtype)}


def read_dtype(name: Json, what: str) -> Any:
    """Check the name of a dtype read from JSON."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{what}: {quote(name)} is no dtype that JAX has")
    dtype = _DTYPES[name]
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{what}: {name} needs JAX's 64-bit mode: set jax_enable_x64")
    return dtype
