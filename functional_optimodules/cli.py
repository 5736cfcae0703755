"""The command `functional-optimodules`.

A subcommand is one entry of `COMMANDS`: its name, its arguments and what it
runs, which returns an exit status. What only a subcommand needs is imported
where it runs, so that the others work without it.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from functional_optimodules.catalogue import KINDS, plugin_list, plugin_table

_PROGRAM = "functional-optimodules"
_DEMO_PACKAGES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


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


def _require_packages(what: str) -> None:
    missing = [project for module, project in _DEMO_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"{what} needs {' and '.join(missing)}: install with `pip install 'functional_optimodules[demo]'`, "
            "or from a clone of the repository with `pip install '.[demo]'`"
        )


def _demo(arguments: argparse.Namespace) -> int:
    _require_packages("the demo")
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
    _require_packages("an experiment")
    from functional_optimodules.experiments.run import run_experiment

    output = arguments.output or Path(arguments.experiment.stem)
    try:
        run_experiment(arguments.experiment, output)
    except FloatingPointError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyError as error:
        raise UsageError(f"{arguments.experiment}: {error.args[0]}") from error
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"{arguments.experiment}: {error}") from error
    return 0


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=tuple(KINDS), help="only plug-ins of this kind")
    parser.add_argument("--markdown", action="store_true", help="print the table that the README embeds")


def _list(arguments: argparse.Namespace) -> int:
    kinds = [arguments.kind] if arguments.kind else list(KINDS)
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
