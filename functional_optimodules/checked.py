"""What an author's methods return, checked in the trace, always.

A slip (a state forgotten, a shape changed) is then an error that names the class and
shows the code to write, whoever calls the brick: the stateful side, an `Optimizer`
or a federated round. It costs nothing in a compiled program.
"""

from typing import Any

import jax
import jax.numpy as jnp

from functional_optimodules.types import PyTree
from functional_optimodules.wire.paths import show


def name_of(brick: object) -> str:
    """Return how an error names a brick."""
    return type(brick).__name__


def require_pair(brick: object, made: PyTree) -> tuple[Any, Any]:
    """Raise a `TypeError` if `update` returned anything but updates and a state."""
    if type(made) is not tuple or len(made) != 2:
        found = f"a tuple of {len(made)}" if type(made) is tuple else f"one {type(made).__name__}"
        raise TypeError(
            f"{name_of(brick)}.update returned {found}: expected two values, the new updates and the new state\n"
            "    wrong:  return updates\n"
            "    right:  return updates, state"
        )
    return made


def require_arrays(brick: object, state: PyTree) -> None:
    """Raise a `TypeError` if a state that `init` made is no pytree of arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"{name_of(brick)}.init returned {leaf!r} at {jax.tree_util.keystr(path) or 'its root'}: expected a "
                "`NamedTuple` of arrays and of trees shaped like the parameters\n"
                '    wrong:  return MyState("none yet")\n'
                "    right:  return MyState(zeros_wide(params))"
            )


_RIGHT = {
    "updates": "    wrong:  return jax.tree.leaves(updates), state\n"
    "    right:  return jax.tree.map(my_function, updates), state",
    "state": "    wrong:  return MyState(None)\n"
    "    right:  return state._replace(total=new_total.astype(state.total.dtype))",
}


def require_like(brick: object, method: str, what: str, new: PyTree, old: PyTree) -> None:
    """Raise a `TypeError` if a method changed the structure, a shape or a dtype of the updates or of the state."""
    leaves, structure = jax.tree.flatten(new)
    expected, old_structure = jax.tree.flatten(old)
    same: bool = structure == old_structure  # type: ignore[operator]
    if same and list(map(_spec, leaves)) == list(map(_spec, expected)):
        return
    before, after = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (old, new))
    at = jax.tree_util.keystr
    changed = [path for path in before.keys() & after.keys() if _spec(before[path]) != _spec(after[path])]
    if changed:
        path = min(changed, key=at)
        how = f"changed the {what} at {at(path) or 'its root'} from {_show(before[path])} to {_show(after[path])}"
    else:
        paths = sorted(at(path) or "its root" for path in before.keys() ^ after.keys())
        where = f", at {', '.join(paths)}" if paths else f" from {old_structure} to {structure}"
        how = f"changed the structure of the {what}{where}"
    code = _RIGHT[what] if method == "update" else _RIGHT["state"]
    raise TypeError(f"{name_of(brick)}.{method} {how}\n{code}")


def _spec(leaf: Any) -> Any:
    # What is no array of JAX's has the dtype that JAX would give it.
    spec = leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jax.eval_shape(jnp.asarray, leaf)
    return spec.shape, spec.dtype


def _show(leaf: Any) -> str:
    return show(leaf if hasattr(leaf, "dtype") else jax.eval_shape(jnp.asarray, leaf))
