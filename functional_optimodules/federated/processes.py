"""Several processes that run one federation together, on JAX's own engine.

Each process calls `start` before anything else of JAX, builds its data with
`FederatedData.from_local` over `clients_mesh()`, and then runs the same program as
all others. When one is lost, the others stop within seconds: start all again from
the last saved state. Where the lost one closes its connections, as a killed process
does, they say so in an error, and end with status 1. Where it only falls silent, JAX
ends them after `lost_after` seconds by SIGABRT, and says so among a stack of its own.
"""

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator

import jax

_lost = threading.Event()


@atexit.register
def _leave_the_lost() -> None:
    # JAX would wait for all processes to end together, and abort in the end, far below the message.
    if _lost.is_set():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def start(address: str, num_processes: int, process_id: int, *, lost_after: int = 10) -> None:
    """Join the processes of a federation.

    SIGTERM ends a process as it does any other. JAX's own notice of preemption, which
    would take it and do nothing, is left out.

    Args:
      address: `host:port` of process 0, which listens there, and only there.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      lost_after: seconds without a sign of life until a process counts as lost.

    Raises:
      ValueError: if the numbers do not go together, or the address has no port.
      RuntimeError: if JAX has been used before, or not all processes join.
    """
    if not 0 <= process_id < num_processes:
        raise ValueError(f"start: process_id={process_id} should be from 0 to {num_processes - 1}")
    if not address.rpartition(":")[2].isdigit() or not address.rpartition(":")[0]:
        raise ValueError(f"start: address={address!r} should be host:port")
    if lost_after < 1:
        raise ValueError(f"start: lost_after={lost_after} should be at least 1 second")
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        num_processes=num_processes,
        process_id=process_id,
        # Without it, it would listen on every interface.
        coordinator_bind_address=address if process_id == 0 else None,
        heartbeat_timeout_seconds=lost_after,
        shutdown_timeout_seconds=lost_after,
    )


@contextlib.contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Say of an error in the exchange with other processes what it means and what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _lost.set()
        raise RuntimeError(
            f"process {jax.process_index()} of {jax.process_count()}: the exchange with the other processes broke off; "
            "one of them was lost. Start all again from the last saved state"
        ) from error
