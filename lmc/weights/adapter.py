"""Low-rank adapters on disk (LoRA, as PEFT writes them), and the model that one gives on its base, tensor by tensor.

An adapter changes a weight W by `scale B A`, with `scale = alpha / rank`, or `alpha / sqrt(rank)` of rank-stabilised ones
(Hu et al. 2021, 2106.09685; Kalajdzievski 2023, 2312.03732). DoRA gives every row of the sum a length of its own (Liu et
al. 2024, 2402.09353). Biases, norms and heads may be stored whole beside it.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.core.context import warn
from lmc.errors import DataError, MismatchError, WeightsError
from lmc.weights.checkpoint import Checkpoint, Mapped, Remade, Stored, read_json, readable
from lmc.weights.state import FACTORS, narrowed, tied_names, wide

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of PEFT, before every name
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?!weight$|bias$)(?P<adapter>[\w-]+))?(\.(?P<what>weight|bias))?$"
)
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
SAVED = re.compile(r"\.(base_layer|modules_to_save(\.(?!weight$|bias$)[\w-]+)?)(?=\.)")
# Fields of a configuration that make an adapter something else than a change of weights.
REFUSED = {
    "layer_replication": "repeats layers, so that its model has another depth than the base",
    "target_parameters": "changes parameters that are no weights of modules",
    "trainable_token_indices": "trains rows of the embedding under names of their own",
    "alora_invocation_tokens": "acts behind some tokens only, which no change of weights does",
    "arrow_config": "chooses among adapters for every token",
    "use_bdlora": "has factors of blocks",
    "use_qalora": "was trained on groups of quantised inputs",
}
# Ways to start the factors that take them off the base: what is stored belongs to what is left of it.
RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Adapted(Checkpoint):
    """A base with an adapter, from `Adapter.on`; `path` is the adapter's.

    Attributes:
        base: the path of the base; None where that is in memory.
    """

    base: Path | None = None


class Adapter(Checkpoint):
    """An opened adapter: its factors are its tensors; `on(base)` is the model.

    Merging methods take it as a model where `base=` is given. Made by `open_checkpoint`.

    Attributes:
        config: what `adapter_config.json` holds.
    """

    def __init__(self, opened: Checkpoint, folder: Path) -> None:
        super().__init__(opened.path, opened.stored, opened.ties, opened.notes, opened.metadata)
        self._config_file = folder / CONFIG
        self.config = read_json(self._config_file)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it depends on: the factors and the configuration."""
        return (*super().files, self._config_file)

    def __repr__(self) -> str:
        kind = "DoRA" if self.config.get("use_dora") else str(self.config.get("peft_type", "of unknown kind"))
        origin = self.config.get("base_model_name_or_path")
        base = f"; base {origin}" if origin else ""
        lines = [f"Adapter({str(self.path)!r}: {kind}, rank {self.config.get('r', '?')}, {readable(self.size)}{base})"]
        return "\n  ".join([*lines, *self.notes])

    @property
    def changes(self) -> frozenset[str]:
        """The modules with factors, and the tensors that are stored whole, by their names in the model."""
        factors, saved = self._parts()
        return frozenset((*factors, *saved))

    def on(self, base: Mapping[str, Tensor]) -> Checkpoint:
        """The full model: the base with what the adapter changes. Nothing is read before it is asked for.

        A name of a tied tensor that the adapter changes is no longer tied.

        Raises:
            WeightsError: an adapter of another kind, or one that is no change of the base's weights.
            MismatchError: modules that the base lacks, or of another size there; the first is named.
            DataError: names that are no part of an adapter, or a configuration that does not fit them.
        """
        self._check_kind()
        factors, saved = self._parts()
        if isinstance(base, Adapter):
            raise WeightsError(
                f"{base.path}: the base is an adapter itself; pass the full model that it was trained on"
            )
        place = {name: _stored(base, name, self.path) for name in base}
        _add_head(place, factors, saved, self.path)
        wanted = [f"{module}.weight" for module in factors] + [n for n in saved if n.endswith(".weight")]
        rename = _renaming(wanted, place)
        found: dict[str, Stored] = {}
        for name, stored in saved.items():
            new = rename(name)
            found[new] = Changed(place[new], new, start=stored) if new in place else stored
        for module, parts in factors.items():
            found |= self._changed(rename(module), module, parts, place, found)
        ties = _kept_ties(tied_names(base), found)
        entries = {name: found.get(name, entry) for name, entry in place.items() if name not in ties}
        entries |= {name: entry for name, entry in found.items() if name not in place}
        note = f"adapter of rank {self.config.get('r')} on {len(factors)} modules"
        whole = f", {len(saved)} tensors whole" if saved else ""
        metadata = getattr(base, "metadata", getattr(base, "_metadata", None))
        made = Adapted(self.path, entries, ties, [*self.notes, note + whole], metadata)
        made.base = base.path if isinstance(base, Checkpoint) else None
        return made

    def _check_kind(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise WeightsError(
                f"{self.path}: an adapter of kind {kind}, whose product with the base is not known here; merge it into "
                "its base first (peft: model.merge_and_unload())"
            )
        for key, why in REFUSED.items():
            if self.config.get(key):
                raise WeightsError(f"{self.path}: {key} is set: the adapter {why}; it is no task vector")
        start = str(self.config.get("init_lora_weights"))
        if start.lower().startswith(RESIDUAL):
            raise WeightsError(
                f"{self.path}: init_lora_weights={start!r} took the first factors off the base, so that these belong to "
                "what was left; convert it first (peft: save_pretrained(..., path_initial_model_for_weight_conversion=))"
            )

    def _parts(self) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
        """The factors of each module, by part, and the tensors that are stored whole; names as in the model."""
        factors: dict[str, dict[str, Stored]] = {}
        saved: dict[str, Stored] = {}
        adapters = set()
        for name in self:
            plain = name.removeprefix(PREFIX)
            if match := FACTOR.match(plain):
                adapters.add(match["adapter"])
                part = match["part"].replace("embedding_", "")
                kind = {"lora_A": "down", "lora_B": "up"}.get(part, "magnitude")
                kind = "bias" if match["what"] == "bias" else kind
                own = factors.setdefault(SAVED.sub("", match["module"] + ".")[:-1], {})
                own[kind] = self.entry(name)
                if "embedding" in match["part"]:
                    own["embedding"] = self.entry(name)
            elif FACTORS.search(plain) or "lora_" in plain or "trainable_tokens" in plain:
                raise DataError(f"{self.path}: {name} is no part of a LoRA adapter that is known here")
            elif ".original_module." not in plain:
                saved[SAVED.sub("", plain)] = self.entry(name)
        if len(adapters) > 1:
            raise DataError(
                f"{self.path}: holds several adapters, {', '.join(map(str, sorted(adapters, key=str)))}; save one"
            )
        for module, parts in factors.items():
            if missing := {"down", "up"} - set(parts):
                letter = "A" if "down" in missing else "B"
                raise DataError(f"{self.path}: {module} lacks its factor lora_{letter}")
        return factors, saved

    def _changed(
        self,
        home: str,
        module: str,
        parts: Mapping[str, Stored],
        base: Mapping[str, Stored],
        saved: Mapping[str, Stored],
    ) -> dict[str, Stored]:
        """The changed tensors of one module, `home` in the base and `module` in the adapter; `saved` are stored whole."""
        name, bias = f"{home}.weight", f"{home}.bias"
        if f"{home.removesuffix('.out_proj')}.in_proj_weight" in base:
            raise WeightsError(
                f"{self.path}: {module} is part of a torch.nn.MultiheadAttention, where peft (0.21) adds the product of "
                "the output projection twice; merge it into its base first (peft: model.merge_and_unload())"
            )
        if name not in base:
            raise MismatchError(
                f"{self.path}: changes {name}, which the base lacks (its names are like {next(iter(base), 'none')!r}): "
                "an adapter of another model, or a base whose file has other names than its modules; in the second case "
                "load the model and pass its state dict as base"
            )
        scale = self._scale(module, parts["down"].shape[0])
        rows, columns = parts["up"].shape[0], parts["down"].shape[1:]
        start = _whole(saved, name)
        product, shape = (rows, *columns), base[name].shape if start is None else start.shape
        stored_across = (columns[0], rows) if len(columns) == 1 else ()
        across = "embedding" in parts or (
            bool(self.config.get("fan_in_fan_out")) if product == stored_across else shape == stored_across
        )
        if parts["up"].shape[1] != parts["down"].shape[0] or shape != (stored_across if across else product):
            raise MismatchError(
                f"{self.path}: {name} is {shape} in the base, the factors are {parts['up'].shape} and "
                f"{parts['down'].shape}: an adapter of another size, or of a grouped convolution"
            )
        change = LowRank(parts["up"], parts["down"], scale, across, base[name].dtype)
        found: dict[str, Stored] = {}
        if "magnitude" in parts:
            if across:
                raise WeightsError(
                    f"{self.path}: {module}: DoRA on a weight that is stored across, which is not supported; merge it into "
                    "its base first (peft: model.merge_and_unload())"
                )
            found[name] = Directed(base[name], name, change, start, magnitude=parts["magnitude"])
        else:
            found[name] = Changed(base[name], name, change, start)
        if "bias" in parts:
            if bias not in base:
                raise MismatchError(f"{self.path}: changes {bias}, which the base lacks")
            added = Scaled(parts["bias"], scale, base[bias].dtype)
            found[bias] = Changed(base[bias], bias, added, _whole(saved, bias))
        return found

    def _scale(self, module: str, rank: int) -> float:
        """`alpha / rank` as PEFT chooses them: the first pattern that fits the end of the module's name, else the general ones."""
        values = {}
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            patterns = self.config.get(pattern) or {}
            own = next(
                (v for end, v in patterns.items() if re.match(rf"(.*\.)?({end})$", module)), self.config.get(key)
            )
            if not isinstance(own, int | float):
                raise DataError(f"{self._config_file}: lacks {key}, by which the product of the factors is scaled")
            values[key] = own
        if rank == 0:
            raise DataError(f"{self.path}: {module} has factors of rank 0, which are no adapter")
        if values["r"] != rank:
            raise DataError(f"{self._config_file}: says rank {values['r']} for {module}, its factors have {rank}")
        return values["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True)
class LowRank:
    """`scale up @ down`, whose factors are read when asked for.

    Attributes:
        up, down: (out, rank) and (rank, in), of a convolution (out, rank, 1, 1) and (rank, in, height, width).
        across: the tensor is stored as (in, out): the product's transpose.
        dtype: of the base's tensor.
    """

    up: Stored
    down: Stored
    scale: float
    across: bool
    dtype: torch.dtype

    def rows(self, first: int, last: int) -> Tensor:
        """`(last - first, values per row)` in float32 or wider."""
        rank, kind = self.down.shape[0], wide(self.dtype, self.up.dtype, self.down.dtype)
        down = self.down.read().to(kind).flatten(1)
        if self.across:
            left, right = down[:, first:last].T, self.up.read().to(kind).flatten(1).T
        else:
            left, right = self.up.read(slice(first * rank, last * rank)).to(kind).view(-1, rank), down
        return (left @ right).mul_(self.scale)

    def part(self, shape: Sequence[int], chunk: slice | None) -> Tensor:
        if chunk is None:
            return self.rows(0, shape[0]).reshape(tuple(shape))
        first, last, inside = _covering(shape, chunk)
        return self.rows(first, last).view(-1)[inside]


@dataclass(frozen=True)
class Scaled:
    """`scale` times a stored tensor."""

    stored: Stored
    scale: float
    dtype: torch.dtype

    def part(self, shape: Sequence[int], chunk: slice | None) -> Tensor:
        return self.stored.read(chunk).to(wide(self.dtype, self.stored.dtype)) * self.scale


@dataclass(frozen=True)
class Changed(Remade):
    """A tensor of the base as an adapter changes it: like one that is stored, and its difference from the base, unrounded.

    Attributes:
        stored: the tensor of the base.
        name: for errors.
        change: what is added, `LowRank` or `Scaled`; None where nothing is.
        start: the tensor that is stored whole in the adapter, which takes the place of the base's; None where none is.
    """

    name: str
    change: Any = None
    start: Stored | None = None

    @property
    def origin(self) -> Stored:
        """The tensor that the change is added to."""
        return self.stored if self.start is None else self.start

    @property
    def shape(self) -> tuple[int, ...]:
        return self.origin.shape

    def read(self, chunk: slice | None = None) -> Tensor:
        return narrowed(self.unrounded(chunk), self.dtype, self.name)

    def unrounded(self, chunk: slice | None = None) -> Tensor:
        """The same in float32 or wider."""
        origin = self.origin.read(chunk).to(wide(self.dtype, self.origin.dtype))
        return origin if self.change is None else origin + self.change.part(self.shape, chunk)

    def delta(self, chunk: slice | None = None) -> Tensor:
        """The difference from the base, in float32 or wider."""
        if self.start is None:
            return self.change.part(self.shape, chunk)
        whole = self.unrounded(chunk)
        return whole - self.stored.read(chunk).to(whole.dtype)


@dataclass(frozen=True)
class Directed(Changed):
    """DoRA: the rows of origin plus change, each with a length of its own.

    Attributes:
        magnitude: the lengths.
    """

    magnitude: Stored = field(kw_only=True)

    def unrounded(self, chunk: slice | None = None) -> Tensor:
        shape = self.shape
        if chunk is None:
            return self._rows(0, shape[0]).reshape(shape)
        first, last, inside = _covering(shape, chunk)
        return self._rows(first, last).view(-1)[inside]

    def delta(self, chunk: slice | None = None) -> Tensor:
        whole = self.unrounded(chunk)
        return whole - self.stored.read(chunk).to(whole.dtype)

    def _rows(self, first: int, last: int) -> Tensor:
        change = self.change.rows(first, last)
        width = self.size // self.shape[0]
        origin = self.origin.read(slice(first * width, last * width)).to(change.dtype).view(-1, width)
        length = self.magnitude.read().to(change.dtype).reshape(-1, 1)[first:last]
        moved = origin + change
        return moved * (length / moved.norm(dim=1, keepdim=True))


def _covering(shape: Sequence[int], chunk: slice) -> tuple[int, int, slice]:
    """The rows that hold a chunk of the flattened tensor, and where the chunk is in them."""
    width = math.prod(shape[1:])
    first, last = chunk.start // width, -(-chunk.stop // width)
    return first, last, slice(chunk.start - first * width, chunk.stop - first * width)


def _stored(base: Mapping[str, Tensor], name: str, path: Path) -> Stored:
    return base.entry(name) if isinstance(base, Checkpoint) else Mapped(path, base[name])


def _add_head(
    place: dict[str, Stored],
    factors: Mapping[str, Mapping[str, Stored]],
    saved: Mapping[str, Stored],
    path: Path,
) -> None:
    """A head that is tied to the embedding is not stored; where the adapter changes one of them, they part."""
    embeddings = [name for name, entry in place.items() if EMBEDDING.search(name) and len(entry.shape) == 2]
    heads = [name for name in place if HEAD.search(name)]
    changed = {f"{module}.weight": parts for module, parts in factors.items()}
    wanted = next((name for name in (*changed, *saved) if HEAD.search(name) and name not in place), None)
    if heads or len(embeddings) != 1:
        return
    (embedding,) = embeddings
    if wanted is not None and (wanted in saved or changed[wanted]["up"].shape[0] == place[embedding].shape[0]):
        place[wanted] = place[embedding]
        warn(
            f"{path}: changes {wanted}, which the base has in {embedding} alone; the result has both: set "
            "tie_word_embeddings to false in its configuration"
        )
    elif embedding in changed or embedding in saved:
        warn(
            f"{path}: changes {embedding}, and the base stores no head: where a model takes it from the embedding, it "
            "changes as well, as in what peft merges, but not in the model with its adapter"
        )


def _whole(found: Mapping[str, Stored], name: str) -> Stored | None:
    """The tensor that an adapter stores whole and does not change further."""
    entry = found.get(name)
    return entry.start if isinstance(entry, Changed) and entry.change is None else None


def _renaming(wanted: Iterable[str], base: Mapping[str, Stored]) -> Any:
    """Names of the adapter -> those of the base, where one of them has some words before all names more."""
    wanted = [name for name in wanted]
    if all(name in base for name in wanted) or not wanted:
        return lambda name: name
    first = next(name for name in wanted if name not in base)
    for longer in base:
        if longer.endswith(f".{first}"):
            before = longer.removesuffix(first)
            if all(before + name in base for name in wanted):
                return lambda name: before + name
    for place in (match.end() for match in re.finditer(r"\.", first)):
        before = first[:place]
        if all(name.startswith(before) and name.removeprefix(before) in base for name in wanted):
            return lambda name: name.removeprefix(before)
    return lambda name: name


def _kept_ties(ties: Mapping[str, str], changed: Mapping[str, Stored]) -> dict[str, str]:
    """The ties of the base that the adapter leaves: both names unchanged, or stored whole with equal values."""
    kept = {}
    for again, first in ties.items():
        here, there = changed.get(again), changed.get(first)
        if here is None and there is None:
            kept[again] = first
        elif (x := _whole(changed, again)) and (y := _whole(changed, first)) and x.read().equal(y.read()):
            kept[again] = first
        else:
            warn(
                f"{again}: tied to {first} in the base; the adapter changes one of the two, so that they are no longer tied: "
                "set tie_word_embeddings to false in the configuration of the result"
            )
    return kept
