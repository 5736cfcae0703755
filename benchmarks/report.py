"""The options that the scripts share, and the Markdown that they write."""

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "results"
SECONDS = (20.0, "about how long to time each row of a table")


def parse_arguments(doc, **options):
    """Parse the options of a script, and `--results`.

    Args:
      options: the default and the help of each. Of a tuple, some may be chosen; a bool is a flag.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in {**options, "results": (RESULTS, "the folder to write to")}.items():
        if isinstance(default, bool):
            how = {"action": "store_true"}
        elif isinstance(default, tuple):
            how = {"nargs": "+", "choices": default, "type": type(default[0])}
        else:
            how = {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **how)
    return parser.parse_args()


def table(header, rows):
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def section(title, measure, cases, *headers):
    """Measure case after case, printing the rows, and return the lines of a section with a table for each header.

    Args:
      measure: a function of a case that returns the rows of each table.
    """
    tables = [[] for _ in headers]
    for case in cases:
        for rows, new in zip(tables, measure(case), strict=True):
            rows += new
            print(*new, sep="\n", flush=True)
    return [f"## {title}", *(line for parts in zip(headers, tables, strict=True) for line in ("", *table(*parts)))]


def conditions(packages=("jax", "jaxlib", "optax", "numpy")):
    """Return what the numbers hold for: the machine, its load, the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    device = jax.devices()[0]
    return [
        f"- machine: {processor}, {cores} cores, {platform.system()}; load at the end {os.getloadavg()[0]:.1f}",
        f"- device: {device.device_kind} ({device.platform})",
        f"- Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}",
    ]


def write(path, title, intro, *sections, **options):
    """Write a report, and print it."""
    parts = [f"# {title}", "", *intro, "", *conditions(**options)]
    for lines in sections:
        parts += ["", *lines]
    text = "\n".join(parts) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)
