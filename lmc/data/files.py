"""Finding, fetching and checking the original files of a data set. Nothing is parsed before its checksum held."""

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from lmc.core.progress import tqdm
from lmc.errors import DataError

VARIABLE = "LMC_DATA"


@dataclass(frozen=True)
class Source:
    """One original file: where it lies below a root (the layouts of torchvision), where it comes from, its checksum."""

    name: str
    folders: tuple[str, ...]  # looked into in this order, "" being the root itself; downloads go to the first
    url: str
    checksum: str  # "sha256:..." or "md5:...", whichever its makers publish


def cache_folder() -> Path:
    """The folder of downloads: `lmc` in the user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmc"


def locate(source: Source, root: str | Path | None, download: bool, progress: bool = True) -> Path:
    """Path of a checked copy of `source`: below `root`, else below `LMC_DATA`, else in the cache, else downloaded.

    Raises `DataError` for a root that does not exist, a file that fails its checksum, and a file that is nowhere
    and may not or cannot be downloaded.
    """
    roots = [*given_roots(root), cache_folder()]
    path = find(source, roots)
    if path is None:
        if not download:
            raise DataError(f"{source.name} is not there and download=False. {_advice(source, roots)}")
        path = cache_folder() / source.folders[0] / source.name
        _download(source, path, progress, roots)
    else:
        verify(path, source.checksum)
    return path


def find(source: Source, roots: Iterable[Path]) -> Path | None:
    """The first copy of `source` below any of `roots`, not yet checked; None when there is none."""
    for root in roots:
        for folder in source.folders:
            path = root / folder / source.name
            if path.is_file():
                return path
    return None


def verify(path: Path, checksum: str) -> None:
    """Raise `DataError` unless the file has this checksum ("sha256:..." or "md5:...")."""
    algorithm, expected = checksum.split(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise DataError(
            f"{path}: expected {algorithm} {expected}, found {found} ({path.stat().st_size} bytes): the file is "
            "truncated or changed; replace it by the original"
        )


def given_roots(root: str | Path | None) -> list[Path]:
    given = os.environ.get(VARIABLE) if root is None else root
    if not given:
        return []
    path = Path(given).expanduser()
    if not path.is_dir():
        raise DataError(f"{'root' if root is not None else VARIABLE}={str(given)!r} is not a folder")
    return [path]


def _download(source: Source, path: Path, progress: bool, roots: list[Path]) -> None:
    """Fetch into a temporary file beside `path`, check it, and only then give it its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DataError(f"could not write into {path.parent}: {error}. {_advice(source, roots)}") from error
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(source.url, timeout=30) as response:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, desc=source.name, unit="B", unit_scale=True, disable=not progress) as bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
        verify(partial, source.checksum)
        os.replace(partial, path)
    except (OSError, HTTPException) as error:  # urllib's own errors are OSErrors
        raise DataError(f"could not download {source.url}: {error}. {_advice(source, roots)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _advice(source: Source, roots: list[Path]) -> str:
    places = ", ".join(str(root / folder / source.name) for root in roots for folder in source.folders)
    return (
        f"Fetch {source.url} on a machine that is online and put it into one of the places looked at ({places}), "
        f"or name the folder that has it by root= or the environment variable {VARIABLE}."
    )
