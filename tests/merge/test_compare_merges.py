"""`lmc.merge.compare`: chosen on validation data only, nothing lost, every method on one table."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_merges_of_digits import Bench

import lmc
from lmc.merge.study.candidates import CANDIDATES, Candidate
from lmc.weights import distance

TASKS = ("012", "345", "67", "89")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(0)


def named(parts):
    return dict(zip(TASKS, parts, strict=True))


def test_all_methods_on_four_tasks(bench: Bench) -> None:
    found = lmc.merge.compare(
        bench.base, bench.models, named(bench.validation), test=named(bench.test), base=bench.base,
        data=bench.inputs, methods=[name for name in CANDIDATES if name not in ("slerp", "adamerging")], progress=False,
    )  # fmt: skip
    rows = {entry.method: entry for entry in found.entries}
    assert len(rows) == len(CANDIDATES) - 2 + 2 and not any(entry.note for entry in found.entries)
    scores = [entry.validation for entry in found.entries]
    assert scores == sorted(scores, reverse=True)
    assert found.best.test > rows["best single model"].test + 0.4
    assert bench.mean(found.weights, bench.validation) == pytest.approx(found.best.validation)
    assert bench.mean(found.weights, bench.test) == pytest.approx(found.best.test)
    assert found.best.tasks == pytest.approx(dict(zip(TASKS, bench.accuracies(found.weights, bench.test), strict=True)))
    frame = found.to_frame()
    assert list(frame.columns) == ["options", "validation", "test", *TASKS, "tried", "seconds"]
    assert len(found.plot().data) == 3


def test_adapters_are_compared(bench: Bench, tmp_path) -> None:
    """Folders of adapters, opened, beside a full model: as the models that they make of the base."""
    base = bench.base.state_dict()
    name = next(n for n, tensor in base.items() if n.endswith(".weight") and tensor.ndim == 2)
    parts = {f"base_model.model.{name.removesuffix('weight')}lora_{k}.weight": torch.ones(s) / 100
             for k, s in (("A", (2, base[name].shape[1])), ("B", (len(base[name]), 2)))}  # fmt: skip
    save_file(parts, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    adapter = lmc.open_checkpoint(tmp_path)
    data = named(bench.validation)
    methods = ["average", "task_arithmetic"]
    models = [adapter, bench.models[1]]
    found = lmc.merge.compare(bench.base, models, data, base=bench.base, methods=methods, progress=False)
    whole = [adapter.on(base).load(), bench.models[1]]
    assert found.weights.keys() == base.keys() and not any(entry.note for entry in found.entries)
    again = lmc.merge.compare(bench.base, whole, data, base=bench.base, methods=methods, progress=False)
    assert [e.validation for e in found.entries] == [e.validation for e in again.entries]


def test_a_budget_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a merge moves on by a second: five methods, a budget of four, each with an equal share of what is left."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("lmc.merge.study.compare.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slow(models, *, base, scale):
        clock.now += 1.0
        return lmc.merge.task_arithmetic(models, base=base, scale=scale)

    methods = {name: (slow, {"scale": (0.1, 0.2, 0.3, 0.4)}) for name in "abcde"}
    found = lmc.merge.compare(bench.base, bench.models, named(bench.validation), base=bench.base, methods=methods,
                              seconds=4.0, progress=False)  # fmt: skip
    rows = {entry.method: entry for entry in found.entries}
    assert [rows[name].tried for name in "abcde"] == [1, 1, 1, 1, 0] and clock.now == 4.0
    assert "the budget of 4 s was spent" in rows["e"].note
    clock.now = 0.0
    found = lmc.merge.compare(bench.base, bench.models, named(bench.validation), base=bench.base, methods=methods,
                              seconds=9.0, progress=False)  # fmt: skip
    assert [e.tried for e in sorted(found.entries, key=lambda e: e.method) if e.method in methods] == [2, 2, 2, 2, 1]


def test_options_are_chosen_by_validation_alone(bench: Bench) -> None:
    grid = {"scale": [0.1, 0.5, 3.0]}
    methods = {"mine": (lmc.merge.task_arithmetic, grid)}
    by_hand = [lmc.merge.task_arithmetic(bench.models, base=bench.base, scale=s) for s in grid["scale"]]
    scores = [bench.mean(weights, bench.validation) for weights in by_hand]
    wrong = named([(x, (y + 1) % 10) for x, y in bench.test])  # a test set that would choose otherwise
    found = lmc.merge.compare(
        bench.base, bench.models, named(bench.validation), test=wrong, base=bench.base, methods=methods, progress=False
    )
    assert found.best.options["scale"] == grid["scale"][int(np.argmax(scores))] == 0.5
    assert found.best.validation == pytest.approx(max(scores)) and found.best.tried == 3
    assert found.best.test < 0.3 and distance(found.weights, by_hand[1]) == 0.0


def test_half_of_plain_data_is_held_out(bench: Bench) -> None:
    x, y = torch.cat([p[0] for p in bench.validation]), torch.cat([p[1] for p in bench.validation])
    found = lmc.merge.compare(bench.base, bench.models, (x, y), methods=["average"], progress=False)
    soup = lmc.merge.average(bench.models)
    assert found.best.validation == pytest.approx(bench.accuracies(soup, [(x[::2], y[::2])])[0])
    assert found.best.test == pytest.approx(bench.accuracies(soup, [(x[1::2], y[1::2])])[0])


def test_a_data_set_is_tested_on_its_test_split() -> None:
    stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
    a, b = stored
    spec = lmc.permutation_spec(stored.model(), data.test[0][:2])
    plain, aligned = (
        lmc.merge.compare(stored.model(), [a, b], data, methods=["average"], align=align, progress=False)
        for align in (None, spec)
    )
    evaluated = lmc.landscape.evaluate(stored.model(), lmc.merge.average([a, b]), data)
    assert plain.best.validation == pytest.approx(evaluated["train"].accuracy)
    assert plain.best.test == pytest.approx(evaluated["test"].accuracy) and aligned.best.test > plain.best.test + 0.05


def test_a_function_of_weights_scores_as_well(bench: Bench) -> None:
    found = lmc.merge.compare(
        bench.base,
        bench.models,
        lambda w: -float(w["0.weight"].norm()),
        methods=["average", "karcher_mean"],
        progress=False,
    )
    assert found.best.validation < 0 and math.isnan(found.best.test)


def test_a_method_that_fails_keeps_its_row(bench: Bench) -> None:
    def broken(models, *, base=None):
        raise lmc.InputError("no way")

    found = lmc.merge.compare(
        bench.base,
        bench.models,
        named(bench.validation),
        methods={"broken": broken, "fine": lmc.merge.average},
        progress=False,
    )
    assert {e.method: e.note for e in found.entries}["broken"] == "no way" and found.best.method == "fine"
    assert "no way" in repr(found)
    with pytest.raises(lmc.InputError, match="no method worked: broken: no way"):
        lmc.merge.compare(bench.base, bench.models, named(bench.validation), methods={"broken": broken}, progress=False)


def test_an_interrupt_returns_what_is_done(bench: Bench) -> None:
    def stopped(models, *, base=None):
        raise KeyboardInterrupt

    methods = {"fine": lmc.merge.average, "stopped": stopped, "never": lmc.merge.average}
    with pytest.warns(UserWarning, match="interrupted"):
        found = lmc.merge.compare(bench.base, bench.models, named(bench.validation), methods=methods, progress=False)
    assert [e.method for e in found.entries if e.method in methods] == ["fine"]


def test_grids_are_cut_evenly() -> None:
    candidate = Candidate(lambda task: {}, {"a": (1, 2, 3), "b": (1, 2, 3, 4)})
    assert len(candidate.options(12)) == 12
    few = candidate.options(3)
    assert few[0] == {"a": 1, "b": 1} and few[-1] == {"a": 3, "b": 4} and len(few) == 3
    assert candidate.options(1) == [{"a": 1, "b": 1}]


def test_nothing_given_is_changed(bench: Bench) -> None:
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in [bench.base, *bench.models]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lmc.merge.compare(bench.base, bench.models, named(bench.validation), base=bench.base, methods=["ties", "regmean"],
                          evaluations=2, progress=False)  # fmt: skip
    after = [m.state_dict() for m in [bench.base, *bench.models]]
    assert all(torch.equal(old[n], new[n]) for old, new in zip(before, after, strict=True) for n in old)


def test_bad_input(bench: Bench) -> None:
    validation = named(bench.validation)
    for match, arguments in {
        "'tie' is none of": {"methods": ["tie"]},
        "expected a list of names": {"methods": "ties"},
        "evaluations=0": {"evaluations": 0},
        "test has the tasks": {"test": {"other": bench.test[0]}},
        "give one of these": {"metric": "f1"},
        "positive budget": {"seconds": 0.0},
        "expected method": {"methods": {"x": 3}},
    }.items():
        with pytest.raises(lmc.InputError, match=match):
            lmc.merge.compare(bench.base, bench.models, validation, progress=False, **arguments)
    with pytest.raises(lmc.InputError, match="a sequence"):
        lmc.merge.compare(bench.base, bench.base, validation, progress=False)


class OwnLoss(torch.nn.Module):
    """It computes its loss when it is given targets, and takes them by name."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x, labels=None):
        found = self.layer(x)[:, 0]
        loss = None if labels is None else (found - labels).square().mean()
        return {"logits": found, "loss": loss}


def test_half_of_a_mapping_keeps_the_name_of_its_targets() -> None:
    models, x = [OwnLoss(0), OwnLoss(1)], torch.randn(12, 4)
    whole = {"x": x, "labels": x.sum(1)}
    for data in (whole, [{name: tensor[k : k + 4] for name, tensor in whole.items()} for k in (0, 4, 8)]):
        found = lmc.merge.compare(models[0], models, data, methods=["average"], progress=False)
        assert found.unit == "" and all(math.isfinite(entry.validation) for entry in found.entries)
