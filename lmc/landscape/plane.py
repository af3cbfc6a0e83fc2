"""Loss and accuracy on planes in weight space: through three networks, or around one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lmc.batchnorm import Recalibrator
from lmc.errors import InputError
from lmc.landscape.evaluation import Evaluator
from lmc.landscape.grid import Triangle, Values, axis, filter_normalised
from lmc.landscape.plane_result import Plane
from lmc.landscape.points import preparation
from lmc.landscape.scores import Measure
from lmc.landscape.survey import Survey
from lmc.network import pick_device
from lmc.weights import ModelOrWeights, Weights, as_weights, check_compatible, check_finite, mean


def loss_plane(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Any,
    resolution: int = 41,
    *,
    names: Sequence[str] = ("A", "B", "C"),
    margin: float = 0.2,
    resume: Plane | None = None,
    repair: Literal["auto"] | None = "auto",
    statistics_inputs: Any = None,
    loss: Measure | None = None,
    metrics: Mapping[str, Measure] | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Plane:
    """Evaluate the plane through three networks (Garipov et al. 2018, arXiv:1802.10026, section 3.2), in eval mode.

    The first network is the origin, the third lies on the x axis, the second above it; distances are Euclidean, over
    parameters. The lines of the grid nearest to a network are moved onto it, so that all three are evaluated as they
    are. Nothing of the caller's is touched. Points are evaluated from coarse to fine; an interrupt returns what is done
    (the rest NaN, with a warning), and `resume` goes on from there.

    Args:
        model: the architecture.
        models: three weight sets of it; modules or state dicts.
        data: as for `loss_path`.
        resolution: points along each axis, at least 5.
        names: what the three are called in print and in plots.
        margin: how far the grid reaches beyond the models, as a share of their extent along the axis.
        resume: an unfinished plane of the same arguments, whose points are taken over.
        repair, statistics_inputs, loss, metrics, batch_size, device: as for `loss_path`.
        progress: show a bar, and tell the cost of a long plane before it starts.

    Raises:
        InputError: models on one line, or an unusable argument.
        MismatchError: models of different architectures, dtypes or devices.
        WeightsError: weights that are not finite. DataError: unusable data.
    """
    if len(models) != 3 or isinstance(models, Mapping):
        raise InputError(f"models: expected three networks, got {len(models)}")
    if len(names) != 3 or len(set(names)) != 3:
        raise InputError(f"names={names!r}; expected three different names")
    if not (isinstance(resolution, int) and resolution >= 5):
        raise InputError(f"resolution={resolution!r}; expected a whole number, at least 5")
    if not (math.isfinite(margin) and margin >= 0.0):
        raise InputError(f"margin={margin}; expected a number, at least 0")
    states = _states(dict(zip(names, models, strict=True)))
    chosen = pick_device(device, states[0])
    evaluator = Evaluator(model, data, loss=loss, metrics=metrics, batch_size=batch_size, device=chosen)
    states, prepare = _begin(evaluator, states, names, repair, statistics_inputs)
    triangle = Triangle.of(states, names, _parameters(evaluator))
    x, y = (_through([place[i] for place in triangle.places], margin, resolution) for i in (0, 1))
    survey = Survey(evaluator, prepare, lambda x, y: mean(states, triangle.shares(x, y)), x, y, progress)
    axes = (f"distance from {names[0]} towards {names[2]}", f"off this line, towards {names[1]}")
    return survey.plane(states, dict(zip(names, triangle.places, strict=True)), axes, resume)


def random_plane(
    model: nn.Module,
    weights: ModelOrWeights | None,
    data: Any,
    resolution: int = 41,
    *,
    radius: float = 1.0,
    seed: int = 0,
    name: str = "A",
    resume: Plane | None = None,
    repair: Literal["auto"] | None = "auto",
    statistics_inputs: Any = None,
    loss: Measure | None = None,
    metrics: Mapping[str, Measure] | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Plane:
    """Evaluate `weights + x d + y e` for two filter-normalised random directions (Li et al. 2018, arXiv:1712.09913).

    Each filter of d and e (the weights that feed one unit) is Gaussian and as long as that of the network; biases and
    the parameters of normalisations stay. So networks of different scale can be compared.

    Args:
        model: the architecture.
        weights: the network in the middle; a module or state dict (None: the module's own).
        resolution: points along each axis, odd, at least 5.
        radius: x and y run from -radius to radius, in lengths of the filters.
        seed: of both directions.
        name: what the network is called.
        data, resume, repair, statistics_inputs, loss, metrics, batch_size, device, progress: as for `loss_plane`.

    Raises:
        As `loss_plane`, but for models on one line.
    """
    if not (isinstance(resolution, int) and resolution >= 5 and resolution % 2):
        raise InputError(f"resolution={resolution!r}; expected an odd number, at least 5, so that the network is on it")
    if not (math.isfinite(radius) and radius > 0.0):
        raise InputError(f"radius={radius}; expected a positive number")
    states = _states({name: model if weights is None else weights})
    chosen = pick_device(device, states[0])
    evaluator = Evaluator(model, data, loss=loss, metrics=metrics, batch_size=batch_size, device=chosen)
    states, prepare = _begin(evaluator, states, [name], repair, statistics_inputs)
    centre = states[0]
    generator = torch.Generator().manual_seed(seed)
    d, e = (filter_normalised(centre, _parameters(evaluator), generator) for _ in range(2))

    def state_at(x: float, y: float) -> Weights:
        moved = {key: (centre[key] + x * d[key] + y * e[key]).to(centre[key].dtype) for key in d}
        return {**centre, **moved}

    x = axis(-radius, radius, resolution, [0.0])
    survey = Survey(evaluator, prepare, state_at, x, x.copy(), progress)
    axes = ("first random direction (filter norms)", "second random direction (filter norms)")
    return survey.plane(states, {name: (0.0, 0.0)}, axes, resume)


def _states(models: Mapping[str, ModelOrWeights]) -> list[Weights]:
    """The weights of each model, compatible and finite."""
    states = {name: as_weights(model) for name, model in models.items()}
    first = next(iter(states))
    for name, state in states.items():
        check_compatible(states[first], state, (first, name))
        check_finite(state, name)
    return list(states.values())


def _begin(
    evaluator: Evaluator, states: Sequence[Weights], names: Sequence[str], repair: str | None, statistics_inputs: Any
) -> tuple[list[Weights], Recalibrator | None]:
    """The weights where they are evaluated, and what is done to those of every point."""
    for name, state in zip(names, states, strict=True):
        evaluator.network.check(state, name)
    prepare = preparation(evaluator, repair, statistics_inputs)
    return [{key: tensor.to(evaluator.device) for key, tensor in state.items()} for state in states], prepare


def _parameters(evaluator: Evaluator) -> list[str]:
    """What distances are measured over: each parameter once, no buffers."""
    return [name for name, _ in evaluator.network.module.named_parameters()]


def _through(places: Sequence[float], margin: float, count: int) -> Values:
    low, high = min(places), max(places)
    reach = margin * (high - low)
    return axis(low - reach, high + reach, count, places)
