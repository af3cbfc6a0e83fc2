"""CIFAR-10 (Krizhevsky 2009) in the layouts that people have: the original archives, what comes out of them, image files."""

import io
import pickle
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.data.files import Source, cache_folder, find, given_roots, locate, verify
from lmc.data.images import Dataset, pair
from lmc.errors import DataError
from lmc.weights.state import natural

PAGE = "https://www.cs.toronto.edu/~kriz/"
FOLDERS = ("CIFAR10", "cifar10", "")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
SIDE = 32
PIXELS = 3 * SIDE * SIDE
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
ARRAY_PARTS = {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
CORE = np.empty(0).__reduce__()[0].__module__.rpartition(".")[0]  # numpy._core, or numpy.core before numpy 2
Part = tuple[np.ndarray, np.ndarray]  # images (n, 3, 32, 32) and labels (n,)
Found = tuple[Part, Part, str]  # train, test, and where they are from


def cifar10(
    root: str | Path | None = None, *, download: bool = True, flat: bool = False, progress: bool = True
) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images, `(N, 3, 32, 32)` or, with `flat=True`, `(N, 3072)`.

    Looked for in `root` (default: the environment variable `LMC_DATA`), in its folders `CIFAR10` and `cifar10`, then in
    the cache; in each as

    - the archive of the binary or of the Python version (as torchvision or as Keras calls it), of which nothing is read
      before its published checksum held;
    - the folder `cifar-10-batches-bin` or `cifar-10-batches-py` that comes out of it, or `root` may be that folder;
      pickles may hold arrays and nothing else;
    - image files, PNG or JPEG: `train/cat/0001.png` and `test/cat/0001.png`, or `train/17_cat.png` without folders of
      classes. They come in the order of their names, numbers by value. Needs Pillow: the extra `images`.

    Otherwise 170 MB are downloaded. `provenance` of the result says which it was: of unpacked files no checksum is
    published, and pixels of JPEG files are not the original ones. A subset that has every class is taken as it is. In
    float32 all images take 740 MB.

    Raises:
        DataError: a layout that is incomplete or holds something else, or what `lmc.data.files.locate` raises.
        MissingPackageError: image files without Pillow.
    """
    for place in [*given_roots(root), cache_folder()]:
        found = _archived(place) or _unpacked(place) or _pictured(place, progress)
        if found is not None:
            break
    else:
        found = read_archive(locate(BINARY.archives[0], root, download, progress), BINARY)
    train, test, provenance = found
    return Dataset(
        name="CIFAR10",
        train=pair(*train, 255, flat),
        test=pair(*test, 255, flat),
        classes=CLASSES,
        image_shape=(3, SIDE, SIDE),
        provenance=provenance,
    )


def parse_binary(content: bytes) -> Part:
    """Records of one label byte and 3072 pixel bytes (red plane, green plane, blue plane, rows from the top)."""
    if not content or len(content) % (1 + PIXELS):
        raise DataError(f"CIFAR-10 batch of {len(content)} bytes: expected a multiple of {1 + PIXELS}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + PIXELS)
    return _checked(records[:, 1:], records[:, 0])


def parse_pickle(content: bytes) -> Part:
    """The dictionary `{b"data": (n, 3072), b"labels": list}` of the Python version."""
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        data, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except DataError:
        raise
    except Exception as error:  # a pickle may be broken in any way
        raise DataError(f"CIFAR-10 batch: not a pickle with b'data' and b'labels': {error!r}") from error
    return _checked(data, labels)


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module.split(".")[0], name) in ARRAY_PARTS:
            return super().find_class(module.replace("numpy._core", "numpy.core").replace("numpy.core", CORE), name)
        raise DataError(f"CIFAR-10 batch: a pickle that asks for {module}.{name} is not one of the originals")


def _checked(data: np.ndarray, labels: np.ndarray) -> Part:
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS or labels.shape != data.shape[:1]:
        raise DataError(
            f"CIFAR-10 batch: expected bytes (n, {PIXELS}) and labels (n,), found {data.dtype} {data.shape} and labels "
            f"{labels.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0 or labels.max(initial=0) >= len(CLASSES):
        raise DataError("CIFAR-10 batch: expected labels from 0 to 9; these are those of another data set")
    return data.reshape(-1, 3, SIDE, SIDE), labels


@dataclass(frozen=True)
class Version:
    """One of the two versions that are published: its name, its folder, the files in it, who reads them, its archives."""

    name: str
    folder: str
    member: str
    parse: Callable[[bytes], Part]
    archives: tuple[Source, ...]

    @property
    def members(self) -> list[str]:
        return [self.member.format(batch) for batch in BATCHES]

    def parts(self, files: Sequence[tuple[str, bytes]]) -> tuple[Part, Part]:
        """Train and test from the contents of the six files, each with what it is called in errors."""
        batches = []
        for name, content in files:
            try:
                batches.append(self.parse(content))
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
        images, labels = zip(*batches, strict=True)
        return (np.concatenate(images[:5]), np.concatenate(labels[:5])), (images[5], labels[5])


# md5 as published on the data set's page; Keras keeps the Python version by a name of its own
_PYTHON = Source(
    "cifar-10-python.tar.gz", FOLDERS, f"{PAGE}cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"
)
_BINARY = Source(
    "cifar-10-binary.tar.gz", FOLDERS, f"{PAGE}cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530"
)
BINARY = Version("binary", "cifar-10-batches-bin", "{}.bin", parse_binary, (_BINARY,))
PYTHON = Version(
    "Python", "cifar-10-batches-py", "{}", parse_pickle, (_PYTHON, replace(_PYTHON, name="cifar-10-batches-py.tar.gz"))
)


def _archived(root: Path) -> Found | None:
    for version in (BINARY, PYTHON):
        for source in version.archives:
            path = find(source, [root])
            if path is not None:
                verify(path, source.checksum)
                return read_archive(path, version)
    return None


def read_archive(path: Path, version: Version) -> Found:
    """The six batches in an archive, whose checksum held."""
    try:
        with tarfile.open(path) as archive:
            files = [(name, archive.extractfile(f"{version.folder}/{name}")) for name in version.members]
            contents = [(f"{path}, {name}", file.read()) for name, file in files if file is not None]
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise DataError(f"{path}: not the archive of CIFAR-10: {error}") from error
    return *version.parts(contents), "the original archive"


def _unpacked(root: Path) -> Found | None:
    for version in (BINARY, PYTHON):
        for place in [*(root / folder / version.folder for folder in FOLDERS), root]:
            missing = [name for name in version.members if not (place / name).is_file()]
            if len(missing) == len(BATCHES) and not (place.is_dir() and place.name == version.folder):
                continue
            if missing:
                raise DataError(f"{place} is incomplete: {', '.join(missing)} missing; unpack the archive again")
            parts = version.parts([(str(place / name), (place / name).read_bytes()) for name in version.members])
            return *parts, f"the unpacked {version.name} version, which no checksum covers"
    return None


def _pictured(root: Path, progress: bool) -> Found | None:
    for folder in (*FOLDERS, "cifar10/cifar10", "cifar"):
        place = root / folder
        missing = [split for split in ("train", "test") if not (place / split).is_dir()]
        if len(missing) == 1 and any((place / split / CLASSES[0]).is_dir() for split in ("train", "test")):
            raise DataError(f"{place} is incomplete: there is no folder {missing[0]}")
        if not missing:
            listed = [_labelled(place / split) for split in ("train", "test")]
            kinds = sorted({KINDS[path.suffix.lower()] for files in listed for path, _ in files})
            lossy = ", which do not hold the original pixels" if "JPEG" in kinds else ""
            train, test = (_decoded(files, progress) for files in listed)
            return train, test, f"{' and '.join(kinds)} files{lossy}"
    return None


def _labelled(folder: Path) -> list[tuple[Path, int]]:
    """The image files of one split with their classes: `cat/0001.png`, `cat/17_cat.png` or `17_cat.png`."""
    files = []
    for entry in folder.iterdir():
        if entry.name.startswith(".") or not (entry.is_dir() or entry.suffix.lower() in KINDS):
            continue
        label = entry.name if entry.is_dir() else entry.stem.rpartition("_")[2]
        if label.lower() not in CLASSES:
            raise DataError(
                f"{entry}: {label!r} is no class of CIFAR-10 ({', '.join(CLASSES)}); expected images as <class>/<name>.png "
                "or <number>_<class>.png. Of the competition on Kaggle the labels of the test images were never published"
            )
        inside = entry.iterdir() if entry.is_dir() else [entry]
        images = [path for path in inside if path.suffix.lower() in KINDS and not path.name.startswith(".")]
        files += [(path, CLASSES.index(label.lower())) for path in images]
    lacking = [name for i, name in enumerate(CLASSES) if i not in {label for _, label in files}]
    if lacking:
        raise DataError(f"{folder} is incomplete: there are no images (png, jpg) of {', '.join(lacking)}")
    return sorted(files, key=lambda file: (natural(file[0].name), file[1]))


def _decoded(files: Sequence[tuple[Path, int]], progress: bool) -> Part:
    pictures = require("PIL.Image", "images")
    images = np.empty((len(files), 3, SIDE, SIDE), dtype=np.uint8)
    for i, (path, _) in enumerate(tqdm(files, desc="images", unit="image", disable=not progress)):
        try:
            with pictures.open(path) as picture:
                if picture.size != (SIDE, SIDE):
                    raise ValueError(f"expected {SIDE} x {SIDE} pixels, found {picture.width} x {picture.height}")
                images[i] = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        except (OSError, SyntaxError, ValueError) as error:  # all of which Pillow raises for broken files
            raise DataError(f"{path}: not an image of CIFAR-10: {error}") from error
    return images, np.array([label for _, label in files])
