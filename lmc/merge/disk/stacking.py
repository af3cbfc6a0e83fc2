"""Stacks of layers: a model made of slices of others, its layers numbered anew ("passthrough", depth up-scaling).

    tall = lmc.merge.stack([("a/", 0, 24), ("a/", 20, 40)])       # layers 20 to 23 twice
    lmc.merge.write(lmc.merge.average, [tall], "tall/")
    lmc.merge.write(lmc.merge.ties, [stack_of_a, stack_of_b], "merged/", base=stack_of_base)

Nothing is read or copied before it is asked for: a stack is a checkpoint like others. Depth up-scaling (Kim et al. 2024,
2312.15166) is such a stack, trained on.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmc.core.context import own_context, warn
from lmc.errors import InputError
from lmc.weights.adapter import Adapter
from lmc.weights.checkpoint import Checkpoint, Stored, read_json
from lmc.weights.opening import open_checkpoint

Slice = tuple[str | Path | Checkpoint, int, int]
# Of the tensors outside layers those that stand before them: they are the first slice's, all others the last one's.
BEFORE = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|tok_embeddings|position\w*|shared|cls_token|pos_embed|patch\w*)([._]|$)"
)
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")  # in configurations


class Stack(Checkpoint):
    """A checkpoint made of slices of layers of others. Made by `stack`.

    Attributes:
        slices: the folder or file of each, with its first layer and the one after its last.
        layers: their number in all.
    """

    def __init__(self, stored: Mapping[str, Stored], opened: Sequence[Checkpoint], ranges: Sequence[range]) -> None:
        slices = [f"layers {r.start} to {r.stop - 1} of {o.path}" for o, r in zip(opened, ranges, strict=True)]
        super().__init__(opened[0].path, stored, {}, slices, None)
        self.slices = tuple((o.path.resolve(), r.start, r.stop) for o, r in zip(opened, ranges, strict=True))
        self.layers = sum(map(len, ranges))
        self._picked = [layer for r in ranges for layer in r]

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the first slice's configuration that say something of single layers or their number."""
        before = next((config[key] for key in COUNTS if isinstance(config.get(key), int)), None)
        found: dict[str, Any] = {key: self.layers for key in COUNTS if isinstance(config.get(key), int)}
        if before is not None and max(self._picked) < before:
            lists = {k: v for k, v in config.items() if isinstance(v, list) and len(v) == before and k not in COUNTS}
            found |= {key: [value[layer] for layer in self._picked] for key, value in lists.items()}
        return found


@own_context
def stack(slices: Sequence[Slice], *, layers: str | None = None) -> Stack:
    """Open slices of layers of models as one model.

    Tensors before the layers (embeddings, known by their names) are those of the first slice's model, tensors after them
    (final norm, head) of the last one's. A head that is tied to the embeddings stays so where both are of one model.

    Args:
        slices: each a model (a path or an opened checkpoint), its first layer and the one after its last: `("a/", 0, 24)`.
        layers: what stands before the number of a layer in names, such as "model.layers." (default: the numbered
            modules with most values).

    Returns:
        A checkpoint, for `write` and whatever takes checkpoints. Where it is merged into a folder, the number of layers in
        `config.json` is set.

    Raises:
        InputError: no slices, layers that a model does not have or that cannot be told from the names.
    """
    if isinstance(slices, str) or not slices or not all(isinstance(s, Sequence) and len(s) == 3 for s in slices):
        raise InputError("slices: expected a list of (model, first layer, layer after the last), such as ('a/', 0, 24)")
    opened = [model if isinstance(model, Checkpoint) else open_checkpoint(model) for model, _, _ in slices]
    if any(isinstance(model, Adapter) for model in opened):
        raise InputError("slices: an adapter has no layers of its own; pass adapter.on(base)")
    before = [layers or layer_prefix(model) for model in opened]
    ranges = [_range(*args) for args in zip(slices, opened, before, strict=True)]
    stored: dict[str, Stored] = {}
    first, last = opened[0], opened[-1]
    outside = {name for name in [*first, *last] if _layer(name, before[0]) is None and _layer(name, before[-1]) is None}
    for name in first:
        if name in outside and BEFORE.search(name) and name not in first.ties:
            stored[name] = first.entry(name)
    number = 0
    for model, numbers, prefix in zip(opened, ranges, before, strict=True):
        inside: dict[int, list[tuple[str, str]]] = {}
        for name in model:
            if (found := _layer(name, prefix)) is not None:
                inside.setdefault(found[0], []).append((name, found[1]))
        for layer in numbers:
            for name, rest in inside[layer]:
                stored[f"{before[0]}{number}.{rest}"] = model.entry(name)
            number += 1
    _add_last(stored, first, last, outside)
    return Stack(stored, opened, ranges)


def _add_last(stored: dict[str, Stored], first: Checkpoint, last: Checkpoint, outside: set[str]) -> None:
    for name in last:
        if name in outside and not BEFORE.search(name):
            if name in last.ties and first.path == last.path:
                continue
            stored[name] = last.entry(name)
    config = last.path / "config.json"
    if first.path != last.path and config.is_file() and read_json(config).get("tie_word_embeddings"):
        warn(
            f"{last.path}: its head is tied to its embeddings, and the stack has those of {first.path}; set "
            "tie_word_embeddings to false and store a head, or take the first and the last slice of one model"
        )


def layer_prefix(names: Mapping[str, Any]) -> str:
    """The text before the number of a layer: of the series 0, 1, 2, ... of modules the one with most tensors."""
    series: dict[str, set[int]] = {}
    counts: Counter[str] = Counter()
    for name in names:
        for match in re.finditer(r"(?:^|(?<=\.))(\d+)(?=\.)", name):
            before = name[: match.start()]
            series.setdefault(before, set()).add(int(match[1]))
            counts[before] += 1
            break  # the outermost number
    whole = [before for before, numbers in series.items() if numbers == set(range(len(numbers)))]
    if not whole:
        raise InputError("cannot tell the layers from the names: no modules are numbered 0, 1, 2, ...; pass layers=")
    most = max(whole, key=lambda before: counts[before])
    if [counts[before] for before in whole].count(counts[most]) > 1:
        several = ", ".join(sorted(before for before in whole if counts[before] == counts[most]))
        raise InputError(f"cannot tell the layers from the names: {several} are as many; pass layers= or one of them")
    return most


def layer_count(names: Mapping[str, Any], prefix: str) -> int:
    """The number of layers."""
    return len({found[0] for name in names if (found := _layer(name, prefix)) is not None})


def layer_of(name: str, prefix: str) -> int | None:
    """The number of the layer that a tensor belongs to; None outside."""
    found = _layer(name, prefix)
    return None if found is None else found[0]


def _layer(name: str, prefix: str) -> tuple[int, str] | None:
    number, dot, rest = name.removeprefix(prefix).partition(".") if name.startswith(prefix) else ("", "", "")
    return (int(number), rest) if dot and number.isdigit() else None


def _range(given: Slice, model: Checkpoint, prefix: str) -> range:
    _, start, stop = given
    count = layer_count(model, prefix)
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= count):
        raise InputError(
            f"{model.path}: layers {start} to {stop} of {count}; the range is half open, from 0 to {count}"
        )
    return range(start, stop)
