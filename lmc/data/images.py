"""A data set in memory: the handwritten digits that come with scikit-learn; MNIST (LeCun, Cortes, Burges) and
Fashion-MNIST (Xiao, Rasul, Vollgraf 2017) from their original files."""

import gzip
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc.data.files import Source, locate
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


FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
MNIST_SHA256 = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
FASHION_SHA256 = (
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def mnist(
    root: str | Path | None = None, *, download: bool = True, flat: bool = True, progress: bool = True
) -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten digits, `(N, 784)` or, with `flat=False`, `(N, 1, 28, 28)`.

    The four idx.gz files are looked for in `root` (default: the environment variable `LMC_DATA`), in its folder
    `MNIST/raw`, and in the cache; otherwise 12 MB are downloaded. Raises `DataError`, see `lmc.data.files.locate`.
    """
    url = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    return _load("MNIST", url, MNIST_SHA256, tuple("0123456789"), root, download, flat, progress)


def fashion_mnist(
    root: str | Path | None = None, *, download: bool = True, flat: bool = True, progress: bool = True
) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 garments, `(N, 784)` or, with `flat=False`, `(N, 1, 28, 28)`.

    As `mnist`, in the folder `FashionMNIST/raw`; 31 MB otherwise.
    """
    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    return _load("FashionMNIST", url, FASHION_SHA256, GARMENTS, root, download, flat, progress)


def _load(
    name: str,
    url: str,
    checksums: tuple[str, ...],
    classes: tuple[str, ...],
    root: str | Path | None,
    download: bool,
    flat: bool,
    progress: bool,
) -> Dataset:
    # The folder of the data set comes first: the files of both sets have the same names.
    folders = (f"{name}/raw", "raw", "")
    sources = [
        Source(file, folders, url + file, f"sha256:{checksum}") for file, checksum in zip(FILES, checksums, strict=True)
    ]
    paths = [locate(source, root, download, progress) for source in sources]
    arrays = [read_idx(path) for path in paths]
    return Dataset(
        name=name,
        train=pair(arrays[0][:, None], arrays[1], 255, flat),
        test=pair(arrays[2][:, None], arrays[3], 255, flat),
        classes=classes,
        image_shape=(1, 28, 28),
        provenance="the original idx files",
    )


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in a gzipped idx file: magic 0, 0, type 8, rank; sizes as big-endian int32; then the values.

    Raises `DataError` when it is anything else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: expected an idx file of unsigned bytes (00 00 08), found {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], dtype=">i4").astype(int)
    if len(shape) != content[3] or len(content) - start != math.prod(shape):
        raise DataError(f"{path}: {len(content)} bytes do not hold an idx array of shape {tuple(shape.tolist())}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
