"""An optimizer's state as JSON text and back, beside flax's msgpack: time and peak memory.

    python benchmarks/state_json.py

Adam on ResNet-50's 161 arrays, 25.6 M parameters, and on 1,000 arrays of 100. Encoding is `get_state` and
`json.dumps`; decoding is `json.loads` and `set_state`, into the optimizer that has the state and into a new one.
Flax's is `to_bytes` and `from_bytes` of the same pytree of arrays: it gives NumPy arrays, which a row more puts on
the device, where `set_state` leaves its own. All sides take turns in one process. Memory is measured in a process
for each side, as the highest rise above what was there before (for encoding the state; for decoding the text, and the
state that is to be replaced), from the counters of Linux with glibc; elsewhere it is left out. Needs flax.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from machine import processor

import functional_optimodules as fo

HERE = Path(__file__).parent
TIME_TARGET = MEMORY_TARGET = 3.0
SIDES = ("JSON", "msgpack")


def resnet50():
    """Return the shapes of ResNet-50's kernels, scales and biases, for 1,000 classes."""
    kernels, before = {"stem": (7, 7, 3, 64)}, 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            at = f"stage_{stage}/block_{block}"
            kernels |= {f"{at}/1": (1, 1, before, width), f"{at}/2": (3, 3, width, width)}
            kernels |= {f"{at}/3": (1, 1, width, 4 * width)}
            if block == 0:
                kernels[f"{at}/shortcut"] = (1, 1, before, 4 * width)
            before = 4 * width
    shapes = {"head/kernel": (before, 1000), "head/bias": (1000,)}
    for name, shape in kernels.items():
        shapes |= {f"{name}/kernel": shape, f"{name}/scale": shape[-1:], f"{name}/bias": shape[-1:]}
    return shapes


TREES = {"ResNet-50": resnet50(), "1,000 x 100": {f"layer_{index:04}": (100,) for index in range(1000)}}


def new_optimizer():
    return fo.Optimizer(1e-3, modules=["adam"])


def trained_optimizer(tree):
    """Return an Adam that has taken one step along normal gradients: its moments are no zeros."""
    rng = np.random.default_rng(0)
    gradients = {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in TREES[tree].items()}
    optimizer = new_optimizer()
    optimizer.setup(gradients)
    optimizer.run(gradients)
    return optimizer


def restore(optimizer, saved):
    optimizer.set_state(saved)
    # The public property would copy it.
    jax.block_until_ready(optimizer._session.state)


def encode(optimizer):
    return json.dumps(optimizer.get_state())


def encode_to_file(optimizer):
    with tempfile.TemporaryFile("w") as file:
        json.dump(optimizer.get_state(), file)


def decode(optimizer, text):
    restore(optimizer, json.loads(text))


class Clock:
    """Wall-clock and CPU seconds of named stages, a list each."""

    def __init__(self):
        self.wall, self.cpu = {}, {}

    def __call__(self, name, function, *args):
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*args)
        self.wall.setdefault(name, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        return result


def time_tree(tree, repeats):
    """Return the `Clock` of all stages of both sides, taken in turn."""
    optimizer = trained_optimizer(tree)
    state, clock = optimizer.state, Clock()
    require_same(optimizer, state)
    for turn in range(repeats + 1):
        clock = Clock() if turn == 1 else clock
        saved = clock("get_state", optimizer.get_state)
        text = clock("json.dumps", json.dumps, saved)
        del saved
        saved = clock("json.loads", json.loads, text)
        del text
        clock("set_state", restore, optimizer, saved)
        clock("set_state, new", restore, new_optimizer(), saved)
        del saved
        raw = clock("to_bytes", flax.serialization.to_bytes, state)
        arrays = clock("from_bytes", flax.serialization.from_bytes, state, raw)
        clock("to the device", lambda arrays: jax.block_until_ready(jax.tree.map(jnp.array, arrays)), arrays)
        del raw, arrays
    return clock


def require_same(optimizer, state):
    """Raise unless both sides give the state back, bit by bit."""
    again = new_optimizer()
    again.set_state(json.loads(json.dumps(optimizer.get_state(), allow_nan=False)))
    if again.get_state() != optimizer.get_state():
        raise RuntimeError("the JSON state did not come back as it was")
    arrays = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, arrays, state))):
        raise RuntimeError("the msgpack state did not come back as it was")


TOTALS = {
    "encode": ("get_state", "json.dumps"),
    "decode": ("json.loads", "set_state"),
    "decode, new": ("json.loads", "set_state, new"),
    "both": ("get_state", "json.dumps", "json.loads", "set_state"),
    "both, new": ("get_state", "json.dumps", "json.loads", "set_state, new"),
    "flax encode": ("to_bytes",),
    "flax decode": ("from_bytes",),
    "flax both": ("to_bytes", "from_bytes"),
    "flax both, to the device": ("to_bytes", "from_bytes", "to the device"),
}
RATIOS = (
    ("encode", "flax encode"),
    ("decode", "flax decode"),
    ("both", "flax both"),
    ("both, new", "flax both"),
    ("both", "flax both, to the device"),
)


def summed(times, stages):
    return np.sum([times[stage] for stage in stages], axis=0)


def time_lines(tree, clock):
    """Return the tables of one tree's times."""
    lines = [
        f"## {tree}: time",
        "",
        "| | median, ms | quartiles, ms | fastest, ms | CPU, ms |",
        "|---|---|---|---|---|",
    ]
    for name, stages in {**{stage: (stage,) for stage in clock.wall}, **TOTALS}.items():
        wall, cpu = 1e3 * summed(clock.wall, stages), 1e3 * summed(clock.cpu, stages)
        low, median, high = np.quantile(wall, [0.25, 0.5, 0.75])
        label = f"**{name}**" if name in TOTALS else f"`{name}`" if "device" not in name else name
        lines.append(f"| {label} | {median:.0f} | {low:.0f} to {high:.0f} | {wall.min():.0f} | {np.median(cpu):.0f} |")
    lines += ["", "| ratio | of medians | of the fastest | of CPU times | target | |", "|---|---|---|---|---|---|"]
    for one, other in RATIOS:
        pairs = [(summed(times, TOTALS[one]), summed(times, TOTALS[other])) for times in (clock.wall, clock.cpu)]
        wall, cpu = (float(np.median(ours) / np.median(theirs)) for ours, theirs in pairs)
        fastest = float(pairs[0][0].min() / pairs[0][1].min())
        target = f"<= {TIME_TARGET}" if other == "flax both" and tree == "ResNet-50" else ""
        verdict = ("reached" if wall <= TIME_TARGET else "missed") if target else ""
        lines.append(f"| {one} / {other} | {wall:.2f} | {fastest:.2f} | {cpu:.2f} | {target} | {verdict} |")
    return lines


def memory_counter(name):
    """Return `VmRSS` or `VmHWM` of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def peak_of(function, *args):
    """Return what a function returns, and by how many bytes memory rose meanwhile, at its highest."""
    gc.collect()
    # What was freed and kept for later use would be used now, and hide as much of the rise.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now what is there
    before = memory_counter("VmRSS")
    result = function(*args)
    return result, memory_counter("VmHWM") - before


def peaks(side, tree):
    """Return the bytes of the state, and the peak above what was there of encoding and of decoding."""
    optimizer = trained_optimizer(tree)
    state = optimizer.state
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if side == "msgpack":
        raw, encoding = peak_of(flax.serialization.to_bytes, state)
        _, decoding = peak_of(flax.serialization.from_bytes, state, raw)
        return {"state": nbytes, "encode": encoding, "decode": decoding}
    restore(new_optimizer(), optimizer.get_state())  # what is compiled once is no part of it
    del state
    _, streaming = peak_of(encode_to_file, optimizer)
    text, encoding = peak_of(encode, optimizer)
    _, decoding = peak_of(decode, optimizer, text)
    del optimizer
    _, afresh = peak_of(decode, new_optimizer(), text)
    return {
        "state": nbytes,
        "encode": encoding,
        "encode to a file": streaming,
        "decode": decoding,
        "decode, new": afresh,
    }


def memory_lines(tree):
    """Return the table of one tree's peaks, each side measured in a process of its own."""
    lines = [
        f"## {tree}: peak memory, in sizes of the state",
        "",
        "| side | | above what was there | with the state and the text that were there | target, above | |",
        "|---|---|---|---|---|---|",
    ]
    for side in SIDES:
        command = [sys.executable, __file__, "--peaks", side, tree]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        text = 4 / 3 if side == "JSON" else 1
        for stage in list(found)[1:]:
            above = found[stage] / found["state"]
            there = {"encode": 1, "encode to a file": 1, "decode": 1 + text, "decode, new": text}[stage]
            target = f"< {MEMORY_TARGET}" if side == "JSON" else ""
            verdict = ("reached" if above < MEMORY_TARGET else "missed") if target else ""
            lines.append(f"| {side} | {stage} | {above:.2f} | {above + there:.2f} | {target} | {verdict} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="timed passes over both sides")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--peaks", nargs=2, metavar=("SIDE", "TREE"), help="only measure the memory of one side")
    args = parser.parse_args()
    if args.peaks:
        print(json.dumps(peaks(*args.peaks)))
        return
    sections = []
    for tree in TREES:
        sections += [*time_lines(tree, time_tree(tree, args.repeats)), ""]
    if platform.libc_ver()[0] == "glibc":
        sections += memory_lines("ResNet-50")
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "msgpack", "numpy"))
    report = [
        "# An optimizer's state as JSON",
        "",
        f"Encoding and decoding Adam's state, in turn with flax's msgpack, {args.repeats} passes. The state is",
        "two moments of each parameter. CPU is the median CPU time of all threads: waiting for a core leaves it alone.",
        "",
        f"- machine: {processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}; "
        f"load at the end {os.getloadavg()[0]:.1f}",
        f"- Python {platform.python_version()}, {versions}",
        "",
        *sections,
    ]
    text = "\n".join(report).rstrip() + "\n"
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "state_json.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
