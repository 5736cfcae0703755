"""What is learned, and from what: what the function returns that an experiment's file names.

    [problem]
    factory = "my_module:make"
    width = 32

calls `make(width=32)`, and with `seed` and `folder`, that of the experiment's file,
where it has arguments of these names. The module is looked for in that folder first.
"""

import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from functional_optimodules.config.fields import nearest
from functional_optimodules.federated import FederatedData, Federation, StagedData
from functional_optimodules.federated.loss import LossFn
from functional_optimodules.federated.models import ModelLoss
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.types import Json, Params, PyTree


class Problem(NamedTuple):
    """What there is to learn: what a factory returns.

    Attributes:
      params: the parameters, a pytree of arrays; or an `nnx.Module`; or, with `module`,
        the variables of a linen module.
      loss: as `Federation` takes it, or `Federation.from_nnx` or `from_linen` where there
        is a model. One that is a function of its module, rather than made anew by each
        call of the factory, is compiled once for all seeds.
      data: the clients' examples: `FederatedData`, or for each client a pytree of arrays
        with its examples in front; or `StagedData`, of which no more than those who take
        part in `save_every` rounds are on the device.
      test: examples that no client has, a pytree of arrays with these in front; `None`
        for none.
      evaluate: `(params) -> metrics`, or `(params, test) -> metrics` where there are such
        examples, called after each round, with the model where it has a state. Without
        it, the history has the loss and its metrics on the test examples, as
        `test_loss` and so on.
      module: the linen module.
      stats: the state of a model whose loss takes and returns it.
    """

    params: Any
    loss: Callable[..., PyTree]
    data: FederatedData | StagedData | Sequence[PyTree]
    test: PyTree = None
    evaluate: Callable[..., Mapping[str, jax.Array]] | None = None
    module: Any = None
    stats: PyTree = None


class Arrays(NamedTuple):
    """The arrays of a problem.

    Attributes:
      params: what is trained.
      stats: the other state of the model; `None` without.
      data: the clients' examples, `FederatedData` or `StagedData`.
      test: those that no client has.
    """

    params: Params
    stats: PyTree
    data: Any
    test: PyTree


class Code(NamedTuple):
    """The functions of a problem, which a compiled program depends on.

    Attributes:
      loss_fn: as `Federation` has it.
      eval_fn: likewise.
      evaluate: the problem's.
    """

    loss_fn: LossFn
    eval_fn: LossFn | None
    evaluate: Callable[..., Mapping[str, jax.Array]] | None


def make_problem(table: Mapping[str, Json], seed: int, folder: Path) -> Problem:
    """Call the factory that a table `[problem]` names.

    Args:
      table: `factory`, and the arguments by name.
      seed: passed on, if the factory takes it.
      folder: likewise; modules are looked for in it first.

    Raises:
      KeyError: if there is no such function, or it takes other arguments.
      ValueError: if the name is malformed, or the factory, or its module, raises: with
        where in its code.
      TypeError: if what it returns is no problem.
    """
    name = str(table["factory"])
    factory = _find(name, folder)
    known = {"seed": seed, "folder": folder}
    parameters = inspect.signature(factory).parameters
    given = {key: value for key, value in table.items() if key != "factory"}
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        for key in given:
            if key not in parameters:
                raise KeyError(f"[problem]: {name} has no argument {key!r}: {nearest(key, parameters)}")
    given |= {key: value for key, value in known.items() if key in parameters and key not in given}
    for key, each in parameters.items():
        named = each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        if named and each.default is each.empty and key not in given:
            raise KeyError(f"[problem]: {name} needs a value for {key!r}")
    problem = _calling(f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})", factory, **given)
    _check(problem, f"[problem]: {name}, at {_place(factory)}, returned")
    return problem


BUILT_IN = {name: f"functional_optimodules.experiments.builtin:{name}" for name in ("digits", "npz")}
"""The factories that have a name of their own."""


def import_factory(name: str, folder: Path) -> tuple[ModuleType, str]:
    """Import the module that a factory is in, which may declare plug-ins: return it, and the function's name.

    Args:
      name: `"module:function"`, or one of `BUILT_IN`.
      folder: where the module is looked for first.

    Raises:
      KeyError: if there is no such module.
      ValueError: if the name is malformed, or the module raises: with where in its code.
    """
    module, colon, function = BUILT_IN.get(name, name).partition(":")
    if not (module and colon and function):
        raise ValueError(
            f"[problem]: factory={name!r} should be 'module:function', or one of {', '.join(map(repr, BUILT_IN))}"
        )
    sys.path.insert(0, str(folder.resolve()))
    try:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise KeyError(f"[problem]: factory={name!r}: there is no module {module!r}, in {folder} or installed")
        return _calling(f"the import of {module}", importlib.import_module, module), function
    finally:
        sys.path.remove(str(folder.resolve()))


def _find(name: str, folder: Path) -> Callable[..., Problem]:
    found, function = import_factory(name, folder)
    factory = getattr(found, function, None)
    if not callable(factory):
        there = [key for key, value in vars(found).items() if inspect.isfunction(value)]
        raise KeyError(f"[problem]: {found.__file__} has no function {function!r}: {nearest(function, there)}")
    return factory


def _calling(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call what a user wrote: an error shows where in it."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        own = [frame for frame in frames if "importlib" not in frame.filename] or frames
        where = "".join(traceback.format_list(own)).rstrip()
        raise ValueError(f"[problem]: {what} raised {type(error).__name__}: {error}\n{where}") from error


def _place(factory: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(factory), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(factory)


def _check(problem: Any, returned: str) -> None:
    if not isinstance(problem, Problem):
        raise TypeError(f"{returned} {type(problem).__name__}: expected functional_optimodules.experiments.Problem")
    for field, optional in (("loss", False), ("evaluate", True)):
        value = getattr(problem, field)
        if not callable(value) and not (optional and value is None):
            raise TypeError(f"{returned} {field}={value!r}: expected a function")
    if isinstance(problem.data, str) or not isinstance(problem.data, FederatedData | StagedData | Sequence):
        raise TypeError(
            f"{returned} data of type {type(problem.data).__name__}: expected FederatedData, or a "
            "list of clients' examples, or StagedData"
        )
    if problem.params is None:
        raise TypeError(f"{returned} params=None: expected arrays, or a Flax model")
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(problem.test)}
    if problem.test is not None and (len(counts) != 1 or counts & {(), (0,)}):
        shapes = [list(np.shape(leaf)) for leaf in jax.tree.leaves(problem.test)]
        raise TypeError(f"{returned} test examples of shapes {shapes}: expected arrays with as many examples in front")


def code_and_arrays(problem: Problem, mesh: Mesh | None) -> tuple[Code, Arrays]:
    """Return a problem's functions and its arrays, as a federation takes them; over a mesh, if there is one.

    Raises:
      TypeError: for a module that is none of Flax's, or what is no array among the parameters,
        the model's state and the test examples.
      ValueError: if the clients' examples do not go together.
    """
    made: Callable[..., Federation] = functools.partial(Federation, problem.loss)
    if problem.module is not None:
        made = functools.partial(Federation.from_linen, problem.module, problem.loss)
    elif (nnx := sys.modules.get("flax.nnx")) is not None and isinstance(problem.params, nnx.Module):
        made = functools.partial(Federation.from_nnx, problem.params, problem.loss)
    federation = made(Optimizer(0.0))
    params, stats = problem.params, problem.stats
    if isinstance(federation.loss_fn, ModelLoss):
        params, stats = federation.loss_fn.taken_apart(params)
    data = problem.data
    if not isinstance(data, FederatedData | StagedData):
        data = FederatedData.from_clients(data, mesh)
    params, stats, test = (
        jax.tree_util.tree_map_with_path(functools.partial(_array, name), tree)
        for name, tree in (("params", params), ("stats", stats), ("test", problem.test))
    )
    arrays = Arrays(params, stats, data, test)
    return Code(federation.loss_fn, federation.eval_fn, problem.evaluate), arrays


def _array(field: str, path: Any, leaf: Any) -> jax.Array:
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(f"[problem]: {field}{jax.tree_util.keystr(path)} is no array: {error}") from None
