"""The plane explorer: what it is given to draw, and the arithmetic of its drawing."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import traitlets

import lmc
from lmc.errors import InputError
from lmc.landscape.planes.plane_result import Plane
from lmc.views.widgets.explorer import FOLDER
from lmc.views.widgets.plane import PlaneExplorer, state

WIDGETS = FOLDER / "js"


@pytest.fixture
def plane() -> Plane:
    """z = x + 10 y, a number that is missing, and an accuracy."""
    x, y = np.array([0.0, 1.0, 4.0]), np.array([0.0, 2.0])
    loss = x[None] + 10.0 * y[:, None]
    loss[1, 2] = np.nan
    values = {s: {"loss": loss + i, "accuracy": np.full((2, 3), 0.5)} for i, s in enumerate(("train", "test"))}
    places = {"A": (0.0, 0.0), "B": (1.0, 2.0), "C": (4.0, 0.0)}
    own = {s: {"loss": (0.0, 21.0, 4.0), "accuracy": (0.5,) * 3} for s in values}
    return Plane(x, y, values, places, own, np.ones((2, 3), dtype=bool), ("across", "up"))


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(2, 3)


def test_the_state_holds_what_the_plane_holds(plane):
    content = state(plane, {"curve": [[0, 0], [1, 1], [4, 0]]})
    data = content["data"]
    assert (content["split"], content["measure"], data["splits"]) == ("test", "loss", ["test", "train"])
    np.testing.assert_allclose(floats(data["values"]["train"]["loss"]), plane.losses["train"])
    np.testing.assert_allclose(floats(data["values"]["test"]["accuracy"]), 50.0)
    assert content["point"] == pytest.approx([5 / 3, 2 / 3])
    assert (data["missing"], data["gaps"]) == (0, {"loss": 1, "accuracy": 0})
    assert [track["name"] for track in data["tracks"]] == ["curve"] and data["tracks"][0]["points"][1] == [1.0, 1.0]
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize("path", [[[0, 0]], [[0, 0, 0], [1, 1, 1]], [[0, 0], [np.nan, 1]], [0, 1]])
def test_tracks_that_are_no_curves_in_the_plane_are_refused(plane, path):
    with pytest.raises(InputError, match=r"tracks\['p'\]: expected weights or finite points \(K, 2\)"):
        state(plane, {"p": path})


def test_the_widget_follows_leads_and_stays_in_step(plane):
    first, second = plane.explore(), plane.explore()
    assert repr(first) == "PlaneExplorer(3 x 2 points; A, B, C)"
    first.point, first.measure = [1.0, 2.0], "accuracy"
    assert (second.point, second.measure) == ([1.0, 2.0], "accuracy")
    with pytest.raises(traitlets.TraitError, match="split='validation'; expected one of train, test"):
        first.split = "validation"
    with pytest.raises(InputError, match="without networks at hand"):
        first.answer(["test", 1.0, 2.0])


def test_the_kernel_compares_with_one_of_the_models():
    torch.manual_seed(0)
    model = lmc.models.mlp(16, [8], 3)
    models = [lmc.models.mlp(16, [8], 3) for _ in range(3)]
    data = torch.randn(40, 16), torch.randint(3, (40,))
    plane = lmc.loss_plane(model, models, data, resolution=5, progress=False)
    widget = plane.explore(examples="unlike B")
    assert widget.data["unlike"] == {"name": "B"}
    far = widget.answer(["data", *plane.places["C"]])
    said = [m(data[0]).argmax(-1) for m in models]
    changed = (said[1] != said[2]).nonzero().flatten().tolist()
    assert far["differing"] == len(changed) > 0 and far["shown"]["index"] == changed[:24]
    assert widget.answer(["data", *plane.places["B"]])["differing"] == 0
    with pytest.raises(InputError, match="examples='unlike D'; expected one of 'wrong', 'unlike A', "):
        plane.explore(examples="unlike D")


def test_the_page_stands_alone(plane, tmp_path):
    plane.save_html(tmp_path / "plane.html")
    document = (tmp_path / "plane.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', document)
    assert set(re.findall(r"https?://[^\s\"']+", document)) <= {"http://www.w3.org/2000/svg"}
    assert len(document) < 100_000


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; the browser tests run this code too")
def test_the_arithmetic_of_grids():
    script = """
    import { cellOf, contour, rangeOf, valueIn } from "./grid.js";
    const field = { x: [0, 1, 4], y: [0, 2], values: [0, 1, 4, 20, 21, NaN] };
    const peak = { x: [0, 1, 2], y: [0, 1, 2], values: [0, 0, 0, 0, 1, 0, 0, 0, 0] };
    const saddle = (a) => contour({ x: [0, 1], y: [0, 1], values: [a, 0, 0, 1] }, 0.5);
    console.log(JSON.stringify([
      cellOf(field.x, 2.5), cellOf(field.x, 4), cellOf(field.x, 9), cellOf(field.x, -1),
      valueIn(field, 0.5, 1), valueIn(field, 2.5, 0), valueIn(field, 4, 0), valueIn(field, 1, 2), valueIn(field, 4, 0.5),
      rangeOf(field.values), rangeOf([NaN]),
      contour(peak, 0.5).map((s) => s.map((v) => v.toFixed(2)).join()), contour(field, 30), saddle(1.5), saddle(0.6),
    ]));
    """
    command = ["node", "--input-type=module", "-e", script]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=WIDGETS).stdout
    # The saddle: with a high middle the low corners are cut off, with a low middle the high ones.
    assert json.loads(output) == [
        *([1, 0.5], [1, 1], [1, 1], [0, 0], 10.5, 2.5, 4, 21, None, [0, 21], [0, 1]),
        ["1.00,0.50,0.50,1.00", "1.50,1.00,1.00,0.50", "0.50,1.00,1.00,1.50", "1.50,1.00,1.00,1.50"],
        [],
        [[pytest.approx(2 / 3), 0, 1, 0.5], [0.5, 1, 0, pytest.approx(2 / 3)]],
        [[1, 0.5, 0.5, 1], [0, pytest.approx(1 / 6), pytest.approx(1 / 6), 0]],
    ]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; the browser tests run this code too")
def test_the_module_parses():
    subprocess.run(["node", "--input-type=module", "--check", "-"], input=PlaneExplorer._esm, text=True, check=True)
