"""What public architectures admit beyond permutations, against a derivation by hand; what scales do to distances and barriers.

    python benchmarks/continuous.py --kinds             # transformers, and torchvision and timm where they are installed
    python benchmarks/continuous.py --kinds vit bert    # those whose names contain a word
    python benchmarks/continuous.py --stored            # the stored pairs: distances and barriers with and without scales

By hand: what each family admits, by patterns of names: the number of scales, whether a sign may flip, the mixing. Seconds
are of the processor.
"""

import argparse
import logging
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lmc

NONE, GL = "none", "general linear"
Admits = tuple[int, bool, str]

# Bilinear, so that any matrix goes: queries against keys, values against the output. Whole heads have the scales of both
# where these are tensors of their own.
QK, V, HEADS, FUSED_HEADS = (1, True, GL), (1, True, GL), (2, True, NONE), (0, True, NONE)
RELU, GELU, GATED = (1, False, NONE), (0, False, NONE), (1, True, NONE)
BATCH_NORM = (2, True, NONE)  # what comes in scales against the gain, the gain against what goes out


def stream(scales: int) -> Admits:
    """A stream whose norms have gains: one scale for each gain and what reads it alone, one for each layer scale; the gain's
    sign goes with that of what reads it."""
    return (scales, True, NONE)


@dataclass(frozen=True)
class Case:
    """An architecture, its inputs, and what its families admit: (pattern of the family's name, what it admits), first match."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    rules: tuple[tuple[str, Admits], ...]


def images(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(batch: int = 2, length: int = 6) -> Callable[[], Any]:
    return lambda: {"input_ids": torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(0))}


def tiny(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of `transformers` by the name of its class, with a small configuration."""

    def make() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}
        return kind(kind.config_class(**(sizes | options)))

    return make


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return make


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return make


# Two layers where nothing else is said. A norm whose reader is tied to the embedding, or is the output, has no scale.
BERT = ((r"query$", QK), (r"value$", V), (r"heads$", HEADS), (r"intermediate", GELU), (r"", stream(1)))
LLAMA = ((r"mlp", GATED), (r"v_proj$", V), (r"heads$", (0, False, NONE)), (r"", stream(5)))
CASES: dict[str, Case] = {
    "BERT, masked words": Case(tiny("BertForMaskedLM"), tokens(), BERT),
    "RoBERTa": Case(tiny("RobertaForMaskedLM"), tokens(), BERT),
    "DistilBERT": Case(
        tiny("DistilBertForMaskedLM", dim=16, n_layers=2, n_heads=2, hidden_dim=24),
        tokens(),
        ((r"q_lin$", QK), (r"v_lin$", V), (r"heads$", HEADS), (r"ffn", GELU), (r"", stream(1))),
    ),
}
VIT = (
    (r"query$|q_proj$", QK),
    (r"value$|v_proj$", V),
    (r"heads$", HEADS),
    (r"fc1|intermediate", GELU),
    (r"", stream(5)),
)
CASES |= {
    # Queries, keys and values are one tensor, of which whole heads cannot scale a part, but change the sign. The last norm is
    # read by the embedding.
    "GPT-2": Case(
        tiny("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2),
        tokens(),
        ((r"heads$", FUSED_HEADS), (r"qk$|c_attn$|c_attn\.q", QK), (r"\.v$", V), (r"mlp|c_fc", GELU), (r"", stream(4))),
    ),
    "OPT": Case(
        tiny("OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=16),
        tokens(),
        ((r"q_proj$", QK), (r"v_proj$", V), (r"heads$", HEADS), (r"fc1", RELU), (r"", stream(4))),
    ),
    # Rotary encodings leave queries and keys nothing; of two query heads on one key nothing but their order is free.
    "LLaMA": Case(tiny("LlamaForCausalLM", num_key_value_heads=1), tokens(), LLAMA),
    "Mistral": Case(tiny("MistralForCausalLM", num_key_value_heads=1), tokens(), LLAMA),
    "Qwen 2": Case(tiny("Qwen2ForCausalLM", num_key_value_heads=1), tokens(), LLAMA),
    # Gains are 1 + w, which no factor of w scales.
    "Gemma": Case(
        tiny("GemmaForCausalLM", num_key_value_heads=1, head_dim=8),
        tokens(),
        ((r"mlp", GATED), (r"v_proj$", V), (r"", (0, False, NONE))),
    ),
    # The output is the stream itself, which stays; positions tie the heads of both layers.
    "T5, encoder": Case(
        tiny("T5EncoderModel", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
        tokens(),
        ((r"\.q$", QK), (r"\.v$", V), (r"heads$", (4, True, NONE)), (r"wi|DenseReluDense", RELU)),
    ),
    "ViT": Case(tiny("ViTForImageClassification", image_size=16, patch_size=8), images(2, 3, 16, 16), VIT),
    "DINOv2": Case(
        tiny("Dinov2ForImageClassification", image_size=28, patch_size=14),
        images(2, 3, 28, 28),
        ((r"q_proj$", QK), (r"v_proj$", V), (r"heads$", HEADS), (r"fc1", GELU), (r"", stream(9))),
    ),
    "ELECTRA": Case(tiny("ElectraForMaskedLM", embedding_size=16), tokens(), BERT),
    "XLM-R": Case(tiny("XLMRobertaForMaskedLM"), tokens(), BERT),
    "DeiT": Case(tiny("DeiTForImageClassification", image_size=16, patch_size=8), images(2, 3, 16, 16), VIT),
    # The norm in front writes to the stream, and has no scale.
    "CLIP, vision": Case(
        tiny("CLIPVisionModelWithProjection", image_size=16, patch_size=8, projection_dim=6), images(2, 3, 16, 16), VIT
    ),
    # Two of eight units of each head turn with the position; the others mix.
    "GPT-NeoX": Case(
        tiny("GPTNeoXForCausalLM"),
        tokens(),
        ((r"heads$", FUSED_HEADS), (r"mlp|dense_h", GELU), (r"query_key_value", QK), (r"", stream(5))),
    ),
    "timm ViT": Case(
        timm("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24),
        images(2, 3, 32, 32),
        ((r"heads$", FUSED_HEADS), (r"qk$", QK), (r"\.v$", V), (r"fc1", GELU), (r"", stream(5))),
    ),
    # One norm and one layer scale in each block, and the norm behind the stage.
    "timm ConvNeXt": Case(
        timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 12, 16, 20)),
        images(2, 3, 64, 64),
        ((r"fc1", GELU), (r"stages\.stream\.2$", stream(5)), (r"", stream(3))),
    ),
    # A rectified stream: a scale for the stream, and one for each batch norm that writes to it.
    "timm ResNet18": Case(
        timm("resnet18", channels=(8, 12, 16, 20)),
        images(2, 3, 64, 64),
        ((r"layer\d\.\d\.conv1|^conv1", BATCH_NORM), (r"", stream(4))),
    ),
    "ResNet18": Case(
        vision("resnet18"),
        images(2, 3, 32, 32),
        ((r"layer1\.stream|^conv1", stream(4)), (r"\d\.conv1", BATCH_NORM), (r"", stream(4))),
    ),
    "SqueezeNet": Case(vision("squeezenet1_1"), images(2, 3, 64, 64), ((r"", RELU),)),
}


def kinds(words: list[str]) -> None:
    """Print a row for each architecture, and where families differ from what was derived by hand."""
    print("| architecture | families | as derived | scales | sign | mixing | largest error | least power | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if words and not any(word.lower() in name.lower() for word in words):
            continue
        torch.manual_seed(0)
        try:
            model, x = case.make().eval(), case.inputs()
        except (ImportError, AttributeError) as error:
            print(f"| {name} | {type(error).__name__} | | | | | | | |", flush=True)
            continue
        spec = lmc.permutation_spec(model, x, certify=False, progress=False)
        started = time.process_time()
        found = lmc.continuous_symmetries(spec, model, x, progress=False).kinds
        seconds = time.process_time() - started
        off = []
        for family, kind in found.items():
            expected = next((admits for pattern, admits in case.rules if re.search(pattern, family)), None)
            if (len(kind.scales), kind.sign, kind.mixing) != expected:
                off.append(f"{family}: found {len(kind.scales), kind.sign, kind.mixing}, by hand {expected}")
        proven = [kind for kind in found.values() if kind.scales]
        print(
            f"| {name} | {len(found)} | {len(found) - len(off)} | {sum(len(k.scales) for k in found.values())} "
            f"| {sum(k.sign for k in found.values())} | {sum(k.mixing != NONE for k in found.values())} "
            f"| {max((k.error for k in found.values()), default=0):.0e} "
            f"| {min((k.power for k in proven), default=0):.0e} | {seconds:.1f} |",
            flush=True,
        )
        for line in off:
            print(f"  {line}", flush=True)


PAIRS = (
    "digits-mlp64", "digits-mlp256", "digits-cnn", "digits-vgg11", "digits-resnet20", "digits-resnet20-layernorm",
    "digits-vit", "toy-text-gpt",
)  # fmt: skip


def stored(names: list[str]) -> None:
    """Print for each stored pair what becomes of distance, cosine, barrier and curvature when scales are taken away."""
    print("| pair | weights | distance over norm | cosine | barrier, nats | top eigenvalue of A |")
    print("|---|---|---|---|---|---|")
    for name in names or PAIRS:
        kept = lmc.data.checkpoint(name)
        source = kept.manifest["data"]
        data = getattr(lmc.data, source["function"])(**source["options"])
        model = kept.model()
        spec = lmc.permutation_spec(model, data.train[0][:2], continuous=True, certify=False, progress=False)
        a, b = kept.weights[:2]
        ca, cb = lmc.canonical(spec, model, a), lmc.canonical(spec, model, b)
        whole = lmc.align.group_matching(spec, model, a, b, progress=False)
        pairs = {
            "as they are": (a, b),
            "canonical": (ca, cb),
            "as they are, weight matching": (a, lmc.weight_matching(spec, a, b, progress=False).apply(b)),
            "canonical, weight matching": (ca, lmc.weight_matching(spec, ca, cb, progress=False).apply(cb)),
            "matched modulo the group": (whole.a, whole.weights),
        }
        parameters = [n for n, _ in model.named_parameters()]
        for row, (x, y) in pairs.items():
            u, v = (torch.cat([w[n].double().flatten() for n in parameters]) for w in (x, y))
            barrier = lmc.loss_path(model, x, y, data, alphas=11, progress=False).barrier
            sharp = ""
            if "matching" not in row and "matched" not in row:
                sharp = f"{lmc.landscape.curvature(model, x, data, top=1, probes=2, progress=False).eigenvalues[0]:.1f}"
            distance, cosine = float((u - v).norm() / u.norm()), float(u @ v / u.norm() / v.norm())
            print(f"| {name} | {row} | {distance:.3f} | {cosine:.3f} | {barrier:.3f} | {sharp} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", help="words in names of architectures")
    parser.add_argument("--stored", nargs="*", help="names of stored pairs")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.kinds is not None:
        kinds(options.kinds)
    if options.stored is not None:
        stored(options.stored)


if __name__ == "__main__":
    main()
