"""Planes and mixtures whose points are scored by workers: the same bits as one after the other here."""

import multiprocessing
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import classifier, splits
from torch import nn

import lmc
from lmc.landscape.evaluation.measured import Measured

QUIET = {"progress": False}
DATA = splits(200, 90)
SMALL = classifier(0)  # many of its weight sets go through it together
NORM = classifier(0, norm=True)


class Wide(nn.Sequential):
    """One weight set at a time goes through it, and products of the first layer are mixed."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


WIDE = Wide()
IMAGES = torch.rand(400, 64, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 10
CASES = {"small": (SMALL, DATA), "batch normalisation": (NORM, DATA), "wide": (WIDE, IMAGES)}


def models(model: nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [
        {n: t + 0.3 * torch.randn(t.shape, generator=rng) if t.is_floating_point() else t for n, t in state.items()}
        for state in [{n: t.abs() if "var" in n else t for n, t in model.state_dict().items()}] * count
    ]


def same(one: Measured, two: Measured) -> bool:
    pairs = [(one.values[s][m], two.values[s][m]) for s in one.values for m in one.values[s]]
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs) and bool(pairs)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("case", CASES)
def test_planes_and_mixtures_have_the_same_bits(case, threads):
    model, data = CASES[case]
    nets = models(model, 4)
    assert same(
        lmc.loss_plane(model, nets[:3], data, resolution=15, **QUIET),
        lmc.loss_plane(model, nets[:3], data, resolution=15, executor=threads, **QUIET),
    )
    assert same(
        lmc.loss_triangle(model, nets[:3], data, resolution=7, **QUIET),
        lmc.loss_triangle(model, nets[:3], data, resolution=7, executor=threads, **QUIET),
    )


def test_other_planes_and_simplices_take_an_executor(threads):
    nets = models(SMALL, 4)
    calls = [
        lambda **how: lmc.random_plane(SMALL, nets[0], DATA, resolution=7, **how, **QUIET),
        lambda **how: lmc.trajectory_plane(SMALL, nets, DATA, resolution=7, **how, **QUIET),
        lambda **how: lmc.loss_simplex(SMALL, nets, DATA, resolution=3, **how, **QUIET),
        lambda **how: lmc.loss_plane(SMALL, nets[:3], DATA, resolution=25, tolerance=0.05, **how, **QUIET),
    ]
    for call in calls:
        assert same(call(), call(executor=threads))


def test_processes_give_the_same_bits():
    nets = models(WIDE, 3)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = lmc.loss_plane(WIDE, nets, IMAGES, resolution=9, executor=pool, **QUIET)
    assert same(found, lmc.loss_plane(WIDE, nets, IMAGES, resolution=9, **QUIET))
    point = found.exact(float(found.x[2]), float(found.y[3]))["data"].loss
    assert point == pytest.approx(found.losses["data"][3, 2], abs=1e-6), "what is evaluated later is evaluated here"


class Dying(Executor):
    """Its workers die with the third task."""

    def __init__(self) -> None:
        self.count = 0

    def submit(self, fn, /, *args, **kwargs):
        from concurrent.futures.process import BrokenProcessPool

        self.count += 1
        future = Future()
        if self.count < 3:
            future.set_result(fn(*args, **kwargs))
        else:
            future.set_exception(BrokenProcessPool("a process was terminated"))
        return future


def test_workers_that_die_leave_what_is_done():
    nets = models(WIDE, 3)
    with pytest.warns(UserWarning, match="took the whole executor with it .*points were evaluated, the others are NaN"):
        part = lmc.loss_triangle(WIDE, nets, IMAGES, resolution=30, executor=Dying(), **QUIET)
    assert 0 < part.done.sum() < part.done.size
    rest = lmc.loss_triangle(WIDE, nets, IMAGES, resolution=30, resume=part, **QUIET)
    assert same(rest, lmc.loss_triangle(WIDE, nets, IMAGES, resolution=30, **QUIET))
    with pytest.warns(UserWarning, match="took the whole executor with it"):
        plane = lmc.loss_plane(WIDE, nets, IMAGES, resolution=25, executor=Dying(), **QUIET)
    assert 0 < plane.done.sum() < plane.done.size
