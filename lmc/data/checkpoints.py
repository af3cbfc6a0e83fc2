"""The stored checkpoints under `data/`, which an installed package has in `lmc/data/stored`: small networks trained by
`tools/make_checkpoints.py`.

Trained losses differ between machines in the last digits and then in the first ones; evaluations of stored
weights do not. So the notebooks evaluate these.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import nn

from lmc.data.files import verify
from lmc.errors import DataError, InputError
from lmc.weights import StateDict
from lmc.weights.state import natural

MANIFEST = "manifest.json"
REMEDY = "Stored checkpoints come with the repository and with the installed package; others are found by folder="


@dataclass(frozen=True, repr=False, eq=False)
class CheckpointSet(Sequence[StateDict]):
    """Stored weight sets of one architecture, float32, on the CPU; `a, b = checkpoint(...)` unpacks a pair.

    `seeds[i]` and `epochs[i]` say which network `weights[i]` is, and when. `manifest` holds the rest: recipe, data,
    versions, losses, checksums, and the command that makes the files again. `folder` is where all this lies.
    """

    name: str
    weights: tuple[StateDict, ...]
    seeds: tuple[int, ...]
    epochs: tuple[int, ...]
    manifest: dict[str, Any]
    folder: Path

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index):
        return self.weights[index]

    def at(self, seed: int, epoch: int) -> StateDict:
        """The weights of one seed after one epoch; `InputError` when they are not stored."""
        stored = list(zip(self.seeds, self.epochs, strict=True))
        if (seed, epoch) not in stored:
            raise InputError(f"{self.name} has no seed {seed} at epoch {epoch}; stored (seed, epoch): {stored}")
        return self.weights[stored.index((seed, epoch))]

    def model(self) -> nn.Module:
        """A new module of this architecture, in eval mode, with the first weight set loaded."""
        import lmc.models

        made_by = self.manifest["model"]
        with torch.random.fork_rng(devices=[]):  # initialising draws random numbers
            model = getattr(lmc.models, made_by["function"])(*made_by["arguments"], **made_by["options"])
        model.load_state_dict(self.weights[0])
        return model.eval()

    def __repr__(self) -> str:
        lines = [f"CheckpointSet({self.name}: {self.manifest['description']})"]
        for entry in self.manifest["files"]:
            lines.append(
                f"  seed {entry['seed']}, epoch {entry['epoch']}: test loss {entry['test']['loss']:.4f}, "
                f"accuracy {entry['test']['accuracy']:.4f}"
            )
        return "\n".join(lines)


def checkpoint(name: str, folder: str | Path | None = None) -> CheckpointSet:
    """The stored checkpoint `name`, each file checked against the sha256 in its manifest before it is read.

    Looked for in `folder`, or in the folder `data` of the repository this package runs from, among what was installed with
    it, and in the folder `data` of the current folder or of one above it. Raises `DataError` when it is not there or a file is not what the manifest says.
    """
    place = _find(name, folder)
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        entries = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place / MANIFEST}: not a manifest: {error!r}") from error
    weights = []
    for entry in entries:
        path = place / entry["file"]
        if not path.is_file():
            raise DataError(f"{path} is missing, though the manifest beside it names it. Remake: {manifest['command']}")
        verify(path, f"sha256:{entry['sha256']}")
        stored = load(path.read_bytes())
        order = sorted(stored, key=natural)  # the file has another one each time it is written
        weights.append(StateDict({n: stored[n].float() if stored[n].is_floating_point() else stored[n] for n in order}))
    seeds, epochs = (tuple(entry[field] for entry in entries) for field in ("seed", "epoch"))
    return CheckpointSet(name, tuple(weights), seeds, epochs, manifest, place)


def _find(name: str, folder: str | Path | None) -> Path:
    here = Path.cwd()
    around = [Path(__file__).parents[2], here, *here.parents]
    own = Path(__file__).parent / "stored"
    places = (
        [Path(folder).expanduser()]
        if folder is not None
        else [around[0] / "data", own, *(p / "data" for p in around[1:])]
    )
    for place in places:
        if (place / name / MANIFEST).is_file():
            return place / name
    known = sorted({path.parent.name for place in places for path in place.glob(f"*/{MANIFEST}")})
    if known:
        raise DataError(f"no stored checkpoint {name!r}; there are {', '.join(known)}")
    raise DataError(f"no stored checkpoint {name!r}: no {MANIFEST} below {places[0]}. {REMEDY}")
