"""The plane in which a training run moves most: its directions, its shares, the run drawn in it."""

import numpy as np
import pytest
import torch
from torch import nn

import lmc
from lmc.errors import InputError, MismatchError
from lmc.landscape.evaluation.evaluator import evaluate
from lmc.landscape.planes.plane import loss_plane, random_plane, trajectory_plane
from lmc.landscape.planes.plane_result import Plane
from lmc.landscape.planes.span import Principal

RUN = lmc.data.checkpoint("digits-mlp64-trajectory")
EPOCHS = (0, 1, 2, 5, 20)
STATES = [RUN.at(seed=0, epoch=epoch) for epoch in EPOCHS]
FEW = tuple(part[:60] for part in lmc.data.digits().test)


def flat(state):
    return torch.cat([state[name].double().flatten() for name in sorted(state)]).numpy()


def moved(state, direction, by):
    return {name: (tensor + by * direction[name]).to(tensor.dtype) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def plane():
    return trajectory_plane(RUN.model(), STATES, FEW, resolution=9, progress=False)


def test_directions_are_the_singular_vectors_of_the_differences():
    found = Principal.of(STATES, STATES[0])
    matrix = np.stack([flat(state) - flat(STATES[-1]) for state in STATES[:-1]])
    _, lengths, rows = np.linalg.svd(matrix, full_matrices=False)
    for k, direction in enumerate(found.directions):
        assert abs(flat(direction) @ rows[k]) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(found.explained, lengths[:2] ** 2 / (lengths**2).sum(), rtol=1e-6)
    u, v = (flat(direction) for direction in found.directions)
    np.testing.assert_allclose(found.track[:-1], np.stack([matrix @ u, matrix @ v], axis=1), atol=1e-4)
    assert found.track[-1].tolist() == [0.0, 0.0] and (found.track[0] >= 0.0).all()


def test_a_run_that_lies_in_a_plane_is_explained_by_it():
    a, b, c = STATES[0], STATES[2], STATES[-1]
    inside = {name: 0.3 * a[name] + 0.3 * b[name] + 0.4 * c[name] for name in a}
    flat_run = trajectory_plane(RUN.model(), [a, inside, b, c], FEW, resolution=9, progress=False)
    assert sum(flat_run.explained) == pytest.approx(1.0, abs=1e-5)
    found = Principal.of([a, inside, b, c], a)
    for state, (x, y) in zip([a, inside, b], found.track, strict=False):
        rebuilt = moved(moved(c, found.directions[0], x), found.directions[1], y)
        np.testing.assert_allclose(flat(rebuilt), flat(state), rtol=1e-4, atol=1e-4)


def test_points_equal_direct_evaluations(plane):
    found = Principal.of(STATES, STATES[0])
    for row, column in ((0, 0), (8, 8), (3, 5)):
        state = moved(STATES[-1], found.directions[0], plane.x[column])
        state = moved(state, found.directions[1], plane.y[row])
        score = evaluate(RUN.model(), state, FEW)["data"]
        assert plane.losses["data"][row, column] == pytest.approx(score.loss, rel=1e-4)


def test_the_end_lies_on_a_node_and_the_run_inside(plane):
    assert plane.places == {"end": (0.0, 0.0)}
    row, column = np.flatnonzero(plane.y == 0.0)[0], np.flatnonzero(plane.x == 0.0)[0]
    direct = evaluate(RUN.model(), STATES[-1], FEW)["data"].loss
    assert plane.losses["data"][row, column] == pytest.approx(direct, rel=1e-6)
    track = plane.tracks["trajectory"]
    assert track.shape == (len(EPOCHS), 2)
    assert (track >= [plane.x[0], plane.y[0]]).all() and (track <= [plane.x[-1], plane.y[-1]]).all()


def test_what_is_explained_is_printed_and_saved(plane, tmp_path):
    assert f"axes explain {plane.explained[0]:.1%} and {plane.explained[1]:.1%}" in str(plane)
    plane.save(tmp_path / "plane.json")
    again = Plane.load(tmp_path / "plane.json")
    assert again.explained == plane.explained and str(again) == str(plane)
    np.testing.assert_array_equal(again.tracks["trajectory"], plane.tracks["trajectory"])


def test_the_run_is_drawn_point_by_point(plane):
    drawn = next(trace for trace in plane.plot().data if trace.name == "trajectory")
    np.testing.assert_array_equal(np.stack([drawn.x, drawn.y], axis=1), plane.tracks["trajectory"])
    assert drawn.mode == "lines+markers"


def test_runs_without_a_plane_are_refused():
    line = [lmc.weights.lerp(STATES[0], STATES[-1], t) for t in (0.0, 0.4, 1.0)]
    with pytest.raises(InputError, match="trajectory: its points are collinear"):
        trajectory_plane(RUN.model(), line, FEW)
    with pytest.raises(InputError, match="collinear"):
        trajectory_plane(RUN.model(), [STATES[0]] * 3, FEW)
    with pytest.raises(InputError, match="at least three weight sets, got 2"):
        trajectory_plane(RUN.model(), STATES[:2], FEW)
    with pytest.raises(MismatchError, match=r"trajectory\[1\]"):
        trajectory_plane(RUN.model(), [STATES[0], nn.Linear(3, 3), STATES[1]], FEW)


# ---- grids and panels that all planes share


def test_grids_may_be_longer_than_high():
    wide = random_plane(RUN.model(), STATES[-1], FEW, resolution=(9, 5), progress=False)
    square = random_plane(RUN.model(), STATES[-1], FEW, resolution=9, progress=False)
    assert wide.losses["data"].shape == (5, 9)
    np.testing.assert_allclose(wide.losses["data"], square.losses["data"][::2], rtol=1e-6)
    three = loss_plane(RUN.model(), STATES[:3], FEW, resolution=(6, 11), progress=False)
    assert three.losses["data"].shape == (11, 6) and three.plot().data[0].z.shape == (11, 6)
    for wrong in ((9, 4), (9, 9, 9), "9", 4):
        with pytest.raises(InputError, match="resolution"):
            loss_plane(RUN.model(), STATES[:3], FEW, resolution=wrong)


def test_panels_show_the_measures_asked_for_and_count_their_gaps():
    def confidence(outputs, targets):
        value = outputs.softmax(1).max(1).values
        return value if value.mean() < 0.9 else value * float("nan")

    plane = random_plane(
        RUN.model(), STATES[-1], FEW, resolution=7, radius=2.0, metrics={"confidence": confidence}, progress=False
    )
    assert plane.gaps["confidence"] > 1
    fig = plane.plot(measures=["confidence", "loss", "accuracy"])
    contours = [trace for trace in fig.data if trace.type == "contour"]
    np.testing.assert_array_equal(np.array(contours[0].z, dtype=float), plane.values["data"]["confidence"])
    titles = [note.text for note in fig.layout.annotations]
    assert f"data confidence, NaN at {plane.gaps['confidence']} points" in titles and "data loss (nats)" in titles
    with pytest.raises(InputError, match="measures="):
        plane.plot(measures=["perplexity"])
