"""Further points of paths and planes: equal to direct evaluations, and refused where they would be wrong."""

import copy
import pickle

import pytest
import torch

from lmc.errors import WeightsError
from lmc.landscape.curves.curve import bezier_curve
from lmc.landscape.evaluation.evaluator import evaluate
from lmc.landscape.path import loss_path
from lmc.landscape.planes.plane import loss_plane
from lmc.models import mlp
from lmc.weights import lerp, mean

GENERATOR = torch.Generator().manual_seed(0)
MODEL = mlp(16, [8], 3)
DATA = torch.randn(90, 16, generator=GENERATOR), torch.randint(3, (90,), generator=GENERATOR)


def weights():
    return {k: torch.randn(v.shape, generator=GENERATOR) for k, v in MODEL.state_dict().items()}


def test_a_path_scores_what_lies_between_its_points():
    a, b = weights(), weights()
    path = loss_path(MODEL, a, b, DATA, alphas=5)
    direct = evaluate(MODEL, lerp(a, b, 0.3), DATA)["data"]
    assert path.exact(0.3)["data"].loss == pytest.approx(direct.loss, rel=1e-5)
    assert path.exact(0.3)["data"].accuracy == direct.accuracy
    for alpha, loss in zip(path.alphas, path.losses["data"], strict=True):
        assert path.exact(float(alpha))["data"].loss == pytest.approx(loss, rel=1e-5)
    assert path.exact.predictions(0.3).confusion[0].trace() == round(90 * direct.accuracy)


def test_a_plane_scores_what_lies_between_its_points():
    states = [weights() for _ in range(3)]
    plane = loss_plane(MODEL, states, DATA, resolution=5, progress=False)
    (x, y), (u, v) = plane.places["B"], plane.places["C"]
    direct = evaluate(MODEL, mean(states, (0.5, 0.2, 0.3)), DATA)["data"]
    found = plane.exact(0.2 * x + 0.3 * u, 0.2 * y + 0.3 * v)["data"]
    assert found.loss == pytest.approx(direct.loss, rel=1e-4)
    assert plane.exact(x, y)["data"].loss == pytest.approx(plane.own["data"]["loss"][1], rel=1e-4)


def test_the_plane_of_a_curve_keeps_it():
    a, b = weights(), weights()
    curve = bezier_curve(MODEL, a, b, DATA, epochs=1, progress=False)
    plane = curve.plane(DATA, resolution=5, progress=False)
    x, y = plane.tracks["curve"][50]
    direct = evaluate(MODEL, curve.at(0.5), DATA)["data"]
    assert plane.exact(float(x), float(y))["data"].loss == pytest.approx(direct.loss, rel=1e-4)


def test_statistics_are_estimated_anew_at_further_points_too():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    a, b = (
        {
            k: torch.rand(v.shape, generator=GENERATOR) if v.is_floating_point() else v
            for k, v in model.state_dict().items()
        }
        for _ in range(2)
    )
    path = loss_path(model, a, b, DATA, alphas=5)
    assert path.exact(0.25)["data"].loss == pytest.approx(path.losses["data"][1], rel=1e-5)


def test_weights_that_were_changed_since_are_refused():
    a, b = weights(), weights()
    path = loss_path(MODEL, a, b, DATA, alphas=3)
    path.exact(0.3)
    next(iter(b.values())).mul_(2.0)
    with pytest.raises(WeightsError, match="changed since"):
        path.exact(0.3)


def test_it_stays_behind_in_copies():
    path = loss_path(MODEL, weights(), weights(), DATA, alphas=3)
    assert pickle.loads(pickle.dumps(path)).exact is None and copy.deepcopy(path).exact is None
