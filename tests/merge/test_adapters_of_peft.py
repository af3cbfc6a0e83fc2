"""Adapters that PEFT makes give the model that PEFT makes of them, and PEFT reads the adapters that are extracted."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lmc
from lmc import merge

pytestmark = pytest.mark.thorough


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.embed(x).mT).mT
        return self.head(self.norm(self.v(torch.relu(self.q(h)))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def adapted(model: nn.Module, folder: Path, seed: int = 0, **config: Any) -> Any:
    """PEFT's model with an adapter of random factors, which is stored in `folder`."""
    torch.manual_seed(seed)
    import peft  # takes seconds

    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    made.save_pretrained(folder)
    return made


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q", "v"]},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": ["q", "v"], "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["q", "v", "head"],
        "rank_pattern": {"q": 2}, "alpha_pattern": {"v": 3, "q": 5},
    },
    "embedding": {"r": 3, "lora_alpha": 6, "target_modules": ["embed", "q"]},
    "convolution": {"r": 3, "lora_alpha": 6, "target_modules": ["conv", "q"]},
    "saved": {"r": 3, "lora_alpha": 6, "target_modules": ["q"], "modules_to_save": ["head", "norm"]},
    "biases": {"r": 3, "lora_alpha": 6, "target_modules": ["q"], "bias": "all"},
    "lora bias": {"r": 3, "lora_alpha": 6, "target_modules": ["q"], "lora_bias": True},
    "dora": {"r": 3, "lora_alpha": 6, "target_modules": ["q", "v"], "use_dora": True},
    "dora of a convolution": {"r": 3, "lora_alpha": 6, "target_modules": ["conv"], "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_model_of_an_adapter(kind: str, tmp_path: Path):
    model = net()
    if kind == "dora of a convolution":
        model.conv = nn.Conv2d(8, 8, 3)  # type: ignore[assignment]
    expected = adapted(model, tmp_path / "a", **CONFIGS[kind]).merge_and_unload().state_dict()
    full = lmc.open_checkpoint(tmp_path / "a").on(model.state_dict()).load()
    assert set(full) == set(expected)
    for name in expected:
        torch.testing.assert_close(full[name], expected[name], atol=2e-6, rtol=1e-5)
    assert any(not torch.equal(full[name], model.state_dict()[name]) for name in full)


class Words(nn.Module):
    """Names by which PEFT stores embeddings beside their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 8)}) for _ in range(3))
        self.lm_head = nn.Linear(8, 11, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_stored_embeddings_and_patterns_by_regular_expressions(tmp_path: Path):
    torch.manual_seed(0)
    model = Words()
    made = adapted(
        model, tmp_path / "a", r=4, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "q", "up"], use_rslora=True,
        rank_pattern={r"^layers\.0\.q": 2, r"layers\.[12]\.up": 3}, alpha_pattern={r".*\.up": 5, "embed_tokens": 1},
    )  # fmt: skip
    made.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    opened = lmc.open_checkpoint(tmp_path / "a")
    assert any("base_layer" in name for name in opened)
    full = opened.on(model.state_dict()).load()
    for name, tensor in made.merge_and_unload().state_dict().items():
        torch.testing.assert_close(full[name], tensor, atol=2e-6, rtol=1e-5)


def test_weights_stored_across(tmp_path: Path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 8), Conv1D(12, 12))
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["0", "1"], "fan_in_fan_out": True}
    expected = adapted(model, tmp_path / "a", **config).merge_and_unload().state_dict()
    full = lmc.open_checkpoint(tmp_path / "a").on(model.state_dict()).load()
    for name in expected:
        torch.testing.assert_close(full[name], expected[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "scale"), [("cat", 1.0), ("svd", 1.0)])
def test_combinations(kind: str, scale: float, tmp_path: Path):
    """PEFT's exact combinations are task arithmetic; the svd of full rank is extraction of that rank."""
    model, config = net(), {"r": 3, "lora_alpha": 3, "target_modules": ["q", "v"]}
    adapted(model, tmp_path / "a", 1, **config)
    adapted(model, tmp_path / "b", 2, **config)
    from peft import PeftModel

    both = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", adapter_name="b")
    more = {"svd_rank": 6} if kind == "svd" else {}
    both.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type=kind, **more)
    both.set_adapter("both")
    expected = both.merge_and_unload().state_dict()
    base = model.state_dict()
    folders = [tmp_path / "a", tmp_path / "b"]
    models = [lmc.open_checkpoint(folder) for folder in folders]
    merged = merge.task_arithmetic(models, base=base, weights=[0.7, 0.4])
    made = merge.extract(models, tmp_path / "both", base=base, rank=6, weights=[0.7, 0.4], progress=False)
    for state in (merged, made.open().on(base)):
        for name in expected:
            torch.testing.assert_close(state[name], expected[name], atol=5e-6, rtol=1e-5)


def test_peft_reads_what_is_extracted(tmp_path: Path):
    model, x = net(), torch.arange(11)[None]
    tuned = copy.deepcopy(model)
    torch.manual_seed(3)
    for parameter in tuned.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    found = merge.extract([tuned], tmp_path / "a", base=tmp_path / "base.safetensors", rank=12, progress=False)
    assert found.error < 1e-5
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a")
    torch.testing.assert_close(loaded(x), tuned(x), atol=1e-5, rtol=1e-4)
    merged = loaded.merge_and_unload().state_dict()
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=1e-4)
