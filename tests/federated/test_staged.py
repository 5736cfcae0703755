"""Clients whose data and states are not on the device: the numbers of those that are, and what can break."""

import errno
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation, StagedData, StagedFederation
from functional_optimodules.random.keys import is_any_key, words

from . import problem

pytestmark = pytest.mark.slow

ROUNDS, EVERY = 7, 2
ARRAYS = jax.tree.map(lambda *parts: np.concatenate(parts), *problem.clients())


@pytest.fixture(scope="module")
def data() -> FederatedData:
    return FederatedData.from_clients(problem.clients())


@pytest.fixture
def staged_data() -> StagedData:
    return StagedData(ARRAYS, problem.SIZES)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, array in ARRAYS.items():
        np.save(tmp_path / f"{name}.npy", array)
    return {name: tmp_path / f"{name}.npy" for name in ARRAYS}


def fit(federation: Any, state: Any, data: Any, rounds: int = ROUNDS, **options: Any) -> Any:
    return federation.fit(state, data, rounds, **{"participants": 3, "every": EVERY, **options})


def init(staged: StagedFederation, data: StagedData) -> Any:
    return staged.init(problem.params(), data, seed=3)


def run(federation: Federation, data: FederatedData, **options: Any) -> Any:
    return fit(federation, federation.init(problem.params(), data, seed=3), data, **options)


def same(left: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def same_run(staged: StagedFederation, found: Any, expected: Any) -> None:
    """Two runs have the same history, and the same models, the clients' own too."""
    (state, history), (other, other_history) = found, expected
    assert history.keys() == other_history.keys()
    same(history, other_history)
    for client in (None, *range(problem.NUM_CLIENTS)):
        same(staged.model(state, client), staged.federation.model(other, client))


def simple(client: Any = (), **options: Any) -> Federation:
    return Federation(problem.loss, fo.Optimizer(0.2, modules=client), batch_size=problem.BATCH, **options)


@pytest.mark.parametrize(
    "federation",
    [
        simple(),
        simple(["momentum"]),
        simple(uplink=[("top-k", {"fraction": 0.5})]),
        simple(local=["b"]),
        simple(fragments=[["w"], ["b"]]),
        problem.federation(),
        problem.federation(mapping=2),
        problem.noisy_federation(),
    ],
    ids=["fedavg", "momentum", "top-k", "local", "fragments", "scaffold", "chunks", "keys"],
)
def test_the_numbers_are_those_of_the_same_clients_on_the_device(
    federation: Federation, data: FederatedData, staged_data: StagedData
) -> None:
    staged = StagedFederation(federation)
    same_run(staged, fit(staged, init(staged, staged_data), staged_data), run(federation, data))


def test_weights_drops_and_evaluation_are_those_too(data: FederatedData, staged_data: StagedData) -> None:
    federation, weights = problem.federation(), np.arange(1.0, 8.0)
    options = {"weights": weights, "drop_rate": 0.3, "evaluate": lambda params: {"b": params["b"]}}
    staged = StagedFederation(federation)
    found = fit(staged, init(staged, staged_data), staged_data, **options)
    same_run(staged, found, run(federation, data, **options))
    assert not found[1]["joined"].all()


def test_all_clients_may_take_part_in_each_round(data: FederatedData, staged_data: StagedData) -> None:
    staged = StagedFederation(problem.federation())
    found = fit(staged, init(staged, staged_data), staged_data, participants=None)
    same_run(staged, found, run(staged.federation, data, participants=None))


def test_files_are_read_as_arrays_are(data: FederatedData, files: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "sizes.npy", np.array(problem.SIZES, np.int32))
    mapped = {**files, "y": np.load(files["y"], mmap_mode="r")}
    expected = run(problem.federation(), data)
    for examples in (files, mapped):
        staged, from_files = StagedFederation(problem.federation()), StagedData(examples, tmp_path / "sizes.npy")
        same_run(staged, fit(staged, init(staged, from_files), from_files), expected)


def test_a_run_is_the_same_in_other_pieces_and_calls(data: FederatedData, staged_data: StagedData) -> None:
    staged = StagedFederation(problem.federation())
    expected = run(staged.federation, data)
    same_run(staged, fit(staged, init(staged, staged_data), staged_data, every=3), expected)
    state, first = fit(staged, init(staged, staged_data), staged_data, 3)
    state, nothing = fit(staged, state, staged_data, 0)
    state, rest = fit(staged, state, staged_data, 4)
    history = jax.tree.map(lambda *parts: np.concatenate(parts), first, nothing, rest)
    same_run(staged, (state, history), expected)


def test_a_callback_sees_each_piece_and_may_stop_the_run(data: FederatedData, staged_data: StagedData) -> None:
    staged, seen = StagedFederation(simple(local=["b"])), []

    def callback(state: Any, history: Any) -> bool:
        seen.append((history["round"].tolist(), staged.model(state, 2)["b"]))
        return len(seen) == 2

    state, history = fit(staged, init(staged, staged_data), staged_data, callback=callback)
    assert [rounds for rounds, _ in seen] == [[0, 1], [2, 3]]
    same_run(staged, (state, history), run(staged.federation, data, rounds=4))
    same(seen[-1][1], staged.model(state, 2)["b"])


@pytest.mark.parametrize("federation", [problem.federation(), simple()], ids=["scaffold", "fedavg"])
def test_a_run_in_a_folder_goes_on(
    federation: Federation, data: FederatedData, staged_data: StagedData, tmp_path: Path
) -> None:
    staged = StagedFederation(federation, tmp_path / "run")
    first = fit(staged, init(staged, staged_data), staged_data, 3)[1]
    gc.collect()
    state = init(staged, staged_data)
    assert int(state.federation.round) == 3
    state, rest = fit(staged, state, staged_data, 4)
    history = jax.tree.map(lambda *parts: np.concatenate(parts), first, rest)
    same_run(staged, (state, history), run(staged.federation, data))


@pytest.mark.parametrize("safe_mode", [False, True])
def test_keys_from_entropy_are_those_that_were_drawn_at_first(
    safe_mode: bool, staged_data: StagedData, tmp_path: Path
) -> None:
    noise = ("gaussian-noise", {"std": 0.1, "safe_mode": safe_mode})
    staged = StagedFederation(simple([noise]), tmp_path)
    state, _ = fit(staged, staged.init(problem.params(), staged_data), staged_data, 1)
    first = state.first
    keys = [words(leaf) for leaf in jax.tree.leaves(first, is_leaf=is_any_key) if is_any_key(leaf)]
    del state
    gc.collect()
    other = staged.init(problem.params(), staged_data).first
    assert keys
    same(keys, [words(leaf) for leaf in jax.tree.leaves(other, is_leaf=is_any_key) if is_any_key(leaf)])


def test_clients_of_a_secret_seed_draw_the_same_noise_from_disk(
    data: FederatedData, staged_data: StagedData, tmp_path: Path
) -> None:
    federation = simple([("gaussian-noise", {"std": 0.1, "seed": 5})])
    staged = StagedFederation(federation, tmp_path)
    same_run(staged, fit(staged, init(staged, staged_data), staged_data), run(federation, data))


def test_a_run_that_breaks_off_at_any_write_goes_on_from_a_whole_piece(
    data: FederatedData, staged_data: StagedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(problem.federation(), data)
    calls = {name: getattr(os, name) for name in ("pwritev", "replace")}
    count = 0

    def failing(name: str) -> Any:
        def call(*args: Any) -> Any:
            nonlocal count
            count -= 1
            if not count:
                if name == "pwritev":  # half a row is there
                    calls[name](args[0], [args[1][0]], args[2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return calls[name](*args)

        return call

    for name in calls:
        monkeypatch.setattr(os, name, failing(name))
    for last in (3, 5, 9, 14, 15, 20):  # 2 for the files themselves
        staged = StagedFederation(problem.federation(), tmp_path / str(last))
        count = last
        with pytest.raises(OSError, match=r"No space left on device: round \d was not written to"):
            fit(staged, init(staged, staged_data), staged_data)
        gc.collect()
        count = 0
        state = init(staged, staged_data)
        done = int(state.federation.round)
        state, rest = fit(staged, state, staged_data, ROUNDS - done)
        history = {name: np.concatenate([values[:done], rest[name]]) for name, values in expected[1].items()}
        same_run(staged, (state, history), expected)
        gc.collect()


SCRIPT = """
import os, signal, sys
from functional_optimodules.federated import StagedFederation
from tests.federated import problem, test_staged

staged_data = test_staged.StagedData(test_staged.ARRAYS, problem.SIZES)
staged = StagedFederation(problem.federation(), sys.argv[1])
write, left = os.pwritev, 10

def pwritev(*args):
    global left
    left -= 1
    return os.kill(os.getpid(), signal.SIGKILL) if not left else write(*args)

os.pwritev = pwritev
test_staged.fit(staged, test_staged.init(staged, staged_data), staged_data)
"""


def test_a_process_that_is_killed_goes_on(data: FederatedData, staged_data: StagedData, tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    staged = StagedFederation(problem.federation(), tmp_path)
    state = init(staged, staged_data)
    done = int(state.federation.round)
    assert 0 < done < ROUNDS
    state, rest = fit(staged, state, staged_data, ROUNDS - done)
    expected = run(staged.federation, data)
    history = {name: np.concatenate([values[:done], rest[name]]) for name, values in expected[1].items()}
    same_run(staged, (state, history), expected)


def test_what_is_on_the_device_is_of_the_participants_alone() -> None:
    total = 20_000
    examples = {"x": np.ones((2 * total, 3), np.float32), "y": np.zeros(2 * total, np.int32)}
    many, seen = StagedData(examples, np.full(total, 2)), []
    staged = StagedFederation(problem.federation(total))
    before = sum(array.nbytes for array in jax.live_arrays())

    def callback(state: Any, history: Any) -> None:
        seen.append(sum(array.nbytes for array in jax.live_arrays()) - before)

    fit(staged, init(staged, many), many, callback=callback)
    # Some copies of 6 participants' 100 bytes, and what the server has.
    assert max(seen) < 10_000 < sum(array.nbytes for array in examples.values())


def test_a_client_that_sends_nan_is_named_and_the_folder_keeps_what_was_before(tmp_path: Path) -> None:
    clients = problem.clients()
    clients[2]["x"][0, 0] = np.nan
    poisoned = StagedData(jax.tree.map(lambda *parts: np.concatenate(parts), *clients), problem.SIZES)
    participants = run(problem.federation(on_nonfinite="skip"), FederatedData.from_clients(clients))[1]["participants"]
    first = int(np.flatnonzero((participants == 2).any(axis=1))[0])
    staged = StagedFederation(problem.federation(), tmp_path)
    with pytest.raises(FloatingPointError, match=rf"in round {first}, clients \[2\] sent values that are not finite"):
        fit(staged, init(staged, poisoned), poisoned)
    gc.collect()
    assert int(init(staged, poisoned).federation.round) == first // EVERY * EVERY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 200), r"x.npy is no .npy file, or was cut short"),
        (lambda path: os.truncate(path, 20), r"x.npy is no .npy file, or was cut short"),
        (lambda path: path.write_text("x,y"), r"x.npy is no .npy file, or was cut short"),
        (lambda path: np.save(path, np.asfortranarray(ARRAYS["x"])), "x.npy is in Fortran's order"),
        (lambda path: np.save(path, ARRAYS["x"][:-1]), r"'x' of shape \[44, 3\]: expected 45 rows in front"),
        (lambda path: np.save(path, np.float32(1)), r"'x' of shape \[\]: expected 45 rows in front"),
    ],
)
def test_a_damaged_file_is_refused(files: Any, change: Any, message: str) -> None:
    change(files["x"])
    with pytest.raises(ValueError, match=message):
        StagedData(files, problem.SIZES)


def test_a_file_that_is_cut_short_meanwhile_is_an_error_that_names_it(files: Any) -> None:
    staged, cut = StagedFederation(problem.federation()), StagedData(files, problem.SIZES)
    os.truncate(files["x"], 300)
    with pytest.raises(ValueError, match=r"x.npy was cut short: it ends at byte 300"):
        fit(staged, init(staged, cut), cut, participants=None)


def test_a_file_that_is_missing_or_an_archive_is_refused(files: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "both.npz", **ARRAYS)
    with pytest.raises(ValueError, match=r"should be a \.npy file of one array, not an archive"):
        StagedData({**files, "x": tmp_path / "both.npz"}, problem.SIZES)
    with pytest.raises(FileNotFoundError, match=r"other.npy"):
        StagedData({**files, "x": tmp_path / "other.npy"}, problem.SIZES)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "expected an integer a client"),
        ([[45]], r"sizes of int64\[1, 1\]: expected an integer a client"),
        ([45.0], r"sizes of float64\[1\]: expected an integer a client"),
        ([45, 0], "client 1 has no examples: its size is 0"),
        ([45, 1], r"'x' of shape \[45, 3\]: expected 46 rows in front, as many as the 2 clients have"),
    ],
)
def test_sizes_that_are_none_are_refused(sizes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StagedData(ARRAYS, sizes)


def test_a_file_in_the_place_of_the_folder_is_refused(staged_data: StagedData, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("")
    with pytest.raises(ValueError, match=r"folder='.*run' is a file: expected a folder"):
        init(StagedFederation(problem.federation(), path), staged_data)


def test_what_it_cannot_run_is_refused(data: FederatedData, staged_data: StagedData) -> None:
    staged = StagedFederation(problem.federation())
    with pytest.raises(TypeError, match="data should be StagedData, not FederatedData"):
        staged.init(problem.params(), data)  # type: ignore[arg-type]
    state = init(staged, staged_data)
    with pytest.raises(TypeError, match="data should be StagedData, not FederatedData"):
        fit(staged, state, data)
    with pytest.raises(ValueError, match="data of 1 clients, and a state made for 7"):
        fit(staged, state, StagedData(ARRAYS, [45]), participants=1)
    with pytest.raises(ValueError, match="participants=8 should be from 1 to the 7 clients"):
        fit(staged, state, staged_data, participants=8)
    with pytest.raises(ValueError, match="every=0 should be an integer of at least 1"):
        fit(staged, state, staged_data, every=0)
    with pytest.raises(ValueError, match="client=7 should be one of the 7 clients"):
        staged.model(state, 7)


def test_a_state_that_is_not_the_last_one_is_refused(staged_data: StagedData) -> None:
    staged = StagedFederation(problem.federation())
    old = init(staged, staged_data)
    copy = old._replace(federation=jax.tree.map(jnp.copy, old.federation))
    fit(staged, old, staged_data, 2)
    with pytest.raises(ValueError, match="a state after 0 rounds, and its bank is after 2"):
        fit(staged, copy, staged_data)


@pytest.mark.parametrize(
    ("federation", "options"),
    [
        (problem.federation(), {}),
        (problem.noisy_federation(), {"batch_size": 2, "key": jax.random.key(5)}),
        (simple(local=["b"]), {}),
        (problem.federation(), {"steps": 2}),
    ],
    ids=["scaffold", "keys", "local", "steps"],
)
@pytest.mark.parametrize("at_once", [3, 100])
def test_evaluation_is_that_of_the_same_clients_on_the_device(
    federation: Federation, options: Any, at_once: int, data: FederatedData, staged_data: StagedData
) -> None:
    staged = StagedFederation(federation)
    state, _ = fit(staged, init(staged, staged_data), staged_data)
    other, _ = run(federation, data)
    same(staged.evaluate(state, staged_data, at_once=at_once, **options), federation.evaluate(other, data, **options))
    alike = {name: value for name, value in options.items() if name != "steps"}
    same(
        staged.evaluate(state.federation.params, staged_data, at_once=at_once, **alike),
        federation.evaluate(other.params, data, **alike),
    )


def test_evaluation_may_follow_local_steps_on_other_data(data: FederatedData, staged_data: StagedData) -> None:
    clients = [jax.tree.map(lambda leaf: leaf[:1], client) for client in problem.clients()]
    first = FederatedData.from_clients(clients)
    staged_first = StagedData(jax.tree.map(lambda *parts: np.concatenate(parts), *clients), [1] * len(clients))
    staged = StagedFederation(problem.federation())
    state, _ = fit(staged, init(staged, staged_data), staged_data)
    other, _ = run(staged.federation, data)
    found = staged.evaluate(state, staged_first, steps=3, train=staged_data, at_once=2)
    same(found, staged.federation.evaluate(other, first, steps=3, train=data))


def test_what_cannot_be_evaluated_is_refused(data: FederatedData, staged_data: StagedData) -> None:
    staged = StagedFederation(problem.federation())
    state = init(staged, staged_data)
    with pytest.raises(TypeError, match="data should be StagedData, not FederatedData"):
        staged.evaluate(state, data)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data should be StagedData, not FederatedData"):
        staged.evaluate(state, staged_data, steps=1, train=data)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data of 1 clients, and a state made for 7"):
        staged.evaluate(state, StagedData(ARRAYS, [45]))
    with pytest.raises(ValueError, match="at_once=0 should be an integer of at least 1"):
        staged.evaluate(state, staged_data, at_once=0)
    with pytest.raises(ValueError, match="after local steps, pass the federation's state"):
        staged.evaluate(state.federation.params, staged_data, steps=1)


class TestFolder:
    @pytest.fixture
    def folder(self, staged_data: StagedData, tmp_path: Path) -> Path:
        staged = StagedFederation(problem.federation(), tmp_path)
        fit(staged, init(staged, staged_data), staged_data, 2)
        gc.collect()
        return tmp_path

    def test_another_run_at_work_there_is_refused(self, staged_data: StagedData, tmp_path: Path) -> None:
        staged = StagedFederation(problem.federation(), tmp_path)
        state = init(staged, staged_data)
        with pytest.raises(ValueError, match="another run is at work in"):
            init(staged, staged_data)
        del state
        gc.collect()
        assert int(init(staged, staged_data).federation.round) == 0

    def test_a_run_of_another_federation_or_other_data_is_refused(self, folder: Path, staged_data: StagedData) -> None:
        other = StagedFederation(problem.federation(remainder="wrap"), folder)
        with pytest.raises(ValueError, match=r"is of another run: federation remainder was 'mask', and is 'wrap' here"):
            init(other, staged_data)
        staged = StagedFederation(problem.federation(), folder)
        half = StagedData(jax.tree.map(lambda leaf: leaf[:-1], ARRAYS), (*problem.SIZES[:-1], problem.SIZES[-1] - 1))
        with pytest.raises(ValueError, match="data examples was 45, and is 44 here"):
            init(staged, half)
        with pytest.raises(ValueError, match=r"'0/params/w' has shape \[3, 2\]: expected \[3, 1\]"):
            staged.init({"w": jnp.zeros((3, 1)), "b": jnp.zeros(2)}, staged_data)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda folder: (folder / "rows").unlink(), "rows is missing, without which the run cannot go on"),
            (lambda folder: os.truncate(folder / "rows", 30), r"rows has 30 bytes: expected \d+"),
            (lambda folder: os.truncate(folder / "stamps", 30), "stamps has 30 bytes: expected 56"),
            (lambda folder: os.truncate(folder / "state.json", 30), "state.json is no JSON"),
            (lambda folder: (folder / "state.json").write_text("[]"), "should be a mapping, not list"),
        ],
    )
    def test_a_damaged_folder_is_refused(
        self, folder: Path, staged_data: StagedData, change: Any, message: str
    ) -> None:
        change(folder)
        with pytest.raises(ValueError, match=message):
            init(StagedFederation(problem.federation(), folder), staged_data)
