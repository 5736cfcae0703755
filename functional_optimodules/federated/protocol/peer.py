"""What both peers are: called by one thread at a time, and kept in a folder rather than copied."""

import dataclasses
import threading
from typing import NoReturn

from functional_optimodules.federated.federation import Federation


class Peer:
    """A server, or a client.

    Attributes:
      federation: what it was made from; how that maps participants does not matter between machines.
    """

    def __init__(self, federation: Federation) -> None:
        if not isinstance(federation, Federation):
            raise TypeError(
                f"{type(self).__name__}: federation should be a Federation, not {type(federation).__name__}"
            )
        self.federation = dataclasses.replace(federation, mapping=None)
        self._lock = threading.RLock()

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} is not pickled or copied: `save` it to a folder, and `load` it into another {name}")
