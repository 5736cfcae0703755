"""An optimizer's state as JSON text and back, beside flax's msgpack: time and peak memory.

    python -m benchmarks.state.encoding

Adam on ResNet-50's 161 arrays, 25.6 M parameters, and on 1,000 arrays of 100. Encoding is `get_state` and
`json.dumps`; decoding is `json.loads` and `set_state`, into the optimizer that has the state and into a new one.
Flax's is `to_bytes` and `from_bytes` of the same pytree of arrays: it gives NumPy arrays, which a row more puts on
the device, where `set_state` leaves its own. All sides take turns in one process. Memory is measured in a process
for each side, as the highest rise above what was there before (for encoding the state; for decoding the text, and the
state that is to be replaced), from the counters of Linux with glibc; elsewhere it is left out. Needs flax.
"""

import ctypes
import gc
import json
import platform
import tempfile
import time

import flax.serialization
import jax
import numpy as np

import functional_optimodules as fo
from benchmarks.peak import alone, peak_of
from benchmarks.report import parse_arguments, table, write
from benchmarks.step.trees import TREES, normal

TIME_TARGET = MEMORY_TARGET = 3.0
SIDES = ("JSON", "msgpack")


def new_optimizer():
    return fo.Optimizer(1e-3, modules=["adam"])


def trained_optimizer(tree):
    """Return an Adam that has taken one step along normal gradients: its moments are no zeros."""
    gradients, optimizer = normal(TREES[tree]), new_optimizer()
    optimizer.setup(gradients)
    optimizer.run(gradients)
    return optimizer


def restore(optimizer, saved):
    optimizer.set_state(saved)
    # The public property would copy it.
    jax.block_until_ready(optimizer._session.memory.state)


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
        clock("to the device", lambda arrays: jax.block_until_ready(jax.tree.map(jax.numpy.array, arrays)), arrays)
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


def time_lines(tree, repeats):
    """Return the tables of one tree's times."""
    clock, rows, ratios = time_tree(tree, repeats), [], []
    for name, stages in {**{stage: (stage,) for stage in clock.wall}, **TOTALS}.items():
        wall, cpu = 1e3 * summed(clock.wall, stages), 1e3 * summed(clock.cpu, stages)
        low, median, high = np.quantile(wall, [0.25, 0.5, 0.75])
        label = f"**{name}**" if name in TOTALS else f"`{name}`" if "device" not in name else name
        numbers = (f"{median:.0f}", f"{low:.0f} to {high:.0f}", f"{wall.min():.0f}", f"{np.median(cpu):.0f}")
        rows.append((label, *numbers))
    for one, other in RATIOS:
        pairs = [(summed(times, TOTALS[one]), summed(times, TOTALS[other])) for times in (clock.wall, clock.cpu)]
        wall, cpu = (float(np.median(ours) / np.median(theirs)) for ours, theirs in pairs)
        fastest = float(pairs[0][0].min() / pairs[0][1].min())
        target = f"<= {TIME_TARGET}" if other == "flax both" and tree == "ResNet-50" else ""
        verdict = ("reached" if wall <= TIME_TARGET else "missed") if target else ""
        ratios.append((f"{one} / {other}", f"{wall:.2f}", f"{fastest:.2f}", f"{cpu:.2f}", target, verdict))
    header = ("", "median, ms", "quartiles, ms", "fastest, ms", "CPU, ms")
    titles = ("ratio", "of medians", "of the fastest", "of CPU times", "target", "")
    return [f"## {tree}: time", "", *table(header, rows), "", *table(titles, ratios)]


def peak_trimmed(function, *args):
    """Return what a function returns, and by how many bytes memory rose meanwhile, at its highest."""
    gc.collect()
    # What was freed and kept for later use would be used now, and hide as much of the rise.
    ctypes.CDLL(None).malloc_trim(0)
    return peak_of(function, *args)


def peaks(side, tree):
    """Return the bytes of the state, and the peak above what was there of encoding and of decoding."""
    optimizer = trained_optimizer(tree)
    state = optimizer.state
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if side == "msgpack":
        raw, encoding = peak_trimmed(flax.serialization.to_bytes, state)
        _, decoding = peak_trimmed(flax.serialization.from_bytes, state, raw)
        return {"state": nbytes, "encode": encoding, "decode": decoding}
    restore(new_optimizer(), optimizer.get_state())  # what is compiled once is no part of it
    del state
    _, streaming = peak_trimmed(encode_to_file, optimizer)
    text, encoding = peak_trimmed(encode, optimizer)
    _, decoding = peak_trimmed(decode, optimizer, text)
    del optimizer
    _, afresh = peak_trimmed(decode, new_optimizer(), text)
    return {
        "state": nbytes,
        "encode": encoding,
        "encode to a file": streaming,
        "decode": decoding,
        "decode, new": afresh,
    }


def memory_lines(tree):
    """Return the table of one tree's peaks, each side measured in a process of its own."""
    rows = []
    for side in SIDES:
        found = alone(peaks, side, tree)
        text = 4 / 3 if side == "JSON" else 1
        for stage in list(found)[1:]:
            above = found[stage] / found["state"]
            there = {"encode": 1, "encode to a file": 1, "decode": 1 + text, "decode, new": text}[stage]
            target = f"< {MEMORY_TARGET}" if side == "JSON" else ""
            verdict = ("reached" if above < MEMORY_TARGET else "missed") if target else ""
            rows.append((side, stage, f"{above:.2f}", f"{above + there:.2f}", target, verdict))
    header = (
        "side",
        "",
        "above what was there",
        "with the state and the text that were there",
        "target, above",
        "",
    )
    return [f"## {tree}: peak memory, in sizes of the state", "", *table(header, rows)]


def main():
    trees = ("ResNet-50", "1,000 x 100")
    args = parse_arguments(__doc__, trees=(trees, "only these trees"), repeats=(25, "timed passes over both sides"))
    sections = [time_lines(tree, args.repeats) for tree in args.trees]
    if platform.libc_ver()[0] == "glibc":
        sections.append(memory_lines(args.trees[0]))
    intro = [
        f"Encoding and decoding Adam's state, in turn with flax's msgpack, {args.repeats} passes. The state is",
        "two moments of each parameter. CPU is the median CPU time of all threads: waiting for a core leaves it alone.",
    ]
    packages = ("jax", "flax", "msgpack", "numpy")
    path = args.results / "state" / "encoding.md"
    write(path, "An optimizer's state as JSON", intro, *sections, packages=packages)


if __name__ == "__main__":
    main()
