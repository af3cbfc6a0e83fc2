"""Models whose tokenizers differ: rows follow their tokens, whatever their numbers; ties and files are kept."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import same
from torch import Tensor

import lmc
from lmc import merge
from lmc.cli import main
from lmc.errors import InputError, MismatchError
from lmc.merge.disk.vocabulary import tokens

WORDS = ["a", "b", "c", "d", "e"]
State = dict[str, Tensor]


def stored(folder: Path, words: list[str], state: State, added: list[str] = []) -> Path:  # noqa: B006
    """A model with its tokenizer: words with rows in their order, then tokens that were added."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    content = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "a"},
        "added_tokens": [
            {"id": len(words) + i, "content": w, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for i, w in enumerate(added)
        ],
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(state["embed.weight"])}))
    return folder


def network(seed: int, rows: int, near: State | None = None) -> State:
    rng = torch.Generator().manual_seed(seed)
    drawn = {"embed.weight": torch.randn(rows, 4, generator=rng), "l.weight": torch.randn(4, 4, generator=rng),
             "lm_head.weight": torch.randn(rows, 4, generator=rng), "lm_head.bias": torch.randn(rows, generator=rng)}  # fmt: skip
    if near is None:
        return drawn
    height = len(near["embed.weight"])
    return {
        k: torch.cat([near[k][:rows] + 0.1 * v[:height], v[height:]]) if v.shape[0] == rows else near[k] + 0.1 * v
        for k, v in drawn.items()
    }


BASE = network(0, 5)
A = network(1, 7, BASE)
B = network(2, 6, BASE)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "base": stored(tmp_path / "base", WORDS, BASE),
        "a": stored(tmp_path / "a", WORDS, A, ["<x>", "<y>"]),
        "b": stored(tmp_path / "b", WORDS, B, ["<z>"]),
    }


def put(folders: dict[str, Path], out: Path, method=merge.task_arithmetic, **options):
    return merge.write(method, [folders["a"], folders["b"]], out, base=folders["base"], progress=False, **options)


def test_without_it_other_heights_are_refused(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(MismatchError, match="vocabularies of 7 and 6|vocabularies of 7 and 5"):
        put(folders, tmp_path / "out")
    advice = merge.inspect([folders["a"], folders["b"]], base=folders["base"], progress=False).advice
    assert "'<x>', '<y>'" in advice[0] and "vocabulary='union'" in advice[0] and "'<z>'" in advice[1]


def test_union(folders: dict[str, Path], tmp_path: Path):
    merged = put(folders, tmp_path / "out", scale=0.5, vocabulary="union")
    assert tokens(tmp_path / "out") == {**{w: i for i, w in enumerate(WORDS)}, "<x>": 5, "<y>": 6, "<z>": 7}
    for name in ("embed.weight", "lm_head.weight", "lm_head.bias"):
        assert merged[name].shape[0] == 8
        known = BASE[name] + 0.5 * (A[name][:5] - BASE[name]) + 0.5 * (B[name][:5] - BASE[name])
        torch.testing.assert_close(merged[name][:5], known, atol=1e-6, rtol=0)
        assert torch.equal(merged[name][5:7], A[name][5:]) and torch.equal(merged[name][7:], B[name][5:])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 8
    tokenizers = pytest.importorskip("tokenizers")
    read = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert read.encode("b <z> <x> e").ids == [1, 7, 5, 4]
    again = merge.replay(tmp_path / "out", tmp_path / "again", progress=False)
    assert same(again.load(), merged.load())


def test_base(folders: dict[str, Path], tmp_path: Path):
    merged = put(folders, tmp_path / "out", merge.ties, density=0.5, vocabulary="base")
    cut = [{k: v[:5] if "l.weight" != k else v for k, v in m.items()} for m in (A, B)]
    assert same(merged.load(), merge.ties(cut, base=BASE, density=0.5), ordered=False)
    assert tokens(tmp_path / "out") == tokens(folders["base"])


def test_tokens_under_other_numbers(tmp_path: Path):
    """A model whose vocabulary is permuted together with its rows is the same model."""
    order = [3, 0, 4, 1, 2]
    moved = {k: v if k == "l.weight" else v[order] for k, v in A.items() for v in [v[:5]]}
    plain = {k: v[:5] for k, v in A.items()}
    folders = [stored(tmp_path / "b", WORDS, BASE), stored(tmp_path / "p", WORDS, plain),
               stored(tmp_path / "m", [WORDS[i] for i in order], moved)]  # fmt: skip
    direct = merge.write(merge.average, [folders[0], folders[1]], tmp_path / "x", progress=False)
    by_token = merge.write(merge.average, [folders[0], folders[2]], tmp_path / "y", vocabulary="union", progress=False)
    assert same(direct.load(), by_token.load())
    assert "under other numbers" in merge.inspect([folders[2], folders[0]], progress=False).advice[0]


def test_without_a_base_the_others_stand_in(folders: dict[str, Path], tmp_path: Path):
    merged = merge.write(
        merge.average, [folders["a"], folders["b"]], tmp_path / "out", vocabulary="union", progress=False
    )
    assert torch.equal(merged["embed.weight"][7], B["embed.weight"][5])
    torch.testing.assert_close(merged["embed.weight"][:5], (A["embed.weight"][:5] + B["embed.weight"][:5]) / 2)


def test_equal_tokenizers_change_nothing(tmp_path: Path):
    folders = [stored(tmp_path / name, WORDS, network(seed, 8, None)) for seed, name in enumerate("pq")]
    plain = merge.write(merge.average, folders, tmp_path / "x", progress=False)
    assert same(plain, merge.write(merge.average, folders, tmp_path / "y", vocabulary="union", progress=False))


def test_ties_stay(tmp_path: Path):
    def tied(name: str, state: State, added: list[str]) -> Path:
        kept = {k: v for k, v in state.items() if "head" not in k}
        folder = stored(tmp_path / name, WORDS, kept, added)
        save_file(kept, folder / "model.safetensors", {"lm_head.weight": "embed.weight"})
        return folder

    folders = [tied("a", A, ["<x>", "<y>"]), tied("b", B, ["<z>"])]
    merged = merge.write(merge.average, folders, tmp_path / "out", vocabulary="union", progress=False)
    assert merged.ties == {"lm_head.weight": "embed.weight"} and merged["lm_head.weight"].shape == (8, 4)


def test_a_recipe_of_mergekit_and_the_command_line(folders: dict[str, Path], tmp_path: Path):
    weights = [{"model": str(folders[name]), "parameters": {"weight": 0.5}} for name in "ab"]
    content = {
        "models": weights,
        "merge_method": "task_arithmetic",
        "base_model": str(folders["base"]),
        "tokenizer_source": "union",
    }
    by_recipe = merge.replay(content, tmp_path / "out", progress=False)
    words = [
        "merge",
        "task_arithmetic",
        *(str(folders[name]) for name in "ab"),
        "--base",
        str(folders["base"]),
        "--quiet",
    ]
    assert main([*words, "--set", "weights=[0.5,0.5]", "--vocabulary", "union", "--out", str(tmp_path / "cli")]) == 0
    assert same(by_recipe.load(), lmc.open_checkpoint(tmp_path / "cli").load())


def test_rows_of_single_tokens(folders: dict[str, Path], tmp_path: Path):
    """Rows of tokens that a model lacks, or of all, from a model, another token or zeros."""
    rows = {
        "<y>": {"model": 0, "token": "<x>"}, "<z>": {"zero": True}, "<new>": {"model": "base", "token": 3},
        "a": {"model": 1, "force": True},
    }  # fmt: skip
    vocabulary = {"source": "union", "tokens": rows}
    merged = put(folders, tmp_path / "out", scale=0.5, vocabulary=vocabulary)
    assert tokens(tmp_path / "out") | {"<new>": 8} == tokens(tmp_path / "out") and len(tokens(tmp_path / "out")) == 9
    for name in ("embed.weight", "lm_head.weight", "lm_head.bias"):
        found, base, a, b = merged[name], BASE[name], A[name], B[name]
        close = torch.testing.assert_close
        assert torch.equal(found[0], b[0])  # forced: all models have that row, the base too
        close(found[1], base[1] + 0.5 * (a[1] - base[1]) + 0.5 * (b[1] - base[1]))
        close(found[6], a[5] + 0.5 * (a[6] - a[5]))  # the base and b take a's row of <x>, a has its own
        close(found[7], 0.5 * b[5])
        assert torch.equal(found[8], base[3])
    again = merge.replay(tmp_path / "out", tmp_path / "again", progress=False)
    assert same(again.load(), merged.load())


def test_padding_is_the_mean(folders: dict[str, Path], tmp_path: Path):
    merged = merge.write(merge.average, [folders["a"], folders["b"]], tmp_path / "out", progress=False,
                         vocabulary={"source": "union", "pad": 5})  # fmt: skip
    assert merged["embed.weight"].shape == (10, 4) and merged["lm_head.bias"].shape == (10,)
    torch.testing.assert_close(merged["embed.weight"][8:], merged["embed.weight"][:8].mean(0).expand(2, 4))
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 10
    part = merge.plan(merge.average, [folders["a"]], tmp_path / "x", vocabulary={"source": "union", "pad": 5})
    assert part.size > 0


def test_the_tokenizer_of_any_folder(folders: dict[str, Path], tmp_path: Path):
    (folders["b"] / "tokenizer_config.json").write_text("{}")
    merged = put(folders, tmp_path / "out", vocabulary={"source": str(folders["b"])})
    assert tokens(tmp_path / "out") == tokens(folders["b"]) and (tmp_path / "out/tokenizer_config.json").is_file()
    assert merged["embed.weight"].shape == (6, 4) and torch.equal(merged["embed.weight"][5], B["embed.weight"][5])
    content = {"models": [{"model": str(folders[n]), "parameters": {"weight": 1.0}} for n in "ab"], "merge_method": "ties",
               "base_model": str(folders["base"]), "tokenizer": {"source": str(folders["b"]), "pad_to_multiple_of": 4}}  # fmt: skip
    assert merge.replay(content, tmp_path / "x", progress=False)["embed.weight"].shape == (8, 4)


def test_an_adapter_has_the_tokens_of_its_base(folders: dict[str, Path], tmp_path: Path):
    (tmp_path / "lora").mkdir()
    factors = {
        "base_model.model.l.lora_A.weight": torch.ones(1, 4),
        "base_model.model.l.lora_B.weight": torch.ones(4, 1),
    }
    save_file(factors, tmp_path / "lora/adapter_model.safetensors")
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    models = [tmp_path / "lora", folders["a"]]
    merged = merge.write(merge.task_arithmetic, models, tmp_path / "out", base=folders["base"], vocabulary="union",
                         progress=False)  # fmt: skip
    torch.testing.assert_close(merged["l.weight"], A["l.weight"] + 1)
    assert torch.equal(merged["embed.weight"][5:], A["embed.weight"][5:])


def test_bad_input(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(InputError, match="'union' or 'base'"):
        put(folders, tmp_path / "out", vocabulary="all")
    for wrong, message in (
        ({"sources": "union"}, "source, tokens and pad"),
        ({"pad": 0}, "pad=0"),
        ({"source": "nowhere"}, "folder with a tokenizer"),
        ({"tokens": {"a": {"modle": 0}}}, "mapping of model, token, zero and force"),
        ({"tokens": {"a": {"model": 7}}}, "place of a model, 0 to 1, or 'base'"),
        ({"tokens": {"a": {"model": 1, "token": "<x>"}}}, "has no token '<x>'"),
    ):
        with pytest.raises(InputError, match=message):
            put(folders, tmp_path / "out", vocabulary=wrong)
    with pytest.raises(InputError, match="in memory"):
        merge.write(merge.average, [A, folders["b"]], tmp_path / "out", vocabulary="union", progress=False)
    (folders["b"] / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer.json"):
        put(folders, tmp_path / "out", vocabulary="union")
