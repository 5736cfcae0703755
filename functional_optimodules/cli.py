"""The command `functional-optimodules`.

A subcommand is one entry of `COMMANDS`: its name, its arguments and what it
runs, which returns an exit status. What only a subcommand needs is imported
where it runs, so that the others work without it.
"""

import argparse
import contextlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from functional_optimodules.catalogue import KINDS, named, plugin_list, plugin_page, plugin_table, unknown
from functional_optimodules.experiments.extras import missing

_PROGRAM = "functional-optimodules"


class UsageError(Exception):
    """What was asked for cannot be done; the message says what to change."""


class Failure(Exception):
    """What was asked for was begun, and failed; the message says how."""


class Command(NamedTuple):
    """A subcommand.

    Attributes:
      name: what is typed.
      summary: what it does, in one line.
      add_arguments: declares its arguments.
      run: does it, and returns the exit status. A `UsageError` becomes a message, and status 2;
        a `Failure` one, and status 1.
    """

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="where files go (default: %(default)s)"
    )


def _demo(arguments: argparse.Namespace) -> int:
    if lacking := missing("matplotlib", "sklearn", "tqdm"):
        raise UsageError(f"the demo needs {lacking}")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the output folder {arguments.output}: {error.strerror}") from None

    from functional_optimodules.demo import run_demo

    broken = [promise.what for promise in run_demo(arguments.output) if not promise.kept]
    for what in broken:
        print(f"{_PROGRAM}: the demo did not keep its promise: {what}", file=sys.stderr)
    return 1 if broken else 0


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.toml", help="what to run")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where results go, and what is resumed (default: the file's name)"
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another value of a field, such as client.lrate=0.01, with which a saved run may go on; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run, with bytes and steps, and end")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep compiled programs there, and take those that are there already"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    usual = parser.format_help
    # What only this help needs is imported where it is asked for.
    parser.format_help = lambda: usual() + _keys_help()  # type: ignore[method-assign]


def _keys_help() -> str:
    from functional_optimodules.experiments.keys import text

    return f"\nkeys of the file:\n\n{text()}\n"


def _run(arguments: argparse.Namespace) -> int:
    from functional_optimodules.experiments.compiled import keep_programs
    from functional_optimodules.experiments.run import dry_run, run_experiment

    path = arguments.experiment
    with _saying(path):
        if arguments.dry_run:
            dry_run(path, arguments.override)
        else:
            if arguments.cache:
                keep_programs(arguments.cache)
            run_experiment(path, arguments.output or Path(path.stem), arguments.override)
    return 0


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `run` wrote to")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of all there")


def _compare(arguments: argparse.Namespace) -> int:
    from functional_optimodules.experiments.summary import compare, draw

    if arguments.plot and (lacking := missing("matplotlib")):
        raise UsageError(f"--plot needs {lacking}")
    with _saying("compare"):
        runs, text = compare(arguments.runs)
        print(text)
        if arguments.plot:
            draw(arguments.plot, runs, " and ".join(map(str, arguments.runs)))
    return 0


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="PATH", help="the folder of a checkpoint")


def _inspect(arguments: argparse.Namespace) -> int:
    from functional_optimodules.wire.checkpoint import Checkpoint

    with _saying("inspect"):
        print(Checkpoint.open(arguments.checkpoint).table())
    return 0


@contextlib.contextmanager
def _saying(what: object) -> Iterator[None]:
    """Make an error a message, which says all by itself or shows where it came from in a user's code."""
    try:
        yield
    except FloatingPointError as error:
        raise Failure(str(error)) from error
    except KeyboardInterrupt:
        raise Failure(f"{what}: interrupted: the same command goes on from what was saved") from None
    except Exception as error:
        if where := _where(error):
            raise UsageError(f"{what}: {type(error).__name__}: {error}{where}") from error
        if not isinstance(error, KeyError | ModuleNotFoundError | OSError | TypeError | ValueError):
            raise
        raise UsageError(f"{what}: {error.args[0] if isinstance(error, KeyError) else error}") from error


def _where(error: Exception) -> str:
    """Return where an error came from, if that is code which an experiment's file has named; else an empty text."""
    frames = traceback.extract_tb(error.__traceback__)
    here = next(index for index, frame in enumerate(frames) if frame.filename == __file__)
    others = str(Path(__file__).parent), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], "<"
    own = [frame for frame in frames[here:] if not frame.filename.startswith(others)]
    return "\n" + "".join(traceback.format_list(own)).rstrip() if own else ""


def _kind_or_name(word: str) -> str:
    if word not in KINDS and not named(word):
        raise argparse.ArgumentTypeError(unknown(word))
    return word


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        type=_kind_or_name,
        metavar="KIND or NAME",
        help=f"only plug-ins of one kind ({', '.join(KINDS)}), or all about the one of this name",
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables that the documentation has")


def _list(arguments: argparse.Namespace) -> int:
    kinds = [arguments.what] if arguments.what else list(KINDS)
    if not KINDS.keys() >= set(kinds):
        if arguments.markdown:
            raise UsageError(f"--markdown prints tables of {', '.join(KINDS)}, and none of {arguments.what!r} alone")
        print(plugin_page(arguments.what))
    else:
        print(plugin_table(kinds) if arguments.markdown else plugin_list(kinds))
    return 0


COMMANDS = (
    Command("demo", "train on real images, in Flax and between federated clients", _demo_arguments, _demo),
    Command("run", "run a federated experiment, or resume one", _run_arguments, _run),
    Command("compare", "set runs side by side: a table, and in what they differ", _compare_arguments, _compare),
    Command("inspect", "show what is in a server's or client's checkpoint", _inspect_arguments, _inspect),
    Command("list", "list the plug-ins with their hyper-parameters", _list_arguments, _list),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
      argv: the arguments after the program's name; those of the process by default.

    Returns:
      The exit status: 0 for success, 1 for a result that falls short, 2 for wrong usage.
    """
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Gradient-adaptation bricks for JAX.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except (UsageError, Failure) as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has seen enough: Python must not flush the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
