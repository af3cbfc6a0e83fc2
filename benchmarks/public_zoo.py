"""Symmetries of the architectures of public model zoos: found, sound in a fresh module, coverage, seconds, memory.

    python benchmarks/public_zoo.py --list              # what is there
    python benchmarks/public_zoo.py                     # everything, one process after the other
    python benchmarks/public_zoo.py timm: torchvision:resnet --seconds 60 --gigabytes 12

Takes what is installed of timm (one variant for each model file, the smallest by its name), torchvision, transformers
(configurations shrunk by the names of their entries), diffusers, torch_geometric (two layers of a convolution) and
segmentation_models_pytorch. No weights are downloaded. The check is independent of the package's certificate: weights
before and after a random element of the group are loaded into two newly built modules and computed in float64.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Built = tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]  # the module, and inputs for it

SIZES = "atto femto pico nano zepto xxxtiny xxtiny xtiny xxs xs tiny mini extra small lite s t b0 12 18 base b".split()
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 4, 6], [1, 2, 3, 4, 5, 6, 7, 0, 4, 6, 0, 2]])


def by_size(name: str) -> tuple[int, int, str]:
    """Key that puts the variant whose name has the smallest size in it first."""
    words = re.split(r"[_.]|(?<=[a-z])(?=\d)", name)
    return min((SIZES.index(word) for word in words if word in SIZES), default=len(SIZES)), len(name), name


def timm_models() -> Iterator[tuple[str, Built]]:
    import timm
    from timm.models import _registry

    for file in sorted(_registry._module_to_models):
        names = _registry._module_to_models[file]
        name = min([name for name in names if not name.startswith("test_")] or names, key=by_size)

        def inputs(model: Any) -> Tensor:
            """Images of 96 pixels where the model takes them, which makes the checks quick, else of its own size."""
            own = model.pretrained_cfg.get("input_size", (3, 224, 224))
            with contextlib.suppress(Exception), torch.no_grad():
                model(small := torch.randn(2, own[0], 96, 96))
                return small
            return torch.randn(2, *own)

        yield name, (lambda name=name: timm.create_model(name, pretrained=False), inputs)


def torchvision_models() -> Iterator[tuple[str, Built]]:
    from torchvision import models

    files: dict[str, list[str]] = {}
    for name in models.list_models():
        builder = models.get_model_builder(name)
        if not re.search("quantiz|detection|optical", builder.__module__):
            kind = re.split("[_0-9]", name)[0] + "_bn" * name.endswith("_bn")
            files.setdefault(f"{builder.__module__}.{kind}", []).append(name)
    for module, names in files.items():
        name = min(names, key=by_size)
        side = 299 if "inception" in name else 64 if "video" in module else 224 if re.match("vit|maxvit", name) else 96
        shape = (2, 3, 8, side, side) if "video" in module else (2, 3, side, side)
        if name.startswith("mvit"):
            shape = (1, 3, 16, 224, 224)
        options: dict[str, Any] = {"weights": None}
        if "segmentation" in module:
            options["weights_backbone"], shape = None, (2, 3, 96, 96)
        if re.fullmatch("googlenet|inception_v3", name):
            options["init_weights"] = False
        yield (
            name,
            (
                lambda name=name, options=options: models.get_model(name, **options),
                lambda _, shape=shape: torch.randn(shape),
            ),
        )
    yield (
        "retinanet_resnet50_fpn (backbone and heads)",
        (
            lambda: Body(models.get_model("retinanet_resnet50_fpn", weights=None, weights_backbone=None)),
            lambda _: torch.randn(1, 3, 96, 96),
        ),
    )


def torchaudio_models() -> Iterator[tuple[str, Built]]:
    from torchaudio import models

    lengths = torch.tensor([20, 17])
    wave = torch.randn(2, 4000)
    tacotron = {"n_symbol": 20, "symbol_embedding_dim": 16, "encoder_embedding_dim": 16, "n_mels": 8, "decoder_rnn_dim": 16,
                "attention_rnn_dim": 16, "attention_hidden_dim": 8, "prenet_dim": 8, "postnet_embedding_dim": 16,
                "attention_location_n_filter": 4, "decoder_dropout": 0.0, "attention_dropout": 0.0}  # fmt: skip
    text = torch.arange(20).view(2, 10) % 20
    small = {"extractor_mode": "group_norm", "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2)],
             "extractor_conv_bias": False, "encoder_embed_dim": 32, "encoder_projection_dropout": 0.0,
             "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 4,
             "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 48, "encoder_ff_interm_dropout": 0.0,
             "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": 7}  # fmt: skip
    table: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        "Conformer": (lambda: models.Conformer(16, 4, 32, 2, 7), (torch.randn(2, 20, 16), lengths)),
        "ConvTasNet": (lambda: models.ConvTasNet(2, 16, 16, 3, 8, 16, 2, 1), torch.randn(2, 1, 400)),
        "DeepSpeech": (lambda: models.DeepSpeech(16, n_hidden=16, n_class=5), torch.randn(2, 1, 20, 16)),
        "Emformer": (
            lambda: models.Emformer(16, 4, 32, 2, 4, right_context_length=2),
            (torch.randn(2, 18, 16), lengths - 4),
        ),
        "HDemucs": (lambda: models.HDemucs(["a", "b"], channels=4), torch.randn(1, 2, 11025)),
        "Tacotron2": (
            lambda: models.Tacotron2(**tacotron),
            (text, torch.tensor([10, 8]), torch.randn(2, 8, 12), torch.tensor([12, 10])),
        ),
        "Wav2Letter": (lambda: models.Wav2Letter(7, "mfcc", 16), torch.randn(2, 16, 200)),
        "Wav2Vec2Model": (lambda: models.wav2vec2_model(**small), wave),
        "WaveRNN": (
            lambda: models.WaveRNN([2, 2], 8, 4, 1, 16, 16, 3, 8, 8, 8),
            (torch.randn(2, 1, 4 * 10), torch.randn(2, 1, 8, 12)),
        ),
    }
    for name, (build, inputs) in table.items():
        yield name, (build, lambda _, inputs=inputs: inputs)


class Body(nn.Module):
    """What of RetinaNet depends on no values: its backbone and heads."""

    def __init__(self, detector: Any):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


SMALL = [  # entry of a configuration -> its value; the first pattern that fits
    (
        r"(num_)?(hidden|encoder|decoder|n)_?layers?|num_(hidden_)?layers|n_layer|depth|num_(encoder|decoder|block)s?_?layers",
        2,
    ),
    (r"(.*_)?num_key_value_heads|.*num_kv_heads", 2),
    (r"(.*_)?(num_)?(attention_)?heads|n_head|num_attention_heads", 4),
    (r"head_dim", 8),
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|projection_dim|word_embed_proj_dim", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|n_inner|mlp_dim|d_ff)", 48),
    (r"vocab_size", 99),
    (r"image_size", 32),
    (r"(num_local_experts|n_routed_experts|num_experts)", 4),
    (r"(num_experts_per_tok|moe_topk|num_experts_per_token)", 2),
    (r"(moe_intermediate_size)", 16),
    (r"patch_size", 8),
    (r"qk_rope_head_dim|qk_nope_head_dim", 4),
    (r"v_head_dim", 8),
    (r"rotary_dim", 4),
    (r"attention_window", 4),
]
SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "label_length": 4,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
}


def shrink(config: Any) -> Any:
    """A configuration with few and small layers, its parts too."""
    if isinstance(getattr(config, "attention_window", None), list):
        config.attention_window = 4
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            small = next((size for pattern, size in SMALL if re.fullmatch(pattern, name)), value)
            if name == "patch_size" and getattr(config, "depths", None):
                small = value  # of the first of several stages
            if name.endswith("_token_id") and value >= 99:
                small = 1
            with contextlib.suppress(AttributeError):  # derived from another entry
                setattr(config, name, small)
    with contextlib.suppress(AttributeError):
        config.layer_types = config.layer_types[:2]
    if getattr(config, "vocab_size", 0) is None:
        config.vocab_size = 99
    return config


def transformers_models() -> Iterator[tuple[str, Built]]:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    heads = [
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_MASKED_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
        auto.MODEL_FOR_OBJECT_DETECTION_MAPPING,
        auto.MODEL_FOR_CTC_MAPPING,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
        auto.MODEL_MAPPING,
    ]
    for kind, config_class in transformers.CONFIG_MAPPING.items():
        head = next((mapping for mapping in heads if config_class in mapping), None)
        if head is None:
            continue

        def build(config_class: Any = config_class, head: Any = head) -> nn.Module:
            model_class = head[config_class]
            return (model_class[0] if isinstance(model_class, tuple) else model_class)(
                shrink(config_class(**(SERIES if of_series(config_class) else {})))
            )

        yield kind, (build, transformers_inputs)


def transformers_inputs(model: Any) -> dict[str, Tensor]:
    """The first of several sets of inputs that the model takes."""
    first = None
    asked = inspect.signature(model.forward).parameters
    for inputs in transformers_candidates(model, asked):
        if inputs.keys() <= asked.keys():
            try:
                with torch.no_grad():
                    model(**inputs)
                return inputs
            except Exception as error:
                first = first or error
    raise first or TypeError(f"{type(model).__name__} takes {', '.join(asked)}")


def transformers_candidates(model: Any, asked: Any) -> Iterator[dict[str, Tensor]]:
    main, config = model.main_input_name, model.config
    vision = getattr(config, "vision_config", config)
    tokens = torch.arange(18).view(2, 9) % 90 + 3
    text = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        text["decoder_input_ids"] = tokens[:, :7]
    side = getattr(vision, "image_size", 64)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    image = {"pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), height, width)}
    mels = getattr(getattr(config, "audio_config", config), "num_mel_bins", 80)
    if "past_values" in asked:
        long, ahead = config.context_length + max(getattr(config, "lags_sequence", [0])), 4
        series = {"past_values": torch.randn(2, long), "past_time_features": torch.randn(2, long, 1),
                  "past_observed_mask": torch.ones(2, long), "future_values": torch.randn(2, ahead),
                  "future_time_features": torch.randn(2, ahead, 1)}  # fmt: skip
        yield {name: value for name, value in series.items() if name in asked}
        yield {"past_values": torch.randn(2, long, getattr(config, "num_input_channels", 1))}
    if "grid_thw" in asked:
        size = vision.patch_size**2 * getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1)
        name = next(iter(asked))
        yield {name: torch.randn(16, size), "grid_thw": torch.tensor([[1, 4, 4]])}
    if main == "pixel_values":
        yield image
        yield {"pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), 96, 96)}
        yield {"pixel_values": torch.randn(2, getattr(vision, "num_frames", 8), 3, height, width)}
    if main == "input_values":
        yield {main: torch.randn(2, 4000)}
        yield {main: torch.randn(2, 1, 4000)}
        yield {main: torch.randn(2, getattr(config, "max_length", 100), mels)}
    if main == "input_features":
        yield {main: torch.randn(2, mels, 3000)}
        yield {main: torch.randn(2, 100, mels)}
        yield {main: torch.randn(2, 100, mels), "attention_mask": torch.ones(2, 100, dtype=torch.long)}
        yield {main: torch.randn(2, 100, getattr(config, "feature_projection_input_dim", 160))}
        yield {main: torch.randn(2, 100, mels), "decoder_input_ids": tokens[:, :7]}
    if main == "input_ids":
        yield text
    large = {"pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), 96, 96)}
    yield text | image
    yield text | large
    yield text | {"input_features": torch.randn(2, 1, 1001, mels)}
    yield text | {"bbox": torch.randint(0, 30, (2, 9, 4)).sort(-1).values}
    yield text | {"bbox": torch.rand(2, 9, 8)}
    yield text | {"visual_feats": torch.randn(2, 4, 2048), "visual_pos": torch.rand(2, 4, 4)}
    yield image


def of_series(config_class: Any) -> bool:
    return "lags_sequence" in inspect.signature(config_class.__init__).parameters


def diffusers_models() -> Iterator[tuple[str, Built]]:
    import diffusers

    time = torch.tensor([3, 7])
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    image = torch.randn(2, 4, 16, 16)
    table: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "UNet2DModel": (
            blocks | {"in_channels": 4, "out_channels": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                      "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
            {"sample": image, "timestep": time},
        ),
        "UNet2DConditionModel": (
            blocks | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 24,
                      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8},
            {"sample": image, "timestep": time, "encoder_hidden_states": torch.randn(2, 5, 24)},
        ),
        "AutoencoderKL": (
            blocks | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
            {"sample": torch.randn(2, 3, 16, 16)},
        ),
        "DiTTransformer2DModel": (
            {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 16,
             "norm_num_groups": 8},
            {"hidden_states": image, "timestep": time, "class_labels": time},
        ),
        "SD3Transformer2DModel": (
            {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
             "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32,
             "pooled_projection_dim": 20, "out_channels": 4},
            {"hidden_states": image, "encoder_hidden_states": torch.randn(2, 5, 24),
             "pooled_projections": torch.randn(2, 20), "timestep": time},
        ),
        "VQModel": (
            {"block_out_channels": (32, 64), "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2,
             "up_block_types": ("UpDecoderBlock2D",) * 2},
            {"sample": torch.randn(2, 3, 16, 16)},
        ),
    }  # fmt: skip
    for name, (options, inputs) in table.items():
        yield name, (lambda name=name, options=options: getattr(diffusers, name)(**options), lambda _, i=inputs: i)


class Graphs(nn.Module):
    """Two layers of a convolution of torch_geometric."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, edge_index: Tensor, *more: Any) -> Tensor:
        return self.second(self.first(x, edge_index, *more).relu(), edge_index, *more)


class Spread(nn.Module):
    """A convolution alone, or between linear layers from i to `inner` and on to o channels."""

    def __init__(self, layer: nn.Module, i: int = 0, inner: int = 0, o: int = 0):
        super().__init__()
        self.layer = layer
        self.before, self.after = (nn.Linear(i, inner), nn.Linear(inner, o)) if i else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor, edge_index: Tensor, *more: Any) -> Tensor:
        return self.after(self.layer(self.before(x), edge_index, *more))


class Given(nn.Module):
    """A convolution that takes more than features and edges: `call(layer, features, edges, more)`."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor, edge_index: Tensor, *more: Any) -> Tensor:
        return self.call(self.layer, x, edge_index, *more)


def places(x: Tensor) -> Tensor:
    """Three coordinates of each node."""
    return torch.linspace(0, 1, 3 * len(x)).view(-1, 3).to(x)


def again(layer: Any, x: Tensor, edges: Tensor) -> Tensor:
    return layer(x, x.tanh(), edges)


def placed(layer: Any, x: Tensor, edges: Tensor) -> Tensor:
    return layer(x, places(x), edges)


def of_one_type(layer: Any, x: Tensor, edges: Tensor) -> Tensor:
    return layer({"node": x}, {("node", "to", "node"): edges})["node"]


def torch_geometric_models() -> Iterator[tuple[str, Built]]:
    from torch_geometric.nn import conv

    def mlp(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Linear(i, 20), nn.ReLU(), nn.Linear(20, o))

    special: dict[str, Callable[[Any, int, int], nn.Module]] = {
        "GINConv": lambda c, i, o: c(mlp(i, o)),
        "GINEConv": lambda c, i, o: c(mlp(i, o), edge_dim=3),
        "EdgeConv": lambda c, i, o: c(mlp(2 * i, o)),
        "NNConv": lambda c, i, o: c(i, o, nn.Linear(3, i * o)),
        "ChebConv": lambda c, i, o: c(i, o, K=3),
        "GATConv": lambda c, i, o: c(i, o // 2, heads=2),
        "GATv2Conv": lambda c, i, o: c(i, o // 2, heads=2),
        "TransformerConv": lambda c, i, o: c(i, o // 2, heads=2),
        "RGCNConv": lambda c, i, o: c(i, o, num_relations=2),
        "GatedGraphConv": lambda c, i, o: c(o, 2),
        "PNAConv": lambda c, i, o: c(i, o, ["mean", "max"], ["identity"], deg=torch.tensor([0, 4, 4])),
        "EGConv": lambda c, i, o: c(i, o, num_heads=2),
        "SSGConv": lambda c, i, o: c(i, o, alpha=0.1),
        "FastRGCNConv": lambda c, i, o: c(i, o, num_relations=2),
        "RGATConv": lambda c, i, o: c(i, o, num_relations=2),
        "GMMConv": lambda c, i, o: c(i, o, dim=3, kernel_size=2),
        "PANConv": lambda c, i, o: c(i, o, filter_size=2),
        "PDNConv": lambda c, i, o: c(i, o, edge_dim=3, hidden_channels=8),
        "FusedGATConv": lambda c, i, o: c(i, o, add_self_loops=False),
        "MixHopConv": lambda c, i, o: c(i, o, powers=[1]),
        "GravNetConv": lambda c, i, o: c(i, o, space_dimensions=3, propagate_dimensions=4, k=3),
    } | {  # those that keep the number of channels stand between two linear layers
        "GatedGraphConv": lambda c, i, o: Spread(c(20, 2), i, 20, o),
        "CGConv": lambda c, i, o: Spread(c(20), i, 20, o),
        "LGConv": lambda c, i, o: Spread(c(), i, 20, o),
        "SimpleConv": lambda c, i, o: Spread(c(), i, 20, o),
        "AntiSymmetricConv": lambda c, i, o: Spread(c(20), i, 20, o),
        "GPSConv": lambda c, i, o: Spread(c(20, conv.GCNConv(20, 20), heads=4), i, 20, o),
        "DirGNNConv": lambda c, i, o: c(conv.GCNConv(i, o)),
        "GCN2Conv": lambda c, i, o: Spread(Given(c(20, alpha=0.1), again), i, 20, o),
        "FAConv": lambda c, i, o: Spread(Given(c(20), again), i, 20, o),
        "AGNNConv": lambda c, i, o: Spread(c(), i, 20, o),
        "APPNP": lambda c, i, o: Spread(c(2, 0.1), i, 20, o),
        "PointNetConv": lambda c, i, o: Given(c(mlp(i + 3, o)), placed),
        "PointTransformerConv": lambda c, i, o: Given(c(i, o), placed),
        "PointGNNConv": lambda c, i, o: Spread(Given(c(mlp(20, 3), mlp(23, 20), mlp(20, 20)), placed), i, 20, o),
        "PPFConv": lambda c, i, o: Given(c(mlp(i + 4, o)), lambda f, x, e: f(x, places(x), places(x).flip(0), e)),
        "SignedConv": lambda c, i, o: Given(c(i, o // 2, first_aggr=True), lambda f, x, e: f(x, e, e.flip(0))),
        "DNAConv": lambda c, i, o: Spread(Given(c(20), lambda f, x, e: f(torch.stack([x, x.tanh()], 1), e)), i, 20, o),
        "HEATConv": lambda c, i, o: Given(
            c(i, o, 2, 2, 4, 3, 4), lambda f, x, e, kind, attr: f(x, e, torch.arange(len(x)) % 2, kind, attr)
        ),
        "HGTConv": lambda c, i, o: Given(c(i, o, (["node"], [("node", "to", "node")]), 2), of_one_type),
        "HeteroConv": lambda c, i, o: Given(c({("node", "to", "node"): conv.GCNConv(i, o)}), of_one_type),
        "HANConv": lambda c, i, o: Given(c(i, o, (["node"], [("node", "to", "node")]), 2), of_one_type),
    }
    weighted = {name: (torch.randn(12, 3),) for name in ("GINEConv", "NNConv", "GMMConv", "PDNConv")}
    weighted |= {name: (torch.arange(12) % 2,) for name in ("RGCNConv", "FastRGCNConv", "RGATConv")}
    weighted["HEATConv"] = (torch.arange(12) % 2, torch.randn(12, 3))
    for name in conv.__all__[1:]:  # after the base class
        layer, make = getattr(conv, name), special.get(name, lambda c, i, o: c(i, o))
        yield (
            name,
            (
                lambda layer=layer, make=make: Graphs(make(layer, 10, 16), make(layer, 16, 6)),
                lambda _, name=name: (torch.randn(8, 10), EDGES, *weighted.get(name, ())),
            ),
        )


def segmentation_models() -> Iterator[tuple[str, Built]]:
    import segmentation_models_pytorch as smp

    for name in sorted(smp.MODEL_ARCHITECTURES_MAPPING):
        encoder = "tu-vit_tiny_patch16_224" if name == "dpt" else "resnet18"  # features that all have one size
        side = {"dpt": 224, "pan": 128}.get(name, 64)
        yield (
            name,
            (
                lambda name=name, encoder=encoder: smp.create_model(
                    name, encoder_name=encoder, encoder_weights=None, classes=3
                ),
                lambda _, side=side: torch.randn(2, 3, side, side),
            ),
        )


LIBRARIES = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "transformers": transformers_models,
    "diffusers": diffusers_models,
    "torch_geometric": torch_geometric_models,
    "torchaudio": torchaudio_models,
    "segmentation_models_pytorch": segmentation_models,
}


def one(build: Callable[[], nn.Module], inputs_of: Callable[[nn.Module], Any]) -> None:
    """One architecture in this process: prints what is known after each stage as JSON, so that a kill leaves the last."""
    import lmc

    warnings.filterwarnings("ignore")
    row: dict[str, Any] = {"stage": "build"}

    def report(**found: Any) -> None:
        row.update(found)
        print(json.dumps(row), flush=True)

    report()
    torch.manual_seed(0)
    try:
        model = build().eval()
        inputs = inputs_of(model)
        with torch.no_grad():
            call(model, inputs)
    except Exception as error:
        return report(error=f"{type(error).__name__}: {error}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, processor = time.perf_counter(), time.process_time()
    try:
        report(stage="find", parameters=sum(p.numel() for p in model.parameters()), before=before / 1024)
        spec = lmc.permutation_spec(model, inputs, certify=False, progress=False)
        report(stage="check", seconds=time.process_time() - processor, groups=len(spec.groups), coverage=spec.coverage,
               assumed=len(spec.assumed))  # fmt: skip
        try:
            error, bound = fresh_error(build, inputs, spec, torch.float64), 1e-4  # modules cast norms down
        except RuntimeError:  # operators that know no double precision
            error, bound = fresh_error(build, inputs, spec, torch.float32), 1e-3
        report(stage="certify", error=error, bound=bound)
        proof = spec.certify(model, inputs, trials=2)
        report(stage="done", unverified=len(proof.unverified), families=len(spec.families))
    except Exception as error:
        kind = type(error).__name__ if isinstance(error, lmc.errors.LmcError) else f"raw {type(error).__name__}"
        report(failed=f"{kind}: {error}")
        if not isinstance(error, lmc.errors.LmcError):
            traceback.print_exc()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(total=time.process_time() - processor, wall=time.perf_counter() - started, peak=peak)


def fresh_error(build: Callable[[], nn.Module], inputs: Any, spec: Any, dtype: torch.dtype) -> float:
    """How far the outputs of two new modules differ, relative to their size: weights, and weights after a random element
    of the group, both loaded before anything is computed."""
    from lmc.symmetry.proof.probe import draw
    from lmc.symmetry.tracing.outputs import kept

    weights = draw(build().eval(), 0, 7)
    given = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    results = []
    for state in (weights, spec.random(seed=3).apply(weights)):
        torch.manual_seed(0)
        module = build()
        own = module.state_dict()
        own.update(state)  # keeps the metadata, in which modules look up their version
        module.load_state_dict(own)
        torch.set_default_dtype(dtype)
        try:
            with torch.no_grad():
                result = call(module.to(dtype).eval(), given)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(list(kept(result, None).values()))
    pairs = [(x, y) for x, y in zip(*results, strict=True) if x.numel()]
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) for x, y in pairs)


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def line(key: str, row: dict[str, Any], ended: str) -> str:
    """One line of the table."""
    error = row.get("error")
    sound = "" if not isinstance(error, float) else "yes" if error < row["bound"] else f"NO ({error:.0e})"
    if row["stage"] == "build":
        ended = f"not built here: {error or ended}"
    traced = "" if row["stage"] in ("build", "find") else "as on example" if row.get("assumed") else "yes"
    cells = [
        key,
        traced,
        sound,
        f"{row['coverage']:.1%}" if "coverage" in row else "",
        row.get("groups", ""),
        row.get("unverified", ""),
        f"{row['seconds']:.1f}" if "seconds" in row else "",
        f"{row['total']:.1f}" if "total" in row else "",
        f"{row['peak'] - row['before']:.0f}" if "peak" in row and "before" in row else "",
        " ".join((row.get("failed") or ended).split())[:300],
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("keys", nargs="*", help="beginnings of LIBRARY:NAME; all if none is given")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--seconds", type=float, default=60, help="processor seconds for each architecture")
    parser.add_argument("--gigabytes", type=float, default=12, help="address space of each process")
    options = parser.parse_args()
    found: dict[str, Built] = {}
    for library, models in LIBRARIES.items():
        if options.keys and not any(key.startswith(f"{library}:") for key in options.keys):
            continue
        try:
            importlib.import_module(library)
        except ImportError:
            continue
        found.update((f"{library}:{name}", built) for name, built in models())
    keys = [
        key
        for start in options.keys or [""]
        for key in found
        if (key == start[:-1] if start.endswith("$") else key.startswith(start))
    ]
    if options.list:
        return print("\n".join(keys))
    import lmc  # noqa: F401  (once, before the forks)

    print("| architecture | traced | sound | coverage | groups | unverified | find (s) | with proof (s) | MB more | |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for key in dict.fromkeys(keys):
        print(line(key, *forked(found[key], options.seconds, options.gigabytes)), flush=True)


def forked(built: Built, seconds: float, gigabytes: float) -> tuple[dict[str, Any], str]:
    """One architecture in a fork, so that libraries are imported once: what it reported last, and how it ended."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(into, 1)
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds),) * 2)
        try:
            one(*built)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(into)
    signal.alarm(int(6 * seconds))  # for what waits without computing
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    with open(out) as lines:
        rows = [json.loads(row) for row in lines if row.startswith("{") and row.endswith("}\n")]
    signal.alarm(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    row = rows[-1] if rows else {"stage": "build"}
    return row, "" if code == 0 else f"more than {seconds:.0f} s at: {row['stage']}" if code in (-9, -24) else f"{code}"


if __name__ == "__main__":
    main()
