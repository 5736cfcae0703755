"""What several processes do in step: it has ended for one when it has for all, and an error in one is one in each."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from functional_optimodules.federated.processes import naming_lost_peers


@contextlib.contextmanager
def together(several: bool) -> Iterator[None]:
    """Do this process's part of something, and wait for the others.

    Args:
      several: whether there are others.

    Raises:
      RuntimeError: if another one failed, or was lost.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    if several:
        with naming_lost_peers():
            faults = np.asarray(multihost_utils.process_allgather(np.array(fault is not None)))
        if fault is None and faults.any():
            raise RuntimeError(
                f"StagedFederation: process {np.flatnonzero(faults)[0]} of {jax.process_count()} failed, and says why: "
                "start all again, and the run goes on from what it has"
            )
    if fault is not None:
        raise fault


def require_alike(several: bool, digest: int, what: str) -> None:
    """Raise a `ValueError` in each process if something is not the same in all.

    Args:
      several: whether there are others.
      digest: a number that tells it, below 2**32.
      what: what an error calls it.
    """
    if not several:
        return
    digests = np.asarray(multihost_utils.process_allgather(np.array(digest, np.uint32)))
    if other := np.flatnonzero(digests != digests[0]).tolist():
        raise ValueError(f"StagedFederation: {what} of process {other[0]} is not that of process 0: give all the same")
