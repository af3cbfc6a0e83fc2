"""`lmc.merge.inspect`: what several models have in common, before anything is merged, and advice from the numbers in words."""

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.merge.disk.vocabulary import differing
from lmc.merge.engine.tensors import STATISTICS, on_base
from lmc.merge.study.survey import Difference, LayerReport, Survey, differences
from lmc.network.derived import derived_names, gauged
from lmc.weights import ModelOrWeights, as_weights, tied_names
from lmc.weights.adapter import Adapter
from lmc.weights.agreement import fitting, outline
from lmc.weights.checkpoint import Checkpoint, readable
from lmc.weights.opening import open_checkpoint
from lmc.weights.state import inexact, unmergeable

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Inspection(Result):
    """The result of `inspect`: a table (`to_frame`), a figure (`plot`), and advice in words (`advice`).

    Attributes:
        names: of the models.
        based: whether there is a base, so that norms and cosines are those of task vectors.
        differences: tensors that differ in presence, shape, dtype or tying; the rest of the report is on the others.
        faults: model -> the first tensor of it that is not finite; such tensors are left out of the report.
        layers: one `LayerReport` per module, in the order of the first model.
        total: all weights together. matrices: those with two axes or more, by which relatives and strangers are distinguished.
        barriers: (M, M) barriers of the loss on the lines between the models, in `unit`; None without data.
        advice: what to do, one sentence each.
    """

    names: tuple[str, ...]
    based: bool
    differences: tuple[Difference, ...]
    faults: Mapping[str, str]
    layers: tuple[LayerReport, ...]
    total: LayerReport
    matrices: LayerReport
    barriers: np.ndarray | None
    advice: tuple[str, ...]
    unit: str = "nats"

    def to_frame(self) -> "pandas.DataFrame":
        """One row per layer: its size, norm of each model relative to the base, smallest cosine, sign conflicts."""
        pandas = require("pandas")

        rows = []
        for layer in (*self.layers, self.total):
            unit = layer.base_norm if self.based and layer.base_norm > 0.0 else 1.0
            row: dict[str, Any] = {"layer": layer.name, "size": layer.size}
            row |= {f"norm of {name}": norm / unit for name, norm in zip(self.names, layer.norms, strict=True)}
            if len(self.names) > 1:
                row["mean cosine"] = float(mean_cosine(layer.cosines))
            rows.append(row | ({"sign conflict": layer.conflict} if self.based else {}))
        return pandas.DataFrame(rows).set_index("layer")

    def differences_frame(self) -> "pandas.DataFrame":
        """One row per tensor that differs: in what, and what each model has."""
        pandas = require("pandas")

        heads = [*self.names, *(["base"] if self.based else [])]
        rows = [
            {"tensor": d.name, "differs in": d.kind, **dict(zip(heads, d.found, strict=True))} for d in self.differences
        ]
        return pandas.DataFrame(rows, columns=["tensor", "differs in", *heads]).set_index("tensor")

    def __repr__(self) -> str:
        what = "task vectors" if self.based else "weights"
        lines = [f"Inspection({', '.join(self.names)}: {len(self.layers)} layers, {self.total.size:,} values, {what})"]
        lines += [f"  {sentence}" for sentence in self.advice]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.differences_frame() if self.differences else self.to_frame()
        said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.advice)
        return f"<ul>{said}</ul>{table.to_html(float_format='{:.3f}'.format, max_rows=40)}"


@own_context
def inspect(
    models: Sequence[ModelOrWeights | str | Path],
    *,
    base: ModelOrWeights | str | Path | None = None,
    names: Sequence[str] | None = None,
    model: nn.Module | None = None,
    data: Any = None,
    alphas: int = 11,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Inspection:
    """Compare models before they are merged: do they fit, are they relatives, do they agree, and what to do then.

    Checkpoints on disk are read one tensor at a time. Statistics of normalisations, integers and aliases of tied
    tensors take no part in norms and cosines; of weights under a weight or spectral normalisation those in use do (of
    checkpoints on disk, those that are stored). Nothing given is changed.

    Args:
        models: modules, state dicts, opened checkpoints, or paths of checkpoints.
        base: what they were fine-tuned from; then task vectors are compared, else the weights themselves.
        names: what the models are called (default: names of files, or `models[i]`).
        model, data: an architecture and labelled data: barriers between all pairs are measured on the lines between
            them, at `alphas` points, on `device`.
        progress: show a bar when it takes longer than two seconds.

    Raises:
        InputError: no models, names that do not fit, or data without a `model`.
        DataError: a checkpoint that cannot be read.
    """
    if isinstance(models, (nn.Module, Mapping, str, Path)) or not models:
        raise InputError("models: expected a sequence of at least one module, state dict or path")
    states = [_opened(given) for given in models]
    called = _names(models, states, names)
    reference = None if base is None else _opened(base)
    given, states = states, on_base(states, reference)[: len(states)]
    if data is not None and model is None:
        raise InputError("barriers on data need the architecture as well: pass model=")
    everyone = [*states, *([] if reference is None else [reference])]
    heads = (*called, "base")
    everyone[1:] = [fitting(states[0], other, (called[0], heads[i]))[0] for i, other in enumerate(everyone) if i]
    states, reference = everyone[: len(states)], None if reference is None else everyone[-1]
    different = differences(everyone)
    skipped = {d.name for d in different if d.kind in ("missing", "shape", "buffer")}
    unusable = {heads[i]: why for i, state in enumerate(everyone) if (why := unmergeable(outline(state)))}
    derived = derived_names(outline(states[0]))
    if derived and not skipped and not any(isinstance(state, Checkpoint) for state in everyone):
        everyone = [gauged(dict(state)) for state in everyone]  # compare the weights in use
        survey = Survey(everyone[: len(states)], None if reference is None else everyone[-1])
    else:
        survey = Survey(states, reference)
    compared = [] if unusable else [name for name in _compared(states[0], model, skipped) if name not in derived]
    for name in tqdm(compared, desc="inspect", unit=" tensors", disable=not progress):
        survey.add(name)
    faults = {heads[i]: text for i, text in survey.faults.items()}
    barriers, unit, flat = None, "nats", FLAT
    if data is not None and model is not None and not (skipped or faults or unusable):
        weights = [as_weights(state) for state in states]
        barriers, unit, flat = _barriers(model, weights, data, alphas, device, progress)
    layers = tuple(survey.layer(name, sums) for name, sums in survey.layers.items())
    total, matrices = survey.layer("all", survey.total), survey.layer("matrices", survey.matrices)
    folders = [state.path for state in everyone if isinstance(state, Checkpoint)]
    words = differing(folders, heads[: len(folders)]) if len(folders) == len(everyone) > 1 else []
    ranks = {who: model.config.get("r") for who, model in zip(called, given, strict=True) if isinstance(model, Adapter)}
    words += [] if unusable else _further(ranks, layers, matrices, called, reference is not None)
    said = (*words, *advice(called, different, faults, unusable, matrices, reference is not None))
    said = (*said, *_cost(everyone)) if len(called) > 1 and not unusable else said
    if barriers is not None and len(called) > 1:
        said = (*said, _basin(called, barriers, unit, flat))
    return Inspection(called, reference is not None, different, faults, layers, total, matrices, barriers, said, unit)


def mean_cosine(cosines: np.ndarray) -> float:
    """The mean over pairs of models; NaN where there is none."""
    values = cosines[np.triu_indices(len(cosines), 1)]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _opened(model: ModelOrWeights | str | Path) -> Mapping[str, Tensor]:
    if isinstance(model, str | Path):
        return open_checkpoint(model)
    return model if isinstance(model, Checkpoint) else as_weights(model)


def _names(models: Sequence[Any], states: Sequence[Any], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is not None:
        if len(names) != len(models) or len(set(names)) != len(names):
            raise InputError(f"names={list(names)}; expected a different one for each of {len(models)} models")
        return tuple(names)
    found = [state.path.name if isinstance(state, Checkpoint) else "" for state in states]
    return tuple(name if name and found.count(name) == 1 else f"models[{i}]" for i, name in enumerate(found))


def _compared(state: Mapping[str, Tensor], model: nn.Module | None, skipped: set[str]) -> list[str]:
    """The names of weights: floating point, stored once, no statistics and no buffers."""
    ties = state.ties if isinstance(state, Checkpoint) else tied_names(state)
    buffers = set() if model is None else {name for name, _ in model.named_buffers()}
    return [
        name
        for name, tensor in outline(state).items()
        if inexact(tensor)
        and tensor.numel()
        and not (name in skipped or name in ties or name in buffers or name.rpartition(".")[2] in STATISTICS)
    ]


def _barriers(
    model: nn.Module, states: Sequence[Any], data: Any, alphas: int, device: torch.device | str | None, progress: bool
) -> tuple[np.ndarray, str, float]:
    """The barriers, the unit of the loss, and the height below which a barrier is small."""
    from lmc.landscape.path import loss_path

    count = len(states)
    found, unit, ends = np.zeros((count, count)), "nats", 1.0
    pairs = [(i, j) for i in range(count) for j in range(i)]
    for i, j in tqdm(pairs, desc="barriers", unit=" pairs", disable=not progress):
        path = loss_path(model, states[i], states[j], data, alphas=alphas, device=device, progress=False)
        found[i, j] = found[j, i] = path.barrier
        unit, ends = path.unit, max(path.losses[path.split][[0, -1]])
    return found, unit, FLAT * (1.0 if unit.startswith("nats") else ends)


FAR = 0.5  # a task vector longer than this share of the base is no usual fine-tuning
RELATIVES, STRANGERS = 0.9, 0.5  # cosines of weights: above, one origin; below, separate ones
TWINS = 0.9999
AGREE = 0.3  # mean cosine of task vectors from which they point the same way
LONGER = 3.0  # one task vector this much longer than another decides the merge alone
FLAT = 0.1  # a barrier below this many nats, or this share of another loss, is small beside what fine-tuning gains


def advice(
    names: Sequence[str],
    differences: Sequence[Difference],
    faults: Mapping[str, str],
    unusable: Mapping[str, str],
    matrices: LayerReport,
    based: bool,
) -> tuple[str, ...]:
    """One sentence for each thing that a person should know before merging."""
    if unusable:
        return tuple(f"{who}: {why}." for who, why in unusable.items())
    said = [
        *_fit(differences),
        *(f"{who} is not finite, first in {name}: leave it out." for who, name in faults.items()),
    ]
    if len(names) < 2:
        return (*said, "One model alone: there is nothing to merge.")
    said += _task_vectors(names, matrices) if based else _weights(matrices)
    return tuple(said)


def _fit(differences: Sequence[Difference]) -> list[str]:
    kinds = Counter(d.kind for d in differences)
    said = []
    if wrong := kinds["missing"] + kinds["shape"]:
        example = next(d for d in differences if d.kind in ("missing", "shape"))
        said.append(
            f"Not one architecture: {wrong} tensors are missing or of another shape somewhere, first {example.name} "
            f"({'; '.join(example.found)}). Make them equal first (cut or pad the rows of a resized vocabulary); "
            "what follows is about the tensors that all share."
        )
    if kinds["dtype"]:
        said.append(
            f"{kinds['dtype']} tensors differ in dtype: sums are made in the widest, and the result has the first model's."
        )
    if kinds["tie"]:
        said.append(f"{kinds['tie']} tensors are tied in one model and not in another: untie or tie them first.")
    return said


def _further(
    ranks: Mapping[str, Any], layers: Sequence[LayerReport], matrices: LayerReport, names: Sequence[str], based: bool
) -> list[str]:
    """The kinds of models: adapters, copies of each other, fine-tunes with frozen layers."""
    said = []
    if ranks:
        listed = ", ".join(f"{who} (rank {rank})" for who, rank in ranks.items())
        said.append(
            f"Adapters, taken as the task vectors that they are: {listed}. A merge can become an adapter again, "
            "lmc.merge.extract(models, out, base=base, rank=...); knots and tsv_m were made for low ranks."
        )
    for i, name in enumerate(names):
        for j in range(i):
            pair = matrices.cosines[i, j], matrices.norms[i], matrices.norms[j]
            if not based and pair[0] > 1.0 - 1e-12 and np.isclose(pair[1], pair[2], rtol=1e-12, atol=0.0):
                said.append(f"{names[j]} and {name} have the same weights: leave one out.")
    frozen = [layer.name for layer in layers if based and layer.size and not layer.norms.any()]
    if frozen and len(frozen) < len(layers):
        said.append(
            f"{len(frozen)} of {len(layers)} layers are the base's in all models, first {frozen[0]}: no method changes them."
        )
    for i, name in enumerate(names):
        own = [layer.name for layer in layers if based and layer.size and layer.norms.any() and not layer.norms[i]]
        if own and name not in ranks and len(own) + len(frozen) < len(layers):
            said.append(
                f"{name} has {len(own)} of {len(layers)} layers as the base has them, where others changed them, first {own[0]}: "
                "an average draws those back to the base, a sum of task vectors leaves them to the others."
            )
    return said


SECONDS = (
    1.5,
    12.0,
)  # of one processor core for a GB that is read: averages, and SCE, which takes longest of those in chunks


def _cost(states: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """The bytes that a merge on disk would read and write, and what time and memory it takes."""
    if not all(isinstance(state, Checkpoint) for state in states):
        return []
    read = sum(file.stat().st_size for file in {f for s in states if isinstance(s, Checkpoint) for f in s.files})
    first = states[0]
    size = first.size if isinstance(first, Checkpoint) else 0
    quick, slow = (max(1, round(seconds * read / 1e9)) for seconds in SECONDS)
    largest = max((tensor.numel() for tensor in outline(first).values()), default=0)
    return [
        f"A merge on disk reads {readable(read)} (some methods two or three times) and writes {readable(size)}, on one core in "
        f"about {quick} s (average) to {slow} s (sce), the disk aside, with some 100 MB of memory beside those of torch; methods "
        f"that hold whole tensors take about {readable(4 * 8 * len(states) * largest)}. lmc.merge.plan(...) says what one takes."
    ]


def _task_vectors(names: Sequence[str], matrices: LayerReport) -> list[str]:
    norms, base = matrices.norms, matrices.base_norm
    said = []
    for name, norm in zip(names, norms, strict=True):
        if norm == 0.0:
            said.append(f"{name} equals the base: it adds nothing.")
        elif norm > FAR * base:
            said.append(
                f"{name} is {norm / base:.2g} times the base's norm away from it: was it really fine-tuned from this "
                "base? If not, use align= and no task vectors."
            )
    if not norms.all():
        return said
    strangers = bool((norms > FAR * base).any())
    cosines = matrices.cosines[np.triu_indices(len(names), 1)]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    twins = [(names[i], names[j]) for i, j in pairs if matrices.cosines[i, j] > TWINS]
    said += [f"{a} and {b} are (nearly) the same task vector: drop one." for a, b in twins]
    if (ratio := norms.max() / norms.min()) > LONGER:
        said.append(
            f"The task vector of {names[int(norms.argmax())]} is {ratio:.1f} times as long as that of "
            f"{names[int(norms.argmin())]} and will decide the merge: balance them with weights=."
        )
    if strangers:  # whatever combines task vectors is for models that were fine-tuned from the base
        return said
    mean = float(cosines.mean())
    if mean > AGREE:
        said.append(
            f"Task vectors agree (mean cosine {mean:.2f}), as runs on one task do: average, greedy_soup, model_stock."
        )
    else:
        said.append(
            f"Task vectors share little (mean cosine {mean:.2f}), as different tasks do: task_arithmetic with a scale "
            f"chosen on validation data, from {1 / len(names):.2g} up."
        )
        chance = 1.0 - 2.0 ** (1 - len(names))  # of signs drawn at random
        if matrices.conflict > 0.8 * chance:
            said.append(
                f"Signs conflict in {matrices.conflict:.0%} of the values (chance: {chance:.0%}): try ties, pcb or "
                "consensus, which settle conflicts, beside it."
            )
    return said


def _weights(matrices: LayerReport) -> list[str]:
    if not matrices.size:
        return []
    values = matrices.cosines[np.triu_indices(len(matrices.norms), 1)]
    if np.isnan(values).all():
        return ["All weights are zero."]
    low = float(np.nanmin(values))
    if low > RELATIVES:
        return [
            f"Weights are close (cosine at least {low:.2f}), as of models with one origin: average or greedy_soup; pass "
            "that origin as base= to compare task vectors."
        ]
    if low < STRANGERS:
        return [
            f"Weights are far apart (cosine down to {low:.2f}), as of networks trained from different initialisations: "
            "bring them into one order first, align=lmc.permutation_spec(model, inputs)."
        ]
    return [
        f"Weights are related (cosine down to {low:.2f}) but far apart: pass the common origin as base= if there is one."
    ]


def _basin(names: Sequence[str], barriers: np.ndarray, unit: str, flat: float) -> str:
    i, j = np.unravel_index(int(barriers.argmax()), barriers.shape)
    top = float(barriers[i, j])
    high = f"{top:.2g} {unit}".strip()
    if top < flat:
        return f"The highest barrier between two models is {high}: they share a basin, where averages are safe."
    return (
        f"The line between {names[int(j)]} and {names[int(i)]} has a barrier of {high}: their plain average is "
        "worse than both; align= them, or merge others."
    )
