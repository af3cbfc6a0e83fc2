"""Loss and accuracy of mixtures: a triangle between three networks, a simplex between more."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from lmc.core.context import own_context
from lmc.core.workers import spread
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.measured import Live, take_over
from lmc.landscape.evaluation.scores import Score
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, Weights

if TYPE_CHECKING:
    pass


from lmc.landscape.simplices.simplex_result import Mixture, Simplex, Triangle, coarse_to_fine, lattice, lattice_size

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
    executor: Any = None,
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
        executor: a `concurrent.futures.Executor` or a dask `Client` whose workers take the points; models and data are sent
            once to each (default: here).
        progress: show a bar, and the cost of a long survey before it starts.

    Raises:
        InputError: an unusable argument.
        MismatchError: models of different architectures, dtypes or devices.
        WeightsError: weights that are not finite.
        DataError: unusable data.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> moved = lmc.weight_matching(spec, a, b).apply(b)
        >>> lmc.loss_triangle(model, [a, b, moved], data.test, names=["A", "B", "B moved"], resolution=4)
        Triangle of 15 mixtures of A, B, B moved
          data: loss 0.157 at A, 0.137 at B, 0.137 at B moved; 1.295 at the uniform soup
          lowest data loss: ...
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
    return Triangle(**vars(_survey(evaluation, names, resolution, resume, executor)))


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
    executor: Any = None,
    progress: bool = True,
) -> Simplex:
    """Evaluate the soups `sum_i s_i theta_i` of any number of networks on a lattice of shares.

    As `loss_triangle`, for two networks or more. The points grow fast with the networks: without a `resolution` it is
    the largest even number (so that the middle of every pair is a point) that makes no more than 500.

    Args:
        model: the architecture.
        models: at least two weight sets of it.
        names: default "A", "B", ...
        data, resolution, resume, repair, inputs, loss, metrics, outputs, batch_size, device, executor, progress: as for
            `loss_triangle`.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> lmc.loss_simplex(model, [a, b], data.test, resolution=4)
        Simplex of 5 mixtures of A, B
          data: loss 0.157 at A, 0.137 at B; 1.678 at the uniform soup
          lowest data loss: 1 B: data loss 0.137, accuracy 95.7 %
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
    return _survey(evaluation, names, resolution, resume, executor)


def _survey(
    evaluation: Evaluation, names: Sequence[str], resolution: int | None, resume: Simplex | None, executor: Any
) -> Simplex:
    """Evaluate the mixtures on a lattice, from coarse to fine."""
    simplex = _blank(evaluation, names, lattice(len(names), _resolution(len(names), resolution)))
    if resume is not None:
        points = np.array_equal(simplex.counts, resume.counts)
        take_over(simplex, resume, resume.done, points, "mixtures")
    order = [i for i in coarse_to_fine(simplex.counts) if not simplex.done[i]]
    shares: list[list[float]] = simplex.shares.tolist()
    if executor is None:
        evaluation.tell(
            "mixtures", len(order), lambda: evaluation.seconds_for(lambda: evaluation.mixed(shares[order[0]]))
        )
        scored = evaluation.run((evaluation.mixed(shares[i]) for i in order), order, "mixtures")
    else:
        shared = {"again": evaluation.again, "shares": shares}
        parts = spread(executor, _elsewhere, shared, evaluation.evaluator.chunks(order))
        scored = evaluation.collect((found for _, part in parts for found in part), len(order), "mixtures")
    for i, score in scored.items():
        simplex.done[i] = True
        for split, measures in simplex.values.items():
            for measure, values in measures.items():
                values[i] = score[split].values[measure]
    return simplex


def _elsewhere(
    again: Callable[[], Evaluation], shares: Sequence[Sequence[float]]
) -> Callable[[Sequence[int]], list[tuple[int, dict[str, Score]]]]:
    """A worker's task for some mixtures."""
    evaluation = again()
    next(evaluation.evaluator([evaluation.states[0]]))
    return lambda order: list(zip(order, evaluation.evaluator(evaluation.mixed(shares[i]) for i in order), strict=True))


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
