"""The compiler's ways: what is written so that XLA compiles it well, and would be written more simply otherwise.

Each is kept for as long as its benchmark shows the need. All were last needed with JAX 0.10.2.

    long_axis_last   on CPU, `python -m benchmarks.rounds.averaging`: rounds of logistic regression
    behind_branch    on CPU, `python -m benchmarks.rounds.averaging`: a bank of 10,000 clients
    pieces           on CPU, `python -m benchmarks.step.compile`: a packed network of 1,000 layers
    end_to_end       for a TPU, `python -m benchmarks.step.tpu`: vectors packed inside of a step
    norm             on CPU, `python -m benchmarks.step.training`: clipping by the global norm

What holds for one platform is chosen when a program is lowered for it, and not by the backend at hand.
"""

import itertools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

T = TypeVar("T")
Out = TypeVar("Out")

# Measured from 2 to 128 columns, with 20 and 128 examples: beyond 32 it depends on both.
_NARROW = 32


def long_axis_last(matrix: jax.Array) -> jax.Array:
    """Have a product that is a tall, narrow matrix written with its long axis last; its values stay, to rounding.

    On CPU a product of matrices is vectorised along the last axis of its result: of
    784 x 10 numbers it takes three times as long as of 10 x 784. What is gained is lost
    again where the short axis is beyond some vectors' width.
    """
    if matrix.ndim != 2 or not 1 < matrix.shape[1] <= _NARROW or matrix.shape[1] >= matrix.shape[0]:
        return matrix
    return jax.lax.platform_dependent(
        matrix, cpu=lambda array: jax.lax.optimization_barrier(array.T).T, default=lambda array: array
    )


# Up to here, slices at offsets that the compiler knows are compiled as fast as others.
_FEW_SLICES = 32


def pieces(buffer: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """Cut a buffer into pieces of these sizes along its last axis.

    XLA:CPU compiles a kernel for each offset that it knows. It does not look into a
    branch, so that of offsets that come out of one it knows nothing, and the
    kernels of pieces of one size are one. Elsewhere a branch would wait for the host.
    """

    def split(buffer: jax.Array) -> list[jax.Array]:
        return list(lax.split(buffer, sizes, buffer.ndim - 1))

    def slice_at_unknown(buffer: jax.Array) -> list[jax.Array]:
        starts = np.cumsum([0, *sizes[:-1]], dtype=np.uint32)
        offsets = lax.cond(
            lax.optimization_barrier(jnp.array(True)), lambda: list(starts), lambda: [np.uint32(0)] * len(sizes)
        )
        lead = buffer.shape[:-1]
        first = (jnp.uint32(0),) * len(lead)
        return [lax.dynamic_slice(buffer, (*first, at), (*lead, size)) for at, size in zip(offsets, sizes, strict=True)]

    if len(sizes) <= _FEW_SLICES:
        return split(buffer)
    return lax.platform_dependent(buffer, cpu=slice_at_unknown, default=split)


# The numbers in a row of a TPU's tiles.
_LANES = 128


def end_to_end(vectors: list[jax.Array]) -> jax.Array:
    """Lay vectors, behind any leading axes, end to end.

    XLA:TPU writes each vector that fills whole rows of a tile into its place by a kernel of
    its own, and other vectors in one kernel all together. As the rows of a matrix, those
    of one size are written together too.
    """
    axis = vectors[0].ndim - 1

    def by_rows(vectors: list[jax.Array]) -> jax.Array:
        parts = []
        for size, run in itertools.groupby(vectors, key=lambda vector: vector.shape[axis]):
            same = list(run)
            if size % _LANES or len(same) == 1:
                parts += same
            else:
                matrix = lax.concatenate([lax.expand_dims(vector, (axis,)) for vector in same], axis)
                parts.append(lax.collapse(matrix, axis))
        return at_once(parts)

    def at_once(vectors: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(vectors, axis=axis)

    if sum(vector.shape[axis] % _LANES == 0 for vector in vectors) <= 1:
        return at_once(vectors)
    return lax.platform_dependent(vectors, tpu=by_rows, default=at_once)


def norm(total: jax.Array) -> jax.Array:
    """Return the root of a sum of squares, > 0 also for 0.

    XLA computes again for each parameter what is cheap, and all that leads up to it:
    nothing may follow the root, which is not cheap.
    """
    return jnp.sqrt(jnp.where(total > 0, total, jnp.finfo(total.dtype).tiny))


def behind_branch(always: jax.Array, function: Callable[[T], Out], never: Callable[[T], Out], operand: T) -> Out:
    """Return `function(operand)` by a branch, whose condition always holds, and XLA cannot know that.

    A loop that reads a row of an array, works on it and writes it back may be compiled
    to read the row once more after it is written, and then copies the whole array each
    time. XLA does not look into a branch: what goes in is read before it.
    """
    return jax.lax.cond(always, function, never, operand)
