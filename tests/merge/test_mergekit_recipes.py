"""Configurations of mergekit: what their values mean, what they compute, what is refused; stacks of layers."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import same
from torch import Tensor

import lmc
from lmc import merge
from lmc.cli import main
from lmc.errors import DataError, InputError
from lmc.merge.disk.mergekit_language import configuration, evaluate, read_configuration

State = dict[str, Tensor]


def network(seed: int, near: State | None = None, layers: int = 4) -> State:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (9, 6), "model.norm.weight": (6,), "lm_head.weight": (9, 6)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.mlp.up.weight": (8, 6), f"model.layers.{i}.attn.q.weight": (6, 6)}
    drawn = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return drawn if near is None else {name: near[name] + 0.1 * tensor for name, tensor in drawn.items()}


BASE = network(0)
STATES = {"base": BASE} | {name: network(seed, BASE) for seed, name in enumerate("abc", start=1)}
A, B, C = (STATES[name] for name in "abc")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, state in STATES.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        config = {"num_hidden_layers": 4, "layer_types": [0, 1, 2, 3], "torch_dtype": "float32", "vocab_size": 9}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(content: dict[str, Any], **options: Any) -> State:
    return merge.replay(content, f"out{len(list(Path().iterdir()))}", progress=False, **options).load()


def model(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "parameters": parameters}


def piece(name: str, first: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "layer_range": [first, stop], "parameters": parameters}


@pytest.mark.parametrize(
    ("setting", "name", "t", "expected"),
    [
        (0.3, "x", 0.7, 0.3),
        ("1e-5", "x", 0.7, 1e-5),
        (True, "x", 0.0, True),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 1, 0.5], "x", 0.75, 0.75),
        ([0.2], "x", 0.9, 0.2),
        ([2, 4], "x", 1.0, 4.0),
        ([{"filter": "mlp", "value": 0.1}, {"value": 0.9}], "layers.0.mlp.up", 0.0, 0.1),
        ([{"filter": "mlp", "value": 0.1}, {"value": 0.9}], "layers.0.attn.q", 0.0, 0.9),
        ([{"value": 0.9}, {"filter": "mlp", "value": 0.1}], "layers.0.mlp.up", 0.0, 0.9),
        ([{"filter": "*", "value": [0, 1]}], "anything", 0.5, 0.5),
        ({"filter": "mlp", "value": 0.1}, "attn", 0.0, None),
        ([], "x", 0.0, None),
    ],
)
def test_values(setting: Any, name: str, t: float, expected: Any):
    assert evaluate(setting, name, t) == expected


def test_a_gradient_runs_over_the_layers(here: Path):
    merged = run({"models": [model("a", weight=1.0), model("b", weight=[0.0, 3.0])], "merge_method": "task_arithmetic",
                  "base_model": "base", "parameters": {"lambda": 0.5}})  # fmt: skip
    for i in range(4):
        name = f"model.layers.{i}.attn.q.weight"
        expected = BASE[name] + 0.5 * (A[name] - BASE[name]) + 0.5 * i * (B[name] - BASE[name])
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=0)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):  # outside layers the first value counts
        torch.testing.assert_close(merged[name], BASE[name] + 0.5 * (A[name] - BASE[name]), atol=1e-6, rtol=0)
    same_here = merge.task_arithmetic([A, B], base=BASE, weights=[1.0, {"gradient": [0, 3]}], scale={"*": 0.5})
    for name in merged:
        torch.testing.assert_close(same_here[name], merged[name])


def test_where_values_are_looked_up(here: Path):
    merged = run({
        "slices": [
            {"sources": [piece("base", 0, 2), piece("a", 0, 2, weight=[{"filter": "mlp", "value": 0.1}])],
             "parameters": {"weight": [{"filter": "layers.1", "value": 0.2}]}},
            {"sources": [piece("base", 2, 4), piece("a", 2, 4)]},
        ],
        "merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 0.7},
    })  # fmt: skip
    expected = {"model.layers.0.mlp.up.weight": 0.1, "model.layers.1.mlp.up.weight": 0.1,
                "model.layers.0.attn.q.weight": 0.7, "model.layers.1.attn.q.weight": 0.2,
                "model.layers.3.mlp.up.weight": 0.7, "lm_head.weight": 0.7}  # fmt: skip
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], BASE[name] + weight * (A[name] - BASE[name]), atol=1e-6, rtol=0)


EXPECTED: dict[str, tuple[dict[str, Any], Any]] = {
    "linear": ({"models": [model("a", weight=1), model("b", weight=3)]}, lambda: merge.average([A, B], weights=[1, 3])),
    "linear without": (
        {"models": [model("a", weight=1), model("b", weight=3)], "parameters": {"normalize": False}},
        lambda: {n: A[n] + 3 * B[n] for n in A},
    ),
    "slerp": ({"models": [model("base"), model("a")], "parameters": {"t": 0.3}}, lambda: merge.slerp([BASE, A], t=0.3)),
    "ties": (
        {"models": [model("a", weight=1, density=0.5), model("b", weight=0.5, density=0.8)]},
        lambda: merge.ties([A, B], base=BASE, density=[0.5, 0.8], weights=[1, 0.5], scope="tensor", undecided="positive"),
    ),
    "dare_ties": (
        {"models": [model("a", weight=1, density=0.5), model("b", weight=0.5, density=0.8)]},
        lambda: merge.dare([A, B], base=BASE, density=[0.5, 0.8], weights=[1, 0.5], rescale="l1", combine_by="ties-sum"),
    ),
    "della_linear": (
        {"models": [model("a", weight=1, density=0.5), model("b", weight=0.5, density=0.8, epsilon=0.1)]},
        lambda: merge.della(
            [A, B], base=BASE, density=[0.5, 0.8], epsilon=[0.15, 0.1], weights=[1, 0.5], rescale="l1", combine_by="sum"
        ),
    ),
    "karcher": ({"models": [model("a"), model("b")]}, lambda: merge.karcher_mean([A, B, BASE])),
    "nearswap": ({"models": [model("a")], "parameters": {"t": "1e-2"}}, lambda: merge.nearswap([A], base=BASE, t=0.01)),
    "arcee_fusion": ({"models": [model("a")]}, lambda: merge.arcee_fusion([A], base=BASE)),
    "sce": (
        {"models": [model("a"), model("b")], "parameters": {"select_topk": 0.3}},
        lambda: merge.sce([A, B], base=BASE, select=0.3),
    ),
    "model_stock": (
        {"models": [model("a"), model("b"), model("c")], "parameters": {"filter_wise": True}},
        lambda: merge.model_stock([A, B, C], base=BASE, row_wise=True, signed=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_methods(name: str, here: Path):
    content, expected = EXPECTED[name]
    method = name.partition(" ")[0]
    base = {} if method == "linear" else {"base_model": "base"}
    merged = run(content | base | {"merge_method": method})
    for key, tensor in expected().items():
        torch.testing.assert_close(merged[key], tensor, atol=1e-6, rtol=1e-5)


def test_passthrough_stacks_layers_bit_for_bit(here: Path):
    merged = run({
        "slices": [{"sources": [piece("a", 0, 3)]}, {"sources": [piece("b", 1, 4)]}],
        "merge_method": "passthrough", "dtype": "float32",
    })  # fmt: skip
    places = [(A, 0), (A, 1), (A, 2), (B, 1), (B, 2), (B, 3)]
    for i, (source, layer) in enumerate(places):
        for rest in ("mlp.up.weight", "attn.q.weight"):
            assert torch.equal(merged[f"model.layers.{i}.{rest}"], source[f"model.layers.{layer}.{rest}"])
    assert torch.equal(merged["model.embed_tokens.weight"], A["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], B["model.norm.weight"]) and len(merged) == 3 + 2 * 6
    (out,) = here.glob("out*")
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 6 and config["layer_types"] == [0, 1, 2, 1, 2, 3]
    again = merge.replay(out, here / "again", progress=False)
    assert same(again.load(), merged)
    assert configuration(read_configuration(out / "mergekit_config.yml")).method == "passthrough"


def test_a_branch_is_skipped_by_a_scale_of_zero(here: Path):
    scale = [{"filter": "attn", "value": 0.0}, {"value": 1.0}]
    merged = run({"slices": [{"sources": [piece("a", 0, 4, scale=scale)]}], "merge_method": "passthrough"})
    assert not merged["model.layers.2.attn.q.weight"].any()
    assert torch.equal(merged["model.layers.2.mlp.up.weight"], A["model.layers.2.mlp.up.weight"])


def test_stacks_are_models_like_others(here: Path):
    tall = [merge.stack([(name, 0, 3), (name, 2, 4)]) for name in ("a", "b", "base")]
    merged = merge.write(merge.ties, tall[:2], "tall", base=tall[2], density=0.5, progress=False)
    expected = merge.ties([one.load() for one in tall[:2]], base=tall[2].load(), density=0.5)
    assert same(merged.load(), expected, ordered=False)
    assert json.loads(Path("tall/config.json").read_text())["num_hidden_layers"] == 5
    one = merge.stack([("a", 0, 4)])
    assert same(one.load(), A, ordered=False)
    with pytest.raises(InputError, match="layers 2 to 5 of 4"):
        merge.stack([("a", 2, 5)])
    with pytest.raises(InputError, match="half open|expected a list"):
        merge.stack("a")  # type: ignore[arg-type]


def test_a_recipe_on_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]):
    text = """
models:
  - model: org/first
    parameters: {weight: 0.5, density: 0.5}
  - model: b
    parameters: {weight: 0.5, density: [1, 0.5]}
merge_method: ties
base_model: base
dtype: bfloat16
chat_template: "{% for m in messages %}{{ m.content }}{% endfor %}"
"""
    Path("config.yml").write_text(text)
    assert main(["merge", "--recipe", "config.yml", "--out", "x", "--quiet"]) == 2
    assert "nothing is downloaded" in capsys.readouterr().err
    assert main(["merge", "--recipe", "config.yml", "--out", "x", "--folder", "org/first=a", "--quiet"]) == 0
    merged = lmc.open_checkpoint("x")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert json.loads(Path("x/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "m.content" in Path("x/chat_template.jinja").read_text()


def test_an_adapter_on_its_base(here: Path):
    Path("lora").mkdir()
    name = "base_model.model.model.layers.1.attn.q.lora_"
    factors = {f"{name}A.weight": torch.ones(2, 6), f"{name}B.weight": torch.full((6, 2), 0.5)}
    save_file(factors, "lora/adapter_model.safetensors")
    Path("lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    merged = run({"models": [model("base+lora", weight=0.5)], "merge_method": "task_arithmetic", "base_model": "base"})
    expected = BASE["model.layers.1.attn.q.weight"] + 0.5
    torch.testing.assert_close(merged["model.layers.1.attn.q.weight"], expected)
    assert torch.equal(merged["model.layers.2.attn.q.weight"], BASE["model.layers.2.attn.q.weight"])
    (out,) = here.glob("out*")
    assert same(merge.replay(out, "again", progress=False).load(), merged)


GOOD: dict[str, Any] = {"models": [model("a", weight=1.0)], "merge_method": "ties", "base_model": "base"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "tise"}, "did you mean 'ties'"),
        ({"merge_method": None}, "not supported"),
        ({"slices": [{"sources": [piece("a", 0, 4)]}]}, "one of models: and slices:"),
        ({"models": None}, "found none"),
        ({"models": "a"}, "list of mappings"),
        ({"modules": {"x": {}}}, "models:, slices: and modules:"),
        ({"models": None, "modules": {"text": {"models": []}, "vision": {"models": []}}}, "several modules"),
        (
            {
                "models": None,
                "modules": {"text": {"models": [model("a")], "parameters": {"weight": 1}}},
                "parameters": {"weight": 2},
            },
            "both set weight",
        ),
        ({"tokenizer": {"source": "union", "tokens": {"x": {"force": True}}}}, "force without source"),
        ({"tokenizer": {"source": "union", "tokens": {"x": {"source": "nowhere"}}}}, "none of the models"),
        (
            {"tokenizer": {"source": "base", "tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}},
            "one of token: and token_id:",
        ),
        ({"tokenizer_source": "union"}, "no tokenizer.json there"),
        ({"tokenizer_source": "nowhere"}, "nothing is downloaded"),
        ({"base_model": None}, "needs one"),
        ({"models": [model("a")]}, "weight of a is not set"),
        ({"models": [model("a", weight="much")]}, "expected a number"),
        ({"models": [model("a", weight=[{"filtre": "x", "value": 1}])]}, "entries {filter, value}"),
        ({"models": [model("a", weight=1.0, density=0.0)]}, "density"),
        ({"models": [model("a", weight=-1.0)]}, "negative weights"),
        ({"models": [model("meta/large", weight=1.0)]}, "nothing is downloaded"),
        ({"models": [model("a+b", weight=1.0)]}, "no adapter"),
        ({"tokenizer": {"source": "union"}, "tokenizer_source": "base"}, "give one of them"),
        ({"chat_template": "chatml"}, "give its text"),
        ({"dtype": "float12"}, "dtype"),
        ({"parameters": {"rescale": True}}, "not supported"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str, here: Path):
    with pytest.raises(InputError, match=message):
        run({key: value for key, value in (GOOD | change).items() if value is not None or key == "merge_method"})
    assert not list(here.glob("out*"))


def test_what_has_no_effect_is_said(here: Path):
    with pytest.warns(UserWarning, match="'lamda' is no parameter of the method .did you mean 'lambda'"):
        configuration(GOOD | {"parameters": {"lamda": 1.0}})
    with pytest.warns(UserWarning, match="did you mean 'base_model'"):
        configuration(GOOD | {"basemodel": "x"})
    with pytest.warns(UserWarning, match=r"models\[0\].parameters: 'normalize' is one number for all models"):
        configuration(GOOD | {"models": [model("a", weight=1.0, normalize=False)]})
    with pytest.warns(UserWarning, match=r"models\[0\]: 'layer_range' is no key there"):
        configuration(GOOD | {"models": [piece("a", 0, 2, weight=1.0)]})
    for text, message in (
        ("a: 1\n---\nb: 2\n", "give each a file of its own"),
        ("models:\n  - model: a\n    model: b\n", "'model' stands twice in one mapping, in lines 2 and 3"),
        ("a: [1", "one YAML document"),
        ("[]", "expected a mapping"),
        ("models: [{model: a}]", "merge_method: is missing"),
        ("experts: [{source_model: a}]", "mergekit-moe"),
    ):
        Path("wrong.yml").write_text(text)
        with pytest.raises((DataError, InputError), match=message):
            merge.replay("wrong.yml", "out", progress=False)


# A configuration for each form that the language has: what it reads as, and a value that holds for a tensor.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "numbers as texts, comments, flow mappings": (
        """
        merge_method: nearswap   # towards another model
        base_model: org/base
        models: [{model: org/other}]
        parameters: {t: 1e-4}
        dtype: torch.float16
        """,
        {"method": "nearswap", "base": "org/base", "dtype": "float16", "models": ["org/other", "org/base"], "t": 1e-4},
    ),
    "revisions and adapters": (
        """
        merge_method: task_arithmetic
        base_model: {model: {path: org/base, revision: main}}
        models:
          - model: org/base@main+org/lora@v2
            parameters: {weight: 0.5}
          - model: {model: org/base, lora: {path: org/second}}
            parameters: {weight: [0, 1]}
        """,
        {"method": "task_arithmetic", "models": ["org/base@main+org/lora@v2", "org/base+org/second", "org/base"]},
    ),
    "filters with gradients": (
        """
        merge_method: slerp
        base_model: x
        slices:
          - sources:
              - {model: x, layer_range: [0, 32]}
              - {model: y, layer_range: [0, 32]}
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 1]}
            - {filter: mlp, value: [1, 0]}
            - value: 0.25
        dtype: bfloat16
        """,
        {"method": "slerp", "slices": 1, "models": ["x", "y"], "t": 0.75, "dtype": "bfloat16"},
    ),
    "a stack of slices, some of them merged, each with a base and parameters of its own": (
        """
        merge_method: passthrough
        slices:
          - sources: [{model: x, layer_range: [0, 8]}]
            residual_weight: 0.1
          - sources: [{model: x, layer_range: [4, 12], parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}}]
          - base_model: y
            sources: [{model: y, layer_range: [12, 16]}]
            parameters: {scale: 1}
        out_dtype: float32
        """,
        {"method": "passthrough", "slices": 3, "dtype": "float32"},
    ),
    "anchors": (
        """
        merge_method: dare_ties
        base_model: b
        models:
          - model: x
            parameters: &usual {weight: 0.4, density: 0.53}
          - model: y
            parameters:
              <<: *usual
              density: 0.6
        parameters: {int8_mask: true, normalize: true, rescale: false, lambda: 0.9}
        """,
        {"method": "dare_ties", "models": ["x", "y", "b"], "lambda": 0.9},
    ),
    "tokens": (
        """
        merge_method: linear
        models:
          - {model: x, parameters: {weight: 1}}
          - {model: y, parameters: {weight: 1}}
        tokenizer:
          source: union
          tokens:
            <|im_start|>: {source: x}
            <|eot_id|>: {source: y, force: true}
            <|new|>: {source: {kind: model_token, model: x, token: <|old|>}}
            <|second|>: {source: {kind: model_token, model: x, token_id: 7}}
            <|none|>: {source: {kind: zero}}
          pad_to_multiple_of: 64
        chat_template: auto
        """,
        {"method": "linear", "vocabulary": {
            "source": "union", "pad": 64, "tokens": {
                "<|im_start|>": {"force": False, "model": "x"}, "<|eot_id|>": {"force": True, "model": "y"},
                "<|new|>": {"force": False, "model": "x", "token": "<|old|>"},
                "<|second|>": {"force": False, "model": "x", "token": 7}, "<|none|>": {"force": False, "zero": True},
            },
        }},
    ),
    "one module": (
        """
        merge_method: ties
        base_model: b
        modules:
          text_decoder:
            parameters: {density: 0.5}
            models:
              - {model: x, parameters: {weight: 1.0}}
        parameters: {weight: 0.5}
        tokenizer_source: base
        """,
        {"method": "ties", "models": ["x", "b"], "density": 0.5, "vocabulary": {"source": "base"}},
    ),
}  # fmt: skip
PARAMETERS: dict[str, str] = {
    "karcher": "{max_iter: 20, tol: 1e-6}", "model_stock": "{filter_wise: true}", "sce": "{select_topk: 0.1}",
    "nuslerp": "{weight: 0.5, nuslerp_row_wise: false, nuslerp_flatten: false}", "arcee_fusion": "{}",
    "multislerp": "{weight: 0.5, normalize_weights: true}", "ram": "{epsilon: 1e-6}",
    "ramplus_tl": "{r: 0.1, alpha: 0.2, epsilon: 1e-5}", "breadcrumbs": "{weight: 1, density: 0.9, gamma: 0.01}",
    "breadcrumbs_ties": "{weight: 1, density: 0.9, gamma: 0.01}", "dare_linear": "{weight: 1, density: 0.5}",
    "della": "{weight: 1, density: 0.5, epsilon: 0.2, lambda: 1.1}", "della_linear": "{weight: 1, density: [0.5, 0.8]}",
}  # fmt: skip
MORE = {
    name: (
        f"merge_method: {name}\nbase_model: b\nmodels: [{{model: x}}, {{model: b}}]\nparameters: {text}",
        {"method": name},
    )
    for name, text in PARAMETERS.items()
}


@pytest.mark.parametrize("name", [*FORMS, *MORE])
@pytest.mark.filterwarnings("error")
def test_every_form_of_the_language(name: str, tmp_path: Path):
    text, expected = (FORMS | MORE)[name]
    (tmp_path / "config.yml").write_text(textwrap.dedent(text))
    read = configuration(read_configuration(tmp_path / "config.yml"))
    found = {key: getattr(read, key) for key in ("method", "base", "dtype", "vocabulary")}
    found |= {"slices": len(read.slices), "models": [s.model for part in read.slices for s in part.sources]}
    found |= {key: evaluate(value, "model.layers.3.mlp.up_proj.weight", 0.25) for key, value in read.parameters.items()}
    assert {key: found[key] for key in expected} == expected


def test_slices_of_unequal_length(here: Path):
    content = {
        "slices": [{"sources": [piece("a", 0, 2), piece("base", 0, 3)]}],
        "merge_method": "slerp",
        "base_model": "base",
    }
    with pytest.raises(InputError, match="same length"):
        run(content)
