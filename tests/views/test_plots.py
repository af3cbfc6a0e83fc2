"""Figures of paths: what they draw is what the paths hold."""

import re

import numpy as np
import pytest
import torch

from lmc.errors import InputError
from lmc.landscape.path import Path
from lmc.landscape.planes.plane_result import Plane
from lmc.merge.study.inspect import inspect
from lmc.training.intrinsic import IntrinsicDimension
from lmc.views.plots.style import BLUE, ORANGE, colours


def made_path(height: float, accuracy: bool = True) -> Path:
    """A path whose loss is a parabola of that height over the line from 0.2 to 0.4."""
    grid = np.linspace(0, 1, 5)
    loss = 0.2 + 0.2 * grid + 4 * height * grid * (1 - grid)
    measures = {"loss": loss, **({"accuracy": 1 - 0.2 * loss} if accuracy else {})}
    own = {name: (float(values[0]), float(values[-1])) for name, values in measures.items()}
    return Path(grid, {"train": measures, "test": measures}, {"train": own, "test": own})


def shown(figure, **properties):
    return [trace for trace in figure.data if all(trace[name] == value for name, value in properties.items())]


def test_every_split_of_every_path_is_drawn():
    naive, aligned = made_path(2.0), made_path(0.0)
    figure = aligned.plot(naive=naive)
    for name, path in (("naive", naive), ("aligned", aligned)):
        curves = shown(figure, legendgroup=name)
        assert len(curves) == 4  # two splits, loss and accuracy
        np.testing.assert_allclose(curves[1].y, path.losses["test"])
        np.testing.assert_allclose(curves[3].y, 100 * path.accuracies["test"])
    assert {trace.line.color for trace in shown(figure, legendgroup="naive")} == {ORANGE}
    assert {trace.line.color for trace in shown(figure, legendgroup="aligned")} == {BLUE}
    assert "naive: barrier 2.000 nats" in {trace.name for trace in figure.data}
    assert {"train", "test"} <= {trace.name for trace in figure.data}


def test_the_barrier_is_marked_where_it_can_be_seen():
    arrows = [a for a in made_path(2.0).plot().layout.annotations if a.showarrow]
    assert [(a.x, a.ay, a.y) for a in arrows][0] == pytest.approx((0.5, 0.3, 2.3))
    assert not [a for a in made_path(0.001).plot().layout.annotations if a.showarrow]


def test_without_classes_there_is_one_panel():
    figure = made_path(1.0, accuracy=False).plot()
    assert {trace.xaxis for trace in figure.data} == {"x"}


def test_points_left_out_are_bridged():
    path = made_path(1.0)
    path.values["test"]["loss"][1] = np.nan
    curve = shown(path.plot(), legendgroup="path")[1]
    assert len(curve.x) == 4 and np.isfinite(curve.y).all()


def test_figures_are_small():
    figure = made_path(1.0).plot(naive=made_path(2.0))
    assert len(figure.to_json()) < 12_000
    assert len(figure.layout.template.to_plotly_json()) > 0


def test_names_are_told_apart():
    with pytest.raises(InputError, match="two results are called 'x'"):
        made_path(1.0).plot("x", x=made_path(2.0))
    with pytest.raises(InputError, match="naive: expected a Path"):
        made_path(1.0).plot(naive=3)
    for names in (["path", "aligned"], ["naive", "aligned", "repaired", "x", "y", "z"]):
        assert len(set(colours(names).values())) == len(names)


def boxes(figure) -> list[tuple[float, float]]:
    """The places of the numbers beside arrows, left panel first."""
    return [
        (note.x, note.y)
        for note in figure.layout.annotations
        if note.text and ("nats" in note.text or "points" in note.text)
    ]


def test_barrier_labels_stand_on_no_curve_and_on_no_other_label():
    alphas = np.linspace(0.0, 1.0, 25)
    hump = 4.0 * alphas * (1.0 - alphas)

    def bump(height: float) -> Path:
        values = {"data": {"loss": 0.2 + height * hump, "accuracy": 0.95 - 0.3 * height * hump}}
        ends = {"data": {"loss": (0.2, 0.2), "accuracy": (0.95, 0.95)}}
        return Path(alphas, values, ends)

    tall, low = bump(1.5), bump(0.6)
    figure = low.plot(naive=tall)
    places = boxes(figure)
    assert len(places) == 4
    for x, y in places[:2]:
        for path in (tall, low):
            near = np.abs(alphas - x) < 0.1  # half of a label
            curve = path.losses["data"][near]
            assert (np.abs(curve - y) > 0.03).all()
    (x, y), (u, v) = places[:2]
    assert abs(x - u) > 0.2 or abs(y - v) > 0.1


def test_barrier_labels_stand_on_no_arrow():
    alphas = np.linspace(0.0, 1.0, 25)

    def fall(middle: float, width: float) -> Path:
        hump = np.exp(-(((alphas - middle) / width) ** 2))
        values = {"data": {"loss": 0.2 + hump, "accuracy": 0.95 - 0.8 * hump}}
        return Path(alphas, values, {"data": {"loss": (0.2, 0.2), "accuracy": (0.95, 0.95)}})

    for middle, width in ((0.3, 0.1), (0.3, 0.25), (0.35, 0.1)):
        figure = fall(0.5, 0.4).plot(other=fall(middle, width))
        arrows = [each for each in figure.layout.annotations if each.showarrow]
        labels = [each for each in figure.layout.annotations if re.search(r"(nats|points)$", each.text or "")]
        assert len(arrows) == 4 and labels
        for label in labels:
            for arrow in arrows:
                low, high = sorted((arrow.ay, arrow.y))
                half = 0.5 * 7.4 * len(label.text) / 250  # of the label, as a share of the panel
                if arrow.xref == label.xref and low < label.y < high:
                    assert abs(arrow.x - label.x) > half


def test_a_barrier_label_stands_beside_its_arrow_or_not_at_all():
    alphas = np.linspace(0.0, 1.0, 25)

    def dip(depth: float, middle: float, width: float, edge: int) -> Path:
        hump = np.exp(-(((alphas - middle) / width) ** edge))
        values = {"data": {"loss": 0.1 + 3.0 * depth * hump, "accuracy": 0.98 - depth * hump}}
        return Path(alphas, values, {"data": {"loss": (0.1, 0.1), "accuracy": (0.98, 0.98)}})

    shallow = {f"shallow {i}": dip(0.08 + 0.01 * i, 0.45, 0.2, 2) for i in range(3)}
    for width, edge in ((0.3, 4), (0.2, 2)):  # there is no room for all beside their arrows, but far from them
        figure = dip(0.88, 0.5, width, edge).plot("deep", **shallow)
        labels = [each for each in figure.layout.annotations if each.text]
        arrows = {(each.xref, each.arrowcolor): each for each in figure.layout.annotations if each.showarrow}
        assert 2 <= len(labels) < len(arrows) == 8
        for label in labels:
            arrow = arrows[label.xref, label.font.color]
            low, high = sorted((arrow.ay, arrow.y))
            height = 88.0 if label.xref == "x2" else 2.74  # of the panel
            assert max(low - label.y, label.y - high) < 0.2 * height


def test_tracks_stand_out_and_name_their_points():
    grid = np.linspace(1.0, 2.0, 9).reshape(3, 3)
    plane = Plane(
        np.linspace(-1.0, 3.0, 3), np.linspace(-1.0, 3.0, 3), {"data": {"loss": grid, "accuracy": 0.1 * grid}}, {"A": (0.0, 0.0)},
        {"data": {"loss": (1.0,), "accuracy": (0.1,)}}, np.ones((3, 3), dtype=bool), ("across", "up"),
        tracks={"run": np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])}, labels={"run": ("0", "5", "10")},
    )  # fmt: skip
    figure = plane.plot(tracks={"aligned": [[0.0, 2.0], [1.0, 2.0]]})
    names = [note.text for note in figure.layout.annotations if note.xref == "x"]
    assert sorted(name for name in names if "<b>" not in name) == ["5", "run 0", "run 10"]
    lines = {trace.name: trace.line.color for trace in figure.data if trace.type == "scatter" and trace.name}
    assert len(set(lines.values())) == 2 and not {BLUE, "#56B4E9"} & set(lines.values())
    ticks = [trace.colorbar.ticktext for trace in figure.data if trace.type == "contour"]
    assert ticks[1] == ("10", "12", "14", "16", "18", "20")
    with pytest.raises(InputError, match="read from a file"):
        plane.plot(tracks={"weights": [{"w": 1}]})


def test_names_of_many_layers_are_thinned_and_shortened():
    layers = [f"encoder.layers.{i}.self_attention.projection" for i in range(24)]
    states = [{f"{name}.weight": torch.randn(3, 3) for name in layers} for _ in range(2)]
    figure = inspect(states).plot()
    axis = next(axis for axis in figure.select_xaxes() if axis.ticktext)
    assert len(axis.ticktext) <= 10 and all(len(name) <= 16 for name in axis.ticktext)
    assert set(axis.tickvals) <= set(layers)


def test_an_intrinsic_dimension_is_noted_where_it_is():
    accuracies = np.array([[0.2], [0.7], [0.95]])
    figure = IntrinsicDimension((10, 50, 200), accuracies, 0.9, 0.9, "dense", 1000).plot()
    place = {note.text: note.x for note in figure.layout.annotations}["200"]
    line = figure.layout.shapes[1].x0
    assert line == 200 and 10**place == pytest.approx(200)  # a line by its value, a note by its logarithm


def test_a_path_without_a_barrier_is_drawn_all_the_same():
    path = made_path(1.0)
    for split in path.values.values():
        split["loss"] = np.where(path.alphas == 1.0, np.nan, split["loss"])
    figure = path.plot(naive=made_path(0.5))
    assert "aligned" in {trace.name for trace in figure.data}
    empty = made_path(1.0)
    for split in empty.values.values():
        split["loss"] = np.full_like(split["loss"], np.inf)
    assert empty.plot().data
