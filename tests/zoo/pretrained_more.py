"""More models of `transformers`: multi-query and latent attention, mixtures of experts, state spaces, two towers."""

import torch

from .entry import Entry, S, heads, tokens, vectors
from .pretrained import HIDDEN, LLAMA, UNIT, VOCABULARY, D, H, decoder, library_model, pairs

ROUTED = {
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": UNIT,
    "num_experts_per_tok": 2,
}
TOWER = dict(hidden_size=D, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=H)
BART = dict(
    vocab_size=VOCABULARY, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=H,
    decoder_attention_heads=H,
    encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1, forced_eos_token_id=None, use_cache=False,
)  # fmt: skip
DEEPSEEK = {name: value for name, value in (LLAMA | ROUTED).items() if name != "head_dim"} | dict(
    n_routed_experts=4, moe_intermediate_size=14, n_group=1, topk_group=1, first_k_dense_replace=0, q_lora_rank=6,
    kv_lora_rank=8,
    qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=5, experts_implementation="batched_mm",
)  # fmt: skip
CLIP = dict(
    projection_dim=9,
    text_config=TOWER
    | dict(vocab_size=VOCABULARY, max_position_embeddings=16, eos_token_id=30, bos_token_id=0, pad_token_id=1),
    vision_config=TOWER | dict(image_size=16, patch_size=8),
)
LAYER = S(HIDDEN) + heads(H, UNIT)


def images_and_texts(images: int, texts: int):
    """Texts end with token 30, at which they are read: the first token alone would see no other, nor keys and queries."""

    def make(g: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.cat([tokens(texts, 4, 30)(g), torch.full((texts, 1), 30)], dim=1)
        return {"input_ids": ids, "pixel_values": vectors(images, 3, 16, 16)(g)}

    return make


def steps(batch: int, length: int):
    return lambda g: torch.randn(batch, length, 2, generator=g)


ENTRIES = [
    decoder(
        "hf_opt",
        "OPTForCausalLM",
        "OPTConfig",
        S(D) + LAYER,
        dict(
            vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=1, num_attention_heads=H, ffn_dim=HIDDEN,
            word_embed_proj_dim=D,
            max_position_embeddings=32, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    ),
    decoder(
        "hf_falcon",
        "FalconForCausalLM",
        "FalconConfig",
        # one key and value for all heads: query heads may be exchanged, value units move in all; 4 D hidden units
        S(D) + S(4 * D) + S(H) + S(UNIT),
        dict(
            vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=1, num_attention_heads=H, multi_query=True,
            alibi=False,
            use_cache=False, bos_token_id=1, eos_token_id=2,
        ),
    ),
    Entry(
        "hf_bart",
        library_model("BartForConditionalGeneration", "BartConfig", **BART),
        pairs(4, 3),
        # one stream: the embedding is shared; the decoder has a second attention
        S(D) + 2 * LAYER + heads(H, UNIT),
        larger=pairs(9, 6),
    ),
    decoder(
        "hf_qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        # routed experts, and a shared one of 10 units
        S(D) + S(H) + H * S(UNIT) + S(4) + 4 * S(14) + S(10),
        LLAMA
        | ROUTED
        | dict(
            num_experts=4, moe_intermediate_size=14, shared_expert_intermediate_size=10, decoder_sparse_step=1,
            experts_implementation="batched_mm",
        ),
    ),
    decoder(
        "hf_deepseek_v3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        # ranks of the latent queries and of the latent keys and values; per head 4 query/key units that do not
        # rotate and 5 value units; routed experts, and a shared one of the same width
        S(D) + S(6) + S(8) + heads(H, 5, 4) + S(4) + 4 * S(14) + S(14),
        DEEPSEEK,
        found=S(D) + S(6) + S(8) + heads(H, 5, 4) + S(14) + S(14),
        short="the exchange of experts: the router sets scores to zero, so that its choice among them could be a tie",
    ),
    decoder(
        "hf_mamba",
        "MambaForCausalLM",
        "MambaConfig",
        # stream, inner channels (2 x), state; the step has rank 1
        S(12) + S(24) + S(4),
        dict(vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=1, state_size=4, use_cache=False,
        use_mambapy=False),
    ),
    Entry(
        "hf_clip",
        library_model("CLIPModel", "CLIPConfig", **CLIP),
        images_and_texts(2, 3),
        # both towers, and the space in which they meet
        2 * (S(D) + LAYER) + S(9),
        larger=images_and_texts(3, 2),
        outputs="logits_per_image",
        still=("logit_scale",),
    ),
    Entry(
        "hf_convnext_v2",
        library_model(
            "ConvNextV2ForImageClassification", "ConvNextV2Config", num_stages=2, hidden_sizes=[6, 10], depths=[1,
            1], patch_size=2,
            num_labels=5,
        ),
        vectors(2, 3, 8, 8),
        # the response normalisation compares hidden channels, without telling them apart
        S(6) + S(24) + S(10) + S(40),
        larger=vectors(1, 3, 12, 12),
        still=("classifier.bias",),
    ),
    Entry(
        "hf_regnet",
        library_model(
            "RegNetForImageClassification", "RegNetConfig", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2],
            groups_width=4,
            num_labels=5, layer_type="y",
        ),
        vectors(2, 3, 16, 16),
        # streams; per block 2 or 3 groups of 4 channels on both sides of the grouped convolution, and the squeezed
        # channels, a quarter of the block's input
        S(8) + S(8) + S(12) + (S(2) + 4 * S(4)) + 2 * (S(3) + 6 * S(4)) + S(2) + S(2) + S(3),
        larger=vectors(1, 3, 24, 24),
        still=("classifier.1.bias",),
    ),
    Entry(
        "hf_patchtst",
        library_model(
            "PatchTSTForPrediction", "PatchTSTConfig", num_input_channels=2, context_length=16, patch_length=4,
            patch_stride=4,
            d_model=12, num_attention_heads=3, ffn_dim=14, num_hidden_layers=1, prediction_length=3,
        ),
        steps(2, 16),
        S(12) + S(14) + heads(3, 4),
        outputs="prediction_outputs",
        larger=steps(3, 16),
        still=("head.projection.bias",),
    ),
]  # fmt: skip
