"""Weights on disk: read lazily, given back exactly; what is broken or dangerous is refused and named."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from lmc.errors import DataError, InputError
from lmc.merge import average
from lmc.weights import as_weights, lerp
from lmc.weights.opening import open_checkpoint


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(5, 3, generator=generator, dtype=torch.float32).bfloat16(),
        "weight": torch.randn(3, 3, generator=generator),
        "double": torch.randn(2, generator=generator, dtype=torch.float64),
        "half": torch.randn(3, generator=generator).half(),
        "small": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.reshape(-1).tolist() == b.reshape(-1).tolist()


def sharded(folder: Path, state: dict[str, Tensor], parts: int = 2) -> Path:
    folder.mkdir()
    weight_map = {name: f"part-{i % parts}.safetensors" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        save_file({name: t for name, t in state.items() if weight_map[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def saved(tmp_path: Path, kind: str) -> Path:
    if kind == "folder":
        return sharded(tmp_path / "sharded", tensors())
    path = tmp_path / kind
    save_file(tensors(), path) if path.suffix == ".safetensors" else torch.save(tensors(), path)
    return path


@pytest.mark.parametrize("kind", ["a.safetensors", "folder", "a.pt", "pytorch_model.bin"])
def test_every_dtype_and_shape_is_given_back(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, kind))
    state = tensors()
    assert set(checkpoint) == set(state) and len(checkpoint) == len(state)
    assert all(same(checkpoint[name], tensor) for name, tensor in state.items())
    assert all(same(checkpoint.load()[name], tensor) for name, tensor in state.items())
    shells = checkpoint.outline()
    assert all((shells[n].dtype, shells[n].shape) == (t.dtype, t.shape) for n, t in state.items())
    assert checkpoint.size == sum(t.nbytes for t in state.values())
    assert "nothing" not in checkpoint and "weight" in checkpoint
    with pytest.raises(KeyError):
        checkpoint["nothing"]


@pytest.mark.parametrize("kind", ["a.safetensors", "a.pt"])
def test_what_is_read_is_the_reader_s_own(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path, kind)
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    checkpoint["weight"].zero_()
    assert same(checkpoint["weight"], tensors()["weight"]) and path.read_bytes() == before


def test_checkpoints_go_wherever_state_dicts_go(tmp_path: Path) -> None:
    states = [{k: v for k, v in tensors(seed).items() if k in ("embed", "weight", "count")} for seed in (0, 1)]
    opened = [open_checkpoint(sharded(tmp_path / str(i), state)) for i, state in enumerate(states)]
    expected = average(states)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in average(opened).items())
    assert all(torch.equal(t, average([states[0], opened[1]])[name]) for name, t in expected.items())
    assert torch.equal(lerp(*opened, 0.25)["weight"], lerp(*states, 0.25)["weight"])
    assert list(as_weights(opened[0])) == sorted(states[0])


def test_ties_of_pickles_and_of_save_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_model(model, str(tmp_path / "a.safetensors"))
    for name in ("a.pt", "a.safetensors"):
        checkpoint = open_checkpoint(tmp_path / name)
        assert len(checkpoint.ties) == 1 and set(checkpoint) == set(model.state_dict())
        assert same(checkpoint["b.weight"], model["a"].weight.detach())
        loaded = checkpoint.load()
        assert loaded["a.weight"] is loaded["b.weight"]
        merged = average([checkpoint, checkpoint])
        assert merged["a.weight"] is merged["b.weight"]


def test_a_state_dict_inside_a_training_checkpoint(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": tensors()}, tmp_path / "a.ckpt")
    assert set(open_checkpoint(tmp_path / "a.ckpt")) == set(tensors())
    old = {name: tensor for name, tensor in tensors().items() if name != "small"}
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(open_checkpoint(tmp_path / "old.pt")["embed"], tensors()["embed"])


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(how: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"weight": torch.zeros(2), "evil": Malicious(trace)}
    torch.save(content, path) if how == "torch" else path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=r"evil\.pt: refused"):
        open_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("keep", [0, 4, 60, -1, -9])
def test_truncated_files_are_named(name: str, keep: int, tmp_path: Path) -> None:
    path = saved(tmp_path, name)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=name):
        open_checkpoint(path)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what it has in memory")
@pytest.mark.parametrize("at_hand", ["nothing", "a part", "not told"])
def test_chunks_are_read_whatever_the_system_has_of_them(
    at_hand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, asked, read = open_checkpoint(saved(tmp_path, "a.safetensors")), list[int](), os.preadv

    def preadv(file: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        asked.append(offset)
        if at_hand != "a part":
            raise BlockingIOError if at_hand == "nothing" else OSError(errno.EOPNOTSUPP, "not supported")
        return read(file, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for name, tensor in tensors().items():
        for stop in range(1, tensor.numel() + 1):
            chunk = checkpoint.read(name, slice(stop - 1, tensor.numel()))
            assert torch.equal(chunk, tensor.flatten()[stop - 1 :])
    assert len(asked) > 20


def test_a_file_cut_after_opening_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.safetensors")
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"a\.safetensors: cut short"):
        checkpoint.load()


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for entry in (
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**40]},
        {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
    ):
        header = json.dumps({"w": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(DataError, match=r"a\.safetensors"):
            open_checkpoint(path)
    path.write_bytes((2**62).to_bytes(8, "little") + bytes(8))
    with pytest.raises(DataError, match=r"a\.safetensors"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"weight": "../outside.safetensors"}, "not a plain file name"),
        (lambda m: m | {"weight": "other.safetensors"}, r"other\.safetensors: missing, .* places weight there"),
        (lambda m: m | {"ghost": "part-0.safetensors"}, r"places ghost in part-0\.safetensors, which does not hold it"),
        (lambda m: m | {"weight": "part-0.safetensors"}, r"part-1\.safetensors: holds weight"),
        (lambda m: m | {"weight": 3}, "should map tensor names"),
        (lambda m: list(m), "should map tensor names"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(change, message: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", tensors())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(DataError, match=message):
        open_checkpoint(folder)


def test_missing_shards_and_other_bad_input(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", tensors())
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(DataError, match=r"part-1\.safetensors: missing"):
        open_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json: not valid JSON"):
        open_checkpoint(folder)
    with pytest.raises(DataError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: expected .* found none"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt: expected a \.safetensors file"):
        open_checkpoint(tmp_path / "a.txt")
    for content, message in (([1.0], "found a list"), ({"lr": 0.1}, "'lr' is a float"), ({}, "found an empty one")):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(DataError, match=message):
            open_checkpoint(tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"no merge\.json"):
        open_checkpoint(saved(tmp_path, "a.safetensors")).verify()
