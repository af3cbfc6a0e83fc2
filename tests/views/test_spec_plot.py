from handwritten import ATTENTION, mlp
from small_models import Attention
from torch import nn

from lmc import models
from lmc.symmetry.spec import PermutationSpec


def lanes(fig):
    return [text.split("<br>")[0] for text in fig.layout.xaxis.ticktext]


def test_lanes_are_groups_and_rows_are_modules():
    fig = PermutationSpec.from_patterns(mlp(2), models.mlp(9, [8, 7], 4)).plot()
    assert lanes(fig) == ["h1", "h2"]
    assert list(fig.layout.yaxis.ticktext) == ["fc1", "fc2", "head"]
    h1 = next(trace for trace in fig.data if trace.hovertemplate and "h1" in trace.hovertemplate)
    assert list(h1.y) == [0, 1]
    assert list(h1.marker.symbol) == ["square", "circle-open"]


def test_nested_groups_share_a_lane_behind_what_they_live_in():
    fig = PermutationSpec.from_patterns(ATTENTION, Attention(), head=4).plot()
    assert lanes(fig) == ["d", "head", "qk", "v"]
    assert "2 units in each of 4" in fig.layout.xaxis.ticktext[3]


def test_equal_layers_of_deep_networks_share_a_row():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(60)))
    patterns = {f"{i}.weight": f"h{i} {'.' if i == 0 else f'h{i - 1}'}" for i in range(60)}
    patterns |= {f"{i}.bias": f"h{i}" for i in range(60)}
    wrapped = nn.ModuleDict({"layers": model})
    spec = PermutationSpec.from_patterns({f"layers.{k}": v for k, v in patterns.items()}, wrapped)
    assert list(spec.plot().layout.yaxis.ticktext) == ["layers.*"]
    assert lanes(spec.plot())[0].startswith("h0")
