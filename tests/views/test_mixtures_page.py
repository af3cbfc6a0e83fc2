"""The explorer of mixtures: what it is given to draw, what the kernel answers, and its arithmetic in the browser."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import traitlets
from support import embedded

import lmc
from lmc.landscape.evaluation.evaluator import evaluate
from lmc.landscape.simplices.simplex import loss_simplex, loss_triangle
from lmc.landscape.simplices.simplex_result import Simplex
from lmc.models import mlp
from lmc.views.widgets.explorer import FOLDER
from lmc.views.widgets.plane import state as plane_state
from lmc.views.widgets.simplex import state
from lmc.weights import mean

MODEL = mlp(4, [8], 3)
GENERATOR = torch.Generator().manual_seed(0)
STATES = [{k: torch.randn(v.shape, generator=GENERATOR) for k, v in MODEL.state_dict().items()} for _ in range(4)]
DATA = torch.randn(50, 4, generator=GENERATOR), torch.randint(3, (50,), generator=GENERATOR)


@pytest.fixture
def triangle():
    return loss_triangle(MODEL, STATES[:3], DATA, resolution=4, names=("A", "B", "</script>"))


def decoded(text: str, dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def test_the_state_holds_what_the_mixtures_hold(triangle):
    triangle.losses["data"][2] = np.nan
    content = state(triangle)
    data = content["data"]
    np.testing.assert_array_equal(decoded(data["counts"], "<u2").reshape(-1, 3), triangle.counts)
    np.testing.assert_allclose(decoded(data["series"]["data"]["loss"], "<f4"), triangle.losses["data"], rtol=1e-6)
    np.testing.assert_allclose(
        decoded(data["series"]["data"]["accuracy"], "<f4"), 100 * triangle.accuracies["data"], rtol=1e-6
    )
    assert data["best"]["data"] == list(triangle.best.shares.values())
    loss, accuracy = data["measures"]
    assert (loss["log"], loss["high_is_good"], accuracy["high_is_good"]) == (True, False, True)
    assert loss["low"] == pytest.approx(np.nanmin(triangle.losses["data"]))
    assert content["shares"] == [pytest.approx(1 / 3, abs=1e-6)] * 3
    json.dumps(content, allow_nan=False)


def asked(widget, place):
    """What the kernel sends back to a browser that came to rest at `place`."""
    sent = []
    widget.send = sent.append
    widget._asked(widget, {"place": place, "ticket": "7"}, [])
    return sent[0]


def test_the_kernel_evaluates_the_mixture_that_it_is_asked_for(triangle):
    widget = triangle.explore()
    place = [0.2, 0.3, 0.5]
    answer = asked(widget, place)
    score = evaluate(MODEL, mean(STATES[:3], place), DATA)["data"]
    assert answer["ticket"] == "7" and answer["values"]["data"]["loss"] == pytest.approx(score.loss)
    assert answer["values"]["data"]["accuracy"] == pytest.approx(100 * score.accuracy)
    assert widget.exact == answer["values"]


def test_a_triangle_from_a_file_says_that_it_cannot_evaluate(triangle, tmp_path):
    triangle.save(tmp_path / "t.json")
    answer = asked(Simplex.load(tmp_path / "t.json").explore(), [1.0, 0.0, 0.0])
    assert "without the models" in answer["error"] and answer["ticket"] == "7"


def test_widgets_of_one_result_move_together_and_others_do_not(triangle):
    first, other = triangle.explore(), loss_triangle(MODEL, STATES[:3], DATA, resolution=2).explore()
    first.shares = [0.5, 0.25, 0.25]
    second = triangle.explore()
    assert second.shares == [0.5, 0.25, 0.25]
    second.shares, second.measure = [0.0, 1.0, 0.0], "accuracy"
    assert first.shares == [0.0, 1.0, 0.0] and first.measure == "accuracy"
    assert other.shares != [0.0, 1.0, 0.0] and other.measure == "loss"


def test_the_widget_refuses_what_it_cannot_show(triangle):
    widget = triangle.explore()
    for shares in ([0.5, 0.5], [0.5, 0.5, 0.5], [2.0, -1.0, 0.0]):
        with pytest.raises(traitlets.TraitError, match="sum to 1"):
            widget.shares = shares
    with pytest.raises(traitlets.TraitError, match="expected one of loss, accuracy"):
        widget.measure = "f1"
    with pytest.raises(traitlets.TraitError, match="expected one of data"):
        widget.split = "test"
    assert repr(widget) == "SimplexExplorer(A, B, </script>; 15 mixtures)"


def test_the_widget_carries_a_page_for_readers_without_a_kernel(triangle, tmp_path):
    widget = triangle.explore()
    widget.shares = [1.0, 0.0, 0.0]
    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert embedded(data["text/html"])["shares"] == [1.0, 0.0, 0.0]
    triangle.save_html(tmp_path / "page.html")
    document = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', document)
    assert set(re.findall(r"https?://[^\s\"']+", document)) <= {"http://www.w3.org/2000/svg"}
    assert embedded(document)["data"]["names"] == ["A", "B", "</script>"] and document.count("</script>") == 1


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; the browser tests run this code too")
def test_the_browser_interpolates_as_python_does():
    made = loss_simplex(MODEL, STATES, DATA, resolution=6)
    mixtures = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    mixtures = np.concatenate([mixtures, np.eye(4), made.shares[:20]])
    given = {
        "counts": made.counts.ravel().tolist(),
        "values": made.losses["data"].tolist(),
        "mixtures": mixtures.tolist(),
    }
    script = """
    import { coordinates, corners, inside, interpolator, withShare } from "MODULE";
    const { counts, values, mixtures } = GIVEN;
    const at = interpolator(counts, 4, 6);
    const polygon = corners(4, { left: 10, top: 20, width: 300, height: 200 });
    const [x, y] = [170, 130];
    const shares = [...coordinates(polygon, x, y)];
    const back = [0, 1].map((axis) => shares.reduce((sum, share, i) => sum + share * polygon[i][axis], 0));
    const edge = [0, 1].map((axis) => 0.75 * polygon[1][axis] + 0.25 * polygon[2][axis]);
    console.log(JSON.stringify({
      found: mixtures.map((shares) => at(values, shares)),
      back, shares, edge: [...coordinates(polygon, ...edge)],
      far: inside(polygon, 1000, 120).slice(1), near: inside(polygon, x, y),
      set: [withShare([0.5, 0.25, 0.25], 0, 0.2), withShare([1, 0, 0], 0, 0.4)],
    }));
    """
    module = base64.b64encode((FOLDER / "js" / "simplex_geometry.js").read_bytes()).decode()
    script = script.replace("MODULE", f"data:text/javascript;base64,{module}").replace("GIVEN", json.dumps(given))
    output = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    told = json.loads(output.stdout)
    np.testing.assert_allclose(told["found"], made.interpolate(mixtures), rtol=1e-9)
    np.testing.assert_allclose(told["back"], [170, 130], atol=1e-9)
    np.testing.assert_allclose(sum(told["shares"]), 1.0)
    np.testing.assert_allclose(told["edge"], [0, 0.75, 0.25, 0], atol=1e-9)
    np.testing.assert_allclose(told["far"], [260, 120], atol=1e-9)  # the right edge of a square of side 200
    assert told["near"] == [0, 170, 130]
    np.testing.assert_allclose(told["set"], [[0.2, 0.4, 0.4], [0.4, 0.3, 0.3]])


def test_fine_lattices_and_measures_that_are_better_when_higher_are_drawn_rightly():
    overlap = {"overlap": lambda outputs, targets: outputs.softmax(-1).gather(1, targets[:, None])[:, 0]}
    task = lmc.Task(metrics=overlap, higher=("accuracy", "overlap"))
    line = loss_simplex(MODEL, STATES[:2], task.on(DATA), progress=False)  # finer than a byte counts
    data = state(line)["data"]
    np.testing.assert_array_equal(decoded(data["counts"], "<u2").reshape(-1, 2), line.counts)
    assert line.counts.max() > 255
    good = {measure["name"]: measure["high_is_good"] for measure in data["measures"]}
    assert good == {"loss": False, "accuracy": True, "overlap": True}
    plane = lmc.loss_plane(MODEL, STATES[:3], task.on(DATA), resolution=5, progress=False)
    assert {m["name"]: m["reversed"] for m in plane_state(plane)["data"]["measures"]} == good
    assert plane.plot(measures=["loss", "overlap"]).data[0].reversescale is False
    assert [trace.reversescale for trace in plane.plot(measures=["overlap"]).data if trace.type == "contour"] == [True]
