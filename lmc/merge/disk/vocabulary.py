"""Models whose tokenizers differ by some tokens, merged token by token: rows of embeddings and heads follow their tokens.

    lmc.merge.write(lmc.merge.ties, ["math/", "chat/"], "merged/", base="base/", vocabulary="union")

The tokens of a model are read from the `tokenizer.json` beside it. With "base" the result has the tokens of the base (or
else of the first model) under their numbers, with "union" those of the others behind them, model by model. A model that
lacks a token takes the row of the base there, or else the mean of the models that have it: its task vector is zero.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.errors import DataError, InputError
from lmc.weights.agreement import VOCABULARY
from lmc.weights.checkpoint import Checkpoint, Stored, read_json
from lmc.weights.state import narrowed, wide

FILE = "tokenizer.json"
SHOWN = 3  # tokens in a text


@dataclass(frozen=True)
class Rows:
    """A tensor whose rows are those of a stored one in another order; rows that it lacks are those of others.

    Attributes:
        own: the stored tensor.
        index: `(rows,)`: the row of `own` for each, -1 where it has none.
        base: the same of the base, whose rows stand in first; None without a base.
        others: the same of all models; the mean of the rows of those that have the token stands in where the base lacks it.
        name: for errors.
    """

    own: Stored
    index: Tensor
    base: tuple[Stored, Tensor] | None
    others: tuple[tuple[Stored, Tensor], ...]
    name: str

    @property
    def file(self) -> Path:
        return self.own.file

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.own.shape[1:])

    @property
    def size(self) -> int:
        """The number of values."""
        return torch.Size(self.shape).numel()

    def read(self, chunk: slice | None = None) -> Tensor:
        """The tensor, or this chunk of it flattened, in memory of its own."""
        width = max(1, self.own.size // max(1, self.own.shape[0]))
        first, last = (0, len(self.index)) if chunk is None else (chunk.start // width, -(-chunk.stop // width))
        found = self._rows(slice(first, last), width)
        if chunk is None:
            return found.reshape(self.shape)
        return found.view(-1)[chunk.start - first * width : chunk.stop - first * width].clone()

    def _rows(self, part: slice, width: int) -> Tensor:
        own = _gather(self.own, self.index[part], width)
        for place in (self.index[part] < 0).nonzero().flatten().tolist():
            row = part.start + place
            if self.base is not None and self.base[1][row] >= 0:
                having = [self.base]
            else:
                having = [(stored, index) for stored, index in self.others if index[row] >= 0]
            if having:
                kind = wide(*(stored.dtype for stored, _ in having))
                rows = [_gather(stored, index[row : row + 1], width)[0].to(kind) for stored, index in having]
                own[place] = narrowed(torch.stack(rows).mean(0), self.dtype, self.name)
        return own


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


def by_token(models: Sequence[Any], base: Any, policy: str) -> tuple[list[Any], Any, dict[str, str]]:
    """The models and the base with one vocabulary, and the files that say so.

    Raises:
        InputError: a policy that is not known, models in memory, or without a `tokenizer.json`.
    """
    if policy not in ("union", "base"):
        raise InputError(f"vocabulary must be 'union' or 'base', got {policy!r}")
    everyone = [*models, *([] if base is None else [base])]
    for i, model in enumerate(everyone):
        if not isinstance(model, Checkpoint):
            raise InputError(
                f"vocabulary: models[{i}] is in memory; tokens are read from the tokenizer.json beside a model"
            )
        if not tokens(model.path):
            raise InputError(f"{model.path}: vocabulary: no {FILE} there; save the model with its (fast) tokenizer")
    known = [tokens(model.path) for model in everyone]
    first = known[-1] if base is not None else known[0]
    home = everyone[-1] if base is not None else everyone[0]
    if all(own == first for own in known) and len({_height(m, _count(first)) for m in everyone}) == 1:
        return list(models), base, {}
    joint = dict(first)
    if policy == "union":
        for own in known:
            for token in sorted(own.keys() - joint.keys(), key=lambda token, own=own: own[token]):
                joint[token] = max(joint.values()) + 1
    height = max(_height(home, _count(first)), max(joint.values()) + 1)
    indices = []
    for own, model in zip(known, everyone, strict=True):
        index = torch.full((height,), -1, dtype=torch.int64)
        for token, number in joint.items():
            index[number] = own.get(token, -1)
        if model is home:  # its rows behind the tokens stay
            used = index >= 0
            rest = torch.arange(height)
            index = torch.where(
                ~used & (rest > max(joint.values())) & (rest < _height(home, _count(first))), rest, index
            )
        indices.append(index)
    views = [
        _view(model, own, everyone, indices, i, base is not None)
        for i, (model, own) in enumerate(zip(everyone, known, strict=True))
    ]
    texts = _texts(home.path, joint, first, [m.path for m in everyone], height)
    return views[: len(models)], None if base is None else views[-1], texts


def _height(model: Checkpoint, count: int) -> int:
    """The number of rows of a model's embeddings."""
    rows = [model.stored[name].shape[0] for name in vocabulary_tensors(model, count)]
    if not rows:
        raise InputError(f"{model.path}: no tensor has a row for each of the {count} tokens of its {FILE}")
    return min(rows)


def _view(
    model: Checkpoint,
    own: Mapping[str, int],
    everyone: Sequence[Checkpoint],
    indices: Sequence[Tensor],
    i: int,
    based: bool,
) -> Checkpoint:
    stored = dict(model.stored)
    for name in vocabulary_tensors(model, _count(own)):
        here = [(other.entry(name), index) for other, index in zip(everyone, indices, strict=True) if name in other]
        base = here[-1] if based and name in everyone[-1] else None
        stored[name] = Rows(model.stored[name], indices[i], base, tuple(here[: len(everyone) - based]), name)
    lacking = int((indices[i] < 0).sum())
    note = f"rows of {FILE} brought into one order" + (
        f"; {lacking} tokens that it lacks stand as in the others" if lacking else ""
    )
    return Checkpoint(model.path, stored, model.ties, [*model.notes, note], model.metadata)


def _texts(
    home: Path, joint: Mapping[str, int], first: Mapping[str, int], folders: Sequence[Path], height: int
) -> dict[str, str]:
    """The tokenizer with the further tokens, and the configuration with their number."""
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
    content["added_tokens"] = [*(content.get("added_tokens") or []), *further]
    found = {FILE: json.dumps(content, ensure_ascii=False, indent=2) + "\n"} if further else {}
    if (home / "config.json").is_file():
        config = read_json(home / "config.json")
        if config.get("vocab_size") not in (None, height):
            found["config.json"] = json.dumps(config | {"vocab_size": height}, indent=2) + "\n"
    return found


def differing(folders: Sequence[Path], names: Sequence[str]) -> list[str]:
    """What the vocabularies of models do not have in common, a sentence for each model that differs from the last."""
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
