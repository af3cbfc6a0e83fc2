"""CIFAR-10 (Krizhevsky 2009) from one of its original archives."""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmc.data.dataset import Dataset, pair
from lmc.data.files import Source, cache_folder, find, given_roots, locate, verify
from lmc.errors import DataError

PAGE = "https://www.cs.toronto.edu/~kriz/"
FOLDERS = ("CIFAR10", "cifar10", "")
# md5 as published on the data set's page
BINARY = Source(
    "cifar-10-binary.tar.gz", FOLDERS, f"{PAGE}cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530"
)
PYTHON = Source(
    "cifar-10-python.tar.gz", FOLDERS, f"{PAGE}cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
PIXELS = 3 * 32 * 32
ARRAY_PARTS = {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

Parser = Callable[[bytes], tuple[np.ndarray, np.ndarray]]


def cifar10(
    root: str | Path | None = None, *, download: bool = True, flat: bool = False, progress: bool = True
) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images, `(N, 3, 32, 32)` or, with `flat=True`, `(N, 3072)`.

    The archive of the binary version, or the one of the Python version that torchvision keeps, is looked for in
    `root` (default: the environment variable `LMC_DATA`), in its folder `CIFAR10`, and in the cache; otherwise
    170 MB are downloaded. Nothing of an archive is read before its checksum held. In float32 the images take 740 MB.
    Raises `DataError`, see `lmc.data.files.locate`.
    """
    roots = [*given_roots(root), cache_folder()]
    python = find(PYTHON, roots)
    if python is not None and find(BINARY, roots) is None:
        verify(python, PYTHON.checksum)
        batches = read_archive(python, "cifar-10-batches-py/{}", parse_pickle)
    else:
        batches = read_archive(locate(BINARY, root, download, progress), "cifar-10-batches-bin/{}.bin", parse_binary)
    images, labels = zip(*batches, strict=True)
    return Dataset(
        name="CIFAR10",
        train=pair(np.concatenate(images[:5]), np.concatenate(labels[:5]), 255, flat),
        test=pair(images[5], labels[5], 255, flat),
        classes=CLASSES,
        image_shape=(3, 32, 32),
        provenance="the original archive",
    )


def read_archive(path: Path, member: str, parse: Parser) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images `(n, 3, 32, 32)` and labels `(n,)` of each of the six batches; `member` names them, with `{}`."""
    try:
        with tarfile.open(path) as archive:
            files = [archive.extractfile(member.format(batch)) for batch in BATCHES]
            return [parse(file.read()) for file in files if file is not None]
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise DataError(f"{path}: not the archive of CIFAR-10: {error}") from error


def parse_binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3072 pixel bytes (red plane, green plane, blue plane, rows from the top)."""
    if not content or len(content) % (1 + PIXELS):
        raise DataError(f"CIFAR-10 batch of {len(content)} bytes: expected a multiple of {1 + PIXELS}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + PIXELS)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def parse_pickle(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The dictionary `{b"data": (n, 3072), b"labels": list}` of the Python version."""
    batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    return np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"])


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module.split(".")[0], name) in ARRAY_PARTS:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise DataError(f"CIFAR-10 batch: a pickle that asks for {module}.{name} is not one of the originals")
