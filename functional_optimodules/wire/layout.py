"""Trees and states as JSON: which parts of a state are shaped like the parameters, and where each part is."""

from collections.abc import Callable, Iterator, Mapping

import jax
from jax.tree_util import PyTreeDef

from functional_optimodules.config.fields import require_keys
from functional_optimodules.config.outside import quote
from functional_optimodules.types import Json, PyTree
from functional_optimodules.wire.arrays import decode_like, encode_array, with_words
from functional_optimodules.wire.paths import Specs, is_path_tree, keystr


def encode_tree(tree: PyTree, specs: Specs) -> dict[str, Json]:
    """Write a tree that has the parameters' container as `{path: array}`.

    What stands for a parameter may be several arrays, or none: those of optax's
    `sm3`, or of masked parameters. It is then a mapping itself.
    """
    return dict(sorted(zip(specs.paths, map(_encode_node, specs.leaves_of(tree)), strict=True)))


def _encode_node(node: PyTree) -> dict[str, Json]:
    if jax.tree_util.all_leaves([node]):
        return encode_array(node)
    return {keystr(path): encode_array(leaf) for path, leaf in jax.tree.leaves_with_path(node)}


def decode_tree(payload: Json, specs: Specs, read: Callable[[str, Json, str], PyTree], what: str) -> PyTree:
    """Read what `encode_tree` wrote into the parameters' container.

    Args:
      payload: the JSON values.
      specs: the parameters', whose paths are those of the tree.
      read: makes the leaf of a path, a payload and a name for errors.
      what: how errors name the tree.

    Raises:
      ValueError: if a path is missing or unknown, or an array is malformed.
    """
    if not isinstance(payload, Mapping):
        raise ValueError(f"{what} should map each parameter's path to an array, not be {type(payload).__name__}")
    for path in sorted(set(specs.paths) ^ set(payload)):
        fault = "lacks the leaf" if path in specs.paths else "has an unknown leaf"
        raise ValueError(f"{what} {fault} {quote(path)}")
    return specs.tree({path: read(path, payload[path], f"{what} at {path!r}") for path in specs.paths})


def _decode_node(payload: Json, like: PyTree, what: str) -> PyTree:
    if jax.tree_util.all_leaves([like]):
        return decode_like(payload, like, what)
    leaves = {keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(like)}
    if not isinstance(payload, Mapping) or payload.keys() != leaves.keys():
        raise ValueError(f"{what} should hold the arrays {list(leaves)}")
    arrays = [decode_like(payload[name], leaf, f"{what}/{name}") for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


class Layout:
    """Which parts of a state are shaped like the parameters, and where each part is.

    Args:
      skeleton: the state's shapes, made over a `PathTree` of the parameters.
    """

    def __init__(self, skeleton: PyTree) -> None:
        self.treedef: PyTreeDef = jax.tree.structure(skeleton, is_leaf=is_path_tree)
        self.parts = {keystr(path): part for path, part in jax.tree.leaves_with_path(skeleton, is_leaf=is_path_tree)}

    def split(self, state: PyTree) -> Iterator[tuple[str, PyTree, PyTree]]:
        """Yield the name, the shapes and the value of each part of a state."""
        return zip(self.parts, self.parts.values(), self.treedef.flatten_up_to(state), strict=True)

    def bytes_by_path(self) -> tuple[dict[str, int], int]:
        """Return how many bytes of a state belong to each parameter by its path, and how many to none."""
        found: dict[str, int] = {}
        others = 0
        for part in self.parts.values():
            if not is_path_tree(part):
                others += _bytes(part)
                continue
            for path, node in part.items():
                found[path] = found.get(path, 0) + sum(map(_bytes, jax.tree.leaves(node)))
        return found, others

    def encode(self, state: PyTree, specs: Specs) -> dict[str, Json]:
        """Write a state as `{part: array or {path: array}}`."""
        return {
            name: encode_tree(value, specs) if is_path_tree(part) else encode_array(value)
            for name, part, value in self.split(state)
        }

    def decode(self, payload: Json, specs: Specs, owner: str) -> PyTree:
        """Read what `encode` wrote, over the specs' container.

        Raises:
          KeyError: if a part is missing or unknown.
          ValueError: if a part is not as expected.
        """
        if not isinstance(payload, Mapping):
            raise ValueError(f"{owner}: 'variables' should be a mapping, not {quote(payload)}")
        payload = with_words(payload, self.parts)
        require_keys(payload, self.parts, f"{owner}: the state", "variable")
        return jax.tree.unflatten(self.treedef, [self._decode(payload, specs, name, owner) for name in self.parts])

    def _decode(self, payload: Mapping[str, Json], specs: Specs, name: str, owner: str) -> PyTree:
        part, what = self.parts[name], f"{owner}: variable {name!r}"
        if is_path_tree(part):
            return decode_tree(payload[name], specs, lambda path, array, at: _decode_node(array, part[path], at), what)
        return decode_like(payload[name], part, what)

    def rehang(self, state: PyTree, old: Specs, new: Specs) -> PyTree:
        """Move a state from one container of the same parameters to another."""
        return self.map_shaped(lambda tree: new.tree(dict(zip(old.paths, old.leaves_of(tree), strict=True))), state)

    def map_shaped(self, function: Callable[[PyTree], PyTree], state: PyTree) -> PyTree:
        """Apply a function to each part of a state that is shaped like the parameters."""
        parts = [function(value) if is_path_tree(part) else value for _, part, value in self.split(state)]
        return jax.tree.unflatten(self.treedef, parts)


def _bytes(spec: jax.ShapeDtypeStruct) -> int:
    return spec.size * spec.dtype.itemsize
