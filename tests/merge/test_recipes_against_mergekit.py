"""Where mergekit is installed, it and `replay` compute the same from the same configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lmc import merge
from lmc.weights.opening import open_checkpoint

config = pytest.importorskip("mergekit.config")

LAYERS, WIDTH = 4, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 24,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": LAYERS, "vocab_size": 40,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, WIDTH), "lm_head.weight": (40, WIDTH)}
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        found |= {f"{block}self_attn.{k}_proj.weight": (WIDTH, WIDTH) for k in "qkvo"}
        found |= {f"{block}mlp.{k}_proj.weight": (24, WIDTH) for k in ("gate", "up")}
        found |= {f"{block}mlp.down_proj.weight": (WIDTH, 24)}
        found |= {f"{block}{k}_layernorm.weight": (WIDTH,) for k in ("input", "post_attention")}
    return found | {"model.norm.weight": (WIDTH,)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(("base", "a", "b", "c")):
        rng = torch.Generator().manual_seed(seed)
        state = {k: torch.randn(shape, generator=rng) * (0.02 if base else 0.3) for k, shape in shapes().items()}
        state = {k: v + base[k] for k, v in state.items()} if base else state
        base = base or state
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    return folder


def m(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "parameters": parameters} if parameters else {"model": name}


def s(name: str, first: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "layer_range": [first, stop]} | ({"parameters": parameters} if parameters else {})


TWO = [m("a", weight=0.4, density=0.7), m("b", weight=[0, 0.5, 1], density=[0.9, 0.3])]
BARE = [m("a"), m("b"), m("c")]
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"models": [m("a", weight=1.0), m("b", weight=[0, 0.5, 1])]},
    "linear, not normalised": {"models": [m("a", weight=0.4), m("b", weight=0.3)], "parameters": {"normalize": False}},
    "task_arithmetic": {"models": TWO, "base_model": "base", "parameters": {"lambda": 0.7}},
    "ties": {"models": [m("a", weight=[{"filter": "mlp", "value": 0.5}, {"value": 1.0}], density=0.5), TWO[1]], "base_model": "base"},
    "ties, not normalised": {"models": TWO, "base_model": "base", "parameters": {"normalize": False}},
    "slerp": {
        "slices": [{"sources": [s("base", 0, 4), s("a", 0, 4)]}], "base_model": "base",
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.4}]},
    },
    "nuslerp": {"models": [m("a", weight=0.3), m("b", weight=0.6)]},
    "nuslerp, rows": {"models": [m("a", weight=0.3), m("b", weight=0.6)], "base_model": "base", "parameters": {"nuslerp_flatten": False}},
    "multislerp": {"models": [m("a", weight=0.3), m("b", weight=0.6), m("c", weight=1)], "base_model": "base"},
    "karcher": {"models": BARE},
    "model_stock": {"models": BARE, "base_model": "base"},
    "model_stock, rows": {"models": BARE, "base_model": "base", "parameters": {"filter_wise": True}},
    "nearswap": {"models": [m("a")], "base_model": "base", "parameters": {"t": 0.01}},
    "arcee_fusion": {"models": [m("a")], "base_model": "base"},
    "sce": {"models": BARE, "base_model": "base", "parameters": {"select_topk": 0.4}},
    "ram": {"models": BARE, "base_model": "base", "parameters": {"epsilon": 0.02}},
    "ramplus_tl": {"models": BARE, "base_model": "base", "parameters": {"epsilon": 0.02}},
    "breadcrumbs": {"models": [m("a", weight=0.4, density=0.7), m("b", weight=0.5, density=0.9, gamma=0.2)], "base_model": "base"},
    "breadcrumbs_ties": {"models": TWO, "base_model": "base"},
    "dare_ties": {"models": [m("a", weight=0.4), m("b", weight=0.5)], "base_model": "base"},
    "della": {"models": [m("a", weight=0.4), m("b", weight=0.5)], "base_model": "base"},
    "passthrough": {"slices": [
        {"sources": [s("a", 0, 3)]},
        {"sources": [s("b", 1, 4, scale=[{"filter": "o_proj", "value": 0}, {"value": 1.0}])]},
    ]},
    "ties, of slices": {
        "slices": [
            {"sources": [s("a", 0, 2, weight=[0, 1]), s("base", 0, 2), s("c", 0, 2, weight=1)]},
            {"sources": [s("base", 1, 4), s("a", 1, 4), s("b", 0, 3, density=[{"filter": "layers.1", "value": 0.3}, {"value": 0.6}])],
             "parameters": {"weight": 0.7, "density": 0.8}},
        ],
        "base_model": "base",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_tensors(name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    monkeypatch.chdir(models)
    content = RECIPES[name] | {"merge_method": name.partition(",")[0]}
    ours = merge.replay(content, tmp_path / "ours", progress=False)
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(config.MergeConfiguration.model_validate(content), str(tmp_path / "theirs"), options)
    theirs = open_checkpoint(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-6, rtol=1e-5)
    layers = [json.loads((tmp_path / w / "config.json").read_text())["num_hidden_layers"] for w in ("ours", "theirs")]
    assert layers[0] == layers[1]
