"""Loss and accuracy on planes in weight space: through three networks, around one, along a trajectory."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from lmc.core.context import own_context
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.measured import Values
from lmc.landscape.planes.plane_result import Plane
from lmc.landscape.planes.span import Frame, PlaneSpan, Principal, ThroughThree, axis, filter_normalised
from lmc.landscape.planes.survey import Layout, survey
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights

Resolution = int | tuple[int, int]


@own_context
def loss_plane(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Any,
    *,
    resolution: Resolution = 41,
    names: Sequence[str] = ("A", "B", "C"),
    margin: float = 0.2,
    tolerance: float | None = None,
    resume: Plane | None = None,
    repair: Literal["auto"] | None = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    metrics: Mapping[str, Loss] | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Plane:
    """Evaluate the plane through three networks (Garipov et al. 2018, arXiv:1802.10026, section 3.2), in eval mode.

    The first network is the origin, the third lies on the x axis, the second above it; distances are Euclidean, over
    parameters. The lines of the grid nearest to a network are moved onto it, so that all three are evaluated as they
    are. Nothing of the caller's is touched. Points are evaluated from coarse to fine; an interrupt returns what is done
    (the rest NaN, with a warning), and `resume` goes on from there.

    On a CPU, as many threads as torch is set to use take points; what the first layer makes of the data is computed once
    and mixed at every point, which is the same up to rounding.

    Args:
        model: the architecture.
        models: three weight sets of it; modules or state dicts.
        data: as for `loss_path`.
        resolution: points along each axis, or along x and along y; at least 5.
        names: what the three are called in print and in plots.
        margin: how far the grid reaches beyond the models, as a share of their extent along the axis.
        tolerance: None evaluates every point. 0.01 evaluates only as many as it takes to know the losses within 1 % of
            their range, as far as points that are held out show, and interpolates the others: of 51 x 51 points,
            most often a tenth. `plane.evaluated` and `plane.error` hold which points and how large the errors are.
        resume: an unfinished plane of the same arguments, whose points are taken over.
        repair, inputs, loss, metrics, outputs, batch_size, device: as for `loss_path`.
        executor: a `concurrent.futures.Executor` or a dask `Client` whose workers take the points, a part of the plane at a
            time; models and data are sent once to each (default: threads here). The losses are those of one thread here.
        progress: show a bar, and the cost of a long plane before it starts.

    Raises:
        InputError: models on one line, or an unusable argument.
        MismatchError: models of different architectures, dtypes or devices.
        WeightsError: weights that are not finite.
        DataError: unusable data.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> moved = lmc.weight_matching(spec, a, b).apply(b)
        >>> lmc.loss_plane(model, [a, b, moved], data.test, names=["A", "B", "B moved"], resolution=5)
        Plane of 5 x 5 points
          data: loss 0.157 at A, 0.137 at B, 0.137 at B moved, 0.137 to 1.953 over the plane
    """
    if len(models) != 3 or isinstance(models, Mapping):
        raise InputError(f"models: expected three networks, got {len(models)}")
    if len(names) != 3 or len(set(names)) != 3:
        raise InputError(f"names={names!r}; expected three different names")
    counts = _counts(resolution)
    _check_margin(margin)
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
    first, second, third = evaluation.states
    triangle = ThroughThree.of((first, second, third), names, evaluation.parameters)
    x, y = (_through([place[i] for place in triangle.places], margin, counts[i]) for i in (0, 1))
    layout = Layout(
        Frame(PlaneSpan.through(first, third, second), evaluation.parameters, triangle.units),
        x,
        y,
        dict(zip(names, triangle.places, strict=True)),
        (f"distance from {names[0]} towards {names[2]}", f"off this line, towards {names[1]}"),
    )
    return survey(evaluation, layout, tolerance, resume, executor)


@own_context
def random_plane(
    model: nn.Module,
    weights: ModelOrWeights | None,
    data: Any,
    *,
    resolution: Resolution = 41,
    radius: float = 1.0,
    seed: int = 0,
    name: str = "A",
    tolerance: float | None = None,
    resume: Plane | None = None,
    repair: Literal["auto"] | None = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    metrics: Mapping[str, Loss] | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Plane:
    """Evaluate `weights + x d + y e` for two filter-normalised random directions (Li et al. 2018, arXiv:1712.09913).

    Each filter of d and e (the weights that feed one unit) is Gaussian and as long as that of the network; biases and
    the parameters of normalisations stay. So networks of different scale can be compared.

    Args:
        model: the architecture.
        weights: the network in the middle; a module or state dict (None: the module's own).
        resolution: points along each axis, or along x and along y; odd, at least 5.
        radius: x and y run from -radius to radius, in lengths of the filters.
        seed: of both directions.
        name: what the network is called.
        data, and all that follows `name`: as for `loss_plane`.

    Raises:
        InputError: an unusable argument.
        MismatchError: weights that do not fit the architecture.
        WeightsError: weights that are not finite.
        DataError: unusable data.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> lmc.random_plane(model, a, data.test, resolution=5)
        Plane of 5 x 5 points
          data: loss 0.157 at A, 0.157 to 11.587 over the plane
    """
    counts = _counts(resolution)
    if not all(count % 2 for count in counts):
        raise InputError(
            f"resolution={resolution!r}; expected odd numbers, at least 5, so that the network is on a node"
        )
    if not (math.isfinite(radius) and radius > 0.0):
        raise InputError(f"radius={radius}; expected a positive number")
    evaluation = Evaluation(
        model,
        [model if weights is None else weights],
        data,
        names=[name],
        repair=repair,
        inputs=inputs,
        loss=loss,
        metrics=metrics,
        outputs=outputs,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    centre, generator = evaluation.states[0], torch.Generator().manual_seed(seed)
    directions = [filter_normalised(centre, evaluation.parameters, generator) for _ in range(2)]
    x, y = (axis(-radius, radius, count, [0.0]) for count in counts)
    axes = ("first random direction (filter norms)", "second random direction (filter norms)")
    frame = Frame(PlaneSpan(centre, directions), evaluation.parameters)
    return survey(evaluation, Layout(frame, x, y, {name: (0.0, 0.0)}, axes), tolerance, resume, executor)


@own_context
def trajectory_plane(
    model: nn.Module,
    trajectory: Sequence[ModelOrWeights],
    data: Any,
    *,
    resolution: Resolution = 41,
    margin: float = 0.2,
    name: str = "end",
    tolerance: float | None = None,
    resume: Plane | None = None,
    repair: Literal["auto"] | None = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    metrics: Mapping[str, Loss] | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Plane:
    """Evaluate the plane in which a training run moves most (Li et al. 2018, arXiv:1712.09913, section 7.2).

    It goes through the last weights, along the two principal components of the differences to them; x and y are Euclidean
    distances over parameters. `plane.tracks["trajectory"]` is the run, projected onto it, and `plane.explained` the share
    of its squared distances to the end that lies in the plane: where that is small, the losses under the track are not
    those of the run.

    Args:
        model: the architecture.
        trajectory: at least three weight sets, from start to end; modules or state dicts.
        resolution: points along each axis, or along x and along y; at least 5.
        margin: how far the grid reaches beyond the run, as a share of its extent along the axis.
        name: what the last weights are called.
        data, and all that follows `name`: as for `loss_plane`.

    Raises:
        InputError: weights on one line, or an unusable argument.
        MismatchError: weights of different architectures, dtypes or devices.
        WeightsError: weights that are not finite.
        DataError: unusable data.

    Example:
        >>> import lmc
        >>> run, data = lmc.data.checkpoint("digits-mlp64-trajectory"), lmc.data.digits()
        >>> states = [run.at(0, epoch) for epoch in sorted(set(run.epochs))]  # of seed 0
        >>> lmc.trajectory_plane(run.model(), states, data.test, resolution=5)
        Plane of 5 x 5 points
          axes explain 91.5% and 7.1% of the trajectory
          data: loss 0.157 at end, 0.157 to 2.308 over the plane
    """
    if isinstance(trajectory, Mapping) or len(trajectory) < 3:
        raise InputError(f"trajectory: expected at least three weight sets, got {len(trajectory)}")
    counts = _counts(resolution)
    _check_margin(margin)
    names = [*(f"trajectory[{i}]" for i in range(len(trajectory) - 1)), name]
    evaluation = Evaluation(
        model,
        trajectory,
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
    found = Principal.of(evaluation.states, evaluation.parameters)
    x, y = (_through(found.track[:, i], margin, counts[i], [0.0]) for i in (0, 1))
    axes = ("first principal component", "second principal component")
    frame = Frame(PlaneSpan(evaluation.states[-1], found.directions), evaluation.parameters)
    plane = survey(evaluation, Layout(frame, x, y, {name: (0.0, 0.0)}, axes), tolerance, resume, executor)
    return replace(plane, tracks={"trajectory": found.track}, explained=found.explained)


def _counts(resolution: Resolution) -> tuple[int, int]:
    """Points along x and along y."""
    counts = (resolution, resolution) if isinstance(resolution, int) else resolution
    if not (isinstance(counts, tuple) and len(counts) == 2 and all(isinstance(n, int) and n >= 5 for n in counts)):
        raise InputError(f"resolution={resolution!r}; expected a whole number, at least 5, or two of them")
    return counts


def _check_margin(margin: float) -> None:
    if not (math.isfinite(margin) and margin >= 0.0):
        raise InputError(f"margin={margin}; expected a number, at least 0")


def _through(places: Iterable[float], margin: float, count: int, nodes: Iterable[float] | None = None) -> Values:
    """An axis that reaches beyond all places, with nodes on them, or on `nodes`."""
    places = [float(place) for place in places]
    low, high = min(places), max(places)
    reach = margin * (high - low)
    return axis(low - reach, high + reach, count, places if nodes is None else nodes)
