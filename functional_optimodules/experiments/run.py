"""Run the experiment of a file, go on with one that was cut off, or say what would be run."""

import contextlib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from functional_optimodules.config.fields import differences
from functional_optimodules.experiments import saved
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.extras import missing
from functional_optimodules.experiments.grouping import simulations, split
from functional_optimodules.experiments.saved import Row, Run
from functional_optimodules.experiments.simulation import Simulation
from functional_optimodules.experiments.summary import draw, summarize, table
from functional_optimodules.experiments.sweep import Trial, set_at, swept, trials
from functional_optimodules.experiments.traffic import Traffic, local_steps
from functional_optimodules.federated.options import History
from functional_optimodules.types import Json

_OF_THE_FILE = ("seeds", "sweep")


def read_experiment(path: Path, overrides: Sequence[str] = ()) -> tuple[Experiment, dict[str, Json]]:
    """Read a file, with other values of some fields, such as `client.lrate=0.01`.

    Returns:
      The experiment, and the other values by path.

    Raises:
      As `Experiment.read` does, and for fields that are unknown.
    """
    experiment, told = Experiment.read(path), {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or name.startswith(_OF_THE_FILE):
            raise ValueError(f"--override {text}: expected a field and its value, such as client.lrate=0.01")
        if name in dict(swept(experiment.sweep)):
            raise ValueError(f"--override {text}: {name!r} is swept over")
        try:
            told[name] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):  # a word needs no quotes
            told[name] = value
        config = set_at(experiment.get_config(), name, told[name], "--override: the file")
        try:
            experiment = Experiment.from_config(config)
        except (KeyError, TypeError, ValueError) as error:
            raise type(error)(f"--override {text}: {error.args[0]}") from None
    return experiment, told


def run_experiment(
    path: Path,
    output: Path,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> list[Row]:
    """Run an experiment, or the rest of one that was cut off.

    Args:
      path: the experiment's TOML file.
      output: the folder for its results. One that holds a part of the same
        experiment is resumed, with the results that it would have had.
      overrides: other values of some fields, such as `client.lrate=0.01`, with which a
        saved run may go on.
      say: prints a line.
      progress: whether to show a progress bar over rounds, if `tqdm` is there.

    Returns:
      The history: a row for each round of each run.

    Raises:
      FileExistsError: if the folder holds a finished run, or anything else, or another
        process is at work in it.
      FloatingPointError: if a client sent values that are not finite, and there is one run.
      ModuleNotFoundError: if the data are scikit-learn's, and it is not there.
      OSError: if the disk is full, or otherwise refuses: it says what was saved before.
      ValueError: if the folder holds another experiment's state, more rounds than are asked
        for, or runs that stand at different rounds where another value is to come in.
    """
    experiment, told = read_experiment(path, overrides)
    each = trials(experiment)
    groups = _traced(each, path.parent)
    with saved.locked(output):
        runs = _begun(output, experiment, told, each, say)
        groups = [part for simulation in groups for part in _apart(simulation, runs)]
        with saved.telling_what_stays(output, _done(runs)):
            history = saved.History(output, saved.rows_of(runs))
        with _bar(groups, runs, experiment.rounds.count, progress) as shown:
            for simulation in groups:
                _run(simulation, runs, output, experiment, history, shown, say)
        _conclude(path, output, runs, say)
    return saved.rows_of(runs)


def _traced(each: Sequence[Trial], folder: Path) -> list[Simulation]:
    """Return the programs of a file; what the problem's functions do not take is said before anything is written."""
    groups = simulations(each, folder)
    for simulation in groups:
        simulation.shapes()
    return groups


def _begun(
    output: Path,
    experiment: Experiment,
    told: Mapping[str, Json],
    each: Sequence[Trial],
    say: Callable[[str], None],
) -> list[Run]:
    """Return what is saved of each run; a folder where no round is becomes this experiment's, if it can be written."""
    config, count = experiment.get_config(), experiment.rounds.count
    fresh: list[Run] = [{"values": trial.values, "rows": [], "clients": [], "state": None} for trial in each]
    if (output / "state.json").exists():
        before, runs = saved.read(output)
    elif saved.is_new(output):
        before, runs = config, []
    else:
        raise FileExistsError(f"{output} is not empty, and holds no experiment to resume: choose another folder")
    if not any(run["rows"] for run in runs):
        with saved.telling_what_stays(output, 0):
            saved.write(output, config, fresh)
        return fresh
    changes = saved.require_same(before, config, told)
    least, most = _done(runs), max(len(run["rows"]) for run in runs)
    if least >= count and (output / "summary.csv").exists():
        raise FileExistsError(f"{output} holds the finished run of this experiment: choose another folder")
    if most > count:
        raise ValueError(f"{output} holds {most} rounds of this experiment, and rounds.count={count} here: give more")
    stand = f"{least}" if least == most else f"{least} to {most}"
    changed = [key.removeprefix("rounds.") for key, _, _ in differences(before, config) if key not in saved.FREE]
    if changed and least < most:
        raise ValueError(
            f"the runs in {output} stand after {stand} rounds, and --override would change each at another one: bring "
            f"them to the same first, with --override rounds.count={most} alone"
        )
    say(f"Resuming after {stand} of {count} rounds, from {output / 'state.json'}.")
    for change in changes:
        say(f"{change} from now on.")
    (output / "summary.csv").unlink(missing_ok=True)  # it is written last, and says that all is
    return [
        {**run, "values": new["values"], "changed": [*run.get("changed", ()), *changed]}
        for run, new in zip(runs, fresh, strict=True)
    ]


def _done(runs: Sequence[Run]) -> int:
    return min(len(run["rows"]) for run in runs)


def _apart(simulation: Simulation, runs: Sequence[Run]) -> list[Simulation]:
    """Put runs that were cut off after different rounds into programs of their own."""
    return split(simulation, [len(run["rows"]) for run in _of(simulation, runs)])


def _of(simulation: Simulation, runs: Sequence[Run]) -> list[Run]:
    """Return what is saved of the runs of a program."""
    return [next(run for run in runs if run["values"] == trial.values) for trial in simulation.trials]


def _run(
    simulation: Simulation,
    runs: Sequence[Run],
    output: Path,
    experiment: Experiment,
    history: saved.History,
    shown: Callable[[int, Sequence[Row]], None],
    say: Callable[[str], None],
) -> None:
    """Run what is left of the runs of one program, and save it piece by piece."""
    mine, rounds, simulation = _of(simulation, runs), experiment.rounds, simulation._replace(folder=output)
    done = len(mine[0]["rows"])
    if done == rounds.count:
        return
    traffic = traffic_of(simulation)
    if mine[0]["state"] is None:
        state = simulation.init()
    else:
        changed = [field for run in mine for field in run.get("changed", ())]
        state = simulation.decode([run["state"] for run in mine], changed)
    while done < rounds.count:
        count = min(rounds.save_every, rounds.count - done)
        state, pieces = simulation.advance(state, count)
        new = [_rows(piece, traffic, [brick.name for brick in rounds.uplink]) for piece in pieces]
        for run, piece, rows in zip(mine, pieces, new, strict=True):
            if len(runs) == 1:
                simulation.federation.check(piece)
            elif not piece["finite"].all() and rounds.on_nonfinite == "error" and run.setdefault("finite", True):
                run["finite"] = False
                say(f"{run['values']}: a client sent values that are not finite, by round {done + count - 1}")
            run["rows"] = run["rows"] + rows
        done += count
        clients = simulation.by_client(state) if done == rounds.count else [{} for _ in mine]
        for run, payload, found in zip(mine, simulation.encode(state), clients, strict=True):
            run |= {"state": payload, "clients": _client_rows(found), "changed": []}
        with saved.telling_what_stays(output, done - count):
            saved.write(output, experiment.get_config(), runs)
        lines = [{**run["values"], **row} for run, rows in zip(mine, new, strict=True) for row in rows]
        with saved.telling_what_stays(output, done):
            history.add(lines)
        shown(count * len(mine), lines)


def traffic_of(simulation: Simulation) -> Traffic:
    """Return the bytes of a round of any of the runs of a program."""
    return Traffic.of(simulation.federation, simulation.state_shapes())


def _rows(piece: History, traffic: Traffic, uplink: Sequence[str]) -> list[Row]:
    """Return a row for each round; what participants have is averaged over those who stayed, by their examples."""
    rows = []
    said = (f"uplink/{name}/bits" for name in reversed(uplink))
    last = next((name for name in said if name in piece), None)  # what leaves the last brick is what is sent
    for index, joined in enumerate(piece["joined"]):
        weights = piece["examples"][index] * joined
        number = int(piece["round"][index])
        row: Row = {"round": number}
        bits = None
        for name, values in sorted(piece.items(), key=lambda item: item[0] != "loss"):
            value = values[index]
            if name in ("round", "participants", "examples", "finite", "joined"):
                continue
            if name == last:
                bits = float(np.sum(value * joined))
            if np.shape(value) == joined.shape and joined.ndim:
                value = np.average(np.where(joined, value, 0), weights=weights) if weights.any() else np.nan
            row["drift" if name == "uplink/drift/norm" else name] = float(value)
        stayed = int(joined.sum())
        row["participants"] = stayed
        row["bytes_up"] = traffic.bytes_up(number, stayed, bits)
        row["bytes_down"] = traffic.bytes_down(number, len(joined))
        rows.append(row)
    return rows


def _client_rows(found: History) -> list[Row]:
    names = list(found)
    return [
        {"client": number, **dict(zip(names, map(float, values), strict=True))}
        for number, values in enumerate(zip(*found.values(), strict=True))
    ]


@contextlib.contextmanager
def _bar(
    groups: Sequence[Simulation], runs: Sequence[Run], count: int, progress: bool
) -> Iterator[Callable[[int, Sequence[Row]], None]]:
    """Show progress: how many rounds a second, and the loss of the last one."""
    if not progress or missing("tqdm"):
        yield lambda count, rows: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=count * len(runs), initial=sum(len(run["rows"]) for run in runs), unit="round") as bar:

        def update(count: int, rows: Sequence[Row]) -> None:
            bar.set_postfix(loss=f"{rows[-1]['loss']:.4g}", refresh=False)
            bar.update(count)

        yield update


def _conclude(path: Path, output: Path, runs: Sequence[Run], say: Callable[[str], None]) -> None:
    """Write the tables and the curves of what has ended, and say where."""
    lines = summarize(runs)
    with saved.telling_what_stays(output, _done(runs)):
        saved.write_table(output / "clients.csv", saved.rows_of(runs, "clients"))
        if lacking := missing("matplotlib"):
            say(f"No curves were drawn: they need {lacking}")
        else:
            draw(output / "curves.png", runs, path.stem)
        saved.write_table(output / "summary.csv", lines)
    say(f"\n{table(lines)}\n\nIn {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")


def dry_run(path: Path, overrides: Sequence[str] = (), say: Callable[[str], None] = print) -> None:
    """Say what a file would run, by tracing its programs: nothing is compiled or written.

    Raises:
      As `run_experiment` does, but for what only the numbers tell.
    """
    experiment, _ = read_experiment(path, overrides)
    groups = _traced(trials(experiment), path.parent)
    count = sum(len(simulation.trials) for simulation in groups)
    say(f"{_many(count, 'run')} of {_many(experiment.rounds.count, 'round')}, in {_many(len(groups), 'program')}")
    for number, simulation in enumerate(groups):
        one, traffic = simulation.experiment, traffic_of(simulation)
        rounds, clients = one.rounds, simulation.data.num_clients
        chosen = rounds.participants or clients
        down, up = (
            sum(each(number, chosen) for number in range(rounds.count))
            for each in (traffic.bytes_down, traffic.bytes_up)
        )
        fewest, most = local_steps(one, simulation.arrays.data)
        steps = f"{fewest:g}" if fewest == most else f"{fewest:g} to {most:g}"
        say(f"\nprogram {number + 1}: {_many(len(simulation.trials), 'run')}")
        for trial in simulation.trials:
            if trial.label:
                say(f"  {trial.label}")
        say(f"  {chosen} of {clients} clients in a round, {steps} local steps each")
        say(f"  {traffic.total:,} bytes of parameters; in each run at most {down:,} bytes down and {up:,} up")
        if rounds.uplink:
            say("  what the bricks on the uplink save is not counted here: the history has it")


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
