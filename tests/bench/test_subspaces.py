"""Branches of a run, random projections, and the intrinsic dimension."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from support import blobs, same

import lmc
from lmc.training.intrinsic import _sparse, hadamard

DATA = {"train": blobs(96, 0), "test": blobs(60, 1)}
MODEL = lmc.models.mlp(8, [10], 4)
SHAPES = {"w": (7, 9), "b": (9,), "v": (1,)}


def test_children_share_the_trunk_up_to_their_epoch_and_part_afterwards():
    found = lmc.training.branches(MODEL, DATA, at=[0, 3], epochs=4, batch_size=16, progress=False)
    assert list(found.children) == [0, 3] and found.trunk.seeds == (0,)
    early, late = found.pairs()[0], found.pairs()[3]
    assert not same(*early) and not same(*late)
    assert lmc.weights.distance(*late) < lmc.weights.distance(*early)
    assert len(found.children[3].history[0].loss) == 1  # the schedule goes on, it does not begin again


def test_a_trunk_may_start_from_given_weights_and_epochs_count_from_its_beginning():
    init = lmc.training.train(MODEL, DATA, seeds=[7], epochs=1, progress=False)[0]
    found = lmc.training.branches(MODEL, DATA, at=[0, 2], epochs=3, init=init, batch_size=16, progress=False)
    assert same(found.trunk.trajectory[0][0], init)
    assert found.trunk.to_frame().epoch.tolist() == [1, 2, 3]
    assert found.children[2].to_frame().epoch.tolist() == [3, 3]


def test_an_interrupt_keeps_the_branches_that_are_done(monkeypatch):
    made = []

    def train(*args, **options):
        made.append(lmc.training.train(*args, **options))
        return dataclasses.replace(made[-1], interrupted=len(made) == 3)

    monkeypatch.setattr(sys.modules["lmc.training.branches"], "train", train)
    with pytest.warns(UserWarning, match="1 of 2 epochs"):
        found = lmc.training.branches(MODEL, DATA, at=[0, 1], epochs=2, batch_size=16, progress=False)
    assert list(found.children) == [0] and len(made) == 3


def test_a_run_that_goes_on_keeps_the_schedule():
    whole = lmc.training.train(
        MODEL, DATA, seeds=[5], epochs=4, lr=0.1, optimizer="sgd", keep=[3], momentum=0.0, progress=False
    )
    last = lmc.training.train(
        MODEL, DATA, seeds=[5], epochs=4, start=3, init=whole.trajectory[0][3], lr=0.1, optimizer="sgd", momentum=0.0,
        progress=False,
    )  # fmt: skip
    begun = lmc.training.train(
        MODEL,
        DATA,
        seeds=[5],
        epochs=1,
        init=whole.trajectory[0][3],
        lr=0.1,
        optimizer="sgd",
        momentum=0.0,
        progress=False,
    )
    start = whole.trajectory[0][3]
    # one epoch at the end of a cosine moves much less than one that begins it
    assert 0 < lmc.weights.distance(start, last[0]) < 0.5 * lmc.weights.distance(start, begun[0])


@pytest.mark.parametrize(
    "options",
    [{"at": [9]}, {"at": []}, {"at": [0], "seeds": [0, 1]}, {"at": [0], "seeds": [1]}, {"at": [0], "keep": 1}],
)
def test_bad_branches_are_refused(options):
    with pytest.raises(lmc.InputError):
        lmc.training.branches(MODEL, DATA, epochs=4, progress=False, **options)
    with pytest.raises(lmc.InputError, match=r"^at=\[0.5\]: expected at least one, each an integer from 0 to 3"):
        lmc.training.branches(MODEL, DATA, epochs=4, at=[0.5], progress=False)
    with pytest.raises(lmc.InputError, match="start"):
        lmc.training.train(MODEL, DATA, epochs=4, start=4, progress=False)


@pytest.mark.parametrize("kind", ["dense", "sparse", "fastfood"])
def test_projections_are_linear_with_a_true_adjoint(kind):
    p = lmc.training.projection(SHAPES, 5, kind=kind, seed=3, dtype=torch.float64)
    x, y = torch.randn(5, dtype=torch.float64), torch.randn(73, dtype=torch.float64)
    assert torch.allclose(p.forward(x) @ y, x @ p.adjoint(y), atol=1e-12)
    assert torch.allclose(p.forward(3 * x), 3 * p.forward(x), atol=1e-12)
    assert {name: tuple(t.shape) for name, t in p(x).items()} == SHAPES
    assert all(not t.any() for t in p(torch.zeros(5, dtype=torch.float64)).values())
    again = lmc.training.projection(SHAPES, 5, kind=kind, seed=3, dtype=torch.float64)
    assert torch.equal(p.forward(x), again.forward(x))


def test_columns_have_norm_one_over_the_whole_network():
    for kind in ("dense", "sparse"):
        p = lmc.training.projection(SHAPES, 6, kind=kind, dtype=torch.float64)
        columns = torch.stack([p.forward(e) for e in torch.eye(6, dtype=torch.float64)])
        assert torch.allclose(columns.norm(dim=1), torch.ones(6, dtype=torch.float64), atol=1e-12)
    norms = []
    for seed in range(40):
        p = lmc.training.projection({"w": (300,)}, 4, seed=seed, dtype=torch.float64)
        norms += [float(p.forward(e).norm()) for e in torch.eye(4, dtype=torch.float64)]
    assert sum(norms) / len(norms) == pytest.approx(1.0, abs=0.01) and max(norms) < 1.2
    square = lmc.training.projection({"w": (256,)}, 4, dtype=torch.float64)  # nothing cut off: exactly one
    assert float(square.forward(torch.eye(4, dtype=torch.float64)[1]).norm()) == pytest.approx(1.0, abs=1e-12)


def test_sparse_projections_have_the_density_that_they_say():
    for size in (1, 2, 10, 100):
        matrix = _sparse({"w": torch.Size((size,)), "rest": torch.Size((4000,))}, 500, torch.Generator().manual_seed(0))
        found, expected = float((matrix.to_dense()[:size] != 0).double().mean()), size**-0.5
        assert abs(found - expected) <= 5 * math.sqrt(expected * (1 - expected) / (500 * size))


@pytest.mark.parametrize("length", [1, 8, 512])  # of no block, of one, of one and a part of the next
def test_the_hadamard_transform_against_its_matrix(length):
    index = range(length)
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in index] for i in index], dtype=torch.float64)
    x = torch.randn(length, dtype=torch.float64)
    assert torch.allclose(hadamard(x), matrix @ x) and torch.allclose(hadamard(hadamard(x)), length * x)
    assert len(hadamard(torch.ones(1 << 13))) == 1 << 13  # three blocks


def test_a_sparse_projection_is_the_product_with_its_matrix():
    p = lmc.training.projection(SHAPES, 5, kind="sparse", seed=3, dtype=torch.float64)
    sizes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    matrix = _sparse(sizes, 5, torch.Generator().manual_seed(3)).to_dense()
    x, y = torch.randn(5, dtype=torch.float64), torch.randn(73, dtype=torch.float64)
    assert torch.allclose(p.forward(x), matrix @ x) and torch.allclose(p.adjoint(y), matrix.T @ y)


@pytest.mark.parametrize("kind", ["dense", "sparse", "fastfood"])
def test_the_gradient_in_a_subspace_is_the_transpose_of_that_in_all_directions(kind):
    p = lmc.training.projection(SHAPES, 5, kind=kind, seed=3, dtype=torch.float64)
    v = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weights = p.forward(v).detach().requires_grad_()
    for each in (p.forward(v), weights):
        each.sin().square().sum().backward()
    torch.testing.assert_close(v.grad, p.adjoint(weights.grad))
    for function, length in ((p.forward, 5), (p.adjoint, 73)):
        with pytest.raises(lmc.InputError, match=rf"expected shape \({length},\), got \(74,\)"):
            function(torch.zeros(74, dtype=torch.float64))


def test_a_quadratic_with_k_conditions_needs_k_dimensions():
    k, total = 6, 40
    conditions = torch.randn(k, total, dtype=torch.float64)
    for d in (k - 1, k, k + 2):
        p = lmc.training.projection({"w": (total,)}, d, kind="dense", seed=1, dtype=torch.float64)
        seen = torch.stack([conditions @ p.forward(e) for e in torch.eye(d, dtype=torch.float64)], 1)
        goal = torch.ones(k, 1, dtype=torch.float64)
        left = float((seen @ torch.linalg.lstsq(seen, goal).solution - goal).norm())
        assert (left < 1e-9) == (d >= k)


def test_more_dimensions_solve_more():
    found = lmc.training.intrinsic_dimension(
        MODEL, DATA, [1, 40], baseline=1.0, seeds=[0, 1], epochs=20, lr=0.05, batch_size=32, progress=False
    )
    low, high = found.accuracies.mean(1)
    assert low < high and high > 0.9 and found.value == 40 and found.parameters == 134
    assert "d_int90 = 40" in repr(found) and list(found.to_frame()["dimension"]) == [1, 40]


def test_bad_subspaces_are_refused():
    for options in ({"kind": "cubic"}, {"dimension": 0}, {"dimension": 74}):
        with pytest.raises(lmc.InputError):
            lmc.training.projection(SHAPES, **{"dimension": 3, **options})
    with pytest.raises(lmc.InputError, match="too large"):
        lmc.training.projection({"w": (1 << 20,)}, 1 << 10, kind="dense")
    for options in ({"baseline": 90.0}, {"baseline": 0.0}, {"baseline": 0.9, "share": 90}):
        with pytest.raises(lmc.InputError, match="expected a number above 0, at most 1"):
            lmc.training.intrinsic_dimension(MODEL, DATA, [2], progress=False, **options)
    with pytest.raises(lmc.InputError, match="test split"):
        lmc.training.intrinsic_dimension(MODEL, DATA["train"], [2], baseline=1.0, progress=False)
    frozen = lmc.models.mlp(8, [10], 4).requires_grad_(False)
    beyond = {"train": DATA["train"], "test": (DATA["test"][0], DATA["test"][1] + 4)}
    for model, data, options, error, match in (
        (MODEL, DATA, {"epochs": 0}, lmc.InputError, "epochs=0: expected a positive integer"),
        (MODEL, DATA, {"batch_size": 8.0}, lmc.InputError, "batch_size=8.0: expected a positive integer"),
        (MODEL, DATA, {"lr": math.nan}, lmc.InputError, "lr=nan: expected a finite number"),
        (MODEL, DATA, {"seeds": 3}, lmc.InputError, "seeds=3: expected the numbers themselves"),
        (MODEL, DATA, {"seeds": [0, 0]}, lmc.InputError, "the same seed twice"),
        (
            MODEL,
            DATA,
            {"dimensions": [2.5]},
            lmc.InputError,
            r"dimensions=\[2.5\]: expected at least one, each an integer",
        ),
        (MODEL.state_dict(), DATA, {}, lmc.InputError, "model: expected an nn.Module, got OrderedDict"),
        (frozen, DATA, {}, lmc.InputError, "no parameter requires a gradient"),
        (MODEL, beyond, {}, lmc.DataError, "test: targets from 4 to 7"),
    ):
        with pytest.raises(error, match=match):
            lmc.training.intrinsic_dimension(
                model, data, **{"dimensions": [2], "baseline": 1.0, "progress": False, **options}
            )
    for options in ({"shapes": MODEL}, {"dtype": torch.int64}):
        with pytest.raises(lmc.InputError):
            lmc.training.projection(**{"shapes": SHAPES, "dimension": 2, **options})
    assert math.isclose(sum(x.numel() for x in MODEL.parameters()), 134)


def test_the_intrinsic_dimension_of_any_task_with_an_accuracy():
    options = dict(dimensions=[6], baseline=1.0, seeds=[0], epochs=2, progress=False)
    named = {split: {"input": x, "y": y} for split, (x, y) in DATA.items()}
    found = [lmc.training.intrinsic_dimension(MODEL, data, **options).accuracies for data in (DATA, named)]
    assert (found[0] == found[1]).all()
    ignoring = {split: (x, y.where(torch.arange(len(y)) % 2 == 0, 9)) for split, (x, y) in DATA.items()}
    fewer = lmc.training.intrinsic_dimension(MODEL, ignoring, loss=lmc.Task.classes(ignore=9), **options).accuracies
    assert (fewer != found[0]).all() and abs(fewer * 30 - (fewer * 30).round()).max() < 1e-9  # of 30 test targets
    reals = lmc.Task.regression().on({split: (x, x[:, :4]) for split, (x, _) in DATA.items()})
    with pytest.raises(lmc.InputError, match="needs an accuracy"):
        lmc.training.intrinsic_dimension(MODEL, reals, **options)


def test_nothing_is_trained_where_a_dimension_is_larger_than_the_network():
    seen = []
    hooked = lmc.models.mlp(8, [10], 4)
    hooked.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with pytest.raises(lmc.InputError, match="dimension=135; expected a whole number from 1 to the 134 parameters"):
        lmc.training.intrinsic_dimension(hooked, DATA, [2, 135], baseline=1.0, progress=False)
    assert max(seen, default=0) <= 2  # the model was tried on a few examples, no batch went through it


def test_what_does_not_move_stays_where_it_started_and_what_diverges_solves_nothing():
    init = lmc.training.train(MODEL, DATA, seeds=[7], epochs=3, progress=False)[0]
    options = dict(baseline=0.1, seeds=np.arange(1), init=init, epochs=1, batch_size=16, progress=False)
    still = lmc.training.intrinsic_dimension(MODEL, DATA, np.array([3, 5]), lr=0.0, **options)
    expected = lmc.landscape.evaluate(MODEL, init, DATA)["test"].accuracy
    assert still.accuracies == pytest.approx(expected) and still.dimensions == (3, 5)
    with pytest.warns(UserWarning, match="seed 0 diverged in 3 dimensions"):
        lost = lmc.training.intrinsic_dimension(MODEL, DATA, [3], lr=1e25, **options)
    assert np.isnan(lost.accuracies).all() and lost.value is None and "not reached" in repr(lost)
