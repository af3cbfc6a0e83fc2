"""The handwritten digits that come with scikit-learn."""

from typing import Any

import numpy as np

from lmc.data.dataset import Dataset, pair
from lmc.errors import DataError

TRAIN = 1400


def digits(seed: int = 0, *, flat: bool = True) -> Dataset:
    """1797 handwritten digits of 8x8 pixels (UCI Optical Recognition of Handwritten Digits, test part); no download.

    Split into 1400 for training and 397 for testing with equal shares of each class; `seed` decides which. Inputs are
    `(N, 64)`, or `(N, 1, 8, 8)` with `flat=False`. Raises `DataError` when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits come with scikit-learn, which is not installed: pip install scikit-learn") from error
    source: Any = load_digits()
    images, labels = source.images[:, None], source.target
    chosen = _stratified(labels, TRAIN, seed)
    return Dataset(
        name="digits",
        train=pair(images[chosen], labels[chosen], 16, flat),
        test=pair(images[~chosen], labels[~chosen], 16, flat),
        classes=tuple("0123456789"),
        image_shape=(1, 8, 8),
        provenance=f"scikit-learn's load_digits, split by seed {seed}",
    )


def _stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A mask that chooses `count` samples, of each class the same share (to one sample), at random."""
    random = np.random.RandomState(seed)  # its stream is frozen across versions of numpy
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members] = (random.permutation(len(members)) + 0.5) / len(members)  # spread over 0 to 1
    mask = np.zeros(len(labels), dtype=bool)
    mask[np.argsort(place, kind="stable")[:count]] = True
    return mask
