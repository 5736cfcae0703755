"""Sides timed in turn, and the rows of tables that say what they took."""

import gc
import time

import jax
import numpy as np

TIMES = ("tree", "side", "median, ms", "quartiles, ms", "fastest, ms", "passes")
RATIOS = ("tree", "ratio", "of medians", "90 % interval", "of the fastest", "target", "")


def interleave(sides, seconds=20.0, least=15, most=400):
    """Call each side in turn, pass after pass, and return the seconds that each call took.

    The order is drawn anew for each pass: memory that one side frees is given back while the next one runs.

    Args:
      sides: `{name: function}`; a function returns what to wait for, or the seconds
        that it took by its own clock, as a float.
      seconds: about how long to go on.
      least: at least so many passes, however long they take.
      most: at most so many passes.
    """
    rng, times = np.random.default_rng(0), {name: [] for name in sides}
    for _ in range(2):
        for side in sides.values():
            jax.block_until_ready(side())
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    try:
        for turn in range(most):
            if turn >= least and time.perf_counter() - begin > seconds:
                break
            for name in rng.permutation(list(sides)):
                start = time.perf_counter()
                result = sides[name]()
                if not isinstance(result, float):
                    jax.block_until_ready(result)
                    result = time.perf_counter() - start
                times[name].append(result)
    finally:
        gc.enable()
    return {name: np.array(taken) for name, taken in times.items()}


def ratio(one, other, draws=2000):
    """Return the ratio of the medians of two sides, and the 90 % interval of it, by resampling passes."""
    picks = np.random.default_rng(0).integers(len(one), size=(draws, len(one)))
    resampled = np.median(one[picks], axis=1) / np.median(other[picks], axis=1)
    low, high = np.quantile(resampled, [0.05, 0.95])
    return float(np.median(one) / np.median(other)), float(low), float(high)


def time_rows(tree, times):
    """Return a row of `TIMES` for each side."""
    rows = []
    for name, taken in times.items():
        low, median, high = 1e3 * np.quantile(taken, [0.25, 0.5, 0.75])
        spread = f"{low:.3g} to {high:.3g}"
        rows.append((tree, name, f"{median:.3g}", spread, f"{1e3 * taken.min():.3g}", len(taken)))
    return rows


def ratio_row(tree, times, one, other, target="", reached=None):
    """Return a row of `RATIOS`: how many times longer one side takes than another.

    Args:
      reached: a function of the ratio that says whether the target is reached.
    """
    median, low, high = ratio(times[one], times[other])
    fastest = times[one].min() / times[other].min()
    verdict = "" if reached is None else "reached" if reached(median) else "missed"
    row = (f"{one} / {other}", f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{fastest:.2f}", target, verdict)
    return (tree, *row)


def at_least(target):
    return {"target": f">= {target}", "reached": lambda value: value >= target}


def at_most(target):
    return {"target": f"<= {target:.3g}", "reached": lambda value: value <= target}


def within_control(times, one, other, factor=1.02):
    """Return the target "no slower than `factor` times, beyond what a side differs from itself"."""
    _, low, high = ratio(times[one], times[other])
    return at_most(factor * max(high, 1 / low))
