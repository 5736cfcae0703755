"""Several runs of one file: which there are, what shares a program, and that each is what it would be alone."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functional_optimodules.experiments import saved, simulation
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.grouping import simulations, split
from functional_optimodules.experiments.run import run_experiment
from functional_optimodules.experiments.simulation import Simulation
from functional_optimodules.experiments.summary import summarize
from functional_optimodules.experiments.sweep import get_at, set_at, trials

Write = Callable[..., Path]

SWEEP = """
[sweep]
client.lrate = [0.02, 0.05]
"client.modules.0.beta" = [0, 0.5]
"""


def programs(path: Path) -> list[Simulation]:
    return simulations(trials(Experiment.read(path)), path.parent)


def run(path: Path, output: str, *overrides: str) -> list[dict[str, Any]]:
    return run_experiment(path, path.parent / output, overrides, say=lambda line: None, progress=False)


@pytest.mark.slow
def test_rates_betas_and_seeds_are_one_program_and_its_runs_are_those_of_each_alone(regression: Write) -> None:
    path = regression(("seed = 3", "seeds = [3, 4]"), more=SWEEP)
    (together,) = programs(path)
    assert together.program.traced == ("client.lrate", "client.modules.0.beta")
    rows = run(path, "sweep")
    assert len(rows) == 2 * 2 * 2 * 4
    alone = run(regression(("seed = 3", "seed = 4"), ("beta = 0.5", "beta = 0"), name="alone.toml"), "alone")
    mine = [row for row in rows if (row["client.lrate"], row["client.modules.0.beta"], row["seed"]) == (0.05, 0, 4)]
    assert mine[0].keys() - alone[0].keys() == {"client.lrate", "client.modules.0.beta", "seed"}
    for row, expected in zip(mine, alone, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_other_values_of_a_sweep_compile_nothing(regression: Write) -> None:
    run(regression(more=SWEEP), "first")
    compiled = simulation.advanced._cache_size()
    other = SWEEP.replace("[0.02, 0.05]", "[0.01, 0.03]").replace("[0, 0.5]", "[0.1, 0.9]")
    run(regression(more=other, name="other.toml"), "second")
    assert simulation.advanced._cache_size() == compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "traced"),
    [
        ('rounds.aggregation = ["mean", "median"]', [(1, ()), (1, ())]),
        ("problem.width = [2, 3]", [(1, ()), (1, ())]),
        ("problem.scale = [1.0, 2.0]", [(2, ())]),
        ("rounds.epochs = [1, 2]\nclient.lrate = [0.1, 0.2]", [(2, ("client.lrate",))] * 2),
        ("rounds.drop_rate = [0.1, 0.2]\nserver.lrate = [0.5, 1.0]", [(4, ("rounds.drop_rate", "server.lrate"))]),
        ('client.lrate = [0.1, ["exponential-decay", { base = 0.1, rate = 0.5 }]]', [(1, ()), (1, ())]),
    ],
)
def test_what_differs_in_more_than_numbers_is_another_program(
    regression: Write, sweep: str, traced: list[tuple[int, tuple[str, ...]]]
) -> None:
    found = programs(regression(more=f"[sweep]\n{sweep}"))
    assert [(len(each.trials), tuple(each.program.traced)) for each in found] == traced


def test_seeds_whose_clients_are_of_other_sizes_share_a_program_where_batches_bound_them(regression: Write) -> None:
    path = regression(("seed = 3", "seeds = [0, 1, 2]"), ('"regression:make"', '"digits"\nsplit = "dirichlet"'))
    (together,) = programs(path)
    assert len(together.trials) == 3
    everything = regression(
        ("seed = 3", "seeds = [0, 1, 2]"),
        ('"regression:make"', '"digits"\nsplit = "dirichlet"'),
        ("batch_size = 2", ""),
    )
    assert len(programs(everything)) > 1


@pytest.fixture
def after_a_piece(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what runs a file, and interrupts it when it has saved a first piece of rounds."""
    add = saved.History.add

    def stop(self: saved.History, rows: list[Any]) -> None:
        add(self, rows)
        raise KeyboardInterrupt

    def interrupted(path: Path, output: str, *overrides: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(saved.History, "add", stop)
            with pytest.raises(KeyboardInterrupt):
                run(path, output, *overrides)

    return interrupted


@pytest.mark.slow
def test_a_sweep_that_was_cut_off_goes_on_with_identical_results(
    regression: Write, after_a_piece: Callable[..., None]
) -> None:
    path = regression(more=SWEEP + 'rounds.aggregation = ["mean", "median"]')
    run(path, "whole")
    for _ in range(3):
        after_a_piece(path, "cut")
    run(path, "cut")
    whole, cut = (saved.read(path.parent / name)[1] for name in ("whole", "cut"))
    assert whole == cut
    rows = [
        list(csv.DictReader((path.parent / name / "history.csv").read_text().splitlines())) for name in ("whole", "cut")
    ]
    assert sorted(map(str, rows[0])) == sorted(map(str, rows[1]))


@pytest.mark.slow
def test_another_value_comes_in_at_the_same_round_of_all_runs(
    regression: Write, after_a_piece: Callable[..., None]
) -> None:
    path = regression(more='[sweep]\nrounds.aggregation = ["mean", "median"]')
    after_a_piece(path, "out")
    with pytest.raises(
        ValueError, match=r"out stand after 0 to 2 rounds, and --override .* --override rounds.count=2 alone"
    ):
        run(path, "out", "client.lrate=0.01")
    run(path, "out", "rounds.count=2")
    shutil.copytree(path.parent / "out", path.parent / "cut")
    expected = run(path, "out", "client.lrate=0.01")
    after_a_piece(path, "cut", "client.lrate=0.01")
    assert run(path, "cut", "client.lrate=0.01") == expected  # though one run's state is of the former rate still
    assert saved.read(path.parent / "cut") == saved.read(path.parent / "out")
    with pytest.raises(FileExistsError, match="finished run"):
        run(path, "cut", "client.lrate=0.01")


@pytest.mark.slow
def test_runs_of_one_program_that_were_cut_off_at_different_rounds_go_on_apart(
    regression: Write, after_a_piece: Callable[..., None]
) -> None:
    path = regression(more="[sweep]\nserver.lrate = [0.5, 1.0]")
    after_a_piece(path, "out", "rounds.mapping=mesh")  # by which runs are programs of their own
    (together,) = programs(path)
    assert [len(each.trials) for each in split(together, [2, 2])] == [2]
    assert [[trial.label for trial in each.trials] for each in split(together, [2, 0])] == [
        ["server.lrate=0.5"],
        ["server.lrate=1.0"],
    ]
    for row, expected in zip(run(path, "out"), run(path, "whole"), strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_last_round_is_told_as_mean_and_spread_over_seeds(regression: Write) -> None:
    path = regression(("seed = 3", "seeds = [3, 4, 5]"), more="[sweep]\nserver.lrate = [0.5, 1.0]")
    rows = run(path, "out")
    (half, whole) = csv.DictReader((path.parent / "out" / "summary.csv").read_text().splitlines())
    assert (half["server.lrate"], whole["server.lrate"], half["runs"], half["rounds"]) == ("0.5", "1.0", "3", "4")
    last = [row["test_loss"] for row in rows if row["round"] == 3 and row["server.lrate"] == 0.5]
    assert float(half["test_loss"]) == pytest.approx(np.mean(last))
    assert float(half["test_loss ±"]) == pytest.approx(np.std(last, ddof=1))
    assert (path.parent / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    clients = list(csv.DictReader((path.parent / "out" / "clients.csv").read_text().splitlines()))
    assert len(clients) == 6 * 4
    assert {"server.lrate", "seed", "client", "loss", "error"} == clients[0].keys()


@pytest.mark.slow
def test_a_run_of_a_sweep_that_diverges_leaves_the_others_alone(regression: Write) -> None:
    path, said = regression(more="[sweep]\nclient.lrate = [0.05, 1e30]"), []
    rows = run_experiment(path, path.parent / "out", say=said.append, progress=False)
    assert any("1e+30" in line and "not finite" in line for line in said)
    assert np.isfinite([row["loss"] for row in rows if row["client.lrate"] == 0.05]).all()
    assert '"loss": null' in (path.parent / "out" / "history.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("client.lrat = [1]", r"\[sweep\] has no field 'client.lrat': at 'lrat', did you mean 'lrate'\?"),
        ("client.modules.1.beta = [1]", r"has no field 'client.modules.1.beta': at '1', there is '0'"),
        ("client.modules.0.gamma = [1]", r"at 'gamma', there is 'beta', 'nesterov'"),
        ("client.lrate = 0.1", r"client.lrate=0.1 should be a list of values"),
        ("client.lrate = []", r"client.lrate=\[\] should be a list"),
        ("client.lrate = [0.1, 0.1]", r"values of 'client.lrate' should be different"),
        ("client.lrate = [0.1, -1]", r"\{'client.lrate': -1\}: Optimizer: lrate=-1.0 should be in"),
        ("rounds.count = [1, 2]", r"'rounds.count' is the same for all runs"),
        ('rounds.aggregation = ["mean", "men"]', r"no aggregator is named 'men': did you mean"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_by_its_field(regression: Write, more: str, message: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError), match=message):
        trials(Experiment.read(regression(more=f"[sweep]\n{more}")))


def test_a_sweep_over_what_a_factory_does_not_take_is_refused(regression: Write) -> None:
    with pytest.raises(KeyError, match=r"regression:make has no argument 'widht': did you mean 'width'\?"):
        programs(regression(more="[sweep]\nproblem.widht = [1, 2]"))


def test_what_a_file_does_not_say_of_optimizers_and_groups_may_be_swept_over(regression: Write) -> None:
    more = """
    [[client.groups]]
    [sweep]
    client.groups.0.factor = [0.5, 1.0]
    server.watch = [[], ["update_norm"]]
    """
    path = regression(more=more)
    found = [trial.experiment for trial in trials(Experiment.read(path))]
    assert [each.client.groups[0].factor for each in found] == [0.5, 0.5, 1.0, 1.0]
    assert [each.server.watch for each in found] == [(), ("update_norm",)] * 2
    assert [each.program.traced for each in programs(path)] == [("client.groups.0.factor",)] * 2


@pytest.mark.slow
def test_rates_of_groups_are_swept_over_in_one_program(regression: Write) -> None:
    group = "[[client.groups]]\nfactor = 0.5\n"
    rows = run(regression(more=f"{group}[sweep]\nclient.groups.0.factor = [0.5, 1.0]"), "swept")
    alone = run(regression(more=group, name="alone.toml"), "alone")
    for row, expected in zip(rows, alone, strict=False):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)
    assert len(rows) == 2 * len(alone)


def test_seeds_are_given_once(regression: Write) -> None:
    with pytest.raises(ValueError, match="both 'seeds' and a sweep over 'seed'"):
        trials(Experiment.read(regression(("seed = 3", "seeds = [1]"), more="[sweep]\nseed = [1, 2]")))
    with pytest.raises(ValueError, match=r"seeds=\[1, 1\] should be different"):
        Experiment.read(regression(("seed = 3", "seeds = [1, 1]")))


def test_a_field_is_found_and_replaced_within_plugins_and_the_old_configuration_stays() -> None:
    config = {"modules": ["adam", ["clip", {"bound": 1, "of": [1, 2]}]]}
    new = set_at(config, "modules.1.of.0", 5)
    assert new == {"modules": ["adam", ["clip", {"bound": 1, "of": [5, 2]}]]}
    assert get_at(new, "modules.1.bound") == 1
    assert config["modules"][1][1]["of"] == [1, 2]  # type: ignore[index]


def test_the_table_of_one_run_has_no_spread() -> None:
    (line,) = summarize([{"values": {}, "rows": [{"round": 0, "loss": 2.0, "bytes_up": 3}] * 2}])
    assert line == {"runs": 1, "rounds": 1, "loss": 2.0, "bytes_up": 6}
