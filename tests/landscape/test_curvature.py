"""Curvature: Lanczos and Hutchinson on known matrices, and the Hessian of tiny networks in full."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.landscape.curvature import Hessian, curvature, hutchinson, lanczos
from lmc.landscape.evaluation.evaluation import Objective


def network(seed=0, norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(4)] if norm else []
        return nn.Sequential(nn.Linear(5, 4), *middle, nn.Tanh(), nn.Linear(4, 3)).double()


def examples(count=40, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=random).double(), torch.randint(0, 3, (count,), generator=random)


def exact_hessian(model, data, loss=nn.functional.cross_entropy):
    """All second derivatives, one row after the other, in eval mode."""
    names, start = zip(*model.eval().named_parameters(), strict=True)
    sizes, shapes = [p.numel() for p in start], [p.shape for p in start]

    def value(flat):
        parts = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return loss(torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (data[0],)), data[1])

    return torch.autograd.functional.hessian(value, torch.cat([p.detach().reshape(-1) for p in start])).numpy()


def symmetric(eigenvalues, seed=0):
    """A matrix of given eigenvalues in a random basis."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=random, dtype=torch.float64))[0]
    return basis * values @ basis.T


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- known matrices


@pytest.mark.parametrize("top", [1, 3, 12])
def test_lanczos_run_to_the_end_is_exact(top):
    values = np.linspace(-2.0, 9.0, 12)
    found, residuals = lanczos(symmetric(values).matmul, 12, top, 12, 1e-14, seeded())
    np.testing.assert_allclose(found, [*values[::-1][:top], -2.0], atol=1e-10)
    assert residuals.max() == 0.0


def test_lanczos_stops_early_when_the_ends_are_clear():
    calls = []
    values = torch.linspace(-0.1, 0.1, 300)
    values[:3] = torch.tensor([5.0, 3.0, -2.0])
    matrix = symmetric(values)

    def product(vector):
        calls.append(1)
        return matrix @ vector

    found, residuals = lanczos(product, 300, 2, 300, 1e-4, seeded())
    np.testing.assert_allclose(found, [5.0, 3.0, -2.0], atol=1e-4)
    assert len(calls) < 30 and residuals.max() <= 5e-4


def test_residuals_bound_the_error_of_an_unfinished_run():
    values = np.linspace(0.0, 1.0, 200)
    found, residuals = lanczos(symmetric(values).matmul, 200, 2, 8, 1e-12, seeded())
    for value, residual in zip(found, residuals, strict=True):
        assert np.abs(values - value).min() <= residual + 1e-12
    assert residuals.max() > 1e-3 and found[0] < 1.0


def test_a_space_that_is_exhausted_is_opened_again():
    """A projection has two eigenvalues, so that the Krylov space has two dimensions; all five of its ones are found."""
    found, _ = lanczos(symmetric([1.0] * 5 + [0.0] * 4).matmul, 9, 5, 9, 1e-12, seeded())
    np.testing.assert_allclose(found, [1.0] * 5 + [0.0], atol=1e-9)


def test_probes_of_a_diagonal_matrix_agree():
    samples = hutchinson(torch.diag(torch.arange(6).double()).matmul, 6, 4, seeded())
    np.testing.assert_allclose(samples, 15.0)


def test_probes_have_the_trace_as_mean_and_a_known_variance():
    matrix = symmetric([4.0, 1.0, 0.5, -1.0])
    samples = hutchinson(matrix.matmul, 4, 4000, seeded())
    variance = 2.0 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    assert samples.mean() == pytest.approx(4.5, abs=5 * math.sqrt(variance / 4000))
    assert samples.var() == pytest.approx(variance, rel=0.15)


# ---- networks


@pytest.mark.parametrize("norm", [False, True])
def test_eigenvalues_and_trace_are_those_of_the_hessian_in_full(norm):
    model, data = network(norm=norm), examples()
    if norm:
        model(data[0])  # statistics of its own
    exact = exact_hessian(model, data)
    values = np.linalg.eigvalsh(exact)[::-1]
    found = curvature(model.train(), None, data, top=4, probes=400, tolerance=1e-9)
    np.testing.assert_allclose(found.eigenvalues, values[:4], atol=1e-8)
    assert found.lowest == pytest.approx(values[-1], abs=1e-8) and found.parameters == len(exact)
    assert found.trace == pytest.approx(np.trace(exact), abs=5 * found.trace_error)
    assert 0 < found.trace_error < 0.1 * np.trace(exact)
    assert model.training


def test_products_are_rows_of_the_hessian_whatever_the_batches():
    model, data = network(), examples(40)
    exact = exact_hessian(model, data)
    for size in (40, 7):
        hessian = Hessian(Objective(model, dict(model.state_dict()), data), size)
        for i in (0, 13, len(exact) - 1):
            np.testing.assert_allclose(hessian(torch.eye(len(exact)).double()[i]), exact[i], atol=1e-12)


def test_positions_that_do_not_count_do_not_count():
    inputs, targets = examples(30)
    marked = targets.clone()
    marked[::3] = -100
    keep = marked != -100
    some = curvature(network(), None, (inputs, marked), batch_size=4, probes=5)
    kept = curvature(network(), None, (inputs[keep], targets[keep]), batch_size=4, probes=5)
    assert some.trace == pytest.approx(kept.trace, rel=1e-9)
    np.testing.assert_allclose(some.eigenvalues, kept.eigenvalues, rtol=1e-9)


def test_least_squares_have_the_curvature_of_their_inputs():
    inputs = examples()[0]
    model = nn.Linear(5, 1, bias=False).double()
    found = curvature(model, None, (inputs, inputs[:, :1]), top=5, loss=nn.MSELoss(), probes=200)
    gram = 2.0 * (inputs.T @ inputs / len(inputs)).numpy()
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(gram)[::-1], rtol=1e-8)
    assert found.trace == pytest.approx(np.trace(gram), abs=5 * found.trace_error + 1e-9)


def test_logistic_regression_is_convex_and_tanh_networks_are_not():
    model = nn.Linear(5, 3).double()
    assert curvature(model, None, examples(), probes=1, tolerance=1e-9).lowest > -1e-9
    assert curvature(network(), None, examples(), probes=1, tolerance=1e-9).lowest < -1e-3


def test_a_linear_loss_is_flat():
    model = nn.Linear(5, 3).double()
    flat = curvature(model, None, examples(), probes=2, loss=lambda outputs, targets: outputs.sum(1))
    assert flat.trace == 0.0 and not flat.eigenvalues.any() and flat.lowest == 0.0


class Attention(nn.Module):
    """One head of attention over six tokens."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1))


def test_attention_has_a_curvature():
    model, random = Attention(), torch.Generator().manual_seed(0)
    data = (torch.randn(12, 6, 4, generator=random), torch.arange(12) % 3)
    hessian = Hessian(Objective(model, dict(model.state_dict()), data), 12)
    u, v = torch.randn(2, hessian.size, generator=random).double()
    assert float(u @ hessian(v)) == pytest.approx(float(v @ hessian(u)), rel=1e-4, abs=1e-5)
    assert curvature(model, None, data, probes=2).eigenvalues[0] > 0.0


def test_float32_agrees_with_float64():
    inputs, targets = examples()
    wide = curvature(network(), None, (inputs, targets), probes=10)
    narrow = curvature(network().float(), None, (inputs.float(), targets), probes=10)
    np.testing.assert_allclose(narrow.eigenvalues, wide.eigenvalues, rtol=1e-3)
    assert narrow.trace == pytest.approx(wide.trace, rel=1e-4)
    assert (narrow.residuals >= 1e-7 * narrow.eigenvalues[0]).all()  # no better than rounding


def test_weights_may_be_given_and_nothing_of_the_callers_changes():
    model, other = network(0), network(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    one, two = curvature(model, other.state_dict(), examples(), seed=3), curvature(other, None, examples(), seed=3)
    np.testing.assert_array_equal(one.eigenvalues, two.eigenvalues)
    assert one.trace == two.trace and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "Hessian of 39 parameters: top eigenvalues" in str(one) and "trace" in str(one)


# ---- bad input


@pytest.mark.parametrize(
    "options",
    [{"top": 0}, {"top": 40}, {"probes": 0}, {"steps": 2}, {"tolerance": 0.0}, {"batch_size": 0}, {"top": 1.5}],
)
def test_unusable_arguments_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        curvature(network(), None, examples(), **options)


def test_unusable_weights_and_data_are_named():
    with pytest.raises(WeightsError, match="0.bias"):
        curvature(network(), network().state_dict() | {"0.bias": torch.full((4,), math.nan).double()}, examples())
    with pytest.raises(MismatchError):
        curvature(network(), nn.Linear(5, 3), examples())
    with pytest.raises(DataError, match="targets from 0 to 9"):
        curvature(network(), None, (torch.zeros(20, 5).double(), torch.arange(20) % 10))
