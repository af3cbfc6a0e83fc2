"""A data set in memory."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


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
