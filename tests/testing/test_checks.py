"""Each check of the contract suite fails on a brick that breaks it, and says why."""

import itertools

import pytest

from functional_optimodules.testing import checks_of, contract, instances

from .bricks import (
    AcrossClients,
    Aliasing,
    AliasingRound,
    AskingTheHost,
    DictOnly,
    DictState,
    DividesByCount,
    DroppingRound,
    Flattening,
    Growing,
    HalfReset,
    HiddenState,
    Implicit,
    InPlace,
    Kept,
    ListState,
    NarrowAndNoisy,
    NarrowMean,
    NarrowMoment,
    NarrowNorm,
    NeedsALeaf,
    NoiseBeforeASign,
    OldKey,
    OnlyInScan,
    OwnEquality,
    OwnGenerator,
    PerParameter,
    Random,
    RootAtZero,
    SameKey,
    Sentinel,
    SilentlyReceiving,
    Smuggling,
    Sum,
    TraceAware,
    Twice,
    WeakTyped,
    Widening,
)
from .pairs import (
    EmptyingCollect,
    ForgettingRound,
    HalfForgetting,
    RandomCollect,
    Reshaping,
    Sending,
    SendingElse,
    SendingUndeclared,
    Serving,
    Unheard,
)

KEPT = dict(contract(Kept))


@pytest.mark.slow
@pytest.mark.parametrize("check", KEPT)
def test_brick_that_keeps_the_callers_gradients_in_its_state_keeps_the_contract(check):
    KEPT[check]()


BROKEN = {
    "check_config_round_trip": [(OwnEquality, "unequal")],
    "check_state_is_a_named_tuple_of_arrays": [(Sentinel, "let it return arrays"), (DictState, "NamedTuple")],
    "check_update_keeps_structure": [(Growing, "state's structure"), (Flattening, "other updates")],
    "check_update_is_pure": [(Random, "not a pure"), (InPlace, "in place"), (Smuggling, r"\['last'\]")],
    "check_state_owns_its_buffers": [
        (Aliasing, "params"),
        (AliasingRound, "begin_round"),
        (Twice, r"\.kept\[0\]"),
    ],
    "check_state_can_be_donated": [(Aliasing, "deletes arrays|deleted"), (Twice, "donate the same buffer twice")],
    "check_dtypes_are_kept": [(Widening, "updates in bfloat16")],
    "check_half_precision_accumulates_wide": [
        (NarrowMoment, r"accumulates in float16 at \.kept"),
        (NarrowNorm, "float16 updates give"),
        (NarrowMean, "accumulates"),
        (NarrowAndNoisy, "float16 updates give"),
    ],
    "check_gradient_at_zero_is_finite": [(RootAtZero, "updates of zero")],
    "check_jit_equals_eager": [(TraceAware, "differs under jit")],
    "check_vmap_over_clients": [(AcrossClients, "under vmap")],
    "check_scan_equals_loop": [(OnlyInScan, "steps in a scan")],
    "check_traced_once": [(WeakTyped, "traced 2 times"), (OwnEquality, "traced 2 times|unequal")],
    "check_strict_promotion": [(Implicit, "promotion")],
    "check_rounds_keep_structure": [(DroppingRound, r"begin_round\(state, params\)"), (Reshaping, "process")],
    "check_round_reset_is_as_new": [(HalfReset, "does not start as")],
    "check_fold_in_separates_clients": [(SameKey, "same key"), (OldKey, "jax.random.key")],
    "check_keys_can_be_restored": [(OwnGenerator, "a generator that JAX has no name for")],
    "check_forget_takes_back_what_was_given": [(HalfForgetting, "leaves something of what a client gave")],
    "check_run_is_update": [(Growing, "structure"), (HiddenState, "other updates")],
    "check_resume_in_mid_round": [(HiddenState, "continues differently")],
    "check_state_before_the_first_run": [(DroppingRound, "begin_round")],
    "check_containers_are_equal": [(DictOnly, "Any container"), (ListState, "NamedTuple|chex|path|container")],
    "check_odd_trees": [(NeedsALeaf, "concatenate"), (DividesByCount, "give")],
    "check_chained_after_running": [(HiddenState, "other updates")],
    "check_copies_are_independent": [(HiddenState, "continues differently")],
    "check_lowered_for_every_platform": [(AskingTheHost, "without a call of the host")],
    "check_packed_is_as_unpacked": [(PerParameter, "leave out `packable = True`")],
    "check_collect_reads_only": [
        (RandomCollect, "asked again"),
        (EmptyingCollect, "changes the state"),
        (SendingUndeclared, "`sends` declares nothing"),
        (SendingElse, "returned Orders"),
    ],
    "check_exchange_is_as_simulated": [(ForgettingRound, "in round 1 the exchange")],
    "check_facade_collects_the_same_again": [(SendingElse, "declares Numbers")],
    "check_messages_survive_json": [(SendingElse, "declares Numbers")],
    "check_received_messages_survive_json": [(Reshaping, "process"), (Unheard, "no module sends Unanswered")],
    "check_unwanted_messages_are_refused": [(SilentlyReceiving, "declares nothing")],
}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Sum, Sending, Serving])
def test_bricks_that_the_broken_ones_are_made_of_keep_the_contract(cls):
    for _, check in contract(cls):
        check()


@pytest.mark.parametrize(
    ("check", "cls", "message"), [(name, *fault) for name, faults in BROKEN.items() for fault in faults]
)
def test_check_fails_on_a_brick_that_breaks_it(check, cls, message):
    if cls is OnlyInScan:
        cls.calls = itertools.count(1)
    brick = list(instances(cls).values())[-1]
    with pytest.raises(AssertionError, match=message) as failure:
        checks_of(brick)[check](brick)
    assert cls.__name__ in str(failure.value)


def test_values_that_noise_brings_to_a_jump_may_fall_on_either_side_of_it():
    brick = NoiseBeforeASign()
    checks_of(brick)["check_half_precision_accumulates_wide"](brick)


def test_check_fails_on_a_facade_that_lets_itself_be_traced(monkeypatch):
    brick = Kept()
    monkeypatch.setattr(Kept, "run", lambda self, gradients, params=None: gradients)
    with pytest.raises(AssertionError, match="`run` under jit is no error"):
        checks_of(brick)["check_refused_under_trace"](brick)


def test_every_check_is_shown_to_fail():
    assert set(checks_of(Kept)) == set(BROKEN) | {"check_refused_under_trace"}
