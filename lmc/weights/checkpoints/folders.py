"""Folders of weights as common libraries write them: which of the files are the weights, and shards with an index."""

import re
from collections.abc import Callable
from pathlib import Path

from lmc.errors import DataError
from lmc.weights.checkpoints.checkpoint import Checkpoint, read_json
from lmc.weights.checkpoints.formats import Stored
from lmc.weights.order import natural

INDEX = re.compile(r".*\.(safetensors|bin)\.index(\.[\w-]+)?\.json$")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[\w-]+)?\.\w+$")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# What a training run keeps beside the weights.
OTHERS = re.compile(
    r"^(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state|dl_state_dict|"
    r"custom_checkpoint|events\.)"
)
USUAL = ("model", "pytorch_model", "diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model", "weights")
Open = Callable[[Path], Checkpoint]


def open_folder(folder: Path, open_file: Open) -> Checkpoint:
    """The weights in a folder: shards with an index, or the one file of weights; safetensors before pickles."""
    files = sorted((f for f in folder.iterdir() if f.is_file() and not OTHERS.match(f.name)), key=lambda f: f.name)
    if (folder / "model_index.json").is_file() and not any(f.suffix in (".safetensors", *PICKLES) for f in files):
        parts = [f.name for f in sorted(folder.iterdir()) if f.is_dir()]
        raise DataError(f"{folder}: a pipeline of several models; name the folder of one: {', '.join(parts)}")
    if any(f.suffix == ".distcp" for f in files):
        raise DataError(
            f"{folder}: a distributed checkpoint; convert it first, "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    for ending in ("safetensors", "bin"):
        indices = [f for f in files if (match := INDEX.match(f.name)) and match[1] == ending]
        if len(indices) > 1:
            raise DataError(f"{folder}: {len(indices)} index files; name one: {', '.join(i.name for i in indices)}")
        if indices:
            return open_sharded(indices[0], open_file)
        known = [f for f in files if f.suffix == ".safetensors" or (ending == "bin" and f.suffix in PICKLES)]
        if known:
            return _open_one(folder, known, open_file)
    raise DataError(f"{folder}: expected model.safetensors.index.json or one weight file, found none; name one")


def _open_one(folder: Path, files: list[Path], open_file: Open) -> Checkpoint:
    usual = [file for file in files if file.stem in USUAL]
    if len(files) > 1 and len(usual) != 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        lost = "the index of these shards is missing" if any(SHARD.match(f.name) for f in files) else "name one"
        raise DataError(
            f"{folder}: expected an index or one weight file, found {len(files)} weight files: {names}; {lost}"
        )
    file = files[0] if len(files) == 1 else usual[0]
    opened = open_file(file)
    others = [other.name for other in files if other != file]
    notes = [f"read from {file.name}, not from {', '.join(others)}"] if others else []
    return Checkpoint(folder, opened.stored, opened.ties, [*notes, *opened.notes], opened.metadata)


def open_sharded(index: Path, open_file: Open) -> Checkpoint:
    """The shards that an index names. A name that a shard holds and the index omits is taken as well.

    Raises:
        DataError: the index is malformed, names files elsewhere or missing, or places a name where it is not.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DataError(f"{index}: malformed: 'weight_map' should map tensor names to shard files")
    stored: dict[str, Stored] = {}
    ties: dict[str, str] = {}
    notes: list[str] = []
    opened: dict[str, Checkpoint] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard:
            raise DataError(f"{index}: shard {shard!r} is not a plain file name; shards are beside the index")
        file = index.parent / shard
        if not file.is_file():
            raise DataError(f"{file}: missing, but {index.name} places {_some(weight_map, shard)} there")
        opened[shard] = open_file(file)
        for name in opened[shard]:
            if weight_map.get(name, shard) != shard:
                raise DataError(f"{file}: holds {name}, which {index.name} places in {weight_map.get(name)!r}")
        stored |= opened[shard].stored
        ties |= opened[shard].ties
        further = [name for name in opened[shard].stored if name not in weight_map]
        if further:
            more = f" and {len(further) - 1} more" if len(further) > 1 else ""
            notes.append(f"{shard} holds {further[0]}{more}, which {index.name} omits; read as well")
    for name, shard in weight_map.items():
        if name not in opened[shard]:
            raise DataError(f"{index}: places {name} in {shard}, which does not hold it")
    ordered = {name: stored[name] for name in sorted(stored, key=natural)}
    metadata = next((shard.metadata for shard in opened.values() if shard.metadata is not None), None)
    return Checkpoint(index.parent, ordered, ties, notes, metadata)


def one_of_shards(file: Path) -> str:
    """The number of shards that a file is one of, as text; empty for a file of its own."""
    match = SHARD.match(file.name)
    return match[3].lstrip("0") if match and int(match[3]) > 1 else ""


def _some(weight_map: dict[str, str], shard: str) -> str:
    names = [name for name, place in weight_map.items() if place == shard]
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
