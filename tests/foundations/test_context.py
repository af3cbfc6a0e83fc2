"""The public doors: one known state of torch inside, the caller's afterwards."""

import inspect
import warnings

import pytest
import torch
from torch import nn

import lmc
from lmc.core.context import callers_dtype, own_context, warn


@own_context
def state(value: object = None, *, other: object = None) -> tuple:
    """What is set inside."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.empty(0).device.type,
    )


KNOWN = (True, False, False, torch.float32, "cpu")


def test_the_state_is_known_inside_and_the_callers_afterwards():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            assert state() == KNOWN
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            assert torch.get_default_dtype() == torch.float64 and torch.empty(0).is_meta
        with torch.no_grad():
            assert state() == KNOWN and not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(before)


def test_the_state_comes_back_after_an_error():
    @own_context
    def fails() -> None:
        raise ValueError

    with torch.no_grad():
        with pytest.raises(ValueError):
            fails()
        assert not torch.is_grad_enabled()


def test_inference_tensors_are_copied_wherever_they_are():
    with torch.inference_mode():
        tensor, model = torch.ones(2), nn.Linear(2, 2)
    given = [{"a": tensor, "b": (tensor, [tensor])}, model]

    @own_context
    def found(values: list) -> list:
        inner = values[0]
        return [inner["a"], inner["b"][0], inner["b"][1][0], *values[1].parameters()]

    assert not any(t.is_inference() for t in found(given))
    assert given[0]["a"] is tensor and tensor.is_inference() and model.weight.is_inference()


def test_arguments_without_inference_tensors_are_the_very_same():
    @own_context
    def same(value: object) -> object:
        return value

    value = [{"a": torch.ones(2)}]
    assert same(value) is value


def test_signature_and_docstring_are_the_functions_own():
    assert state.__doc__ == "What is set inside." and list(inspect.signature(state).parameters) == ["value", "other"]
    assert "alphas" in inspect.signature(lmc.loss_path).parameters


def test_modules_run_under_the_callers_default_dtype():
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.linear(x) @ torch.eye(4))  # of the default dtype

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        models = [Makes() for _ in range(3)]
        x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
        spec = lmc.permutation_spec(models[0], x, progress=False)
        path = lmc.loss_path(*models, (x, y), alphas=3, progress=False)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)
    assert callers_dtype() == torch.float32 and spec.certificate and path.complete


def test_float32_modules_that_make_tensors_are_certified_in_double_precision():
    class Makes(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](torch.relu(self[0](x)) @ torch.eye(5))

    spec = lmc.permutation_spec(Makes(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(2, 4), progress=False)
    assert spec.certificate is not None


def test_a_warning_points_at_the_callers_line():
    data = torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lmc.loss_path(model, model, model, data, alphas=3, repair=None, progress=False)
        lmc.loss_plane(model, [_other(model, seed) for seed in range(3)], data, resolution=5, repair=None)
        own_context(warn)("mine")
    assert {w.filename for w in caught if w.category is UserWarning} == {__file__} and len(caught) >= 3


def _other(model: nn.Module, seed: int) -> dict:
    rng = torch.Generator().manual_seed(seed)
    return {
        k: v + torch.rand(v.shape, generator=rng) if v.is_floating_point() else v for k, v in model.state_dict().items()
    }


def test_checkpoints_among_the_arguments_are_not_read():
    """A mapping that reads each tensor from disk is passed on as it is."""
    from collections.abc import Mapping

    from lmc.core.context import own_context

    class Lazy(Mapping):
        def __getitem__(self, name):
            raise AssertionError("read")

        def __iter__(self):
            return iter(["a"])

        def __len__(self):
            return 1

    given = Lazy()
    assert own_context(lambda models: models[0])([given]) is given


def test_parametrized_weights_are_computed_anew():
    torch.manual_seed(0)
    a, b = (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)) for _ in range(2))
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    expected = lmc.loss_path(a, a, b, (x, y), alphas=3, progress=False).values["data"]["loss"]
    with nn.utils.parametrize.cached():
        a(x)
        found = lmc.loss_path(a, a, b, (x, y), alphas=3, progress=False).values["data"]["loss"]
        kept = dict(nn.utils.parametrize._cache)
    assert found == pytest.approx(expected) and kept
    assert not nn.utils.parametrize._cache
