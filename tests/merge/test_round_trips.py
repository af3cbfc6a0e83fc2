"""Merged folders open in the library that the models came from, under the names that it looks for."""

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lmc
from lmc.core.files import __version__

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

CONFIG = {
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
IDS = torch.arange(12).view(2, 6)


def llama(seed: int, tied: bool):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, tie_word_embeddings=tied)).eval()


@torch.no_grad()
def logits(model) -> Tensor:
    return model(IDS).logits


def mean_of(tied: bool):
    """The average, made by the library's own means."""
    a, b, made = llama(0, tied), llama(1, tied), llama(2, tied)
    with torch.no_grad():
        for target, x, y in zip(made.parameters(), a.parameters(), b.parameters(), strict=True):
            target.copy_(x + (y - x) * 0.5)
    return made


def folder(root: Path, form: str, seed: int, tied: bool) -> Path:
    path, model = root / f"{form}-{seed}", llama(seed, tied)
    model.save_pretrained(path, max_shard_size="2kB" if form == "sharded" else "5GB")
    if form in ("bin", "sharded bin"):
        (path / "model.safetensors").unlink()
        state = model.state_dict()
        if form == "bin":
            torch.save(state, path / "pytorch_model.bin")
            return path
        names = [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
        places = {name: names[i % 2] for i, name in enumerate(state)}
        for name in names:
            torch.save({n: t for n, t in state.items() if places[n] == name}, path / name)
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


FORMS = list(itertools.product(("one file", "sharded", "bin", "sharded bin"), (False, True), ("5GB", "3kB")))
SHORT = {("one file", False, "5GB"), ("sharded", True, "3kB"), ("bin", True, "3kB"), ("sharded bin", False, "5GB")}


@pytest.mark.parametrize(
    ("form", "tied", "shard_size"),
    [pytest.param(*each, marks=[] if each in SHORT else [pytest.mark.thorough]) for each in FORMS],
)
def test_transformers_reads_what_was_merged(form: str, tied: bool, shard_size: str, tmp_path: Path):
    paths = [folder(tmp_path, form, seed, tied) for seed in (0, 1)]
    merged = lmc.merge.write(lmc.merge.average, paths, tmp_path / "out", shard_size=shard_size, progress=False)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(merged.path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(logits(again.eval()), logits(mean_of(tied)), atol=1e-6)
    name = "model.safetensors" if shard_size == "5GB" else f"model-00001-of-{len(merged.files):05}.safetensors"
    assert min(file.name for file in merged.files) == name and (len(merged.files) == 1) == (shard_size == "5GB")
    # And what was written goes on with the module: paths, barriers, inspections.
    path = lmc.loss_path(llama(3, tied), *paths_of(paths), (IDS[:, :-1], IDS[:, 1:]), alphas=3, progress=False)
    assert math.isfinite(path.barrier)
    found = lmc.merge.inspect([merged.path, *paths], model=llama(3, tied), progress=False)
    assert not found.differences and len(found.layers) > 5


def paths_of(paths: list[Path]) -> list[lmc.Checkpoint]:
    return [lmc.open_checkpoint(path) for path in paths]


def test_one_folder_with_the_tied_name_and_one_without(tmp_path: Path):
    """`save_pretrained` leaves out the head that is tied to the embedding; files of torch keep both."""
    short, long = folder(tmp_path, "one file", 0, True), folder(tmp_path, "bin", 1, True)
    assert set(lmc.open_checkpoint(long)) - set(lmc.open_checkpoint(short)) == {"lm_head.weight"}
    expected = logits(mean_of(True))
    for i, pair in enumerate(([short, long], [long, short])):
        merged = lmc.merge.write(lmc.merge.average, pair, tmp_path / f"out{i}", progress=False)
        assert set(merged) == set(lmc.open_checkpoint(pair[0]))
        again = transformers.AutoModelForCausalLM.from_pretrained(merged.path).eval()
        assert torch.allclose(logits(again), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "whole", "shard", "index"),
    [
        (
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
        ),
        (
            "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
        ("open_clip_model.safetensors", "open_clip_model.safetensors", None, None),
        ("my-model.safetensors", "model.safetensors", "model-00001-of-00002.safetensors", None),
    ],
)
def test_files_are_called_as_those_of_the_first_model(file, whole, shard, index, tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"w": torch.randn(4), "v": torch.randn(4)}, tmp_path / name / file)
    (tmp_path / "a" / "config.json").write_text("{}")
    pair = [tmp_path / "a", tmp_path / "b"]
    merged = lmc.merge.write(lmc.merge.average, pair, tmp_path / "out", progress=False)
    assert {f.name for f in merged.path.iterdir()} == {whole, "config.json", "merge.json"}
    if shard:
        cut = lmc.merge.write(lmc.merge.average, pair, tmp_path / "cut", shard_size=16, progress=False)
        names = {f.name for f in cut.path.iterdir()}
        assert shard in names and (index is None or index in names)
        assert torch.equal(cut["w"], merged["w"])
        again = lmc.merge.write(lmc.merge.average, [cut.path], tmp_path / "again", shard_size=16, progress=False)
        assert {f.name for f in again.path.iterdir()} == names


def test_the_recipe_carries_the_version_and_the_hash_of_the_inputs(tmp_path: Path):
    save_file({"w": torch.ones(4)}, tmp_path / "a.safetensors")
    merged = lmc.merge.write(lmc.merge.average, [tmp_path / "a.safetensors"], tmp_path / "out", progress=False)
    recipe = json.loads((merged.path / "merge.json").read_text())
    assert recipe["lmc"] == __version__ and list(map(len, recipe["inputs"].values())) == [64]
    assert list(recipe["inputs"]) == [str((tmp_path / "a.safetensors").resolve())]
