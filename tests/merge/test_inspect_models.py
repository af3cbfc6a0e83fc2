"""`lmc.merge.inspect`: differences, numbers and advice for models whose relation is known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lmc
from lmc.merge.study.inspect import mean_cosine
from lmc.merge.study.survey import COLUMNS_AT_ONCE


def state(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (40, 30), "a.bias": (40,), "b.weight": (10, 40), "b.running_mean": (10,)}
    return {name: scale * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def moved(base, by, scale=1.0):
    return {name: tensor + scale * by[name] for name, tensor in base.items()}


def test_numbers_equal_those_of_flat_vectors() -> None:
    base, models = state(0), [moved(state(0), state(i), 0.1) for i in (1, 2, 3)]
    found = lmc.merge.inspect(models, base=base)
    names = ("a.weight", "a.bias", "b.weight")  # running means are no weights
    flat = np.stack([torch.cat([(m[n] - base[n]).double().flatten() for n in names]).numpy() for m in models])
    assert np.allclose(found.total.norms, np.linalg.norm(flat, axis=1), rtol=1e-6)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    assert np.allclose(found.total.cosines, unit @ unit.T)
    signs = np.sign(flat)
    conflict = ((signs > 0).any(0) & (signs < 0).any(0)).mean()
    assert found.total.conflict == pytest.approx(conflict) and 0.7 < conflict < 0.8
    assert found.total.size == flat.shape[1] == sum(layer.size for layer in found.layers)
    assert [layer.name for layer in found.layers] == ["a", "b"]
    frame = found.to_frame()
    assert frame.loc["all", "norm of models[0]"] == pytest.approx(found.total.norms[0] / found.total.base_norm)


def test_long_tensors_are_read_in_pieces() -> None:
    size = COLUMNS_AT_ONCE + 17
    a, b = ({"w": torch.randn(size, generator=torch.Generator().manual_seed(i))} for i in (0, 1))
    found = lmc.merge.inspect([a, b])
    assert found.total.norms[0] == pytest.approx(float(a["w"].double().norm()), rel=1e-9)
    assert found.total.size == size


@pytest.mark.parametrize(
    ("models", "base", "words"),
    [
        ([moved(state(0), state(1), 0.1), moved(state(0), state(1), 0.05)], state(0), "Task vectors agree"),
        ([moved(state(0), state(1), 0.1), moved(state(0), state(2), 0.1)], state(0), "share little"),
        ([moved(state(0), state(1), 0.1), moved(state(0), state(2), 0.1)], state(0), "Signs conflict"),
        ([moved(state(0), state(1), 0.2), moved(state(0), state(2), 0.02)], state(0), "10.* times as long"),
        ([state(1), state(2)], state(0), "really fine-tuned from this base"),
        ([state(0), moved(state(0), state(2), 0.1)], state(0), r"models\[0\] equals the base"),
        ([state(1), state(2)], None, "different initialisations"),
        ([moved(state(0), state(1), 0.1), moved(state(0), state(2), 0.1)], None, "one origin"),
        ([state(1)], None, "nothing to merge"),
    ],
)
def test_advice_for_relations_that_are_known(models, base, words) -> None:
    said = lmc.merge.inspect(models, base=base).advice
    assert any(re.search(words, sentence) for sentence in said), said


def test_differences_are_a_table_and_the_rest_is_still_compared() -> None:
    a, b = state(1), state(2)
    b["a.weight"] = torch.zeros(41, 30)
    b["a.bias"] = b["a.bias"].half()
    del b["b.running_mean"]
    b["extra"] = torch.zeros(2)
    found = lmc.merge.inspect([a, b], names=["one", "two"])
    assert {d.name: d.kind for d in found.differences} == {
        "a.weight": "shape", "a.bias": "dtype", "b.running_mean": "missing", "extra": "missing"
    }  # fmt: skip
    frame = found.differences_frame()
    assert frame.loc["a.weight", "two"] == "(41, 30) float32" and frame.loc["extra", "one"] == "missing"
    assert "Not one architecture: 3 tensors" in found.advice[0]
    assert found.total.size == a["b.weight"].numel() + a["a.bias"].numel()
    assert "a.weight" in found._repr_html_()


def test_ties_that_differ_are_named() -> None:
    shared = torch.randn(5, 5)
    tied, untied = {"x": shared, "y": shared}, {"x": shared.clone(), "y": shared.clone()}
    (difference,) = lmc.merge.inspect([tied, untied]).differences
    assert (difference.name, difference.kind) == ("y", "tie") and difference.found[0] == "one with x"
    assert lmc.merge.inspect([tied, {"x": shared + 1, "y": shared + 1}]).differences != ()
    both = shared + 1
    assert lmc.merge.inspect([tied, {"x": both, "y": both}]).differences == ()


def test_a_model_that_is_not_finite_is_named_and_left_out() -> None:
    a, b = state(1), state(2)
    b["b.weight"][3, 4] = torch.nan
    found = lmc.merge.inspect([a, b])
    assert found.faults == {"models[1]": "b.weight"} and np.isfinite(found.total.norms).all()
    assert any("models[1] is not finite, first in b.weight" in sentence for sentence in found.advice)


def test_checkpoints_on_disk_give_the_same_numbers(tmp_path) -> None:
    models = [moved(state(0), state(i), 0.1) for i in (1, 2)]
    for i, weights in enumerate([*models, state(0)]):
        save_file(weights, tmp_path / f"m{i}.safetensors")
    expected = lmc.merge.inspect(models, base=state(0))
    found = lmc.merge.inspect(
        [tmp_path / "m0.safetensors", str(tmp_path / "m1.safetensors")], base=tmp_path / "m2.safetensors"
    )
    assert found.names == ("m0.safetensors", "m1.safetensors")
    assert np.array_equal(found.total.cosines, expected.total.cosines)


def test_barriers_between_stored_networks() -> None:
    stored = lmc.data.checkpoint("digits-mlp64")
    a, b = stored
    found = lmc.merge.inspect([a, b, a], model=stored.model(), data=lmc.data.digits().test)
    assert found.barriers.shape == (3, 3) and found.barriers[0, 2] < 1e-6 and found.barriers[0, 1] > 0.5
    assert np.array_equal(found.barriers, found.barriers.T)
    assert any("barrier of" in sentence for sentence in found.advice)
    assert len(found.plot().data) == 2 + 3 + 1  # two matrices, a line for each model, bars


def test_barriers_have_the_unit_of_the_task() -> None:
    draw = torch.Generator().manual_seed(0)
    model = lmc.models.mlp(6, [8], 2)
    models = [{n: torch.randn(t.shape, generator=draw) for n, t in model.state_dict().items()} for _ in range(2)]
    data = lmc.Task.regression().on((torch.randn(30, 6, generator=draw), torch.randn(30, 2, generator=draw)))
    found = lmc.merge.inspect(models, model=model, data=data, progress=False)
    path = lmc.loss_path(model, *models, data, alphas=11, progress=False)
    assert found.unit == "squared error" and found.barriers[0, 1] == path.barrier
    assert "squared error" in found.advice[-1] and "nats" not in str(found)
    assert any("barrier (squared error)" in note.text for note in found.plot().layout.annotations)
    spec = lmc.permutation_spec(model, data.data[0][:2], progress=False)
    compared = lmc.align.compare(spec, model, *models, data, methods=["weight matching"], alphas=3, progress=False)
    assert compared.unit == "squared error" and "(squared error)" in compared.plot().layout.xaxis.title.text


def test_no_method_on_task_vectors_is_recommended_for_a_stranger_to_the_base() -> None:
    said = " ".join(lmc.merge.inspect([moved(state(0), state(1), 0.1), state(2)], base=state(0)).advice)
    assert "models[1] is" in said and "use align= and no task vectors" in said
    assert not any(word in said for word in ("task_arithmetic", "try ties", "model_stock"))


def test_layers_that_one_model_alone_left_as_they_were_are_said() -> None:
    frozen = moved(state(0), state(2), 0.1) | {name: t for name, t in state(0).items() if name.startswith("a.")}
    models = [moved(state(0), state(1), 0.1), frozen]
    said = [s for s in lmc.merge.inspect(models, base=state(0)).advice if "as the base has them" in s]
    assert len(said) == 1 and said[0].startswith("models[1] has 1 of ") and "first a:" in said[0]
    assert not any("as the base has them" in s for s in lmc.merge.inspect([models[0]] * 2, base=state(0)).advice)


def test_adapters_copies_frozen_layers_and_costs(tmp_path: Path) -> None:
    base = {"l0.weight": torch.randn(6, 4), "l1.weight": torch.randn(4, 6)}
    factors = {
        "base_model.model.l1.lora_A.weight": torch.randn(2, 6),
        "base_model.model.l1.lora_B.weight": torch.randn(4, 2),
    }
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file(factors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2 + ord(name)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    save_file(base, tmp_path / "base.safetensors")
    paths = [tmp_path / "a", tmp_path / "b"]
    said = lmc.merge.inspect(paths, base=tmp_path / "base.safetensors", progress=False).advice
    assert "a (rank 2), b (rank 2)" in said[0] and "extract" in said[0]
    assert "1 of 2 layers are the base's in all models, first l0" in said[1]
    assert any("same task vector" in sentence for sentence in said) and said[-1].startswith("A merge on disk reads")
    assert re.search(r"in about 1 s \(average\) to 1 s \(sce\).* 100 MB .* whole tensors take about 2\.3 kB", said[-1])
    alone = lmc.merge.inspect(paths, progress=False).advice
    assert len(alone) == 2 and all("base=" in sentence for sentence in alone)
    twins = lmc.merge.inspect([base, dict(base)], progress=False).advice
    assert twins[0] == "models[0] and models[1] have the same weights: leave one out."


def test_bad_input() -> None:
    with pytest.raises(lmc.InputError, match="expected a sequence"):
        lmc.merge.inspect(state(0))
    with pytest.raises(lmc.InputError, match="names="):
        lmc.merge.inspect([state(0), state(1)], names=["x", "x"])
    with pytest.raises(lmc.InputError, match="pass model="):
        lmc.merge.inspect([state(0), state(1)], data=(torch.zeros(1), torch.zeros(1)))


def test_mean_cosine_passes_over_zero_vectors() -> None:
    cosines = np.array([[1.0, 0.5, np.nan], [0.5, 1.0, np.nan], [np.nan, np.nan, np.nan]])
    assert mean_cosine(cosines) == 0.5 and np.isnan(mean_cosine(np.ones((1, 1))))
