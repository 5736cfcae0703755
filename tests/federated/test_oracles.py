"""Our algorithms against their oracles: in the simulator, and between peers that exchange nothing but JSON."""

import pytest

from benchmarks.conformance.ours import Messages, Peers, Simulator
from functional_optimodules.testing.federated import ORACLES, SCENARIOS, check, check_invariants, explain

# There is no option I. A buffered server's participants follow from a clock: see `test_buffered.py`.
MISSING = {"scaffold-option-1", "fedbuff"}
OURS = sorted(ORACLES.keys() - MISSING)
# What needs each delta, or keeps a part of the model, is the simulator's alone.
DEPLOYED = [
    name
    for name in OURS
    if name not in {"median", "trimmed-mean", "krum", "multi-krum", "geometric-median", "centered-clipping", "ditto"}
]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", OURS)
def test_rounds_of_the_simulator_are_the_papers(algorithm):
    require(check(Simulator(), algorithm))
    for finding in check_invariants(Simulator(), algorithm):
        assert finding.ok, finding


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [name for name in OURS if name != "ditto"])  # it is seen in personal models alone
def test_rounds_of_a_server_and_its_clients_are_the_papers(algorithm):
    require(check(Messages(), algorithm))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", DEPLOYED)
def test_rounds_over_json_are_the_papers(algorithm):
    require(check(Peers(), algorithm))
    for finding in check_invariants(Peers(), algorithm):
        assert finding.ok or "variates" in finding.skipped, finding


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [Simulator(), Messages(), Peers()], ids=["simulator", "server", "peers"])
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fednova"])
def test_lost_messages_sampling_and_unequal_steps_at_once(adapter, algorithm):
    require(check(adapter, algorithm, SCENARIOS["mixed"]))


def require(findings):
    assert findings
    assert all(finding.ok for finding in findings), explain(findings)


@pytest.mark.parametrize("algorithm", sorted(MISSING))
def test_what_cannot_be_run_is_skipped_with_a_reason(algorithm):
    assert all(finding.skipped for finding in check(Simulator(), algorithm))
