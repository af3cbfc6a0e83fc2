"""Weights projected onto planes: what lies in a plane is found where it was made, what is off it at its distance."""

import numpy as np
import pytest
import torch
from torch import nn

from lmc.errors import InputError, MismatchError
from lmc.landscape.planes.plane import loss_plane, random_plane, trajectory_plane
from lmc.landscape.planes.plane_result import Plane
from lmc.models import mlp
from lmc.weights import distance, mean

RANDOM = torch.Generator().manual_seed(0)
MODEL = mlp(16, [8], 3)
DATA = torch.randn(30, 16, generator=RANDOM), torch.randint(3, (30,), generator=RANDOM)
STATES = [{k: torch.randn(v.shape, generator=RANDOM) for k, v in MODEL.state_dict().items()} for _ in range(5)]


@pytest.fixture(scope="module")
def plane():
    return loss_plane(MODEL, STATES[:3], DATA, resolution=5, progress=False)


def test_models_and_their_mixtures_are_found_at_their_places(plane):
    places = np.array(list(plane.places.values()))
    for state, (x, y) in zip(STATES, places, strict=False):
        assert plane.project(state) == pytest.approx((x, y, 0.0), abs=1e-4)
    shares = (0.2, -0.4, 1.2)
    x, y, off = plane.project(mean(STATES[:3], shares))
    assert (x, y) == pytest.approx(tuple(shares @ places), abs=1e-4) and off == pytest.approx(0.0, abs=1e-4)


def test_distances_are_those_of_weights(plane):
    x, y, off = plane.project(STATES[3])
    origin = distance(STATES[3], STATES[0])
    assert x**2 + y**2 + off**2 == pytest.approx(origin**2, rel=1e-6) and off > 1.0
    for state, place in zip(STATES, plane.places.values(), strict=False):
        assert np.hypot(*(np.array(place) - (x, y))) ** 2 + off**2 == pytest.approx(
            distance(STATES[3], state) ** 2, rel=1e-6
        )


def test_buffers_have_no_part_in_distances():
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    states = [
        {
            k: torch.rand(v.shape, generator=RANDOM) if v.is_floating_point() else v
            for k, v in model.state_dict().items()
        }
        for _ in range(3)
    ]
    plane = loss_plane(model, states, DATA, resolution=5, progress=False)
    moved = {**states[1], "1.running_mean": states[1]["1.running_mean"] + 100.0}
    assert plane.project(moved) == pytest.approx((*plane.places["B"], 0.0), abs=1e-4)


def test_weight_normalised_models_are_found_at_their_places():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 4)), nn.ReLU(), nn.Linear(4, 3))
    states = [{k: torch.rand(v.shape, generator=RANDOM) for k, v in model.state_dict().items()} for _ in range(3)]
    plane = loss_plane(model, states, DATA, resolution=5, progress=False)
    for state, place in zip(states, plane.places.values(), strict=True):
        assert plane.project(state) == pytest.approx((*place, 0.0), abs=1e-4)
    assert not plane.recalibrated and "batch statistics" not in str(plane)


def test_coordinates_of_a_random_plane_are_in_lengths_of_filters():
    plane = random_plane(MODEL, STATES[0], DATA, resolution=5, progress=False)
    there = plane.frame.span(*plane.frame.inside(0.3, -0.7))
    assert plane.project(there) == pytest.approx((0.3, -0.7, 0.0), abs=1e-4)


def test_a_trajectory_is_found_on_its_own_track():
    plane = trajectory_plane(MODEL, STATES, DATA, resolution=5, progress=False)
    again = plane.with_tracks({"run": {10 * i: state for i, state in enumerate(STATES)}})
    np.testing.assert_allclose(again.tracks["run"], plane.tracks["trajectory"], atol=1e-3)
    assert again.labels["run"] == ("0", "10", "20", "30", "40") and "trajectory" in again.tracks
    assert again.distances["run"].shape == (5,) and again.distances["run"][-1] == pytest.approx(0.0, abs=1e-4)
    assert "run" not in plane.tracks


def test_what_cannot_be_projected_is_refused(plane, tmp_path):
    with pytest.raises(MismatchError, match="0.weight|fc"):
        plane.project(mlp(16, [9], 3))
    kept = plane.with_tracks({"run": STATES[:2]})
    kept.save(tmp_path / "plane.json")
    read = Plane.load(tmp_path / "plane.json")
    np.testing.assert_array_equal(read.tracks["run"], kept.tracks["run"])
    assert read.labels == {"run": ("0", "1")}
    with pytest.raises(InputError, match="read from a file"):
        read.project(STATES[0])
