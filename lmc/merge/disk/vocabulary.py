"""Models whose tokenizers differ by some tokens, merged token by token: rows of embeddings and heads follow their tokens.

    lmc.merge.write(lmc.merge.ties, ["math/", "chat/"], "merged/", base="base/", vocabulary="union")

The tokens of a model are read from the `tokenizer.json` beside it. With "base" the result has the tokens of the base (or
else of the first model) under their numbers, with "union" those of the others behind them, model by model. A model that
lacks a token takes the row of the base there, or else the mean of the models that have it: its task vector is zero.

A mapping says more, as mergekit's `tokenizer:` does:

    vocabulary={
        "source": "union",                      # or "base", or a folder whose tokenizer the result has
        "tokens": {                             # where the rows of some tokens come from, in models that lack them
            "<x>": {"model": 0},                # models[0], or "base"
            "<y>": {"model": "base", "token": "<z>"},       # its row of another token, by text or number
            "<w>": {"zero": True, "force": True},           # also in models that have it
        },
        "pad": 64,                              # a multiple for the number of rows; those added are the mean of all
    }
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.errors import DataError, InputError
from lmc.merge.engine.chunks import VALUES
from lmc.weights.agreement import VOCABULARY
from lmc.weights.checkpoint import Checkpoint, Remade, Stored, read_json
from lmc.weights.state import narrowed, wide

FILE = "tokenizer.json"
TEXTS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)  # beside it
SHOWN = 3  # tokens in a text


@dataclass(frozen=True, eq=False)
class Rows(Remade):
    """A tensor whose rows are those of a stored one in another order; rows that it lacks are those of others.

    Attributes:
        stored: the tensor in that other order.
        index: `(rows,)`: the row of `stored` for each, -1 where it has none.
        base: the same of the base, whose rows stand in first; None without a base.
        others: the same of all models; the mean of the rows of those that have the token stands in where the base lacks it.
        name: for errors.
        given: rows whose place is set: a stored tensor and its row there, None for zeros.
        padded: the first of the rows at the end that are the mean of those before; None without any.
    """

    index: Tensor
    base: tuple[Stored, Tensor] | None
    others: tuple[tuple[Stored, Tensor], ...]
    name: str
    given: Mapping[int, tuple[Stored, int] | None] = field(default_factory=dict)
    padded: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.stored.shape[1:])

    def read(self, chunk: slice | None = None) -> Tensor:
        width = max(1, self.stored.size // max(1, self.stored.shape[0]))
        first, last = (0, len(self.index)) if chunk is None else (chunk.start // width, -(-chunk.stop // width))
        found = self._rows(slice(first, last), width)
        if chunk is None:
            return found.reshape(self.shape)
        return found.view(-1)[chunk.start - first * width : chunk.stop - first * width].clone()

    def _rows(self, part: slice, width: int) -> Tensor:
        own = _gather(self.stored, self.index[part], width)
        for place in (self.index[part] < 0).nonzero().flatten().tolist():
            row = part.start + place
            if self.padded is not None and row >= self.padded:
                own[place] = self._mean
            elif row in self.given:
                found = self.given[row]
                if found is not None:
                    own[place] = _gather(found[0], torch.tensor([found[1]]), width)[0].to(own.dtype)
            elif having := self._having(row):
                kind = wide(*(stored.dtype for stored, _ in having))
                rows = [_gather(stored, index[row : row + 1], width)[0].to(kind) for stored, index in having]
                own[place] = narrowed(torch.stack(rows).mean(0), self.dtype, self.name)
        return own

    def _having(self, row: int) -> list[tuple[Stored, Tensor]]:
        """Whose rows stand in: the base's, or else those of all that have one."""
        if self.base is not None and self.base[1][row] >= 0:
            return [self.base]
        return [(stored, index) for stored, index in self.others if index[row] >= 0]

    @cached_property
    def _mean(self) -> Tensor:
        """Of the rows before the padded ones."""
        width, count = max(1, self.stored.size // max(1, self.stored.shape[0])), self.padded or 0
        step = max(1, VALUES // width)
        total = torch.zeros(width, dtype=torch.float64)
        for start in range(0, count, step):
            total += self._rows(slice(start, min(start + step, count)), width).double().sum(0)
        return (total / count).to(self.dtype)


def _gather(stored: Stored, index: Tensor, width: int) -> Tensor:
    """`(rows, width)`: rows of a stored tensor, zero where the index is negative; read in runs."""
    found = torch.zeros(len(index), width, dtype=stored.dtype)
    start, numbers = 0, index.tolist()
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1 or numbers[end - 1] < 0:
            if (first := numbers[start]) >= 0:
                found[start:end] = stored.read(slice(first * width, (first + end - start) * width)).view(-1, width)
            start = end
    return found


def tokens(folder: Path) -> dict[str, int]:
    """The tokens of the tokenizer in a folder, with their numbers; empty where there is no `tokenizer.json`.

    Raises:
        DataError: a file of another form.
    """
    file = folder / FILE
    if not folder.is_dir() or not file.is_file():
        return {}
    content = read_json(file)
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: tokens with their scores, in order
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    found = {**vocabulary, **added}
    if not found or not all(isinstance(number, int) for number in found.values()):
        raise DataError(f"{file}: holds no vocabulary of tokens with their numbers")
    return found


def _count(numbers: Mapping[str, int]) -> int:
    return max(numbers.values()) + 1


def vocabulary_tensors(model: Checkpoint, count: int) -> list[str]:
    """The names of tensors with a row for each of `count` tokens: embeddings, heads and their biases."""
    return [
        name
        for name, entry in model.stored.items()
        if VOCABULARY.search(name) and "position" not in name and 1 <= len(entry.shape) <= 2 and entry.shape[0] >= count
    ]


@dataclass(frozen=True)
class Policy:
    """The meaning of `vocabulary=`, checked.

    Attributes:
        source: "union", "base", or the folder whose tokenizer the result has.
        tokens: token -> where its row comes from.
        pad: a multiple for the number of rows; None: as many as the first model, or more.
    """

    source: str
    tokens: Mapping[str, Mapping[str, Any]]
    pad: int | None


def policy_of(vocabulary: str | Mapping[str, Any]) -> Policy:
    """The policy that is meant.

    Raises:
        InputError: one that is not known.
    """
    given: Mapping[str, Any] = {"source": vocabulary} if isinstance(vocabulary, str) else vocabulary
    if not isinstance(given, Mapping) or not set(given) <= {"source", "tokens", "pad"}:
        raise InputError(
            f"vocabulary must be 'union', 'base' or a mapping of source, tokens and pad, got {vocabulary!r}"
        )
    source, named, pad = given.get("source", "union"), given.get("tokens") or {}, given.get("pad")
    if source not in ("union", "base") and not Path(source).is_dir():
        raise InputError(f"vocabulary must be 'union' or 'base', or a folder with a tokenizer, got {source!r}")
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or pad < 1):
        raise InputError(f"vocabulary: pad={pad!r}: expected a whole number of at least 1")
    for token, row in named.items():
        if not isinstance(row, Mapping) or not set(row) <= {"model", "token", "zero", "force"}:
            raise InputError(f"vocabulary: {token!r}: expected a mapping of model, token, zero and force, got {row!r}")
    return Policy(source, named, pad)


def by_token(
    models: Sequence[Any], base: Any, vocabulary: str | Mapping[str, Any]
) -> tuple[list[Any], Any, dict[str, str]]:
    """The models and the base with one vocabulary, and the files that say so.

    Raises:
        InputError: a policy that is not known, models in memory, or without a `tokenizer.json`.
    """
    policy = policy_of(vocabulary)
    everyone = [*models, *([] if base is None else [base])]
    for i, model in enumerate(everyone):
        if not isinstance(model, Checkpoint):
            raise InputError(
                f"vocabulary: models[{i}] is in memory; tokens are read from the tokenizer.json beside a model"
            )
    if base is not None:
        everyone = [model.on(base) for model in everyone]  # adapters as the models that they are
    folders = [_folder(model) for model in everyone]
    known = [tokens(folder) for folder in folders]
    at = len(everyone) - 1 if base is not None else 0  # whose numbers stay, unless another folder's are wanted
    home = folders[at] if policy.source in ("union", "base") else Path(policy.source)
    first = tokens(home)
    if not first:
        raise InputError(f"{home}: vocabulary: no {FILE} there; save the model with its (fast) tokenizer")
    joint = dict(first)
    if policy.source == "union":
        for own in known:
            for token in sorted(own.keys() - joint.keys(), key=lambda token, own=own: own[token]):
                joint[token] = max(joint.values()) + 1
    for token in policy.tokens:
        joint.setdefault(token, max(joint.values()) + 1)
    count = max(joint.values()) + 1
    heights = [_height(model, _count(own)) for model, own in zip(everyone, known, strict=True)]
    own_rows = heights[at] if home == folders[at] and policy.pad is None else 0
    height = max(own_rows, count) if policy.pad is None else -(-count // policy.pad) * policy.pad
    if not policy.tokens and all(own == first for own in known) and set(heights) == {height}:
        return everyone[: len(models)], base, {}
    given = {joint[token]: _given(token, row, known, base is not None) for token, row in policy.tokens.items()}
    forced = [joint[token] for token, row in policy.tokens.items() if row.get("force")]
    indices = []
    for i, own in enumerate(known):
        index = torch.full((height,), -1, dtype=torch.int64)
        for token, number in joint.items():
            index[number] = own.get(token, -1)
        if i == at:  # its rows behind the tokens stay
            rest = torch.arange(height)
            index = torch.where((index < 0) & (rest >= count) & (rest < own_rows), rest, index)
        index[forced] = -1
        indices.append(index)
    padded = count if policy.pad is not None and height > count else None
    views = [_view(everyone, known, indices, i, base is not None, given, padded) for i in range(len(everyone))]
    foreign = policy.source not in ("union", "base")
    texts = _texts(home, everyone[at].path, joint, first, folders, height, foreign)
    return views[: len(models)], None if base is None else views[-1], texts


def _folder(model: Checkpoint) -> Path:
    """The folder of a model's tokenizer; that of an adapter without one is its base's.

    Raises:
        InputError: nowhere.
    """
    places = [model.path, getattr(model, "base", None)]
    found = next((place for place in places if place is not None and tokens(place)), None)
    if found is None:
        raise InputError(f"{model.path}: vocabulary: no {FILE} there; save the model with its (fast) tokenizer")
    return found


def _given(
    token: str, row: Mapping[str, Any], known: Sequence[Mapping[str, int]], based: bool
) -> tuple[int, int] | None:
    """The place of a model, and its row; None for zeros."""
    if row.get("zero"):
        return None
    last = len(known) - based
    place = len(known) - 1 if row.get("model") == "base" and based else row.get("model")
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(known):
        raise InputError(f"vocabulary: {token!r}: model must be the place of a model, 0 to {last - 1}, or 'base'")
    wanted = row.get("token", token)
    found = wanted if isinstance(wanted, int) else known[place].get(wanted)
    if found is None or not 0 <= found < _count(known[place]):
        raise InputError(f"vocabulary: {token!r}: its model, {row['model']}, has no token {wanted!r}")
    return place, found


def _height(model: Checkpoint, count: int) -> int:
    """The number of rows of a model's embeddings."""
    rows = [model.stored[name].shape[0] for name in vocabulary_tensors(model, count)]
    if not rows:
        raise InputError(f"{model.path}: no tensor has a row for each of the {count} tokens of its {FILE}")
    return min(rows)


def _view(
    everyone: Sequence[Checkpoint],
    known: Sequence[Mapping[str, int]],
    indices: Sequence[Tensor],
    i: int,
    based: bool,
    given: Mapping[int, tuple[int, int] | None],
    padded: int | None,
) -> Checkpoint:
    model = everyone[i]
    stored = dict(model.stored)
    for name in vocabulary_tensors(model, _count(known[i])):
        here = [(other.entry(name), index) for other, index in zip(everyone, indices, strict=True) if name in other]
        base = here[-1] if based and name in everyone[-1] else None
        others = tuple(here[: len(everyone) - based])
        rows = {
            number: None if place is None else (everyone[place[0]].entry(name), place[1])
            for number, place in given.items()
        }
        stored[name] = Rows(model.stored[name], indices[i], base, others, name, rows, padded)
    lacking = int((indices[i] < 0).sum())
    note = f"rows of {FILE} brought into one order" + (
        f"; {lacking} tokens that it lacks stand as in the others" if lacking else ""
    )
    return Checkpoint(model.path, stored, model.ties, [*model.notes, note], model.metadata)


def _texts(
    home: Path,
    first_model: Path,
    joint: Mapping[str, int],
    first: Mapping[str, int],
    folders: Sequence[Path],
    height: int,
    foreign: bool,
) -> dict[str, str]:
    """The tokenizer with the further tokens, all of its files where it is `foreign`, and the configuration."""
    content = read_json(home / FILE)
    entries = {}
    for folder in folders:
        for entry in read_json(folder / FILE).get("added_tokens") or []:
            entries.setdefault(entry["content"], entry)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    further = [
        {**plain, **entries.get(token, {}), "id": number, "content": token}
        for token, number in joint.items()
        if token not in first
    ]
    found = {}
    if foreign:
        found |= {file.name: file.read_text(encoding="utf-8") for name in TEXTS if (file := home / name).is_file()}
    if further or foreign:
        content["added_tokens"] = [*(content.get("added_tokens") or []), *further]
        found[FILE] = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    if (first_model / "config.json").is_file():
        config = read_json(first_model / "config.json")
        if config.get("vocab_size") not in (None, height):
            found["config.json"] = json.dumps(config | {"vocab_size": height}, indent=2) + "\n"
    return found


def differing(folders: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The differences between the vocabularies of models, a sentence for each model that differs from the last."""
    known = [tokens(folder) for folder in folders]
    if not all(known):
        return []
    said = []
    for own, name in zip(known[:-1], names[:-1], strict=True):
        more, less = sorted(own.keys() - known[-1].keys()), sorted(known[-1].keys() - own.keys())
        moved = sum(own[token] != number for token, number in known[-1].items() if token in own)
        parts = [f"{len(more)} tokens that {names[-1]} lacks ({_some(more)})"] if more else []
        parts += [f"lacks {len(less)} of its ({_some(less)})"] if less else []
        parts += [f"{moved} tokens under other numbers"] if moved else []
        if parts:
            said.append(
                f"The vocabulary of {name} has {', '.join(parts)}: merge by token, vocabulary='union' (all tokens) or 'base'."
            )
    return said


def _some(found: Sequence[str]) -> str:
    return ", ".join(map(repr, found[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
