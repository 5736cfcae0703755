"""One facade called by several threads, and its copies in other processes."""

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo

ONES = {"w": jnp.ones(4)}
THREADS = 4


def at_once(*calls: Callable[[], Any]) -> None:
    """Make each call in a thread of its own, all from the same moment on; raise what one of them raised."""
    barrier, errors = threading.Barrier(len(calls)), []

    def run(call: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def times(count: int, call: Callable[[], Any]) -> Callable[[], None]:
    return lambda: [call() for _ in range(count)] and None


def test_the_first_calls_of_several_threads_are_all_counted() -> None:
    for _ in range(10):
        module = fo.AdamModule()
        at_once(*[lambda module=module: module.run(ONES)] * THREADS)
        assert module.state.steps == THREADS


def test_steps_of_several_threads_are_all_counted() -> None:
    module = fo.AdamModule()
    at_once(*[times(200, lambda: module.run(ONES))] * THREADS)
    assert module.state.steps == 200 * THREADS


def test_a_state_is_read_saved_and_copied_beside_steps() -> None:
    module = fo.ScaffoldClientModule()
    module.run(ONES)
    seen = []
    at_once(
        times(300, lambda: module.run(ONES)),
        times(100, lambda: seen.append(module.state.steps)),
        times(100, lambda: fo.ScaffoldClientModule().set_state(module.get_state())),
        times(50, lambda: pickle.loads(pickle.dumps(module))),
        times(50, lambda: copy.deepcopy(module)),
    )
    assert [int(step) for step in seen] == sorted(int(step) for step in seen)
    assert module.state.steps == 301


def test_messages_of_several_threads_are_all_taken() -> None:
    client = fo.ScaffoldClientModule()
    client.run(ONES)
    message, server = client.collect_aux_var(), fo.ScaffoldServerModule()
    at_once(*[lambda name=f"client {i}": server.process_aux_var({name: message}) for i in range(8)])
    assert server.state.clients == 8
    np.testing.assert_array_equal(server.collect(server.state).variate["w"], np.ones(4))


def test_a_scheduler_counts_the_calls_of_all_threads() -> None:
    scheduler = fo.LinearDecay(1.0, 1e-4)
    at_once(*[times(100, scheduler.get_next_rate)] * THREADS)
    assert scheduler.get_next_rate() == pytest.approx(1 - 1e-4 * 100 * THREADS)


def stepped(module: fo.AdamModule) -> fo.AdamModule:
    module.run(ONES)
    return module


@pytest.mark.slow
def test_a_facade_goes_to_a_spawned_process_and_comes_back() -> None:
    module = stepped(fo.AdamModule())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        again = pool.apply(stepped, (module,))
    assert module.state.steps == 1
    assert again.get_state() == stepped(module).get_state()
