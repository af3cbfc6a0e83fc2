"""The path explorer: what it is given to draw, and the page that carries it. Its moves are tested in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import traitlets
from PIL import Image
from support import embedded

from lmc.errors import InputError
from lmc.landscape.path import Path, loss_path
from lmc.models import mlp
from lmc.views.widgets.explorer import FOLDER, module
from lmc.views.widgets.path import state
from lmc.views.widgets.poster import png

WIDGETS = FOLDER / "js"


def random_path(seed: int, count: int = 60, pixels=(1, 4, 4), alphas: int = 5) -> Path:
    generator = torch.Generator().manual_seed(seed)
    data = torch.Generator().manual_seed(0)
    size = int(np.prod(pixels))
    model = mlp(size, [8], 3)
    a, b = ({k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()} for _ in range(2))
    inputs = torch.randn(count, *pixels, generator=data)
    return loss_path(model, a, b, (inputs, torch.randint(3, (count,), generator=data)), alphas=alphas)


@pytest.fixture(scope="module")
def naive() -> Path:
    return random_path(1)


@pytest.fixture(scope="module")
def aligned() -> Path:
    return random_path(2)


def decoded(text: str, dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def test_the_state_holds_what_the_paths_hold(naive, aligned):
    content = state({"naive": naive, "aligned": aligned})
    assert content["active"] == "aligned" and content["alpha"] == 0.5
    for given, path in zip((naive, aligned), content["data"]["paths"], strict=True):
        np.testing.assert_allclose(path["series"]["data"]["loss"], given.losses["data"], atol=1e-5)
        np.testing.assert_allclose(path["series"]["data"]["accuracy"], 100 * given.accuracies["data"], atol=1e-5)
        shown = path["shown"]
        confusion = decoded(shown["confusion"], "<u4").reshape(5, shown["classes"], shown["classes"])
        np.testing.assert_array_equal(confusion, given.predictions.confusion)
        predicted = decoded(shown["predicted"], np.uint8).reshape(5, -1)
        np.testing.assert_array_equal(predicted, given.predictions.predicted)
        assert shown["count"] == 60
    images = content["data"]["images"]
    pixels = decoded(images["pixels"], np.uint8).reshape(len(images["index"]), images["height"], images["width"])
    assert pixels.min() == 0 and pixels.max() == 255 and images["index"] == sorted(set(images["index"]))
    np.testing.assert_array_equal(pixels, naive.predictions.images)
    json.dumps(content, allow_nan=False)


def test_gaps_are_null(naive):
    path = random_path(3)
    path.values["data"]["loss"][1] = np.nan
    content = state({"path": path})
    assert content["data"]["paths"][0]["series"]["data"]["loss"][1] is None
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.16), (0.0, 0.0), (3.0, 700.0), (0.0, 1e-6), (-2.0, -1.0)])
def test_ticks_are_few_and_cover_the_curves(low, high):
    path = random_path(1)
    path.values["data"]["loss"][:] = np.linspace(low, high, 5)
    panel = state({"path": path})["data"]["panels"][0]
    assert 2 <= len(panel["ticks"]) <= 6 and panel["range"][0] <= low and panel["range"][1] >= high
    assert panel["ticks"][0] == panel["range"][0] and panel["ticks"][-1] == pytest.approx(panel["range"][1])


def test_large_images_are_chosen_from():
    path = random_path(1, count=90, pixels=(3, 32, 32))
    shown = path.predictions
    assert shown.images.shape[1:] == (32, 32, 3) and 16 <= len(shown.images) < 90
    wrong = (shown.predicted != shown.targets).any(0)
    assert wrong.all()  # those that are never predicted wrong come last
    assert (shown.confusion.sum((1, 2)) == 90).all()


def test_inputs_that_are_no_images_are_not_drawn():
    path = random_path(1, pixels=(7,))
    assert path.predictions.images is None
    assert state({"path": path})["data"]["images"] is None


def test_paths_that_do_not_fit_together_are_refused(naive):
    with pytest.raises(InputError, match="differs between the paths"):
        state({"naive": naive, "aligned": random_path(2, pixels=(1, 5, 5))})
    longer = Path(np.linspace(0, 2, 5), naive.values, naive.own)
    with pytest.raises(InputError, match="same stretch"):
        state({"naive": naive, "aligned": longer})


def test_the_widget_follows_and_leads(naive, aligned):
    widget = aligned.explore(naive=naive)
    assert repr(widget) == "PathExplorer(naive, aligned; 5 points)"
    widget.alpha, widget.active = 0.25, "naive"
    with pytest.raises(traitlets.TraitError, match="expected one of naive, aligned"):
        widget.active = "repaired"
    assert widget.active == "naive"


def test_the_widget_carries_a_page_for_readers_without_a_kernel():
    bundle = random_path(2).explore(naive=random_path(1))._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert set(data) == {"text/html", "text/plain"} and data["text/plain"].startswith("PathExplorer(")
    assert embedded(data["text/html"])["active"] == "aligned"
    unscripted = re.sub(r"<(script|style).*?</\1>", "", data["text/html"], flags=re.S)
    assert "Path of 5 points" in unscripted and "Trust this notebook" in unscripted
    assert re.search(
        r'<img src="data:image/png;base64,[\w+/=]{800,}" alt="loss \(nats\) on the way from A to B', unscripted
    )


def test_a_poster_draws_what_the_path_holds(naive, aligned):
    poster = aligned.explore(naive=naive).poster()
    picture = np.asarray(Image.open(io.BytesIO(poster.png)).convert("RGBA"), dtype=int)
    height, width = picture.shape[:2]
    losses = {"naive": naive.losses["data"], "aligned": aligned.losses["data"]}
    low, high = (edge(list(losses.values())) for edge in (np.min, np.max))
    assert f"from {low:.3g} (below) to {high:.3g} (above)" in poster.caption
    for name, values in losses.items():
        colour = [int(poster.names[name][i : i + 2], 16) for i in (1, 3, 5)]
        for i in (0, 2, 4):
            column = (
                np.abs(picture[:, round(3 + i / 4 * (width - 7)), :3] - colour).sum(1)
                + 255
                - picture[:, round(3 + i / 4 * (width - 7)), 3]
            )
            expected = 3 + (high - values[i]) / (high - low) * (height - 6)
            assert min(abs(np.flatnonzero(column < 30) - expected)) < 4, (name, i)


def test_a_poster_has_few_colours_and_no_ground():
    assert Image.open(io.BytesIO(png(np.zeros((20, 30, 4))))).convert("RGBA").getextrema() == ((0, 0),) * 4
    with pytest.raises(ValueError, match="more than a palette holds"):
        png(np.random.default_rng(0).random((20, 30, 4)))


@pytest.mark.parametrize("where", ["VSCODE_PID", "google.colab"])
def test_front_ends_that_keep_outputs_apart_are_given_a_widget_view(where, monkeypatch):
    monkeypatch.setenv(where, "1")
    if "." in where:
        monkeypatch.setitem(sys.modules, where, ModuleType(where))
    bundle = random_path(2).explore()._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in data


def test_explorers_of_one_path_stay_in_step():
    path, naive = random_path(1), random_path(2)
    first, second, other = path.explore(naive=naive), path.explore(), naive.explore(label="naive")
    assert (second.active, other.active) == ("path", "naive")  # each keeps what the others do not show
    first.alpha = 0.3
    assert (second.alpha, other.alpha) == (0.3, 0.3)
    second.alpha = 0.9
    assert (first.alpha, random_path(1).explore().alpha, path.explore().alpha) == (0.9, 0.5, 0.9)


def test_the_kernel_answers_for_places_in_between():
    path = random_path(1)
    widget, sent = path.explore(label="p"), []
    widget.send = sent.append
    widget._asked(widget, {"place": ["p", 0.25], "ticket": "1"}, [])
    widget._asked(widget, {"place": ["p", 0.3], "ticket": "2"}, [])
    at_point, between = sent
    assert at_point["values"]["loss"] == pytest.approx(path.losses["data"][1])
    assert at_point["values"]["accuracy"] == pytest.approx(100 * path.accuracies["data"][1])
    assert (between["ticket"], between["place"]) == ("2", ["p", 0.3])
    assert between["values"]["loss"] == path.exact(0.3)["data"].loss != at_point["values"]["loss"]
    confusion = decoded(between["shown"]["confusion"], "<u4").reshape(3, 3)
    np.testing.assert_array_equal(confusion, path.exact.predictions(0.3).confusion[0])
    assert len(between["images"]["index"]) == 24
    json.dumps(sent, allow_nan=False)


@pytest.mark.parametrize("name, alpha", [("A", 0.0), ("B", 1.0)])
def test_which_examples_change_their_mind_on_the_way(name, alpha):
    path = random_path(1)
    widget, sent = path.explore(label="p", examples=f"unlike {name}"), []
    assert widget.data["unlike"] == {"name": name, "alpha": alpha}
    widget.send = sent.append
    for at in (0.3, alpha):
        widget._asked(widget, {"place": ["p", at], "ticket": "1"}, [])
    table = path.predictions.predicted
    there = table[-1] if alpha else table[0]
    here = np.empty_like(there)
    full = path.exact.predictions(0.3)
    here[np.searchsorted(path.predictions.index, full.index)] = full.predicted[0]
    changed = path.predictions.index[here != there]  # all 60 examples are small enough to be kept
    shown = sent[0]["shown"]
    assert len(here) == 60 and 0 < sent[0]["differing"] == len(changed)
    assert shown["index"] == changed[:24].tolist() == sent[0]["images"]["index"]
    predicted = decoded(shown["predicted"], np.uint8).reshape(2, -1)
    np.testing.assert_array_equal(predicted[0], there[here != there][:24])
    np.testing.assert_array_equal(predicted[1], here[here != there][:24])
    assert sent[1]["differing"] == 0 and sent[1]["shown"]["index"] == []  # nothing differs from itself
    json.dumps(sent, allow_nan=False)


def test_examples_that_an_explorer_does_not_know(naive):
    with pytest.raises(InputError, match="examples='unlike C'; expected one of 'wrong', 'unlike A', 'unlike B'"):
        naive.explore(examples="unlike C")


def test_why_the_kernel_has_no_answer_is_said(tmp_path):
    random_path(1).save(tmp_path / "path.json")
    widget, sent = Path.load(tmp_path / "path.json").explore(label="p"), []
    widget.send = sent.append
    widget._asked(widget, {"place": ["p", 0.3], "ticket": "1"}, [])
    assert sent == [{"error": "made without networks at hand", "place": ["p", 0.3], "ticket": "1"}]


def test_the_page_stands_alone(naive, tmp_path):
    file = tmp_path / "page.html"
    naive.save_html(file, label="</script><b>", other=random_path(2))
    document = file.read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', document)
    assert set(re.findall(r"https?://[^\s\"']+", document)) <= {"http://www.w3.org/2000/svg"}
    assert embedded(document)["data"]["paths"][1]["name"] == "</script><b>"
    assert document.count("</script>") == 1
    assert len(document) < 100_000


def test_the_page_says_what_it_is_told(naive, tmp_path):
    rows = [{"network": "A & B", "accuracy": "97 %"}]
    naive.save_html(tmp_path / "page.html", title="One <basin>", text=["First."], rows=rows)
    document = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>One &lt;basin&gt;</h1><p>First.</p><table>" in document
    assert "<th>network</th>" in document and "<td>A &amp; B</td>" in document


def test_an_output_is_small_enough_for_a_notebook(naive):
    bundle = naive.explore()._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert len(data["text/html"]) < 60_000


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; the browser tests run this code too")
def test_the_arithmetic_of_the_modules():
    script = """
    import { colourScale, format, logTicks, nearest, stepped, ticks, valueAt } from "./common.js";
    import { differing } from "./pictures.js";
    const grid = [0, 0.25, 0.5, 1];
    console.log(JSON.stringify([
      nearest(grid, 0.3), nearest(grid, 2), valueAt(grid, [0, 1, 3, 4], 0.375), valueAt(grid, [0, null, 2, 4], 0.25),
      valueAt(grid, [0, 1, 3, 4], 1), valueAt(grid, [null, null, null, null], 0.5),
      differing({ index: [5, 7, 9], targets: [0, 1, 2], predicted: [9, 9, 9, 0, 2, 255] }, 1,
        { place: new Map([[5, 0], [7, 1], [9, 2]]) }),
      differing({ index: [5, 7, 9], targets: [0, 1, 2], predicted: [1, 2, 2, 0, 2, 255] }, 1,
        { place: new Map([[5, 0], [7, 1], [9, 2]]) }, 0),
      stepped(grid, 0.3, 1), stepped(grid, 0.25, -1), stepped(grid, 0.3, 9), stepped(grid, 1, 1),
      ticks(0, 1.9), ticks(-0.3, 0.4, 4), logTicks(0.04, 3), logTicks(2.1, 2.4), logTicks(1e-4, 100),
      format(null), format(0.1234), format(1e-5), format(12.34), format(1234.5),
      colourScale([[0, "#000000"], [0.5, "#ff0000"], [1, "#ffffff"]])(0.25), colourScale([[0, "#000000"], [1, "#ffffff"]])(NaN),
    ]));
    """
    assert json.loads(run_module(script)) == [
        *(1, 3, 2, 1, 4, None, [{"example": 7, "wanted": 1, "guess": 2, "target": 1}]),
        *([{"example": 5, "wanted": 1, "guess": 0, "target": 0}], 0.5, 0, 1, 1),
        *([0, 0.5, 1, 1.5], [-0.2, 0, 0.2, 0.4], [0.05, 0.1, 0.2, 0.5, 1, 2], [2.1, 2.2, 2.3, 2.4]),
        *([0.0001, 0.001, 0.01, 0.1, 1, 10, 100], "–", "0.123", "1.0e-5", "12.3", "1235", [128, 0, 0], None),
    ]


def run_module(script: str) -> str:
    """What a module prints that may import the files of the widgets."""
    command = ["node", "--input-type=module", "-e", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=WIDGETS).stdout


def test_a_module_holds_what_it_imports_once_and_first():
    text = module("path_explorer.js")
    assert re.findall(r"^(?:import|export).*", text, re.MULTILINE) == ["export default { initialize, render };"]
    for name in ("stage", "clamp", "pathChart", "predictions"):
        assert text.count(f"function {name}(") == 1
    assert text.index("function stage(") < text.index("function pathChart(") < text.index("function render(")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; the browser tests run this code too")
@pytest.mark.parametrize("name", sorted(file.name for file in WIDGETS.glob("*_explorer.js")))
def test_the_files_of_an_explorer_make_one_module_without_a_name_twice(name):
    subprocess.run(["node", "--input-type=module", "--check", "-"], input=module(name), text=True, check=True)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; the browser tests run this code too")
def test_ink_is_read_on_every_colour():
    script = """
    import { inkOn } from "./common.js";
    const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    const luminance = (c) => light(c).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    let worst = Infinity;
    for (let r = 0; r < 256; r += 15) for (let g = 0; g < 256; g += 15) for (let b = 0; b < 256; b += 15) {
      const l = luminance([r, g, b]);
      worst = Math.min(worst, inkOn([r, g, b]) === "#000" ? (l + 0.05) / 0.05 : 1.05 / (l + 0.05));
    }
    console.log(worst);
    """
    assert float(run_module(script)) > 4.5
