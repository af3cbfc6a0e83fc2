import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lmc
from lmc import weights as W
from lmc.weights.state import finite, narrowed


def pair():
    a = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3), "h": torch.tensor([1.0], dtype=torch.float16)}
    b = {"w": torch.tensor([3.0, 6.0]), "n": torch.tensor(9), "h": torch.tensor([3.0], dtype=torch.float16)}
    return a, b


def test_lerp_is_exact_at_the_ends_and_copies_integers_from_a():
    a, b = pair()
    a["w"] = torch.rand(2) * 1e-3
    for alpha, end in ((0.0, a), (1.0, b)):
        assert torch.equal(W.lerp(a, b, alpha)["w"], end["w"])
    middle = W.lerp(a, {**b, "w": a["w"] + 2}, 0.5)
    assert torch.allclose(middle["w"], a["w"] + 1) and middle["n"] == 3
    assert middle["h"].dtype == torch.float16


def test_nothing_is_changed_or_shared():
    a, b = pair()
    W.lerp(a, b, 0.0)["w"].zero_()
    W.mean([a])["w"].zero_()
    assert a["w"].tolist() == [1.0, 2.0]


def test_mean_of_one_is_that_one_bit_for_bit():
    a = {"w": torch.randn(7, dtype=torch.bfloat16)}
    assert torch.equal(W.mean([a])["w"], a["w"])


def test_mean_accumulates_beyond_half_precision():
    many = [{"w": torch.tensor([1.0 + i / 512], dtype=torch.float16)} for i in range(256)]
    exact = sum(float(m["w"]) for m in many) / 256
    assert float(W.mean(many)["w"]) == torch.tensor(exact, dtype=torch.float16).item()


NARROW = [
    (torch.tensor([1e5], dtype=torch.bfloat16), torch.float16),
    (torch.tensor([5e4]).to(torch.float8_e5m2), torch.float8_e4m3fn),
    (torch.tensor([1e300j], dtype=torch.complex128), torch.complex64),
]


@pytest.mark.parametrize("tensor,dtype", NARROW)
def test_a_dtype_of_the_same_size_may_have_a_smaller_range(tensor, dtype):
    with pytest.raises(lmc.WeightsError, match="w: .* leaves the range of"):
        narrowed(tensor, dtype, "w")
    assert not narrowed(torch.zeros_like(tensor), dtype, "w").to(torch.complex64).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_bit_pattern_of_half_precision_is_known_as_finite_or_not(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    usual, others = every[every.isfinite()], every[~every.isfinite()]
    assert finite(usual) and finite(usual[:0]) and len(others) > 200
    assert not any(finite(torch.stack([usual[0], other])) for other in others)


def test_finite_numbers_and_their_sum():
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn):
        value = torch.tensor([1.0, 2.0]).to(dtype)
        assert finite(value) and not finite(torch.tensor([1.0, float("nan")]).to(dtype))
    assert not finite(torch.full((2,), 3e38)) and finite(torch.full((2,), 3e38, dtype=torch.float64))


def test_distance_of_checkpoints_is_that_of_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("lmc.weights.arithmetic._PART", 7)
    a, b = ({"w": torch.randn(5, 6), "c": torch.randn(4, dtype=torch.complex64), "n": torch.tensor(3)} for _ in "ab")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, weights in zip(files, (a, b), strict=True):
        save_file(weights, file)
    opened = [lmc.open_checkpoint(file) for file in files]
    assert lmc.weights.distance(*opened) == pytest.approx(lmc.weights.distance(a, b), rel=1e-12)
    assert lmc.weights.distance(opened[0], opened[0]) == 0.0
    save_file(a | {"w": torch.randn(3, 6)}, files[1])
    with pytest.raises(lmc.MismatchError, match="w: shape"):
        lmc.weights.distance(opened[0], lmc.open_checkpoint(files[1]))


def test_dot_and_distance_agree():
    a, b = pair()
    squared = W.dot(a, a) + W.dot(b, b) - 2 * W.dot(a, b)
    assert W.distance(a, b) ** 2 == pytest.approx(squared)
    assert W.distance(a, b) == pytest.approx((4 + 16 + 4) ** 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("w"), r"w: in a \(2,\) float32, missing in b"),
        (lambda b: b.update(x=torch.zeros(1)), r"x: in b \(1,\) float32, missing in a"),
        (lambda b: b.update(w=torch.zeros(3)), r"w: shape \(2,\) in a, \(3,\) in b"),
        (lambda b: b.update(w=torch.zeros(2).int()), "w: dtype float32 in a, int32 in b: not the same kind of numbers"),
        (lambda b: b.update(w=torch.zeros(2, device="meta")), "w: on cpu in a, on meta in b"),
    ],
)
def test_mismatches_name_the_tensor_and_both_sides(change, message):
    a, b = pair()
    change(b)
    with pytest.raises(lmc.MismatchError, match=message):
        W.lerp(a, b, 0.5)


def test_not_a_number_is_named_with_its_place():
    with pytest.raises(lmc.WeightsError, match="w of a: on the meta device, which holds no values"):
        W.check_finite({"w": torch.empty(2, device="meta")}, "a")
    with pytest.raises(lmc.WeightsError, match=r"w of b: 1 of 4 values .* first at \(1, 0\)"):
        W.check_finite({"w": torch.tensor([[0.0, 1.0], [float("nan"), 2.0]])}, "b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2, torch.complex64])
def test_infinity_is_found_in_every_dtype_and_large_sums_are_no_infinity(dtype):
    largest = torch.full((4, 3), torch.finfo(dtype).max, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    W.check_finite({"w": largest.to(dtype), "none": torch.empty(0, dtype=dtype)})
    broken = torch.ones_like(largest)
    broken[2, 1] = complex(1.0, -float("inf")) if dtype.is_complex else -float("inf")
    broken[3, 1] = complex(1.0, float("inf")) if dtype.is_complex else 1.0
    with pytest.raises(lmc.WeightsError, match=r"w of b: [12] of 12 values .* first at \(2, 1\)"):
        W.check_finite({"fine": largest.to(dtype), "w": broken.to(dtype)}, "b")


def test_only_modules_and_mappings_of_tensors_are_weights():
    assert list(W.as_weights(nn.Linear(2, 1))) == ["weight", "bias"]
    with pytest.raises(lmc.WeightsError, match="got int"):
        W.as_weights(3)  # type: ignore[arg-type]
    with pytest.raises(lmc.WeightsError, match="step: expected a tensor, got int"):
        W.as_weights({"step": 3})  # type: ignore[dict-item]


def test_the_mean_refuses_nonsense():
    a, b = pair()
    for models, coefficients in (([], None), ([a, b], [1.0]), ([a, b], [0.2, 0.2])):
        with pytest.raises(lmc.InputError):
            W.mean(models, coefficients)


def test_tied_tensors_are_known_by_their_first_name():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    for given in (model, model.state_dict()):
        assert W.tied_names(given) == {"b.weight": "a.weight"}
    assert W.tied_names(nn.Linear(2, 2)) == {}
