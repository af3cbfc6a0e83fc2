"""Loss and accuracy of mixtures: a triangle between three networks, a simplex between more."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lmc.core.context import own_context
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.measured import Live
from lmc.landscape.simplex import Mixture, Simplex, Triangle, coarse_to_fine, lattice, lattice_size
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, Weights

MOST_POINTS = 500  # of a lattice whose resolution is not given


@own_context
def loss_triangle(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Any,
    *,
    resolution: int = 40,
    names: Sequence[str] = ("A", "B", "C"),
    resume: Simplex | None = None,
    repair: Literal["auto"] | None = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    metrics: Mapping[str, Loss] | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Triangle:
    """Evaluate the soups `s_1 a + s_2 b + s_3 c` of three networks, s >= 0 with sum 1, in eval mode.

    Shares go in steps of 1 / `resolution`; the networks themselves are the corners and the lines between them the edges.
    Points are evaluated from coarse to fine; an interrupt returns what is done (the rest NaN, with a warning), and
    `resume` goes on from there. Nothing of the caller's is touched.

    Args:
        model: the architecture.
        models: three weight sets of it; modules or state dicts.
        data: as for `loss_path`.
        resolution: steps along each edge, at least 2: (resolution + 1) (resolution + 2) / 2 points.
        names: what the three are called in print and in plots.
        resume: an unfinished triangle of the same arguments, whose points are taken over.
        repair, inputs, loss, metrics, outputs, batch_size, device: as for `loss_path`.
        progress: show a bar, and the cost of a long survey before it starts.

    Raises:
        InputError: an unusable argument.
        MismatchError: models of different architectures, dtypes or devices.
        WeightsError: weights that are not finite.
        DataError: unusable data.
    """
    if isinstance(models, Mapping) or len(models) != 3:
        raise InputError(f"models: expected three networks, got {len(models)}; for more use loss_simplex")
    names = _checked_names(names, models)
    evaluation = Evaluation(
        model,
        models,
        data,
        names=names,
        repair=repair,
        inputs=inputs,
        loss=loss,
        metrics=metrics,
        outputs=outputs,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    return Triangle(**vars(_survey(evaluation, names, resolution, resume)))


@own_context
def loss_simplex(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Any,
    *,
    resolution: int | None = None,
    names: Sequence[str] | None = None,
    resume: Simplex | None = None,
    repair: Literal["auto"] | None = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    metrics: Mapping[str, Loss] | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Simplex:
    """Evaluate the soups `sum_i s_i theta_i` of any number of networks on a lattice of shares.

    As `loss_triangle`, for two networks or more. The points grow fast with the networks: without a `resolution` it is
    the largest even number (so that the middle of every pair is a point) that makes no more than 500.

    Args:
        model: the architecture.
        models: at least two weight sets of it.
        names: default "A", "B", ...
        data, resolution, resume, repair, inputs, loss, metrics, outputs, batch_size, device, progress: as for
            `loss_triangle`.
    """
    if isinstance(models, Mapping) or len(models) < 2:
        raise InputError(f"models: expected at least two networks, got {len(models)}")
    names = _checked_names(names, models)
    evaluation = Evaluation(
        model,
        models,
        data,
        names=names,
        repair=repair,
        inputs=inputs,
        loss=loss,
        metrics=metrics,
        outputs=outputs,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    return _survey(evaluation, names, resolution, resume)


def _survey(evaluation: Evaluation, names: Sequence[str], resolution: int | None, resume: Simplex | None) -> Simplex:
    """Evaluate the mixtures on a lattice, from coarse to fine."""
    simplex = _blank(evaluation, names, lattice(len(names), _resolution(len(names), resolution)))
    if resume is not None:
        _take_over(simplex, resume)
    order = [i for i in coarse_to_fine(simplex.counts) if not simplex.done[i]]
    shares = simplex.shares

    def point(i: int) -> Weights:
        return evaluation.mixed(shares[i].tolist())

    evaluation.tell("mixtures", len(order), lambda: evaluation.seconds_for(lambda: point(order[0])))
    for i, score in evaluation.run((point(i) for i in order), order, "mixtures").items():
        simplex.done[i] = True
        for split, measures in simplex.values.items():
            for measure, values in measures.items():
                values[i] = score[split].values[measure]
    return simplex


def _checked_names(names: Sequence[str] | None, models: Sequence[Any]) -> list[str]:
    found = [_letter(i) for i in range(len(models))] if names is None else list(names)
    if len(found) != len(models) or len(set(found)) != len(found):
        raise InputError(f"names={found!r}; expected {len(models)} different names")
    return found


def _resolution(models: int, given: int | None) -> int:
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool) or given < 2:
            raise InputError(f"resolution={given!r}; expected a whole number, at least 2")
        return given
    found = 2
    while lattice_size(models, found + 2) <= MOST_POINTS:
        found += 2
    return found


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else f"model {i}"


def _blank(evaluation: Evaluation, names: Sequence[str], counts: np.ndarray) -> Simplex:
    """Mixtures of which no point is known, but the models themselves and the uniform soup."""
    own = evaluation.own()
    kept = {
        split: {m: tuple(score[split].values[m] for score in own) for m in own[0][split].values} for split in own[0]
    }
    values = {s: {m: np.full(len(counts), math.nan) for m in measures} for s, measures in kept.items()}
    equal = [1.0 / len(names)] * len(names)
    score = next(evaluation.evaluator([evaluation.mixed(equal)]))
    uniform = Mixture(
        dict(zip(names, equal, strict=True)), {split: dict(found.values) for split, found in score.items()}
    )
    return Simplex(
        tuple(names),
        counts,
        values,
        kept,
        uniform,
        np.zeros(len(counts), dtype=bool),
        evaluation.recalibrated,
        evaluation.evaluator.task.unit,
        tuple(evaluation.evaluator.task.higher),
        Live(evaluation, _mixture),
    )


def _mixture(evaluation: Evaluation, *shares: float) -> Weights:
    """The weights of a mixture, for `Simplex.exact`.

    Raises:
        InputError: not one finite share for each model, or shares that do not sum to 1.
    """
    count = len(evaluation.states)
    if len(shares) != count or not all(map(math.isfinite, shares)) or abs(sum(shares) - 1.0) > 1e-6:
        raise InputError(f"shares={list(shares)}: expected {count} finite numbers that sum to 1")
    return evaluation.mixed(shares)


def _take_over(fresh: Simplex, earlier: Simplex) -> None:
    """Copy the points that earlier mixtures know.

    Raises:
        InputError: they are of other models, data, measures or points.
    """
    same = fresh.values.keys() == earlier.values.keys() and fresh.recalibrated == earlier.recalibrated
    same = same and np.array_equal(fresh.counts, earlier.counts)
    for split, measures in fresh.own.items():
        others = earlier.own.get(split, {})
        same = same and measures.keys() == others.keys()
        same = same and all(np.allclose(measures[m], others[m], rtol=1e-4, equal_nan=True) for m in measures)
    if not same:
        raise InputError("resume: mixtures of other models, data, measures or points; pass it with the same arguments")
    fresh.done[:] = earlier.done
    for split, measures in fresh.values.items():
        for measure, values in measures.items():
            values[:] = earlier.values[split][measure]
