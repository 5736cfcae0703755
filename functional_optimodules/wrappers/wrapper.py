"""Wrappers: the contract of plug-ins around the whole step of an `Optimizer`.

    Init(params) -> state;  Inside(params) -> params;  Keep(inner) -> inner
    Step(step, updates, state, inner, params) -> updates, state, inner
    Eval(state, params) -> params;  Check(state)

A module makes updates of gradients, and the rate is none of its business. A wrapper is
given the step as a function, rate and decay included: it may take it or leave it, give
it other parameters, and see what becomes of these.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeAlias

import jax

from functional_optimodules.config.plugin import Plugin
from functional_optimodules.contract import named
from functional_optimodules.stateful.facade import CONFIG
from functional_optimodules.types import Params, PyTree, State, Updates
from functional_optimodules.wire.paths import keystr, show

Step: TypeAlias = Callable[[Updates, PyTree, Params], tuple[Updates, PyTree]]
"""What is wrapped, `(updates, inner, params) -> (updates, inner)`: from gradients to what parameters are changed by."""


class Wrapper(Plugin, Generic[State], kind="wrapper"):
    """A plug-in around the whole step of an `Optimizer`: of its regularizers, modules, rate and decay.

    Its methods are pure. The trees that it is given may be packed, and may lack parameters that
    are frozen: it treats elements alike, by `jax.tree.map`, or goes through `map_parameters`.
    """

    _final: ClassVar[frozenset[str]] = CONFIG
    _asked: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._asked = named(cls.around)

    @abc.abstractmethod
    def init(self, params: Params) -> State:
        """Make the state: a `NamedTuple` of arrays and trees shaped like the parameters, which shares no buffer."""

    @abc.abstractmethod
    def around(
        self, step: Step, updates: Updates, state: State, inner: PyTree, params: Params, **known: jax.Array
    ) -> tuple[Updates, State, PyTree]:
        """Take a step, or none.

        Args:
          step: what is inside, as `step(updates, inner, params)`: it turns gradients into what
            is to be added to the parameters, in the gradients' dtypes.
          updates: the gradients.
          state: what `init` or the last step returned.
          inner: the state of what is inside.
          params: the parameters, or `None` where they were not given.
          **known: `lrate`, the learning rate of the step that would be taken, a float32 scalar:
            keyword-only and without a default where it is needed, `*, lrate, **known`.

        Returns:
          What is to be added to the parameters, in the dtypes of `updates`, the new state and
          the new state of what is inside.
        """

    def inside(self, params: Params) -> Params:
        """Return parameters in the dtypes in which `around` gives them to what is inside: these by default.

        Of them the state of what is inside is made, and with them its rounds begin.
        """
        return params

    def keep(self, inner: PyTree) -> PyTree:
        """Return a new state of what is inside in the form in which it is kept between steps: unchanged by default."""
        return inner

    def begin_round(self, state: State, params: Params = None) -> State:
        """Return the state at the start of a round: unchanged by default."""
        return state

    def metrics(self, state: State) -> Mapping[str, jax.Array]:
        """Return scalars about the last step, by name, for histories; none by default. Reads only."""
        return {}

    def check(self, state: State) -> None:
        """Raise a `FloatingPointError` where a state says that training has failed; nothing by default.

        It runs between steps, on the host: a compiled program cannot raise an error.
        """

    def eval_params(self, state: State, params: Params) -> Params:
        """Return the parameters to evaluate and to deploy, in the dtypes of those trained: these by default."""
        return params

    def require(self, params: Params) -> Params:
        """Return the parameters, or raise a `ValueError` where there are none."""
        if params is None:
            raise ValueError(f"{type(self).__name__} needs the parameters: pass `params` to `update`")
        return params

    def asks(self) -> frozenset[str]:
        """Return the names of what `around` asks for."""
        return self._asked


def require_own_dtypes(wrapper: Wrapper, modules: Mapping[str, tuple[PyTree, PyTree]]) -> None:
    """Raise a `ValueError` if a wrapper keeps states of modules that exchange auxiliary variables in other dtypes.

    Such a module acts on its state between steps too.

    Args:
      wrapper: the wrapper.
      modules: by name, the state that a module has made, and as the wrapper keeps it.
    """
    for name, (made, kept) in modules.items():
        for (path, own), leaf in zip(jax.tree.leaves_with_path(made), jax.tree.leaves(kept), strict=True):
            if own.dtype != leaf.dtype:
                raise ValueError(
                    f"{type(wrapper).__name__}: {show(own)} at 'modules/{name}/{keystr(path)}' would be kept in "
                    f"{leaf.dtype}, and is of a module that exchanges auxiliary variables, and so acts on it between "
                    "steps: leave it out of `match`"
                )


def list_wrappers() -> dict[str, type[Wrapper]]:
    """Return the registered wrappers by name."""
    return dict(sorted(Wrapper._registry.items()))
