import pytest
import torch
from alignment_cases import CASES, digits

import lmc
from lmc.align.study.singular import matrices, singular_alignment
from lmc.errors import InputError, MismatchError


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_equal_networks_agree_wholly_and_unrelated_ones_hardly(name: str, gamma: float):
    case = CASES[name]()
    a = case.model.state_dict()
    same = singular_alignment(a, a, gamma=gamma)
    assert same.r == pytest.approx(1.0, abs=1e-9)
    assert all(layer.r == pytest.approx(1.0, abs=1e-9) for layer in same.layers.values())
    assert abs(singular_alignment(a, case.other(5), gamma=gamma).r) < 0.35


def test_a_planted_permutation_brings_r_back_to_one():
    case = CASES["resnet-ln"]()
    a = case.model.state_dict()
    planted = case.spec.random(0)
    moved = planted.apply(a)
    assert singular_alignment(a, moved).r < 0.2
    pi = lmc.weight_matching(case.spec, a, moved, progress=False)
    assert singular_alignment(a, pi.apply(moved)).r == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_distance_follows_from_spectra_and_agreements(name: str):
    case = CASES[name]()
    a, b = case.model.state_dict(), case.other(3)
    for key, layer in singular_alignment(a, b, gamma=0.0).layers.items():
        cross = (layer.values_a[:, None] * layer.values_b * layer.left * layer.right).sum()
        expected = layer.values_a.square().sum() + layer.values_b.square().sum() - 2 * cross
        found = (a[key].double() - b[key].double()).square().sum()
        assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_it_does_not_depend_on_scale_and_counts_the_network_with_fewer_values():
    a = {"w": torch.diag(torch.tensor([4.0, 3.0, 1.0]))}
    b = {"w": 7.0 * torch.diag(torch.tensor([4.0, 1.0, 0.1]))}
    found = singular_alignment(a, b, gamma=0.5).layers["w"]
    assert found.kept == 1 and found.agreement == pytest.approx(1.0)
    assert singular_alignment(a, {"w": -a["w"]}, gamma=0.0).r == pytest.approx(-1.0)
    assert singular_alignment({"w": torch.zeros(3, 3)}, {"w": torch.zeros(3, 3)}).r == 0.0


def test_matrices_are_the_weights_with_rows_and_columns():
    case = CASES["vit"]()
    names = matrices(case.model.state_dict())
    assert "patch.weight" in names and names["patch.weight"].shape == (8, 4)
    assert "class_token" not in names and "norm.weight" not in names and "position" not in names


def test_matching_trained_networks_raises_r():
    trained = digits()
    a, b = trained.weights[:2]
    pi = lmc.weight_matching(trained.spec, a, b, progress=False)
    assert singular_alignment(a, pi.apply(b)).r > singular_alignment(a, b).r + 0.1


def test_it_prints_and_becomes_a_frame():
    case = CASES["mlp"]()
    found = singular_alignment(case.model, case.model)
    assert repr(found) == "SingularAlignment(R = 1.000 at gamma = 0.3, 3 layers)"
    frame = found.to_frame()
    assert list(frame.layer) == ["fc1.weight", "fc2.weight", "head.weight"] and (frame.kept > 0).all()


def test_bad_input():
    case = CASES["mlp"]()
    with pytest.raises(InputError, match="gamma=2"):
        singular_alignment(case.model, case.model, gamma=2.0)
    with pytest.raises(MismatchError):
        singular_alignment(case.model, CASES["cnn"]().model)
