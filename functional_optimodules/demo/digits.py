"""The 1,797 images of handwritten digits that ship with scikit-learn, 8 x 8 pixels each."""

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

TEST_IMAGES = 360


class Images(NamedTuple):
    """Images and what they show.

    Attributes:
      pixels: float32 [images, 64], from 0 to 1.
      labels: int32 [images], from 0 to 9.
    """

    pixels: Any
    labels: Any

    def batch(self, step: int, size: int, seed: int = 0) -> "Images":
        """Return the batch of a step: each epoch is shuffled anew, by its number.

        It depends on the step alone, so that a run may be resumed at any.
        """
        epoch, position = divmod(step, len(self.labels) // size)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.labels))
        return self.take(order[position * size : (position + 1) * size])

    def take(self, indices: Any) -> "Images":
        """Return the images of these indices."""
        return Images(self.pixels[indices], self.labels[indices])


def load() -> tuple[Images, Images]:
    """Return the images to train on and those to test on."""
    data = load_digits()
    images = Images(data.data.astype(np.float32) / 16, data.target.astype(np.int32))
    order = np.random.default_rng(0).permutation(len(images.labels))
    return images.take(order[TEST_IMAGES:]), images.take(order[:TEST_IMAGES])


def two_digits_each(images: Images) -> dict[str, Images]:
    """Deal images to ten clients, of whom each sees only its own digit and the next one."""
    halves = [np.array_split(np.flatnonzero(images.labels == digit), 2) for digit in range(10)]
    return {
        f"client-{digit}": images.take(np.concatenate([halves[digit][0], halves[(digit + 1) % 10][1]]))
        for digit in range(10)
    }
