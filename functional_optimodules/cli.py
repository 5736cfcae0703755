"""The command `functional-optimodules`.

A subcommand is one entry of `COMMANDS`: its name, its arguments and what it
runs, which returns an exit status. What only a subcommand needs is imported
where it runs, so that the others work without it.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from functional_optimodules.catalogue import KINDS, named, plugin_list, plugin_page, plugin_table, unknown
from functional_optimodules.experiments.extras import missing

_PROGRAM = "functional-optimodules"


class UsageError(Exception):
    """What was asked for cannot be done; the message says what to change."""


class Command(NamedTuple):
    """A subcommand.

    Attributes:
      name: what is typed.
      summary: what it does, in one line.
      add_arguments: declares its arguments.
      run: does it, and returns the exit status. A `UsageError` becomes a message, and status 2.
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


def _run(arguments: argparse.Namespace) -> int:
    from functional_optimodules.experiments.run import run_experiment

    try:
        run_experiment(arguments.experiment, arguments.output or Path(arguments.experiment.stem))
    except FloatingPointError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 1
    except (KeyError, ModuleNotFoundError, OSError, TypeError, ValueError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise UsageError(f"{arguments.experiment}: {reason}") from error
    return 0


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
    except UsageError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has seen enough: Python must not flush the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
