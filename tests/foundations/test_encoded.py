"""Codes and factors are no weights: refused with the way out wherever weights are added, in memory and on disk."""

import json
import warnings
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


def beside(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"l.weight": torch.ones(2, 2), name: values}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_codes_are_known_by_their_numbers_too(dtype, on_disk, tmp_path):
    """Under a name that no library is known for."""
    models = [beside("l.packed", torch.tensor([[3, 7], [k, 9]], dtype=dtype)) for k in (1, 2)]
    with pytest.raises(WeightsError, match="l.packed holds u?int.* numbers that differ between .*codes"):
        if on_disk:
            for k, state in enumerate(models):
                torch.save(state, tmp_path / f"{k}.pt")
            lmc.merge.write(lmc.merge.average, [tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out", progress=False)
        else:
            lmc.merge.average(models)
    with pytest.raises(WeightsError, match="l.packed"):
        lmc.weights.agreeing(models)
    assert torch.equal(lmc.merge.average([models[0], models[0]])["l.packed"], models[0]["l.packed"])


@pytest.mark.parametrize(
    "values",
    [torch.arange(4), torch.tensor([True, False]), torch.tensor([1, 0], dtype=torch.uint8), torch.arange(3).int()],
)
def test_integers_that_differ_are_named_and_kept_from_the_first(values):
    models = [beside("l.table", values), beside("l.table", values.flip(0))]
    with pytest.warns(UserWarning, match="l.table: integers or masks that differ between") as caught:
        merged = lmc.merge.average(models)
    assert len(caught) == 1 and torch.equal(merged["l.table"], values)


def test_counters_may_differ(recwarn):
    models = [beside("l.num_batches_tracked", torch.tensor(k)) for k in (1, 2)]
    assert int(lmc.merge.average(models)["l.num_batches_tracked"]) == 1 and not recwarn.list


def test_quantised_dtypes_of_torch_are_refused_on_disk(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
        torch.save({"l.weight": codes}, tmp_path / "a.pt")
        with pytest.raises(WeightsError, match="l.weight .qint8. belongs to a quantised weight"):
            lmc.merge.write(lmc.merge.average, [tmp_path / "a.pt", tmp_path / "a.pt"], tmp_path / "out", progress=False)
