"""Models of the `transformers` library from tiny random configurations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .entry import Entry, S, grouped_query, heads, tokens, vectors

D, H, UNIT, HIDDEN, VOCABULARY = 24, 3, 8, 30, 31


def library_model(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Builds `transformers.<model>(transformers.<config>(**options))` when called; the import is slow."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


BERT = dict(
    vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, num_attention_heads=H, intermediate_size=HIDDEN,
    max_position_embeddings=16,
)  # fmt: skip
LLAMA = dict(
    vocab_size=VOCABULARY, hidden_size=D, intermediate_size=HIDDEN, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=32, head_dim=4, use_cache=False, pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
T5 = dict(
    vocab_size=VOCABULARY, d_model=D, d_kv=UNIT, d_ff=HIDDEN, num_layers=2, num_heads=H, decoder_start_token_id=0,
    use_cache=False,
    relative_attention_num_buckets=8, relative_attention_max_distance=16,
)  # fmt: skip
CLIP = dict(
    vocab_size=VOCABULARY, hidden_size=D, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=H,
    projection_dim=9,
    max_position_embeddings=16, eos_token_id=30, bos_token_id=0, pad_token_id=1,
)  # fmt: skip
WHISPER = dict(
    vocab_size=VOCABULARY, num_mel_bins=5, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=H,
    decoder_attention_heads=H, encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN, max_source_positions=8,
    max_target_positions=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
)  # fmt: skip
WAV2VEC2 = dict(
    vocab_size=7, hidden_size=D, num_hidden_layers=1, num_attention_heads=H, intermediate_size=HIDDEN, conv_dim=(6, 10),
    conv_kernel=(5, 3), conv_stride=(3, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4,
    num_feat_extract_layers=2,
    feat_extract_norm="group",
)  # fmt: skip
SWIN = dict(
    image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, mlp_ratio=2.0,
    num_labels=5,
)  # fmt: skip
MOBILENET = dict(image_size=16, depth_multiplier=0.5, min_depth=4, depth_divisible_by=4, num_labels=5)

LAYER = S(HIDDEN) + heads(H, UNIT)
ROTARY_LAYER = S(HIDDEN) + grouped_query(2, 3, 4)


def width(channels: int) -> int:
    """MobileNetV2's rule for half as many channels, as a multiple of 4 (rounded to nearest, not below 90 %)."""
    scaled = channels * 0.5
    rounded = max(4, int(scaled + 2) // 4 * 4)
    return rounded + 4 if rounded < 0.9 * scaled else rounded


def inverted_residuals() -> Any:
    """MobileNetV2: hidden units of 16 blocks (6 x the input), a stream per stage, two stem groups, the last layer."""
    stages = [(24, 2), (32, 3), (64, 4), (96, 3), (160, 3), (320, 1)]
    total, c_in = S(width(32)) + S(width(16)), width(16)
    for channels, blocks in stages:
        for _ in range(blocks):
            total, c_in = total + S(6 * c_in), width(channels)
        total = total + S(width(channels))
    return total + S(1280)


def pairs(source: int, target: int) -> Callable[[torch.Generator], dict[str, Any]]:
    """Token inputs of an encoder-decoder."""
    return lambda g: {
        "input_ids": tokens(2, source, VOCABULARY)(g),
        "decoder_input_ids": tokens(2, target, VOCABULARY)(g),
    }


def audio(frames: int, target: int) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda g: {
        "input_features": vectors(2, 5, frames)(g),
        "decoder_input_ids": tokens(2, target, VOCABULARY)(g),
    }


def sentence(g: torch.Generator) -> dict[str, Any]:
    return {"input_ids": tokens(2, 4, VOCABULARY)(g)}


def longer(g: torch.Generator) -> dict[str, Any]:
    return {"input_ids": tokens(3, 7, VOCABULARY)(g)}


def masked(g: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {"input_ids": tokens(2, 5, VOCABULARY)(g), "attention_mask": mask}


def decoder(name: str, model: str, config: str, expected: Any, options: dict[str, Any], **more: Any) -> Entry:
    return Entry(name, library_model(model, config, **options), sentence, expected, larger=longer, **more)


ENTRIES = [
    # the pooler has D units of its own
    decoder(
        "hf_bert",
        "BertForSequenceClassification",
        "BertConfig",
        S(D) + 2 * LAYER + S(D),
        BERT,
        still=("classifier.bias",),
    ),
    Entry(
        "hf_bert_mlm",
        library_model("BertForMaskedLM", "BertConfig", **BERT),
        masked,
        # the read-out is the token embedding, which ties the transformed state to the stream
        S(D) + 2 * LAYER,
        larger=longer,
        still=("cls.predictions.bias",),
    ),
    decoder(
        "hf_distilbert",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        S(D) + S(D) + LAYER,
        dict(vocab_size=VOCABULARY, dim=D, n_layers=1, n_heads=H, hidden_dim=HIDDEN, max_position_embeddings=16),
        still=("classifier.bias",),
    ),
    decoder(
        "hf_gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        S(D) + 2 * LAYER,
        dict(
            vocab_size=VOCABULARY,
            n_embd=D,
            n_layer=2,
            n_head=H,
            n_inner=HIDDEN,
            n_positions=16,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    decoder("hf_llama", "LlamaForCausalLM", "LlamaConfig", S(D) + 2 * ROTARY_LAYER, LLAMA | {"num_hidden_layers": 2}),
    decoder("hf_qwen2", "Qwen2ForCausalLM", "Qwen2Config", S(D) + ROTARY_LAYER, LLAMA | {"num_hidden_layers": 1}),
    # query and key norms have a weight per unit; the rotation keeps those units in place anyway
    decoder(
        "hf_qwen3",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        S(D) + ROTARY_LAYER,
        LLAMA | {"num_hidden_layers": 1},
        still=("*.q_norm.weight", "*.k_norm.weight"),
    ),
    decoder(
        "hf_mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        S(D) + grouped_query(2, 3, 4) + S(4) + 4 * S(HIDDEN),
        LLAMA | {"num_hidden_layers": 1, "num_local_experts": 4, "experts_implementation": "batched_mm"},
    ),
    decoder(
        "hf_gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        # a quarter of the 8 query/key units of each head rotates
        S(D) + S(HIDDEN) + heads(H, UNIT, 6),
        dict(
            vocab_size=VOCABULARY,
            hidden_size=D,
            num_hidden_layers=1,
            num_attention_heads=H,
            intermediate_size=HIDDEN,
            max_position_embeddings=32,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        ),
    ),
    Entry(
        "hf_t5",
        library_model("T5ForConditionalGeneration", "T5Config", **T5),
        pairs(4, 3),
        # one stream (embeddings shared); a stack's first layer holds the relative bias of all, which ties their heads
        S(D) + 2 * S(H) + 2 * (S(HIDDEN) + H * 2 * S(UNIT)) + 2 * (S(HIDDEN) + H * 2 * S(UNIT) + heads(H, UNIT)),
        larger=pairs(9, 6),
    ),
    Entry(
        "hf_whisper",
        library_model("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        audio(16, 4),
        # encoder and decoder have streams of their own; the sinusoids of the encoder are a
        # parameter of the model and move with it; the first convolution has D channels of its own
        S(D) + S(D) + S(D) + LAYER + LAYER + heads(H, UNIT),
        larger=audio(16, 7),
    ),
    Entry(
        "hf_vit",
        library_model(
            "ViTForImageClassification",
            "ViTConfig",
            image_size=8,
            patch_size=4,
            hidden_size=D,
            num_hidden_layers=1,
            num_attention_heads=H,
            intermediate_size=HIDDEN,
            num_labels=5,
        ),
        vectors(2, 3, 8, 8),
        S(D) + LAYER,
        larger=vectors(3, 3, 8, 8),
        still=("classifier.bias",),
    ),
    Entry(
        "hf_swin",
        library_model("SwinForImageClassification", "SwinConfig", **SWIN),
        vectors(2, 3, 16, 16),
        # two stages of width 8 and 16, layers with 4 units per head
        S(8) + S(16) + 2 * (S(16) + heads(2, 4)) + S(32) + heads(4, 4),
        larger=vectors(1, 3, 16, 16),
        still=("classifier.bias",),
    ),
    Entry(
        "hf_resnet",
        library_model(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=6,
            hidden_sizes=[8, 12],
            depths=[1, 2],
            layer_type="bottleneck",
            num_labels=5,
        ),
        vectors(2, 3, 16, 16),
        # stem, streams of both stages, two inner layers of a quarter of the width in each of the three blocks
        S(6) + S(8) + S(12) + 2 * S(2) + 2 * (2 * S(3)),
        larger=vectors(1, 3, 24, 24),
        still=("classifier.1.bias",),
    ),
    Entry(
        "hf_convnext",
        library_model(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            num_stages=2,
            hidden_sizes=[6, 10],
            depths=[1, 2],
            patch_size=2,
            num_labels=5,
        ),
        vectors(2, 3, 8, 8),
        S(6) + S(24) + S(10) + 2 * S(40),
        larger=vectors(1, 3, 12, 12),
        still=("classifier.bias",),
    ),
    Entry(
        "hf_mobilenet_v2",
        library_model("MobileNetV2ForImageClassification", "MobileNetV2Config", **MOBILENET),
        vectors(2, 3, 16, 16),
        inverted_residuals(),
        larger=vectors(1, 3, 32, 32),
        still=("classifier.bias",),
    ),
    Entry(
        "hf_clip_text",
        library_model("CLIPTextModelWithProjection", "CLIPTextConfig", **CLIP),
        lambda g: {"input_ids": torch.cat([tokens(2, 4, 30)(g), torch.full((2, 1), 30)], dim=1)},
        S(D) + LAYER,
        larger=lambda g: {"input_ids": torch.cat([tokens(3, 6, 30)(g), torch.full((3, 1), 30)], dim=1)},
        outputs="text_embeds",
    ),
    Entry(
        "hf_wav2vec2",
        library_model("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAV2VEC2),
        vectors(2, 60),
        # the first convolution is normalised per channel; the positional convolution has 4 groups of 6 in and out and
        # is added to the stream, which therefore keeps the groups together
        S(6) + S(10) + S(4) + 4 * S(6) + LAYER,
        larger=vectors(1, 90),
        # the embedding of masked frames is for training; the norm of the positional convolution is per kernel position
        still=("lm_head.bias", "wav2vec2.masked_spec_embed", "*.pos_conv_embed.conv.parametrizations.weight.original0"),
    ),
]
