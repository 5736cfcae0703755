"""Processes that stop when one of them is lost, and go on from what they saved."""

import json
import re
import signal
from typing import Any

import pytest

from functional_optimodules.federated import processes


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_process_stops_the_other_with_a_message_and_both_resume_with_the_same_numbers(
    peers: Any, by: signal.Signals
) -> None:
    first, second = peers.start("endless", count=2, devices=1)
    for process in (first, second):
        line = ""
        while "saved" not in line:
            line = process.stdout.readline()
            assert line, f"process {process.args[-1]} ended early"
    second.send_signal(by)
    # Unless it was told otherwise, JAX waits for a minute and a half.
    output = first.communicate(timeout=60)[0]
    assert second.wait(timeout=60) == -by
    assert first.returncode == 1
    last = output.strip().splitlines()[-1]
    assert re.search(r"process 0 of 2: the exchange .* broke off; one of them was lost\. Start all again", last)

    peers.finish("resume", count=2, devices=1)
    for index in range(2):
        resumed, straight = (
            json.loads((peers.folder / f"round-{number}-of-process-{index}.json").read_text()) for number in (0, 6)
        )
        assert resumed == straight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, 2), "process_id=2 should be from 0 to 1"),
        (("127.0.0.1", 2, 0), "should be host:port"),
        ((":9", 2, 0), "should be host:port"),
    ],
)
def test_what_start_refuses(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processes.start(*arguments)
    with pytest.raises(ValueError, match="lost_after=0 should be at least 1"):
        processes.start("127.0.0.1:1", 2, 0, lost_after=0)
