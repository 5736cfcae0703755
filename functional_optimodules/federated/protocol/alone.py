"""One call at a time: what a peer has is changed by one thread, while others wait."""

import functools
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


class Alone:
    """What several threads may call, and is not copied: its place on a disk is a checkpoint."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} is not pickled or copied: `save` it to a folder, and `load` it into another {name}")


def alone(method: Method) -> Method:
    """Let a method of an `Alone` run while no other such method of the same object does."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(Method, locked)
