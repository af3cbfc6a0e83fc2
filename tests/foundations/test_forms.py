"""Whatever holds a set of named tensors is opened, and what was unwrapped on the way is said."""

import argparse
import collections
import datetime
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lmc
from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.weights.opening import STANDS_IN


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(3, 3, generator=generator) for i in (0, 1, 2, 10)}


def same(opened: lmc.Checkpoint, expected: dict[str, Tensor]) -> bool:
    return set(opened) == set(expected) and all(torch.equal(opened[name], t) for name, t in expected.items())


@pytest.mark.parametrize(
    ("wrapped", "entry"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, "state_dict"),
        (lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {0: {"exp_avg": s}}}}, "model_state_dict"),
        (lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}}, "model"),
        (lambda s: {"model": {"state_dict": s}}, "model.state_dict"),
        (lambda s: {"weights_of_mine": s, "note": "x"}, "weights_of_mine"),
    ],
)
def test_entries_of_training_programs(wrapped, entry: str, tmp_path: Path):
    torch.save(wrapped(state()), tmp_path / "a.th")
    opened = lmc.open_checkpoint(tmp_path / "a.th")
    assert same(opened, state())
    assert opened.notes == (f"weights taken from the entry {entry!r}",) and opened.notes[0] in repr(opened)


def test_several_entries_are_asked_about(tmp_path: Path):
    torch.save({"state_dict": state(0), "state_dict_ema": state(1)}, tmp_path / "a.pth.tar")
    with pytest.raises(DataError, match=r"'state_dict', 'state_dict_ema': say which with key="):
        lmc.open_checkpoint(tmp_path / "a.pth.tar")
    assert same(lmc.open_checkpoint(tmp_path / "a.pth.tar", key="state_dict_ema"), state(1))
    with pytest.raises(DataError, match="no entry 'ema'; it has 'state_dict', 'state_dict_ema'"):
        lmc.open_checkpoint(tmp_path / "a.pth.tar", key="ema")
    save_file(state(0), tmp_path / "a.safetensors")
    with pytest.raises(lmc.InputError, match="key='ema': a safetensors file"):
        lmc.open_checkpoint(tmp_path / "a.safetensors", key="ema")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_forward_module.", "_fsdp_wrapped_module."]
)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_prefixes_of_wrappers_are_stripped(prefix: str, ending: str, tmp_path: Path):
    path, wrapped = tmp_path / f"a.{ending}", {prefix + name: tensor for name, tensor in state().items()}
    torch.save(wrapped, path) if ending == "pt" else save_file(wrapped, path)
    opened = lmc.open_checkpoint(path)
    assert same(opened, state()) and "stripped" in repr(opened)
    assert set(lmc.open_checkpoint(path, prefix="")) == set(wrapped)
    torch.save({"layers.0._orig_mod.weight": torch.ones(2), "layers.1.weight": torch.ones(2)}, tmp_path / "b.pt")
    assert set(lmc.open_checkpoint(tmp_path / "b.pt")) == {"layers.0.weight", "layers.1.weight"}


def test_averaged_models_and_lightning(tmp_path: Path):
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    assert set(lmc.open_checkpoint(tmp_path / "swa.pt")) == {"weight", "bias"}
    content = {f"net.{name}": tensor for name, tensor in state().items()}
    torch.save({"pytorch-lightning_version": "2", "state_dict": content, "callbacks": {}}, tmp_path / "a.ckpt")
    opened = lmc.open_checkpoint(tmp_path / "a.ckpt")
    assert same(opened, state()) and "prefix 'net.' of Lightning" in repr(opened)


def test_a_prefix_that_one_model_has_is_stripped_where_files_are_merged(tmp_path: Path):
    for name, prefix in (("a", ""), ("b", "model.")):
        save_file({prefix + n: t for n, t in state(ord(name)).items()}, tmp_path / f"{name}.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    expected = lmc.merge.average([state(ord("a")), state(ord("b"))])
    plan = lmc.merge.plan(lmc.merge.average, [a, b], tmp_path / "out")
    assert "prefix 'model.' stripped" in str(plan)
    assert same(plan.write(progress=False), expected)
    other = lmc.merge.average([b, a])
    assert set(other) == {f"model.{name}" for name in expected}
    assert torch.allclose(other["model.layers.0.weight"], expected["layers.0.weight"])
    chosen = lmc.open_checkpoint(b, prefix="model.layers.1")
    assert set(chosen) == {".weight", "0.weight"} and "2 names without it left out" in repr(chosen)
    with pytest.raises(InputError, match="no name begins with prefix='net.'"):
        lmc.open_checkpoint(b, prefix="net.")


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_shards_with_an_index(ending: str, tmp_path: Path):
    names = [f"m-{i:05}-of-00002.{ending}" for i in (1, 2)]
    items = list(state().items())
    for name, part in zip(names, (dict(items[:2]), dict(items[2:])), strict=True):
        torch.save(part, tmp_path / name) if ending == "bin" else save_file(part, tmp_path / name)
    weight_map = {key: names[i // 2] for i, (key, _) in enumerate(items)}
    del weight_map["layers.10.weight"]  # held by a shard, omitted by the index
    (tmp_path / f"pytorch_model.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    opened = lmc.open_checkpoint(tmp_path)
    assert same(opened, state()) and "layers.10.weight, which" in repr(opened)
    assert list(opened) == list(state())
    with pytest.warns(UserWarning, match="one of 2 shards; open the folder"):
        lmc.open_checkpoint(tmp_path / names[0])


def test_folders_of_training_runs(tmp_path: Path):
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "scaler.pt", "optimizer.bin"):
        torch.save({"state": {}, "x": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(DataError, match="found none"):
        lmc.open_checkpoint(tmp_path)
    torch.save(state(), tmp_path / "pytorch_model.bin")
    assert same(lmc.open_checkpoint(tmp_path), state())
    save_file(state(1), tmp_path / "model.safetensors")  # what the libraries read first
    assert same(lmc.open_checkpoint(tmp_path), state(1))
    save_file(state(2), tmp_path / "other.safetensors")
    opened = lmc.open_checkpoint(tmp_path)
    assert same(opened, state(1)) and "read from model.safetensors, not from other.safetensors" in repr(opened)


def test_what_cannot_be_opened_names_the_way_out(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(16))
    with pytest.raises(DataError, match="GGUF holds quantised codes"):
        lmc.open_checkpoint(tmp_path / "a.gguf")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(DataError, match="distributed checkpoint; convert it first"):
        lmc.open_checkpoint(tmp_path / "dcp")
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(DataError, match="a pipeline of several models; name the folder of one: unet"):
        lmc.open_checkpoint(tmp_path / "pipe")
    for i in (1, 2):
        save_file(state(i), tmp_path / "dcp" / f"model-{i:05}-of-00002.safetensors")
    (tmp_path / "dcp" / "__0_0.distcp").unlink()
    with pytest.raises(DataError, match="the index of these shards is missing"):
        lmc.open_checkpoint(tmp_path / "dcp")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs"),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs"),
        ("a.pth", b"<!DOCTYPE html><html></html>", "a web page, as failed downloads leave it"),
        ("tf_model.h5", b"\x89HDF\r\n", "weights of TensorFlow or Keras"),
        ("flax_model.msgpack", b"\x81", "weights of Flax"),
        ("model.onnx", b"\x08", "a graph of ONNX"),
        ("model.tar.gz", b"\x1f\x8b", "an archive; unpack it first"),
        ("model.npy", b"\x93NUMPY", "a single array"),
        ("model.pkl", b"\x80\x04}.", "a pickle, which could run code"),
    ],
)
def test_files_of_other_kinds_name_the_way_out(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=message):
            lmc.open_checkpoint(path)


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.skipif(not STANDS_IN, reason="this torch takes no names of classes to read, and refuses the file")
@pytest.mark.parametrize("zipped", [True, False])
def test_settings_beside_the_weights_are_passed_over_and_never_imported(zipped: bool, tmp_path: Path, monkeypatch):
    """A class of settings that is not installed where the file is opened: nothing of it is asked for."""
    away = types.ModuleType("omegaconf")
    away.DictConfig = type("DictConfig", (dict,), {"__module__": "omegaconf"})
    monkeypatch.setitem(sys.modules, "omegaconf", away)
    settings = {
        "args": argparse.Namespace(out=Path("runs"), when=datetime.datetime(2020, 1, 1)),
        "hyper_parameters": away.DictConfig(lr=0.1),
        "best": np.float64(0.5),
        "seen": collections.defaultdict(list, {"train": [1]}),
        "random": np.random.default_rng(0).bit_generator.state | {"array": np.ones(3)},
    }
    torch.save({"model": state(), **settings}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    torch.save({"model": state(), "args": argparse.Namespace(x=Runs())}, tmp_path / "b.pth")
    torch.save(argparse.Namespace(x=state()), tmp_path / "c.pth")
    monkeypatch.delitem(sys.modules, "omegaconf")
    allowed = set(torch.serialization.get_safe_globals())
    opened = lmc.open_checkpoint(tmp_path / "a.pth")
    assert same(opened, state()) and "passed over: argparse.Namespace" in repr(opened)
    assert "omegaconf" not in sys.modules and set(torch.serialization.get_safe_globals()) == allowed
    with pytest.raises(DataError, match=r"refused: it holds builtins\.getattr"):
        lmc.open_checkpoint(tmp_path / "b.pth")
    with pytest.raises(DataError, match="expected a state dict, found an empty one"):
        lmc.open_checkpoint(tmp_path / "c.pth")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.eye(3).to_sparse(), "w is no dense tensor"), (torch.ones(3, device="meta"), "w is on the meta device")],
)
def test_tensors_without_values_of_their_own_are_named(tensor: torch.Tensor, message: str, tmp_path: Path):
    torch.save({"w": tensor}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=message):
        lmc.open_checkpoint(tmp_path / "a.pt")


def test_entries_that_are_no_tensors_are_left_out(tmp_path: Path):
    torch.save({**state(), "epoch": 3, "name": "x"}, tmp_path / "a.pt")
    opened = lmc.open_checkpoint(tmp_path / "a.pt")
    assert same(opened, state()) and "left out: 'epoch' (int), 'name' (str), not tensors" in repr(opened)


def test_another_dtype_on_reading(tmp_path: Path):
    torch.save({**state(), "count": torch.tensor(3), "big": torch.tensor([1e6])}, tmp_path / "a.pt")
    opened = lmc.open_checkpoint(tmp_path / "a.pt", dtype=torch.float16)
    assert opened["layers.0.weight"].equal(state()["layers.0.weight"].half()) and opened["count"].dtype == torch.int64
    assert opened.outline()["layers.0.weight"].dtype == torch.float16 and "read as float16" in repr(opened)
    assert opened.read("layers.0.weight", slice(2, 4)).equal(state()["layers.0.weight"].half().view(-1)[2:4])
    with pytest.raises(WeightsError, match="big: the result leaves the range of float16"):
        opened.load()


def test_names_come_in_one_order_however_the_file_was_written(tmp_path: Path):
    names = list(state())
    for i, order in enumerate((names, names[::-1])):
        save_file({name: state()[name] for name in order}, tmp_path / f"{i}.safetensors")
        assert list(lmc.open_checkpoint(tmp_path / f"{i}.safetensors")) == names  # layers.10 last


def test_versions_of_modules_are_kept(tmp_path: Path):
    torch.save(nn.BatchNorm1d(3).state_dict(), tmp_path / "a.pt")
    metadata = lmc.open_checkpoint(tmp_path / "a.pt").load()._metadata
    assert metadata == nn.BatchNorm1d(3).state_dict()._metadata  # type: ignore[attr-defined]


def test_axes_of_length_zero(tmp_path: Path):
    empty = {"w": torch.ones(2), "registers": torch.zeros(1, 0, 4)}
    save_file(empty, tmp_path / "a.safetensors")
    merged = lmc.merge.write(lmc.merge.average, [tmp_path / "a.safetensors"] * 2, tmp_path / "out", progress=False)
    assert merged["registers"].shape == (1, 0, 4)
    assert lmc.weights.distance(empty, empty) == 0.0 and lmc.weights.mean([empty])["registers"].shape == (1, 0, 4)


def test_single_numbers_beside_an_entry_are_no_weights(tmp_path: Path):
    """As torch's tutorial saves checkpoints, with the loss of the epoch."""
    torch.save({"epoch": 3, "model_state_dict": state(), "loss": torch.tensor(0.5)}, tmp_path / "a.pt")
    assert same(lmc.open_checkpoint(tmp_path / "a.pt"), state())


def test_archives_of_numpy_are_opened_and_those_of_code_are_named(tmp_path: Path):
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in state().items()})
    assert same(lmc.open_checkpoint(tmp_path / "a.npz"), state())
    np.savez(tmp_path / "b.npz", a=np.array([object()]))
    with pytest.raises(DataError, match="more than numbers"):
        lmc.open_checkpoint(tmp_path / "b.npz")
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "c.pt"))
    with pytest.raises(DataError, match=r"a TorchScript archive.*torch.jit.load\('c.pt'\).state_dict"):
        lmc.open_checkpoint(tmp_path / "c.pt")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "d.pt2")
    with pytest.raises(DataError, match="an exported program"):
        lmc.open_checkpoint(tmp_path / "d.pt2")


def test_the_prefix_of_a_file_is_stripped_for_a_module(tmp_path: Path):
    models, x = [nn.Sequential(nn.Linear(4, 3)) for _ in range(2)], torch.randn(6, 4)
    for i, model in enumerate(models):
        torch.save({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / f"{i}.pt")
    opened = [lmc.open_checkpoint(tmp_path / f"{i}.pt") for i in range(2)]
    data = (x, torch.arange(6) % 3)
    found, expected = (lmc.loss_path(models[0], *pair, data, alphas=3, progress=False) for pair in (opened, models))
    assert (found.values["data"]["loss"] == expected.values["data"]["loss"]).all()
    assert lmc.merge.greedy_soup(models[0], opened, data, progress=False).keys() == models[0].state_dict().keys()


@pytest.mark.parametrize("name", ["unet.processor.to_q_lora.down.weight", "l.oft_R.weight", "l.lora_E"])
def test_further_names_of_adapters(name: str):
    with pytest.raises(WeightsError, match="factor of an adapter"):
        lmc.merge.average([{name: torch.ones(2, 2)}, {name: torch.zeros(2, 2)}])


def test_a_module_is_found_behind_the_one_prefix_that_has_all_its_names(tmp_path: Path):
    models, x = [nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)) for _ in range(2)], torch.randn(6, 4)
    for i, model in enumerate(models):
        inside = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": {**inside, "criterion.weight": torch.ones(3)}}, tmp_path / f"{i}.ckpt")
    opened = [lmc.open_checkpoint(tmp_path / f"{i}.ckpt") for i in range(2)]
    data = (x, torch.arange(6) % 3)
    found, expected = (lmc.loss_path(models[0], *pair, data, alphas=3, progress=False) for pair in (opened, models))
    assert (found.values["data"]["loss"] == expected.values["data"]["loss"]).all()
    with pytest.raises(MismatchError, match="a has all names of model behind 'model.', beside others"):
        lmc.loss_path(models[0], dict(opened[0]), models[1], data, progress=False)
    both = {f"{start}{name}": tensor for start in ("model.", "ema.") for name, tensor in models[0].state_dict().items()}
    torch.save(both, tmp_path / "both.ckpt")
    with pytest.raises(MismatchError, match="behind 'model.' and behind 'ema.'"):
        lmc.loss_path(models[0], lmc.open_checkpoint(tmp_path / "both.ckpt"), models[1], data, progress=False)
