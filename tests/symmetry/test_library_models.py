"""Models as their libraries build them: caches on, fused attention, experts in one tensor, any precision; and modules of
torch as people combine them."""

import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lmc

VOCABULARY, D, H, HIDDEN = 31, 24, 3, 32
GPT2 = dict(vocab_size=VOCABULARY, n_embd=D, n_layer=1, n_head=H, n_inner=HIDDEN, n_positions=16, bos_token_id=1,
            eos_token_id=2)  # fmt: skip
LLAMA = dict(vocab_size=VOCABULARY, hidden_size=D, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=6,
             num_key_value_heads=2, head_dim=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)  # fmt: skip
BERT = dict(vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=1, num_attention_heads=H, intermediate_size=HIDDEN,
            max_position_embeddings=16, num_labels=3)  # fmt: skip
T5 = dict(vocab_size=VOCABULARY, d_model=D, d_kv=8, d_ff=HIDDEN, num_layers=1, num_heads=H, decoder_start_token_id=0)
VIT = dict(image_size=16, patch_size=8, hidden_size=D, num_hidden_layers=1, num_attention_heads=H,
           intermediate_size=HIDDEN, num_labels=5)  # fmt: skip
WHISPER = dict(vocab_size=VOCABULARY, num_mel_bins=5, d_model=D, encoder_layers=1, decoder_layers=1,
               encoder_attention_heads=H, decoder_attention_heads=H, encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN,
               max_source_positions=8, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
               decoder_start_token_id=1)  # fmt: skip

HEADS = [3, *[8] * 6]  # heads, and the value and the query/key units of each
GROUPED = [2, 3, 3, 4, 4]  # key/value heads, the query heads of each, its value units; keys and queries rotate


def tokens(batch: int = 2, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def library(model: str, config: str, options: dict[str, Any], seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the library whose models are meant")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, model)(getattr(transformers, config)(**options))


def sizes(spec: lmc.PermutationSpec) -> list[int]:
    return sorted(group.size for group in spec.groups.values())


def proven(spec: lmc.PermutationSpec) -> bool:
    """Certified, by permutations that moved most of the weights."""
    proof = spec.certificate
    return proof is not None and proof.max_error < 1e-12 and proof.moved > 0.5


STREAM = [D, HIDDEN]
LIBRARY = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, tokens(), STREAM + HEADS),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, {"input_ids": tokens()}, STREAM + GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA, tokens(), STREAM + GROUPED),
    "qwen2": (
        "Qwen2ForCausalLM", "Qwen2Config", LLAMA,
        {"input_ids": tokens(), "attention_mask": torch.ones(2, 5, dtype=torch.long)}, STREAM + GROUPED,
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LLAMA, tokens(), STREAM + GROUPED),
    # units of each expert on their own; which expert is which stays
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 4}, tokens(),
        [D, *[HIDDEN] * 4, *GROUPED],
    ),
    # one stream through encoder and decoder (shared embedding); the position bias ties heads, not their units
    "t5": (
        "T5ForConditionalGeneration", "T5Config", T5, {"input_ids": tokens(), "labels": tokens(2, 4)},
        [D, HIDDEN, HIDDEN, *HEADS, *HEADS, *HEADS],
    ),
    # the pooler has units of its own
    "bert": ("BertForSequenceClassification", "BertConfig", BERT, tokens(), [D, *STREAM, *HEADS]),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, noise(2, 3, 16, 16), STREAM + HEADS),
    # streams of encoder and decoder, and the channels between the two convolutions
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER,
        {"input_features": noise(2, 5, 16), "decoder_input_ids": tokens()},
        [D, D, D, HIDDEN, HIDDEN, *HEADS, *HEADS, *HEADS],
    ),
}  # fmt: skip


# By default one of each kind: a decoder, an encoder with a decoder, pictures. Grouped queries, experts and encoders have tests
# of their own below.
USUAL = {"gpt2", "vit"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in USUAL else pytest.mark.thorough) for n in LIBRARY])
def test_models_as_the_library_builds_them(name: str) -> None:
    model, config, options, inputs, expected = LIBRARY[name]
    spec = lmc.permutation_spec(library(model, config, options), inputs, trials=1)
    assert sizes(spec) == sorted(expected), spec
    assert proven(spec)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.thorough), torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = library("LlamaForCausalLM", "LlamaConfig", LLAMA).to(dtype)
    spec = lmc.permutation_spec(model, tokens())
    assert sizes(spec) == sorted(STREAM + GROUPED) and proven(spec)
    moved = spec.random(seed=1).apply(model)
    assert all(tensor.dtype == dtype for tensor in moved.values())


class WithCache(nn.Module):
    """Returns its answer and what a decoder keeps for the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = torch.relu(self.a(x))
        return {"answer": self.b(h), "past_key_values": ((h, h),)}


def test_caches_count_only_when_asked_for() -> None:
    assert sizes(lmc.permutation_spec(WithCache(), noise(4, 5))) == [10]
    assert sizes(lmc.permutation_spec(WithCache(), noise(4, 5), outputs="past_key_values")) == []


@pytest.mark.thorough  # small experts of every form are in the zoo
def test_experts_chosen_by_a_loop() -> None:
    """The loop depends on which experts are chosen: it is recorded, and the spec names the lines that read values."""
    options = LLAMA | {"num_local_experts": 4}
    looped, batched = (
        library("MixtralForCausalLM", "MixtralConfig", options | {"experts_implementation": way})
        for way in ("eager", "batched_mm")
    )
    spec = lmc.permutation_spec(looped, tokens())
    assert any("modeling_mixtral.py:" in line for line in spec.assumed)
    experts = [4]  # their indices become numbers of a loop, so that they are not exchanged
    assert sizes(spec) == sorted(
        (Counter(sizes(lmc.permutation_spec(batched, tokens()))) - Counter(experts)).elements()
    )
    assert proven(spec)


def test_nothing_is_printed_for_what_torch_cannot_export(caplog: pytest.LogCaptureFixture) -> None:
    """Torch logs the failed operator and prints the graph so far; our error says it, or the module is recorded."""

    class Branch(WithCache):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return h + 1 if h.sum() > 0 else h

    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    loggers = [item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger)]
    watched = [logger for logger in loggers if logger.name.startswith("torch") and not logger.propagate]
    before = {logger.name: (logger.level, list(logger.filters), logger.disabled) for logger in loggers}
    for logger in watched:
        logger.addHandler(handler)
    try:
        with redirect_stderr(printed), pytest.raises(lmc.TraceError, match=r"in a \(Linear\)"):
            lmc.permutation_spec(WithCache(), noise(4, 7))
        with redirect_stderr(printed):
            assert lmc.permutation_spec(Branch(), noise(4, 5), progress=False).assumed
    finally:
        for logger in watched:
            logger.removeHandler(handler)
    assert printed.getvalue() == "" and not caplog.records
    assert before == {logger.name: (logger.level, list(logger.filters), logger.disabled) for logger in loggers}


def test_an_operator_without_double_precision_is_certified_in_single() -> None:
    class Single(WithCache):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling() and x.dtype == torch.float64:
                raise NotImplementedError("no kernel for Double")
            return self.b(torch.relu(self.a(x)))

    spec = lmc.permutation_spec(Single(), noise(4, 5))
    assert sizes(spec) == [10] and spec.certificate is not None
    assert spec.certificate.dtype == "float32" and spec.certificate.power > 1e3 * spec.certificate.tolerance


LAYER = [4, *[6] * 8, HIDDEN]


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 4, HIDDEN, batch_first=True, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # norm_first has no fast path
            self.embed, self.body, self.out = nn.Linear(5, D), nn.TransformerEncoder(layer, 1), nn.Linear(D, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.out(self.body(self.embed(x), src_key_padding_mask=padding))


class Attention(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.embed, self.out = nn.Linear(5, D), nn.Linear(D, 3)
        self.body = nn.MultiheadAttention(D, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.out(h + self.body(h, h, h, need_weights=self.weights)[0])


class Recurrent(nn.Module):
    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.out = body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(7, 10), nn.Linear(10, 10), nn.Linear(10, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.inner(self.embed(x))))


def convolutions(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    first, second, last = norm(nn.Conv2d(3, 6, 3)), norm(nn.Conv2d(6, 8, 3)), norm(nn.Linear(8 * 4, 3))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), last)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 3))


PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
SEQUENCE = noise(2, 6, 5)
TORCH: dict[str, tuple[Callable[[], nn.Module], Any, list[int]]] = {
    "encoder in training": (lambda: Encoder().train(), SEQUENCE, [D, *LAYER]),
    "encoder, fast path": (lambda: Encoder().eval().requires_grad_(False), (SEQUENCE, PADDING), [D, *LAYER]),
    "encoder, norm first": (lambda: Encoder(norm_first=True, activation="gelu"), SEQUENCE, [D, *LAYER]),
    "attention": (lambda: Attention(weights=False), SEQUENCE, [D, 4, *[6] * 8]),
    "attention with weights": (lambda: Attention(weights=True).eval(), SEQUENCE, [D, 4, *[6] * 8]),
    "lstm": (lambda: Recurrent(nn.LSTM(5, 7, 2, batch_first=True, dropout=0.2), 7), SEQUENCE, [7, 7]),
    "lstm with projection": (lambda: Recurrent(nn.LSTM(5, 7, batch_first=True, proj_size=4), 4), SEQUENCE, [4, 7]),
    "bidirectional gru": (lambda: Recurrent(nn.GRU(5, 7, batch_first=True, bidirectional=True), 14), SEQUENCE, [7, 7]),
    "weight norm": (lambda: convolutions(parametrizations.weight_norm), noise(2, 3, 6, 6), [6, 8]),
    "spectral norm": (lambda: convolutions(parametrizations.spectral_norm), noise(2, 3, 6, 6), [6, 8]),
    "tied embedding": (Tied, torch.tensor([[0, 3, 6], [1, 2, 5]]), [10]),
    "dropout in training": (lambda: perceptron().train(), noise(4, 5), [10]),
    "compiled": (lambda: torch.compile(perceptron()), noise(4, 5), [10]),
    "data parallel": (lambda: nn.DataParallel(perceptron()), noise(4, 5), [10]),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(perceptron()), noise(4, 5), [10]),
    "half precision": (lambda: Encoder().bfloat16(), SEQUENCE.bfloat16(), [D, *LAYER]),
}


# The same modules in another form: by default one of each kind.
FORMS = {
    "encoder, norm first",
    "attention with weights",
    "lstm",
    "weight norm",
    "dropout in training",
    "averaged",
    "half precision",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.thorough] if n in FORMS else []) for n in TORCH])
def test_modules_of_torch(name: str) -> None:
    build, inputs, expected = TORCH[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    training = [module.training for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = lmc.permutation_spec(model, inputs, trials=1)
    assert sizes(spec) == sorted(expected), spec
    assert proven(spec)
    assert training == [module.training for module in model.modules()]


def test_meta_device_has_shapes_only() -> None:
    with torch.device("meta"):
        model = Encoder()
    spec = lmc.permutation_spec(model, SEQUENCE)
    assert sizes(spec) == sorted([D, *LAYER]) and spec.certificate is None
    assert spec.certify(Encoder(), SEQUENCE).max_error < 1e-12  # on a twin with numbers


def test_modules_that_are_no_networks_yet_or_any_more() -> None:
    lazy = nn.Sequential(nn.LazyLinear(10), nn.ReLU(), nn.Linear(10, 3))
    with pytest.raises(lmc.TraceError, match="call the model once"):
        lmc.permutation_spec(lazy, noise(4, 5))


def test_weights_under_other_names_say_why() -> None:
    wrapped = lmc.permutation_spec(torch.compile(perceptron()), noise(4, 5))
    with pytest.raises(lmc.SpecError, match="_orig_mod"):
        wrapped.random().apply(perceptron())
    tied = lmc.permutation_spec(Tied(), torch.tensor([[0, 3, 6], [1, 2, 5]]))
    stored = {name: tensor for name, tensor in Tied().state_dict().items() if name != "out.weight"}
    with pytest.raises(lmc.SpecError, match=r"out\.weight.*but as embed\.weight"):
        tied.random().apply(stored)


def test_a_language_model_from_spec_to_path() -> None:
    """The way of the first page, on a pair of GPT-2: targets are the next tokens."""
    a, b = (library("GPT2LMHeadModel", "GPT2Config", GPT2, seed=seed) for seed in (0, 1))
    text = tokens(24, 8, seed=3)
    data = ({"input_ids": text[:, :-1]}, text[:, 1:])
    spec = lmc.permutation_spec(a, {"input_ids": text[:2]})
    planted = spec.random(seed=5)
    pi = lmc.weight_matching(spec, planted.apply(b), b, seed=0)
    few = ({"input_ids": text[:6, :-1]}, text[:6, 1:])  # so few that all points are evaluated together
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = lmc.loss_path(a, planted.apply(b), pi.apply(b), few, alphas=3)
        naive = lmc.loss_path(a, planted.apply(b), b, few, alphas=3)
    assert path.losses["data"] == pytest.approx(naive.losses["data"][[0, 0, 0]], rel=1e-5)  # one network all the way
    assert naive.losses["data"][0] == pytest.approx(naive.losses["data"][2], rel=1e-5)  # the same function at both ends
    assert abs(naive.losses["data"][1] - naive.losses["data"][0]) > 1e-3  # which another one lies between
    found = lmc.activation_matching(spec, a, planted.apply(b), b, data)
    moved, wanted = found.apply(b), planted.apply(b)
    assert lmc.weights.distance(moved, wanted) < 1e-5
    assert list(moved) == list(b.state_dict())


def test_batches_that_hold_their_labels() -> None:
    """A model that computes its own loss is evaluated by it."""
    model = library("BertForSequenceClassification", "BertConfig", BERT).eval()
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
    path = lmc.loss_path(model, model, model, [batch], alphas=3)
    assert path.losses["data"] == pytest.approx([model(**batch).loss.item()] * 3, rel=1e-5)
