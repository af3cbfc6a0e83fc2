"""Planes of which only some points are evaluated: how far off the others are, and what is said about it."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import lmc
from lmc.errors import InputError
from lmc.landscape.planes.plane import loss_plane, random_plane, trajectory_plane
from lmc.landscape.planes.plane_result import Plane
from lmc.landscape.planes.survey import _interpolation, _meshes, refine


class Surface:
    """A plane whose values are functions of x and y, and a record of what was asked for."""

    def __init__(self, functions, count=51, limit=10**9):
        line = np.linspace(-1.0, 1.0, count)
        self.truth = {m: f(*np.meshgrid(line, line)) for m, f in functions.items()}
        blank = {m: np.full((count, count), math.nan) for m in functions}
        done = np.zeros((count, count), dtype=bool)
        own = {m: () for m in functions}
        self.plane = Plane(line, line, {"data": blank}, {}, {"data": own}, done, ("x", "y"))
        self.left = limit

    def evaluate(self, mask):
        self.left -= int(mask.sum())
        assert not (mask & self.plane.done).any()  # nothing is evaluated twice
        if self.left < 0:
            return False
        self.plane.done[mask] = True
        for measure, grid in self.plane.values["data"].items():
            grid[mask] = self.truth[measure][mask]
        return True

    def error(self, plane):
        off = np.abs(plane.losses["data"] - self.truth["loss"])
        return float(off.max() / np.ptp(self.truth["loss"]))


SURFACES = {
    "valley": lambda x, y: 0.1 + (x - 0.3) ** 2 + 4 * y**2 + x * y**3,
    "two basins": lambda x, y: (
        2.3 - 2 * np.exp(-8 * ((x - 0.5) ** 2 + y**2)) - 2 * np.exp(-9 * ((x + 0.5) ** 2 + y**2))
    ),
    "orders of magnitude": lambda x, y: np.exp(5 * x + np.sin(3 * y)),
    "negative": lambda x, y: np.cos(2 * x) * np.sin(3 * y),
    "kink": lambda x, y: np.abs(x + 0.4 * y) + 0.2,
    "wall": lambda x, y: 1.0 / (1.0 + np.exp(-30 * (x - 0.2 * y))) + 0.1,
}


@pytest.mark.parametrize("name", SURFACES)
def test_losses_are_within_the_tolerance(name):
    surface = Surface({"loss": SURFACES[name]})
    plane = refine(surface.plane, surface.evaluate, 0.01)
    assert surface.error(plane) <= 0.01
    assert plane.complete and 64 < plane.evaluated.sum() < 0.6 * plane.done.size
    np.testing.assert_array_equal(plane.losses["data"][plane.evaluated], surface.truth["loss"][plane.evaluated])


def test_a_smaller_tolerance_takes_more_points_and_is_nearer():
    surfaces = [Surface({"loss": SURFACES["wall"]}) for _ in range(3)]
    planes = [refine(s.plane, s.evaluate, tolerance) for s, tolerance in zip(surfaces, (0.1, 0.01, 1e-4), strict=True)]
    counts = [int(plane.evaluated.sum()) for plane in planes]
    assert counts[0] < counts[1] < counts[2]
    assert surfaces[2].error(planes[2]) <= 1e-4


def test_points_gather_where_the_landscape_changes():
    surface = Surface({"loss": SURFACES["wall"]})
    plane = refine(surface.plane, surface.evaluate, 0.05)
    wall = np.abs(surface.truth["loss"] - 0.6) < 0.45
    assert plane.evaluated[wall].mean() > 2 * plane.evaluated[~wall].mean()


def test_noise_is_evaluated_everywhere():
    noise = np.random.default_rng(0).random((51, 51))
    surface = Surface({"loss": lambda x, y: noise})
    plane = refine(surface.plane, surface.evaluate, 0.01)
    assert plane.evaluated.all() and surface.error(plane) == 0.0 and "interpolated" not in str(plane)


def test_the_error_that_is_told_is_that_of_points_held_out():
    surface = Surface({"loss": SURFACES["two basins"], "accuracy": lambda x, y: np.round(5 * (x + y)) / 10})
    plane = refine(surface.plane, surface.evaluate, 0.02)
    told = plane.error["data"]["loss"] / np.ptp(surface.truth["loss"])
    assert 0.0 < told <= 0.02 and surface.error(plane) <= 0.02
    assert plane.error["data"]["accuracy"] > 0.01
    assert f"{plane.evaluated.sum()} evaluated" in str(plane) and f"loss {told:.2%}" in str(plane)


def test_gaps_are_evaluated_and_no_wider_than_they_are():
    def holed(x, y):
        return np.where(x**2 + (y - 0.3) ** 2 < 0.05, math.nan, 1.0 + x)

    surface = Surface({"loss": holed})
    plane = refine(surface.plane, surface.evaluate, 0.01)
    np.testing.assert_array_equal(np.isnan(plane.losses["data"]), np.isnan(surface.truth["loss"]))
    assert plane.gaps["loss"] == np.isnan(surface.truth["loss"]).sum()
    assert not (np.isnan(plane.losses["data"]) & ~plane.evaluated).any()


def test_an_interrupt_leaves_evaluated_points_only():
    surface = Surface({"loss": SURFACES["wall"]}, limit=120)
    plane = refine(surface.plane, surface.evaluate, 0.01)
    assert not plane.complete and not plane.interpolated.any()
    assert (np.isnan(plane.losses["data"]) == ~plane.done).all()


def test_interpolation_is_exact_for_polynomials_and_at_nodes():
    nodes, at = np.array([-1.0, -0.7, 0.1, 0.2, 0.8, 1.0, 1.5]), np.linspace(-1.0, 1.5, 23)
    for order in (2, 4, 6):
        values = np.polynomial.Polynomial(np.arange(1.0, order + 1))
        np.testing.assert_allclose(_interpolation(nodes, at, order) @ values(nodes), values(at), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(_interpolation(nodes, nodes, 6), np.eye(7))


def test_meshes_are_nested_and_end_in_the_grid():
    meshes = [{(int(r), int(c)) for r in rows.ravel() for c in columns.ravel()} for rows, columns in _meshes(51, 34)]
    assert len(meshes) > 1 and len(meshes[-1]) == 51 * 34
    assert all(coarse < fine for coarse, fine in zip(meshes[:-1], meshes[1:], strict=True))
    assert all({(0, 0), (50, 33)} <= mesh for mesh in meshes)
    assert len(_meshes(9, 9)) == 1


# ---- networks

PAIR = lmc.data.checkpoint("digits-mlp64")
RUN = lmc.data.checkpoint("digits-mlp64-trajectory")
FEW = tuple(part[:60] for part in lmc.data.digits().test)  # losses are as smooth as those of all
KINDS = {
    "three": lambda **o: loss_plane(PAIR.model(), (PAIR[0], PAIR[1], RUN.at(seed=0, epoch=2)), FEW, resolution=33, **o),
    "random": lambda **o: random_plane(PAIR.model(), PAIR[0], FEW, resolution=33, **o),
    "far": lambda **o: random_plane(PAIR.model(), PAIR[0], FEW, resolution=33, radius=4.0, seed=1, **o),
    "trajectory": lambda **o: trajectory_plane(
        PAIR.model(), [RUN.at(seed=0, epoch=epoch) for epoch in (0, 1, 3, 8, 20)], FEW, resolution=33, **o
    ),
}


@cache
def made(kind, tolerance=None):
    return KINDS[kind](tolerance=tolerance, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_landscapes_of_networks_are_within_the_tolerance(kind):
    quick, exact = made(kind, 0.01), made(kind)
    loss = exact.losses["data"]
    assert np.abs(quick.losses["data"] - loss).max() <= 0.01 * np.ptp(loss)
    assert quick.evaluated.sum() < 0.6 * loss.size and exact.evaluated.all()
    np.testing.assert_allclose(quick.losses["data"][quick.evaluated], loss[quick.evaluated], rtol=1e-6)


def test_an_interpolated_plane_is_finished_by_resuming(tmp_path):
    quick = made("random", 0.01)
    quick.save(tmp_path / "plane.json")
    again = Plane.load(tmp_path / "plane.json")
    np.testing.assert_array_equal(again.evaluated, quick.evaluated)
    assert str(again) == str(quick) and again.error == quick.error
    finished, exact = KINDS["random"](resume=again, progress=False), made("random")
    assert finished.evaluated.all()
    np.testing.assert_allclose(finished.losses["data"], exact.losses["data"], rtol=1e-6)


def test_interpolated_points_are_marked_where_they_are_drawn():
    plane = made("random", 0.01)
    drawn = np.array(plane.plot().data[0].text)
    np.testing.assert_array_equal(drawn == "", plane.evaluated)
    frame = plane.to_frame()
    assert frame.evaluated.sum() == plane.evaluated.sum()
    assert "evaluated" not in made("three").to_frame()


@pytest.mark.parametrize("tolerance", [0.0, -0.1, 1.0, math.nan])
def test_unusable_tolerances_are_refused(tolerance):
    with pytest.raises(InputError, match="tolerance"):
        random_plane(nn.Linear(4, 2), None, (torch.zeros(3, 4), torch.zeros(3).long()), tolerance=tolerance)
