"""What both peers are: called by one thread at a time, and kept in a folder rather than copied."""

import threading
from typing import NoReturn


class Peer:
    """A server, or a client."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} is not pickled or copied: `save` it to a folder, and `load` it into another {name}")
