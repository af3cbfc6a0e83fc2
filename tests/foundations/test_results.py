"""What every result can do: plot, explore, become a table, be saved and read back, also from files of version 0.1."""

import dataclasses
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import lmc
from lmc import align, landscape, merge
from lmc.core.codec import UNSAVED
from lmc.core.results import Result
from lmc.errors import DataError, InputError
from lmc.landscape.evaluation.measured import Predictions

OLD = Path(__file__).parent / "saved_by_0.1"


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


MODEL = network(0)
MODELS = [network(seed) for seed in range(3)]
DATA = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
INPUTS, QUIET = DATA[0], {"progress": False}
SPEC = lmc.permutation_spec(MODEL, INPUTS, **QUIET)


def runs() -> list[dict[int, nn.Module]]:
    return [{0: network(seed), 1: network(seed + 10)} for seed in (0, 1)]


def added(x: int, word: str) -> dict[str, Any]:
    return {"sum": x + 0.5, "nothing": float("nan"), "word twice": 2 * word}


def merged_tasks() -> dict[str, Any]:
    return {"one": DATA, "two": (INPUTS.flip(0), DATA[1])}


A, B = MODELS[:2]
MAKE: dict[str, Any] = {
    "Path": lambda: lmc.loss_path(MODEL, A, B, DATA, alphas=3, **QUIET),
    "PairwiseBarriers": lambda: landscape.pairwise_barriers(MODEL, MODELS, DATA, alphas=3, **QUIET),
    "Plane": lambda: lmc.loss_plane(MODEL, MODELS, DATA, resolution=5, **QUIET),
    "Triangle": lambda: lmc.loss_triangle(MODEL, MODELS, DATA, resolution=3, **QUIET),
    "Simplex": lambda: lmc.loss_simplex(MODEL, [*MODELS, network(3)], DATA, resolution=2, **QUIET),
    "Curve": lambda: lmc.bezier_curve(MODEL, A, B, DATA, epochs=2, **QUIET),
    "LowLossPath": lambda: landscape.low_loss_path(MODEL, A, B, DATA, ticks=2, rounds=(1, 3), **QUIET),
    "Geodesic": lambda: landscape.geodesic_path(MODEL, A, B, DATA, points=3, epochs=2, **QUIET),
    "Curvature": lambda: landscape.curvature(MODEL, A, DATA, top=2, probes=2, **QUIET),
    "Similarity": lambda: landscape.similarity(MODEL, A, B, DATA),
    "LayerwiseBarriers": lambda: landscape.layerwise_barriers(MODEL, A, B, DATA, alphas=3, **QUIET),
    "Multiplicity": lambda: landscape.multiplicity(MODEL, MODELS, DATA),
    "Telescope": lambda: landscape.telescope(MODEL, MODELS, INPUTS),
    "VarianceRatios": lambda: landscape.variance_ratios(MODEL, lmc.weights.mean([A, B]), [A, B], INPUTS),
    "Permutation": lambda: lmc.weight_matching(SPEC, A, B, **QUIET),
    "PermutationSpec": lambda: SPEC,
    "Sweep": lambda: lmc.sweep(added, {"x": [1, 2], "word": ["a"]}, executor=ThreadPoolExecutor(1), **QUIET),
    "Certificate": lambda: SPEC.certify(MODEL, INPUTS),
    "ContinuousSymmetries": lambda: lmc.continuous_symmetries(SPEC, MODEL, INPUTS, **QUIET),
    "Element": lambda: lmc.Element.random(
        lmc.permutation_spec(MODEL, INPUTS, certify=False, continuous=True, **QUIET), seed=0
    ),
    "Connection": lambda: lmc.connect(MODEL, A, B, DATA, spec=SPEC, budget=1.0, **QUIET),
    "SameFunction": lambda: align.SameFunction(1e-7, 1e-4, 0.5),
    "Extraction": lambda: merge.Extraction("adapter", ("fc.weight",), (2,), (0.1,), 0.1, ()),
    "Matchings": lambda: lmc.match_many(SPEC, MODELS, **QUIET),
    "Fusion": lambda: lmc.ot_fusion(MODEL, A, B, INPUTS, spec=SPEC, **QUIET),
    "RotationMatching": lambda: align.rotation_matching(SPEC, MODEL, A, B, DATA, steps=0, **QUIET),
    "GroupMatching": lambda: align.group_matching(SPEC, MODEL, A, B, inputs=INPUTS, **QUIET),
    "RotatableGroups": lambda: align.RotatableGroups({"stream": True}, {"stream": 1e-12}, {"stream": 0.5}),
    "Matching": lambda: align.inspect_matching(
        lmc.weight_matching(SPEC, A, B, **QUIET), A, B, model=MODEL, data=DATA, steps=2, alphas=3, **QUIET
    ),
    "SingularAlignment": lambda: align.singular_alignment(A, B),
    "AlignmentComparison": lambda: align.compare(
        SPEC, MODEL, A, B, DATA, methods=["naive", "weight matching"], alphas=3, **QUIET
    ),
    "Epochs": lambda: align.barrier_over_time(MODEL, *runs(), DATA, spec=SPEC, alphas=3, **QUIET),
    "Zipped": lambda: merge.zipit(MODEL, [A, B], INPUTS, spec=SPEC, **QUIET),
    "Star": lambda: merge.star_model(MODEL, [A, B], DATA, epochs=1, **QUIET),
    "StarPaths": lambda: merge.star_model(MODEL, [A, B], DATA, epochs=1, **QUIET).paths(DATA, alphas=3, **QUIET),
    "Soups": lambda: merge.compare_soups(MODEL, MODELS, DATA, epochs=1, **QUIET),
    "Inspection": lambda: merge.inspect(MODELS, base=network(9), **QUIET),
    "MergeComparison": lambda: merge.compare(MODEL, MODELS, DATA, methods=["average"], **QUIET),
    "Mixer": lambda: merge.mixer(MODEL, [A, B], merged_tasks(), base=network(9), **QUIET),
    "WiseLine": lambda: merge.wise_ft_line(MODEL, B, merged_tasks(), base=A, alphas=3, **QUIET),
    "TrajectoryAverages": lambda: merge.trajectory_averages(MODEL, MODELS, DATA, **QUIET),
}
EXPLORED = {"Connection", "Path", "Plane", "Triangle", "Simplex", "Matching", "Epochs", "Mixer"}
NOT_DRAWN = {"Certificate", "ContinuousSymmetries", "Mixer", "RotatableGroups", "SameFunction"}
LEFT_BEHIND = {name: {"model": MODEL} for name in ("Curve", "Geodesic", "LowLossPath", "Star", "Zipped")}


@pytest.fixture(scope="module", params=MAKE)
def result(request) -> Result:
    found = MAKE[request.param]()
    assert type(found).__name__ == request.param
    return found


def same(x: Any, y: Any) -> bool:
    """Equal in all that is saved, types and dtypes included."""
    if isinstance(x, Tensor):
        return isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, np.ndarray):
        return isinstance(y, np.ndarray) and x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
    if isinstance(x, nn.Module):
        return same(dict(x.state_dict()), dict(y.state_dict()))
    if dataclasses.is_dataclass(x):
        fields = [field for field in dataclasses.fields(x) if field.metadata != UNSAVED and field.name != "certificate"]
        return type(x) is type(y) and all(same(getattr(x, f.name), getattr(y, f.name)) for f in fields)
    if isinstance(x, dict):
        return isinstance(y, dict) and list(x) == list(y) and all(same(x[key], y[key]) for key in x)
    if isinstance(x, tuple | list):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y or (x != x and y != y)


def test_every_result_that_is_exported_is_tried_here():
    rooms = (lmc, align, landscape, merge)
    exported = {name: getattr(room, name) for room in rooms for name in room.__all__}
    results = {name for name, kind in exported.items() if isinstance(kind, type) and issubclass(kind, Result)}
    assert results <= set(MAKE)
    shown = {name for name, kind in exported.items() if isinstance(kind, type) and hasattr(kind, "to_frame")}
    assert shown <= set(MAKE), "a class that becomes a table is a Result"


def test_it_prints_becomes_a_table_and_plots(result):
    name = type(result).__name__
    assert repr(result) and not repr(result).startswith("<")
    frame = result.to_frame()
    assert isinstance(frame, pd.DataFrame) and len(frame) and not frame.columns.duplicated().any()
    assert hasattr(result, "plot") == ("plot" in dir(result)) == (name not in NOT_DRAWN)
    if name not in NOT_DRAWN:
        figure = result.plot()
        assert len(figure.data) and figure.layout.template.layout.font.family.startswith("system-ui")


def test_what_has_an_explorer_opens_it_and_writes_it(result, tmp_path):
    name = type(result).__name__
    assert hasattr(result, "explore") == hasattr(result, "save_html") == (name in EXPLORED)
    if name not in EXPLORED:
        with pytest.raises(AttributeError, match=f"{name} has no explore"):
            result.explore()
        return
    assert result.save_html(tmp_path / "page.html", title="Seen & kept") == tmp_path / "page.html"
    assert "<h1>Seen &amp; kept</h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert name in repr(result.explore()) or isinstance(result, lmc.Triangle | lmc.Connection)


def test_it_is_saved_and_read_back(result, tmp_path):
    kind = type(result)
    assert result.save(tmp_path / "file") == tmp_path / "file"
    again = kind.load(tmp_path / "file", **LEFT_BEHIND.get(kind.__name__, {}))
    assert same(result, again)
    again.save(tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("verb", ["plot", "explore", "save_html"])
def test_shift_tab_shows_the_function_itself(verb):
    bound, own = getattr(MAKE["Path"](), verb), getattr(lmc.Path, verb)
    assert bound.__func__ is own and bound.__doc__ == own.__doc__ and own.__doc__
    assert [*inspect.signature(own).parameters][1:] == [*inspect.signature(bound).parameters]
    assert "label" in inspect.signature(bound).parameters and own.__module__.startswith("lmc.views.")


OLD_FILES = {
    "path.json": lmc.Path, "plane.json": lmc.Plane, "triangle.json": lmc.Triangle, "simplex.json": lmc.Simplex,
    "epochs.json": align.Epochs, "permutation.json": lmc.Permutation, "permutation_spec.json": lmc.PermutationSpec,
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_FILES)
def test_files_of_version_0_1_are_read(name, tmp_path):
    kind, content = OLD_FILES[name], json.loads((OLD / name).read_text())
    found = kind.load(OLD / name)
    assert type(found) is kind
    if isinstance(found, lmc.Path):
        assert np.isnan(found.losses["train"][1]) and isinstance(found.predictions, Predictions)
        assert found.predictions.images.dtype == np.uint8 and found.own["test"]["loss"][0] == found.losses["test"][0]
    if isinstance(found, lmc.Plane):
        assert np.isnan(found.losses["data"][0, 0]) and not found.done[0, 0] and found.tracks["run"].shape == (2, 2)
        assert found.losses["data"][1:].tolist() == content["values"]["data"]["loss"][1:] and found.axes
    if isinstance(found, lmc.Simplex):
        assert found.resolution == content["resolution"] and len(found.counts) == len(found.losses["data"])
        assert type(lmc.Simplex.load(OLD / name)) is kind
    if isinstance(found, align.Epochs):
        assert found.epochs == (0, 2) and set(found.paths) == {"naive", "aligned"}
    if isinstance(found, lmc.Permutation):
        assert {group: index.tolist() for group, index in found.items()} == content["indices"]
    found.save(tmp_path / "now")
    assert same(found, kind.load(tmp_path / "now"))


def test_a_curve_of_version_0_1_is_read(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    curve = lmc.Curve.load(OLD / "curve.safetensors", model)
    assert curve.kind == "bezier" and len(curve.controls) == 3 and len(curve.losses) == 1
    assert same(dict(curve.controls[0]), dict(model.state_dict()))


@dataclasses.dataclass(frozen=True, eq=False)
class Everything(Result):
    numbers: np.ndarray
    weights: dict[str, Tensor]
    optional: float | None
    pairs: dict[tuple[str, int], str]
    names: frozenset[str]
    nested: tuple[Predictions, ...]
    info: dict[str, Any]
    live: Any = dataclasses.field(default=None, metadata=UNSAVED)


def everything(**changes: Any) -> Everything:
    few = np.zeros((1, 2, 2), dtype=np.int64)
    shown = Predictions("test", few, np.arange(2), np.arange(2), np.zeros((1, 2), dtype=np.int64), None)
    given = {
        "numbers": np.array([[1.5, np.nan], [np.inf, -np.inf]], dtype=np.float32),
        "weights": {"w": torch.randn(3, 2).bfloat16(), "tied": torch.ones(4)[::2], "count": torch.tensor(7)},
        "optional": float("nan"), "pairs": {("a", 1): "x"}, "names": frozenset({"b", "a"}), "nested": (shown,),
        "info": {"method": len, "curve": np.arange(3.0), "list": [1, "two", None], "empty": np.zeros((0, 3))},
    }  # fmt: skip
    return Everything(**{**given, **changes})


def test_types_come_back_as_they_were(tmp_path):
    weights = {"w": torch.randn(3, 2).bfloat16(), "count": torch.tensor(7)}
    weights["tied"] = weights["w"]
    made = everything(weights=weights, live=object())
    made.save(tmp_path / "file")
    found = Everything.load(tmp_path / "file")
    assert found.live is None and found.info["method"] == repr(len)
    assert found.info["empty"].shape == (0, 3)
    assert same(made, dataclasses.replace(found, info={**found.info, "method": len}))


@pytest.mark.parametrize(
    "value",
    [
        {1: 2, "1": 3},
        {(1, "a"): [0.5]},
        {"float": 1.5},
        {"tensor": "x"},
        {"kind": "a", "content": "b"},
        {"pairs": {None: 1}},
    ],
)
def test_mappings_come_back_whatever_their_keys(value, tmp_path):
    made = everything(info={"value": value, "deeper": [{"value": value}]})
    made.save(tmp_path / "file")
    found = Everything.load(tmp_path / "file").info
    assert found["value"] == found["deeper"][0]["value"] == value


def test_arrays_of_objects_become_lists_and_empty_indices_keep_their_shape(tmp_path):
    made = everything(
        weights={"none": torch.zeros(0, 3, dtype=torch.int64)}, info={"names": np.array(["a", None], dtype=object)}
    )
    made.save(tmp_path / "file")
    found = Everything.load(tmp_path / "file")
    assert found.info["names"] == ["a", None] and found.weights["none"].shape == (0, 3)


@pytest.mark.parametrize("size", [9_000, 11_000])
def test_long_arrays_and_index_vectors_come_back_exactly(size, tmp_path):
    rng = np.random.default_rng(0)
    made = everything(numbers=rng.standard_normal(size), weights={"index": torch.randperm(size)}, info={})
    made.save(tmp_path / "file")
    assert same(made, Everything.load(tmp_path / "file"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0", '{"format": "else"}', '{"format": "lmc path 1"}'])
@pytest.mark.parametrize("kind", [lmc.Path, lmc.Simplex, lmc.PermutationSpec, merge.Soups])
def test_files_that_are_something_else_are_named(kind, text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json holds no "):
        kind.load(tmp_path / "x.json")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = MAKE["Path"]()
    path.save(tmp_path / "p.json")
    before = (tmp_path / "p.json").read_bytes()
    monkeypatch.setattr("lmc.core.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        dataclasses.replace(path, recalibrated=True).save(tmp_path / "p.json")
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"] and (tmp_path / "p.json").read_bytes() == before


def test_what_stays_behind_is_asked_for_and_nothing_else_is_taken(tmp_path):
    MAKE["Star"]().save(tmp_path / "star")
    with pytest.raises(InputError, match="pass model= to load"):
        merge.with_training.star.Star.load(tmp_path / "star")
    MAKE["Path"]().save(tmp_path / "path")
    with pytest.raises(InputError, match="alphas: not a field that stays behind"):
        lmc.Path.load(tmp_path / "path", alphas=3)
