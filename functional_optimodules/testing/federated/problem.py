"""Small problems that are known exactly: a quadratic for each client.

    f_i(y) = mean over batches k of 1/2 (y - b_ik)^T A_i (y - b_ik)

All that is random elsewhere is given here: step k of a client's round, counted
from 0, takes batch k modulo the number of batches. With one batch, gradients are
those of all of the client's data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Sheared and unlike one another, so that no algorithm's mistakes cancel out; eigenvalues between 0.5 and 2.5.
_SCALES = np.array([[1.0, 0.6, 1.4], [0.5, 1.5, 0.8], [1.8, 0.9, 0.5], [0.7, 1.2, 1.6], [1.1, 0.5, 1.0]])
_SHEARS = np.array([[1.0, -1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
_CENTRES = np.array([[2.0, -1.0, 0.5], [-1.5, 1.0, 2.5], [0.5, 3.0, -2.0], [-2.5, -2.0, 1.0], [1.0, 0.6, -3.0]])
_SPREAD = np.array([0.6, -0.9, 0.4])
_START = np.array([1.5, -2.0, 1.2])


@dataclass(frozen=True)
class Problem:
    """Clients' quadratics, and where the parameters start.

    Attributes:
      curvatures: A_i, of shape (clients, dimension, dimension).
      centres: b_ik, of shape (clients, batches, dimension).
      weights: whole numbers, of shape (clients,): how many examples each client has, hence its weight in a mean.
      start: the parameters before the first round, of shape (dimension,).
    """

    curvatures: Array
    centres: Array
    weights: Array
    start: Array

    @property
    def num_clients(self) -> int:
        """N, the number of all clients."""
        return len(self.centres)

    @property
    def num_batches(self) -> int:
        """How many batches each client has."""
        return self.centres.shape[1]

    def gradient(self, client: int, y: Array, step: int | None = None) -> Array:
        """Return A_i (y - b_ik), k the batch of that local step; without a step, that of all of the client's data."""
        centres = self.centres[client]
        centre = centres.mean(axis=0) if step is None else centres[step % self.num_batches]
        return np.asarray(self.curvatures[client] @ (y - centre))

    def loss(self, client: int, y: Array) -> float:
        """Return f_i(y)."""
        away = y - self.centres[client]
        return float(np.mean(np.einsum("kd,de,ke->k", away, self.curvatures[client], away)) / 2)

    def optimum(self, weights: Sequence[float] | Array | None = None) -> Array:
        """Return (sum w A)^-1 sum w A b, where the mean of the f_i is least, by the problem's weights unless given."""
        each = self.weights if weights is None else np.asarray(weights, np.float64)
        total = np.einsum("n,nde->de", each, self.curvatures)
        pull = np.einsum("n,nde,ne->d", each, self.curvatures, self.centres.mean(axis=1))
        return np.asarray(np.linalg.solve(total, pull))


def quadratics(
    weights: Sequence[int] = (1, 1, 1, 1, 1), num_batches: int = 1, start: Sequence[float] | Array = _START
) -> Problem:
    """Return the five clients' problem in three dimensions that the scenarios use."""
    shears = 0.25 * _SHEARS[:, :, None] * _SHEARS[:, None, :]
    shift = np.arange(num_batches) - (num_batches - 1) / 2
    return Problem(
        curvatures=_SCALES[:, :, None] * np.eye(3) + shears,
        centres=_CENTRES[:, None, :] + shift[:, None] * _SPREAD * (1 + np.arange(5.0)[:, None, None]) / 2,
        weights=np.asarray(weights, np.float64),
        start=np.array(start, np.float64),
    )
