"""Adapters are task vectors: exactly their product on the base, read in parts, merged, and made again from a merge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import same
from torch import Tensor

import lmc
from lmc import merge
from lmc.cli import main
from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.merge.engine import chunks as parts

PEFT = "base_model.model."
SHAPES = {
    "net.layers.0.q.weight": (12, 10),
    "net.layers.0.q.bias": (12,),
    "net.layers.1.q.weight": (10, 10),
    "net.conv.weight": (6, 4, 3, 3),
    "net.norm.weight": (10,),
    "net.norm.bias": (10,),
    "net.embed.weight": (20, 10),
}


def drawn(seed: int, shapes: dict[str, tuple[int, ...]], size: float = 1.0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def stored(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        folder / f"{'adapter_' * (config is not None)}model.safetensors",
    )
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return folder


def adapter(
    folder: Path, seed: int = 0, rank: int = 3, prefix: str = PEFT, **config: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A folder as PEFT writes it, with factors for every kind of module, and its tensors."""
    tensors = drawn(seed, {
        f"{prefix}net.layers.0.q.lora_A.weight": (rank, 10), f"{prefix}net.layers.0.q.lora_B.weight": (12, rank),
        f"{prefix}net.layers.1.q.lora_A.weight": (rank, 10), f"{prefix}net.layers.1.q.lora_B.weight": (10, rank),
        f"{prefix}net.conv.lora_A.weight": (rank, 4, 3, 3), f"{prefix}net.conv.lora_B.weight": (6, rank, 1, 1),
        f"{prefix}net.embed.lora_embedding_A": (rank, 20), f"{prefix}net.embed.lora_embedding_B": (10, rank),
        f"{prefix}net.norm.weight": (10,), f"{prefix}net.layers.0.q.base_layer.bias": (12,),
    }, 0.1)  # fmt: skip
    return stored(folder, tensors, {"r": rank, "lora_alpha": 6} | config), tensors


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Tensor]:
    weights = drawn(9, SHAPES)
    stored(tmp_path / "base", weights)
    return weights


def product(t: dict[str, Tensor], module: str, scale: float) -> Tensor:
    return scale * t[f"{PEFT}{module}.lora_B.weight"].flatten(1) @ t[f"{PEFT}{module}.lora_A.weight"].flatten(1)


def test_an_adapter_adds_its_product(base: dict[str, Tensor], tmp_path: Path):
    folder, t = adapter(tmp_path / "a")
    opened = lmc.open_checkpoint(folder)
    assert repr(opened).startswith("Adapter(") and "rank 3" in repr(opened)
    full = opened.on(lmc.open_checkpoint(tmp_path / "base")).load()
    expected = {
        **base,
        "net.layers.0.q.weight": base["net.layers.0.q.weight"] + product(t, "net.layers.0.q", 2),
        "net.layers.0.q.bias": t[f"{PEFT}net.layers.0.q.base_layer.bias"],
        "net.layers.1.q.weight": base["net.layers.1.q.weight"] + product(t, "net.layers.1.q", 2),
        "net.conv.weight": base["net.conv.weight"] + product(t, "net.conv", 2).view(6, 4, 3, 3),
        "net.embed.weight": base["net.embed.weight"]
        + 2 * (t[f"{PEFT}net.embed.lora_embedding_B"] @ t[f"{PEFT}net.embed.lora_embedding_A"]).T,
        "net.norm.weight": t[f"{PEFT}net.norm.weight"],
    }
    assert set(full) == set(expected)
    for name in expected:
        torch.testing.assert_close(full[name], expected[name], atol=1e-6, rtol=0)


def test_the_task_vector_is_not_rounded_by_the_base(base: dict[str, Tensor], tmp_path: Path):
    """Beside weights of a thousand, float32 and bfloat16 sums lose most of a small product; the task vector does not."""
    large = {name: 1000 * tensor.bfloat16() for name, tensor in base.items()}
    folder, t = adapter(tmp_path / "a")
    task = merge.task_vector(lmc.open_checkpoint(folder), base=large)
    assert torch.equal(task["net.layers.0.q.weight"], product(t, "net.layers.0.q", 2))
    merged = merge.task_arithmetic([lmc.open_checkpoint(folder)], base=large)
    assert {v.dtype for v in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"alpha_pattern": {"layers.0.q": 12}}, 4.0),
        ({"alpha_pattern": {"layers.[1-9].q": 12, ".*q": 3}}, 1.0),
        ({"rank_pattern": {"q": 3, "conv": 3, "embed": 3}, "r": 8}, 2.0),
    ],
)
def test_scales(config: dict[str, Any], scale: float, base: dict[str, Tensor], tmp_path: Path):
    folder, t = adapter(tmp_path / "a", **config)
    task = merge.task_vector(lmc.open_checkpoint(folder), base=base)
    torch.testing.assert_close(task["net.layers.0.q.weight"], product(t, "net.layers.0.q", scale))


def test_another_choice_of_factors_is_the_same_adapter(base: dict[str, Tensor], tmp_path: Path):
    folder, t = adapter(tmp_path / "a")
    mix = torch.linalg.qr(drawn(4, {"m": (3, 3)})["m"]).Q * 2
    moved = dict(t)
    name = f"{PEFT}net.layers.0.q"
    moved[f"{name}.lora_A.weight"] = mix @ t[f"{name}.lora_A.weight"]
    moved[f"{name}.lora_B.weight"] = t[f"{name}.lora_B.weight"] @ mix.inverse()
    other = stored(tmp_path / "b", moved, {"r": 3, "lora_alpha": 6})
    first, second = (merge.task_vector(lmc.open_checkpoint(f), base=base) for f in (folder, other))
    torch.testing.assert_close(first["net.layers.0.q.weight"], second["net.layers.0.q.weight"], atol=1e-6, rtol=1e-5)


def test_zero_factors_leave_the_base(base: dict[str, Tensor], tmp_path: Path):
    _, t = adapter(tmp_path / "a")
    nothing = {
        k: torch.zeros_like(v) if "lora_B" in k or "embedding_B" in k else v for k, v in t.items() if "lora" in k
    }
    folder = stored(tmp_path / "zero", nothing, {"r": 3, "lora_alpha": 6})
    assert same(lmc.open_checkpoint(folder).on(base).load(), base, ordered=False)


def test_weights_that_are_stored_across(tmp_path: Path):
    """GPT-2's layers store (in, out): by shape where that tells, else by the configuration."""
    weights = drawn(1, {"h.0.attn.weight": (10, 12), "h.0.proj.weight": (10, 10)})
    t = drawn(2, {"h.0.attn.lora_A.weight": (3, 10), "h.0.attn.lora_B.weight": (12, 3),
                  "h.0.proj.lora_A.weight": (3, 10), "h.0.proj.lora_B.weight": (10, 3)})  # fmt: skip
    t = {PEFT + "transformer." + k: v for k, v in t.items()}  # of a model with a head, whose names are longer
    folder = stored(tmp_path / "a", t, {"r": 3, "lora_alpha": 3, "fan_in_fan_out": True})
    task = merge.task_vector(lmc.open_checkpoint(folder), base=weights)
    for module in ("h.0.attn", "h.0.proj"):
        torch.testing.assert_close(task[f"{module}.weight"], product(t, f"transformer.{module}", 1).T)


def test_dora_gives_rows_a_length(base: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    t = drawn(3, {f"{PEFT}net.layers.0.q.lora_A.weight": (3, 10), f"{PEFT}net.layers.0.q.lora_B.weight": (12, 3)})
    length = torch.arange(1.0, 13.0)
    folder = stored(
        tmp_path / "a",
        t | {f"{PEFT}net.layers.0.q.lora_magnitude_vector": length},
        {"r": 3, "lora_alpha": 6, "use_dora": True},
    )
    full = lmc.open_checkpoint(folder).on(base)
    weight = full["net.layers.0.q.weight"]
    torch.testing.assert_close(weight.norm(dim=1), length)
    direction = base["net.layers.0.q.weight"] + product(t, "net.layers.0.q", 2)
    torch.testing.assert_close(weight / length[:, None], direction / direction.norm(dim=1, keepdim=True))
    pieces = [full.read("net.layers.0.q.weight", slice(i, min(i + 7, 120))) for i in range(0, 120, 7)]
    torch.testing.assert_close(torch.cat(pieces), weight.flatten())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare", "model_stock", "sce", "tsv_m", "average"])
def test_adapters_merge_as_the_models_they_are(
    method: str, base: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a full fine-tune among them, on disk in small chunks as in memory."""
    folders = [adapter(tmp_path / name, seed)[0] for seed, name in enumerate("ab")]
    full = {name: tensor + 0.1 * torch.sign(tensor) for name, tensor in base.items()}
    stored(tmp_path / "c", full)
    models = [lmc.open_checkpoint(folder) for folder in folders]
    whole = [model.on(base).load() for model in models]
    function = getattr(merge, method)
    expected = function([*whole, full], base=base)
    monkeypatch.setattr(parts, "VALUES", 7)
    merged = merge.write(function, [*folders, tmp_path / "c"], tmp_path / "out", base=tmp_path / "base", progress=False)
    assert same(function([*models, full], base=base), merged.load(), ordered=False)
    close = merge.average([*whole, full]) if method == "average" else expected
    for name in expected:
        torch.testing.assert_close(merged[name], close[name], atol=1e-5, rtol=1e-5)
    again = merge.replay(tmp_path / "out", tmp_path / "again", progress=False)
    assert same(again, merged)


def test_a_recipe_knows_the_configuration(base: dict[str, Tensor], tmp_path: Path):
    folder, _ = adapter(tmp_path / "a")
    merge.write(merge.average, [folder], tmp_path / "out", base=tmp_path / "base", progress=False)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    with pytest.raises(DataError, match="adapter_config.json"):
        merge.replay(tmp_path / "out", tmp_path / "again", progress=False)


def test_ties_of_the_base(tmp_path: Path):
    embed = torch.randn(6, 4)
    weights = {"embed.weight": embed, "head.weight": embed, "l.weight": torch.randn(4, 4)}
    t = {f"{PEFT}head.lora_A.weight": torch.randn(2, 4), f"{PEFT}head.lora_B.weight": torch.randn(6, 2)}
    folder = stored(tmp_path / "a", t, {"r": 2, "lora_alpha": 2})
    with pytest.warns(UserWarning, match="no longer tied"):
        full = lmc.open_checkpoint(folder).on(weights)
    assert torch.equal(full["embed.weight"], embed) and not full.ties
    torch.testing.assert_close(full["head.weight"], embed + product(t, "head", 1))
    both = {f"{PEFT}{name}.weight": embed + 1 for name in ("embed", "head")}
    kept = lmc.open_checkpoint(
        stored(tmp_path / "b", both | {k.replace("head", "l"): v[:4] for k, v in t.items()}, {"r": 2, "lora_alpha": 2})
    ).on(weights)
    assert kept.ties == {"head.weight": "embed.weight"} and torch.equal(kept["head.weight"], embed + 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "kind IA3"),
        ({"layer_replication": [[0, 4]]}, "repeats layers"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "belong to"),
        ({"lora_alpha": None}, "lacks lora_alpha"),
        ({"r": 4}, "says rank 4"),
        ({"rank": 0, "r": 0}, "rank 0"),
    ],
)
def test_what_is_no_task_vector_is_refused(
    config: dict[str, Any], message: str, base: dict[str, Tensor], tmp_path: Path
):
    folder, _ = adapter(tmp_path / "a", **config)
    with pytest.raises((WeightsError, DataError), match=message):
        merge.task_arithmetic([lmc.open_checkpoint(folder)], base=base)


def test_adapters_on_different_modules(base: dict[str, Tensor], tmp_path: Path):
    """Their union is changed, which the plan says; a module that one leaves has a task vector of zero from it."""
    (one, a), (two, b) = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    for folder, tensors, gone in ((one, a, "layers.1"), (two, b, "conv")):
        kept = {name: tensor for name, tensor in tensors.items() if gone not in name}
        save_file(kept, folder / "adapter_model.safetensors")
    plan = merge.plan(merge.task_arithmetic, [one, two], tmp_path / "out", base=tmp_path / "base")
    assert "the adapters change different modules: 6 are changed by one at least, 4 by all" in str(plan)
    merged = plan.write(progress=False)
    for module, own in (("net.conv", product(a, "net.conv", 2)), ("net.layers.1.q", product(b, "net.layers.1.q", 2))):
        expected = base[f"{module}.weight"] + own.reshape(base[f"{module}.weight"].shape)
        torch.testing.assert_close(merged[f"{module}.weight"], expected, atol=1e-6, rtol=0)


def test_a_head_that_is_tied_without_being_stored(tmp_path: Path):
    """transformers stores a tied head under no name: an adapter that changes it, or the embedding, parts the two."""
    weights = {"embed_tokens.weight": torch.randn(6, 4), "l.weight": torch.randn(4, 4)}
    t = {f"{PEFT}lm_head.lora_A.weight": torch.randn(2, 4), f"{PEFT}lm_head.lora_B.weight": torch.randn(6, 2)}
    config = {"r": 2, "lora_alpha": 2}
    with pytest.warns(UserWarning, match="which the base has in embed_tokens.weight alone"):
        full = lmc.open_checkpoint(stored(tmp_path / "a", t, config)).on(weights)
    assert torch.equal(full["embed_tokens.weight"], weights["embed_tokens.weight"])
    torch.testing.assert_close(full["lm_head.weight"], weights["embed_tokens.weight"] + product(t, "lm_head", 1))
    t = {
        f"{PEFT}embed_tokens.lora_embedding_A": torch.randn(2, 6),
        f"{PEFT}embed_tokens.lora_embedding_B": torch.randn(4, 2),
    }
    with pytest.warns(UserWarning, match="the base stores no head"):
        assert list(lmc.open_checkpoint(stored(tmp_path / "b", t, config)).on(weights)) == list(weights)


def test_attention_of_torch_is_refused(tmp_path: Path):
    weights = {"attn.in_proj_weight": torch.zeros(12, 4), "attn.out_proj.weight": torch.zeros(4, 4)}
    for module, rows in (("attn", 12), ("attn.base_layer.out_proj", 4)):
        t = {f"{PEFT}{module}.lora_A.weight": torch.randn(2, 4), f"{PEFT}{module}.lora_B.weight": torch.randn(rows, 2)}
        with pytest.raises(WeightsError, match="MultiheadAttention"):
            lmc.open_checkpoint(stored(tmp_path / module, t, {"r": 2, "lora_alpha": 2})).on(weights)


def test_factors_on_a_tensor_that_is_stored_whole(base: dict[str, Tensor], tmp_path: Path):
    """PEFT stores embeddings beside their factors, for they may have been resized: the product is added to those."""
    name, factors = "net.embed.weight", f"{PEFT}net.embed.lora_embedding_"
    t = drawn(5, {f"{factors}A": (2, 20), f"{factors}B": (10, 2), f"{PEFT}net.embed.base_layer.weight": (20, 10)})
    folder = stored(tmp_path / "a", t, {"r": 2, "lora_alpha": 6})
    expected = t[f"{PEFT}net.embed.base_layer.weight"] + 3 * (t[f"{factors}B"] @ t[f"{factors}A"]).T
    full = lmc.open_checkpoint(folder).on(base)
    torch.testing.assert_close(full[name], expected)
    torch.testing.assert_close(full.read(name, slice(33, 77)), expected.flatten()[33:77])
    torch.testing.assert_close(merge.task_vector(lmc.open_checkpoint(folder), base=base)[name], expected - base[name])
    more = drawn(6, {f"{factors}A": (2, 23), f"{PEFT}net.embed.base_layer.weight": (23, 10)})
    resized = lmc.open_checkpoint(stored(tmp_path / "b", t | more, {"r": 2, "lora_alpha": 6}))
    assert resized.on(base)[name].shape == (23, 10)
    with pytest.raises(MismatchError, match="vocabularies of"):
        merge.task_arithmetic([resized], base=base)


def test_bad_input(base: dict[str, Tensor], tmp_path: Path):
    folder, t = adapter(tmp_path / "a")
    with pytest.raises(WeightsError, match="pass the folder of the adapter and the model it was trained on as base="):
        merge.average([lmc.open_checkpoint(folder)])
    with pytest.raises(MismatchError, match="another model"):
        lmc.open_checkpoint(folder).on({"x.weight": torch.zeros(2, 2)})
    small = base | {"net.layers.0.q.weight": torch.zeros(5, 10)}
    with pytest.raises(MismatchError, match=r"\(5, 10\) in the base"):
        lmc.open_checkpoint(folder).on(small)
    with pytest.raises(WeightsError, match="adapter itself"):
        lmc.open_checkpoint(folder).on(lmc.open_checkpoint(folder))
    half = {k: v for k, v in t.items() if "layers.0.q.lora_B" not in k}
    with pytest.raises(DataError, match="lacks its factor lora_B"):
        lmc.open_checkpoint(stored(tmp_path / "h", half, {"r": 3, "lora_alpha": 6})).on(base)
    with pytest.raises(DataError, match="no part of a LoRA"):
        odd = {f"{PEFT}net.x.lora_E": torch.zeros(2)} | t
        lmc.open_checkpoint(stored(tmp_path / "o", odd, {"r": 3, "lora_alpha": 6})).on(base)
    for rank in (0, True, 2.0):
        with pytest.raises(InputError, match="rank"):
            merge.extract([folder], tmp_path / "out", base=base, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="method on task vectors"):
        merge.extract([folder], tmp_path / "out", base=base, method=merge.average)
    with pytest.raises(InputError, match="equal the base"):
        merge.extract([base], tmp_path / "out", base=base, progress=False)
    assert not (tmp_path / "out").exists()


def test_extraction_recovers_an_adapter(base: dict[str, Tensor], tmp_path: Path):
    folder, _ = adapter(tmp_path / "a")
    full = lmc.open_checkpoint(folder).on(base).load()
    found = merge.extract([full], tmp_path / "again", base=tmp_path / "base", rank=5, progress=False)
    ranks = dict(zip(found.names, found.ranks, strict=True))
    assert found.error < 1e-6 and ranks["net.norm.weight"] == 0 and ranks["net.conv.weight"] == 3
    back = found.open().on(base).load()
    assert set(back) == set(full)
    for name in full:
        torch.testing.assert_close(back[name], full[name], atol=2e-5, rtol=0)
    assert len(found.to_frame()) == len(found.names)
    kept = merge.Extraction.load(found.save(tmp_path / "found.json"))
    assert kept.errors == found.errors
    found.open().verify()
    found.plot()


def test_the_error_is_that_of_the_values_left_out(
    base: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full = {name: tensor + drawn(5, {"d": tuple(tensor.shape)})["d"] for name, tensor in base.items()}
    last = 1.0
    for rank in (1, 3, 10):
        found = merge.extract([full], tmp_path / f"r{rank}", base=base, rank=rank, progress=False)
        delta = (full["net.layers.0.q.weight"] - base["net.layers.0.q.weight"]).double()
        values = torch.linalg.svdvals(delta)
        expected = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        error = dict(zip(found.names, found.errors, strict=True))["net.layers.0.q.weight"]
        assert error == pytest.approx(expected, abs=1e-4) and found.error <= last
        last = found.error
        task = merge.task_vector(found.open(), base=base)["net.layers.0.q.weight"]
        assert float((task - delta).norm() / delta.norm()) == pytest.approx(expected, abs=1e-4)


def test_large_matrices_by_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lmc.merge.disk.extract.LARGE", 50)
    rng = torch.Generator().manual_seed(0)
    decay = torch.linalg.qr(torch.randn(120, 120, generator=rng)).Q * 0.9 ** torch.arange(120)
    weights = {"l.weight": torch.zeros(120, 120)}
    full = {"l.weight": decay @ torch.linalg.qr(torch.randn(120, 120, generator=rng)).Q}
    found = merge.extract([full], tmp_path / "out", base=weights, rank=8, progress=False)
    values = torch.linalg.svdvals(full["l.weight"])
    best = float((values[8:].square().sum() / values.square().sum()).sqrt())
    assert best <= found.error * (1 + 1e-4) and found.error < best * 1.001


def test_an_adapter_of_a_merge_on_the_command_line(
    base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folders = [str(adapter(tmp_path / name, seed)[0]) for seed, name in enumerate("ab")]
    out = tmp_path / "merged"
    words = [
        "extract",
        *folders,
        "--base",
        str(tmp_path / "base"),
        "--rank",
        "6",
        "--out",
        str(out),
        "--layers",
        "--quiet",
    ]
    assert main([*words, "--method", "task_arithmetic", "--set", "scale=0.5"]) == 0
    assert "relative error" in capsys.readouterr().out
    expected = merge.task_arithmetic([lmc.open_checkpoint(f) for f in folders], base=base, scale=0.5)
    for name, tensor in lmc.open_checkpoint(out).on(base).load().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6 and len(load_file(out / "adapter_model.safetensors"))
