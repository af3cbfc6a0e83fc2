"""Figures of paths: what they draw is what the paths hold."""

import numpy as np
import pytest

from lmc.errors import InputError
from lmc.landscape.paths.path import Path
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
