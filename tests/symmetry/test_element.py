"""Elements of the whole symmetry group: laws of a group, the same function, files."""

import pytest
import torch
from torch import Tensor, nn

import lmc
from tests.small_models import Attention


class Block(nn.Module):
    """Heads, a rectified layer, a batch norm and a stream between them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(width=6, heads=2, qk=3, v=3), nn.BatchNorm1d(4)
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.attention(x).mean(1))
        return self.b(torch.relu(self.a(h)))


@pytest.fixture(scope="module")
def world() -> tuple[nn.Module, Tensor, lmc.PermutationSpec]:
    torch.manual_seed(0)
    model, x = Block().double().eval(), torch.randn(6, 4, 5, dtype=torch.float64)
    return model, x, lmc.permutation_spec(model, x, continuous=True, progress=False)


def close(a, b) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-11) for name in a)


def test_it_keeps_the_function_and_is_certified(world):
    model, x, spec = world
    element = lmc.Element.random(spec, 1)
    moved = element.apply(model)
    assert not close(moved, model.state_dict())
    assert torch.allclose(torch.func.functional_call(model, moved, (x,)), model(x), rtol=1e-9, atol=1e-10)
    proof = element.certify(model, x)
    assert proof.max_error < 1e-10 and proof.power > 1e-4 and set(proof.families) == set(spec.families)
    group = next(iter(element.factors))
    name = next(iter(element.factors[group]))
    broken = element.factors | {group: element.factors[group] | {name: 2 * element.factors[group][name]}}
    with pytest.raises(lmc.CertificateError, match="another function"):
        lmc.Element(spec, element.indices, broken).certify(model, x)


def test_the_laws_of_a_group(world):
    model, _, spec = world
    w = model.state_dict()
    e, f, g = (lmc.Element.random(spec, seed) for seed in (1, 2, 3))
    assert close(e.compose(f).apply(w), e.apply(f.apply(w)))
    assert close(e.compose(f).compose(g).apply(w), e.compose(f.compose(g)).apply(w))
    assert close(e.inverse().apply(e.apply(w)), w) and e.compose(e.inverse()).is_identity(1e-9)
    assert not e.is_identity()


def test_a_permutation_is_the_special_case(world):
    model, x, spec = world
    pi = spec.random(4)
    element = lmc.Element.of(pi)
    assert all(torch.equal(t, element.apply(model)[n]) for n, t in pi.apply(model).items())
    assert element.permutation == pi and element.certify(model, x).max_error < 1e-12
    other = lmc.Element.random(spec, 5)
    assert close(other.compose(pi).apply(model), other.apply(pi.apply(model)))


def test_what_it_does_keeps_dtypes_and_is_read_back(world, tmp_path):
    model, _, spec = world
    element = lmc.Element.random(spec, 6)
    single = {n: t.float() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    assert {n: t.dtype for n, t in element.apply(single).items()} == {n: t.dtype for n, t in single.items()}
    element.save(tmp_path / "element")
    again = lmc.Element.load(tmp_path / "element")
    assert all(torch.equal(t, again.apply(single)[n]) for n, t in element.apply(single).items())
    assert again.spec.continuous == spec.continuous
    assert "mixed" in repr(element) and set(element.to_frame()["done"]) <= {"", "scaled", "mixed"}


def test_a_value_that_leaves_the_range_of_its_dtype_is_named(world):
    model, _, spec = world
    half = {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    with pytest.raises(lmc.WeightsError, match=r"a\.weight: .* range of float16"):
        lmc.Element(spec, spec.identity().indices, {"a": {"a.weight": torch.full((5,), 1e7)}}).apply(half)


def test_factors_must_fit(world):
    _, _, spec = world
    identity = spec.identity().indices
    with pytest.raises(lmc.SpecError, match="not a group"):
        lmc.Element(spec, identity, {"nothing": {}})
    with pytest.raises(lmc.SpecError, match="no occurrence 'b.bias'"):
        lmc.Element(spec, identity, {"a": {"b.bias": torch.ones(5)}})
    with pytest.raises(lmc.SpecError, match="expected"):
        lmc.Element(spec, identity, {"a": {"a.weight": torch.ones(4)}})


def test_a_spec_shows_and_keeps_what_its_groups_admit(world, tmp_path):
    _, _, spec = world
    assert "+ scale" in repr(spec) and "general linear" in repr(spec) and "beyond permutations" in spec._repr_html_()
    assert "general linear" in str(spec.plot().layout.xaxis.ticktext) and "beyond" in spec.to_frame()
    spec.save(tmp_path / "spec.json")
    assert lmc.PermutationSpec.load(tmp_path / "spec.json").continuous == spec.continuous
    rest = spec.without("*attention*")
    assert (
        rest.continuous is not None and "a" in rest.continuous.kinds and len(rest.continuous.kinds) < len(spec.families)
    )
    assert lmc.Element.random(rest, 0).factors
