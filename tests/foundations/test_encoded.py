"""Codes and factors are no weights: refused with the way out wherever weights are added, in memory and on disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lmc
from lmc.errors import WeightsError


def quantised(kind: str, seed: int) -> dict[str, Tensor]:
    """One linear layer as common formats store it."""
    torch.manual_seed(seed)
    scale, codes = torch.rand(8), torch.randint(-100, 100, (8, 8))
    return {
        "int8": {"l.weight": codes.to(torch.int8), "l.scale": scale},
        "bitsandbytes8": {"l.weight": codes.to(torch.int8), "l.SCB": scale, "l.weight_format": torch.tensor(0)},
        "bitsandbytes4": {
            "l.weight": codes.to(torch.uint8),
            "l.weight.absmax": scale,
            "l.weight.quant_map": scale + 1,
            "l.weight.quant_state.bitsandbytes__nf4": codes[0].to(torch.uint8),
        },
        "gptq": {"l.qweight": codes.int(), "l.qzeros": codes.int(), "l.scales": scale, "l.g_idx": codes[0].int()},
        "awq": {"l.qweight": codes.int(), "l.qzeros": codes.int(), "l.scales": scale},
        "compressed": {"l.weight_packed": codes.int(), "l.weight_scale": scale, "l.weight_shape": codes[0, :2]},
        "fp8": {"l.weight": scale.expand(8, 8).to(torch.float8_e4m3fn), "l.weight_scale_inv": scale},
        "fp8 input": {"l.weight": scale.expand(8, 8).to(torch.float8_e5m2), "l.input_scale": scale[0]},
    }[kind]


KINDS = ("int8", "bitsandbytes8", "bitsandbytes4", "gptq", "awq", "compressed", "fp8", "fp8 input")


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_refused_everywhere(kind: str, tmp_path: Path):
    states = [quantised(kind, seed) for seed in (0, 1)]
    paths = [tmp_path / f"{i}.safetensors" for i in (0, 1)]
    for path, state in zip(paths, states, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    for action in (
        lambda: lmc.merge.average(states),
        lambda: lmc.merge.average(paths),
        lambda: lmc.merge.ties([states[0]], base=states[1]),
        lambda: lmc.merge.write(lmc.merge.average, paths, tmp_path / "out", progress=False),
        lambda: lmc.weights.lerp(*states, 0.5),
        lambda: lmc.weights.distance(*states),
        lambda: lmc.weights.agreeing(states),
    ):
        with pytest.raises(WeightsError, match=r"l\..*quantised weight|l\..*scale of their own.*dequantise it first"):
            action()
    found = lmc.merge.inspect(paths, progress=False)
    assert len(found.advice) == 2 and all("dequantise" in sentence for sentence in found.advice)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_embedding_A", "lora_embedding_B"),
        ("lora_down.weight", "lora_up.weight"),
        ("hada_w1_a", "hada_w1_b"),
        ("lokr_w1", "lokr_w2"),
        ("ia3_l", "bias"),
    ],
)
def test_factors_of_adapters_are_not_merged(names: tuple[str, str], tmp_path: Path):
    torch.manual_seed(0)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        state = {f"base_model.model.l.{name}": torch.randn(4, 4) for name in names}
        save_file(state, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    opened = [lmc.open_checkpoint(folder).load() for folder in folders]
    for action in (
        lambda: lmc.merge.average(opened),
        lambda: lmc.merge.write(lmc.merge.average, folders, tmp_path / "out", progress=False),
    ):
        with pytest.raises(WeightsError, match="factor of an adapter.*merge_and_unload"):
            action()
    assert "align=" not in "".join(lmc.merge.inspect(folders, progress=False).advice)
    # As parameters of a module they may be interpolated: the path is one of functions.
    lmc.weights.lerp(*opened, 0.5)


def test_what_merely_looks_like_codes_is_merged():
    state = {
        "norm.scale": torch.ones(3),
        "attn.logit_scale": torch.ones(1),
        "l.weight": torch.ones(3, 3),
        "table": torch.zeros(2, 2, dtype=torch.int32),
        "mask": torch.ones(2, dtype=torch.uint8),
        "half.weight": torch.ones(2).to(torch.float8_e4m3fn),
    }
    assert lmc.merge.average([state, state])["l.weight"].equal(state["l.weight"])
