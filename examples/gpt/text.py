"""Text that every Python has: the topics of the language's reference, some 500 kB of English and code."""

from pydoc_data.topics import topics

import numpy as np

HELD_OUT = 0.1


def read() -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes to train on, and those at the end that are held out, as uint8 arrays."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return tuple(np.split(np.frombuffer(text, np.uint8), [round(len(text) * (1 - HELD_OUT))]))


def batch(text: np.ndarray, context: int, size: int, step: int) -> np.ndarray:
    """Return the batch of a step, int32 of shape `(size, context + 1)`, which depends on nothing else."""
    starts = np.random.default_rng([0, step]).integers(len(text) - context, size=size)
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)
