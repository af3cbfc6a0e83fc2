"""The merge mixer's numbers: sums of task vectors by hand, exact on its grid."""

import pytest
import torch

import lmc
from lmc.merge.study.mixer import LEVELS, MOST_POINTS, _thirds


@pytest.fixture(scope="module")
def case():
    draw = torch.Generator().manual_seed(0)
    model = lmc.models.mlp(16, [8, 6], 3)
    base, a, b = ({k: torch.randn(v.shape, generator=draw) for k, v in model.state_dict().items()} for _ in range(3))
    tasks = {n: (torch.randn(60, 16, generator=draw), torch.randint(3, (60,), generator=draw)) for n in ("x", "y")}
    return model, base, [a, b], tasks, lmc.merge.mixer(model, [a, b], tasks, base=base, progress=False)


def test_weights_are_sums_of_task_vectors_by_group(case) -> None:
    _, base, (a, b), _, mixer = case
    assert list(mixer.groups) == ["fc1", "fc2", "head"] and mixer.names == ("x", "y")
    rows = [[0.5, 0.0], [0.0, 1.2], [0.3, 0.7]]
    merged = mixer.weights(rows)
    for name, tensor in merged.items():
        ca, cb = rows[["fc1", "fc2", "head"].index(name.split(".")[0])]
        assert torch.allclose(tensor, base[name] + ca * (a[name] - base[name]) + cb * (b[name] - base[name]), atol=1e-6)
    same = lmc.merge.task_arithmetic([a, b], base=base, **mixer.options(rows))
    assert all(torch.equal(same[name], merged[name]) for name in merged)


def test_the_grid_holds_scores_of_whole_models(case) -> None:
    model, base, models, tasks, mixer = case
    assert mixer.grid.shape == (16, 16, 2) and mixer.levels[[0, 10, 15]].tolist() == [0.0, 1.0, 1.5]
    for i, j in ((0, 0), (3, 7), (10, 10), (15, 2)):
        assert mixer.grid[i, j].tolist() == list(mixer.scores([mixer.levels[i], mixer.levels[j]]).values())
    expected = [
        [lmc.landscape.evaluate(model, w, part)["data"].accuracy for part in tasks.values()] for w in [*models, base]
    ]
    assert mixer.own.tolist() == expected
    best = sum(mixer.scores(mixer.best).values()) / 2
    assert best == pytest.approx(mixer.grid.mean(-1).max())


def test_tasks_of_other_kinds_have_measures_of_their_own(case) -> None:
    model, base, models, tasks, _ = case
    draw = torch.Generator().manual_seed(1)
    numbers = tasks["x"][0], torch.randn(60, 3, generator=draw)
    mixed = {"classes": tasks["x"], "numbers": lmc.Task.regression().on(numbers)}
    made = lmc.merge.mixer(model, models, mixed, base=base, progress=False)
    assert (
        made.measures == ("accuracy", "loss") and made.units == ("", "squared error") and made.higher == (True, False)
    )
    scores = made.scores([0.5, 0.5])
    with torch.no_grad():
        outputs = torch.func.functional_call(model, dict(made.weights([0.5, 0.5])), (numbers[0],))
    assert scores["numbers"] == pytest.approx(float((outputs - numbers[1]).square().mean()))
    assert scores["classes"] == pytest.approx(float((outputs.argmax(1) == tasks["x"][1]).float().mean()))
    losses = lmc.merge.mixer(
        model, models, {"a": numbers, "b": numbers}, base=base, loss=lmc.Task.regression(), progress=False
    )
    best = sum(losses.scores(losses.best).values()) / 2
    assert best == pytest.approx(losses.grid.mean(-1).min())
    drawn = made.explore().get_state()["data"]
    assert [m["unit"] for m in drawn["measures"]] == ["%", "squared error"]
    assert drawn["own"][0] == pytest.approx([100 * made.own[0, 0], made.own[0, 1]], abs=1e-3)
    both = lmc.merge.mixer(model, models, tasks, base=base, metric="loss", progress=False)
    assert both.measures == ("loss", "loss") and both.units == ("nats", "nats") and not any(both.higher)


def test_sliders_can_stand_on_every_level() -> None:
    for count, levels in LEVELS.items():
        steps = [20 * level for level in levels]
        assert steps == [round(step) for step in steps] and len(levels) ** count <= MOST_POINTS
        assert levels[0] == 0.0 and 1.0 in levels and list(levels) == sorted(levels)


def test_stretches_of_layers() -> None:
    groups = _thirds([f"blocks.{i}" for i in range(7)])
    assert [len(part) for part in groups.values()] == [2, 3, 2]
    assert [module for part in groups.values() for module in part] == [f"blocks.{i}" for i in range(7)]
    assert list(_thirds(["fc1", "fc2", "fc3", "head"])) == ["fc1", "fc2 – fc3", "head"]


def test_the_widget_starts_at_the_average_and_refuses_other_shapes(case) -> None:
    import traitlets

    mixer = case[-1]
    widget = mixer.explore()
    assert widget.coefficients == [[0.5, 0.5]] * 3
    other = mixer.explore()
    widget.coefficients = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    assert other.coefficients == widget.coefficients
    told = widget.answer(widget.coefficients)["values"]
    assert told == [100 * value for value in mixer.scores(widget.coefficients).values()]
    with pytest.raises(traitlets.TraitError, match="3 rows of 2"):
        widget.coefficients = [[0.1, 0.2]]


def test_groups_of_ones_own_and_bad_input(case) -> None:
    model, base, models, tasks, _ = case
    made = lmc.merge.mixer(
        model, models, tasks, base=base, groups={"hidden": ["fc1", "fc2"], "head": "head"}, progress=False
    )
    assert made.options([[1.0, 0.0], [0.0, 1.0]])["weights"] == {"fc1": [1, 0], "fc2": [1, 0], "head": [0, 1]}
    with pytest.raises(lmc.InputError, match="fc2.weight is in none"):
        lmc.merge.mixer(model, models, tasks, base=base, groups={"a": "fc1", "b": "head"}, progress=False)
    with pytest.raises(lmc.InputError, match="a and b"):
        lmc.merge.mixer(model, models, tasks, base=base, groups={"a": "*", "b": "head"}, progress=False)
    with pytest.raises(lmc.InputError, match="coefficients of shape"):
        made.weights([[1.0, 2.0, 3.0]])
    with pytest.raises(lmc.InputError, match="a mapping of task names"):
        lmc.merge.mixer(model, models, tasks["x"], base=base)
