"""A data set in memory, and the handwritten digits that come with scikit-learn."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc.errors import DataError

TRAIN = 1400


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """Images and their classes, split into train and test; each part is a pair `(inputs, targets)`.

    inputs: float32 between 0 and 1, `(N, C*H*W)` or `(N, C, H, W)`; targets: int64 `(N,)`, numbers into `classes`;
    image_shape: `(C, H, W)` of each input, whether flat or not; provenance: where the data came from.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    provenance: str

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on another device."""
        return replace(
            self,
            train=(self.train[0].to(device), self.train[1].to(device)),
            test=(self.test[0].to(device), self.test[1].to(device)),
        )

    def __repr__(self) -> str:
        inputs = self.train[0]
        return (
            f"Dataset({self.name}: {len(inputs)} train, {len(self.test[0])} test; inputs {tuple(inputs.shape[1:])} "
            f"on {inputs.device}, {len(self.classes)} classes; {self.provenance})"
        )


def pair(images: np.ndarray, labels: np.ndarray, highest: int, flat: bool) -> tuple[Tensor, Tensor]:
    """Tensors from images `(N, C, H, W)` with values 0 to `highest` and labels `(N,)`."""
    inputs = torch.from_numpy(np.asarray(images, dtype=np.float32) / highest)
    return (inputs.flatten(1) if flat else inputs), torch.from_numpy(np.asarray(labels, dtype=np.int64))


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
