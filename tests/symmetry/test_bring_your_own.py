"""What happens to the caller's module, and to modules that cannot be read."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lmc


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(5, 10), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.norm(self.a(x)))))


def sizes(spec: lmc.PermutationSpec) -> list[int]:
    return sorted(group.size for group in spec.groups.values())


def test_training_mode_is_ignored_and_kept() -> None:
    model = Block().train()
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    spec = lmc.permutation_spec(model, torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    assert sizes(spec) == [10]
    assert model.training and model.norm.training and not model.drop.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert "norm.running_mean" in spec.buffers


def test_gradients_hooks_and_requires_grad_are_kept() -> None:
    model = Block()
    model.a.weight.requires_grad_(False)
    model(torch.randn(4, 5)).sum().backward()
    gradient = model.b.weight.grad
    lmc.permutation_spec(model, torch.randn(4, 5))
    assert model.b.weight.grad is gradient and not model.a.weight.requires_grad and model.a.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = Block().eval().to(dtype)
    spec = lmc.permutation_spec(model, torch.randn(4, 5).to(dtype))
    assert sizes(spec) == [10]
    assert next(model.parameters()).dtype == dtype


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Block().eval()
    spec = lmc.permutation_spec(model, torch.randn(4, 5, device="meta"))
    assert sizes(spec) == [10]


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises((lmc.TraceError, lmc.InputError), match=r"4.*7|shape|mat1"):
        lmc.permutation_spec(Block(), torch.randn(4, 7))


def test_missing_argument() -> None:
    with pytest.raises((lmc.TraceError, lmc.InputError), match="x"):
        lmc.permutation_spec(Block(), ())


class Several(nn.Module):
    """Returns its hidden state too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(h))), h


def test_outputs_decide_what_moves() -> None:
    model, x = Several(), torch.randn(4, 5)
    assert sizes(lmc.permutation_spec(model, x)) == [8]  # the hidden state is an output: it stays
    assert sizes(lmc.permutation_spec(model, x, outputs=0)) == [8, 10]
    assert sizes(lmc.permutation_spec(model, x, outputs=1)) == []
    # whoever only looks at the sum of the outputs may exchange them too
    assert sizes(lmc.permutation_spec(model, x, outputs=lambda result: result[0].sum(1))) == [3, 8, 10]


def test_keyword_inputs() -> None:
    assert sizes(lmc.permutation_spec(Several(), {"x": torch.randn(4, 5)}, outputs=0)) == [8, 10]


class Unknown(nn.Module):
    """A matrix exponential between two free layers: not understood, so its neighbours stay, the others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.c = (
            nn.Linear(5, 10),
            nn.Linear(10, 6),
            nn.Parameter(torch.randn(6, 6)),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(torch.relu(self.a(x))))
        return self.c(h @ torch.linalg.matrix_exp(self.mix))


def test_unknown_operators_freeze_with_a_reason() -> None:
    spec = lmc.permutation_spec(Unknown(), torch.randn(4, 5))
    assert sizes(spec) == [10]
    reasons = " ".join(str(reason) for (name, _), reason in spec.frozen.items() if name == "mix")
    assert "matrix_exp" in reasons, spec.frozen


def test_every_axis_left_alone_has_a_reason() -> None:
    spec = lmc.permutation_spec(Unknown(), torch.randn(4, 5))
    moving = {
        (name, d)
        for group in spec.groups.values()
        for name, tables in group.tables.items()
        for t in tables
        for d in t.dims
    }
    for name, shape in spec.shapes.items():
        for axis, n in enumerate(shape):
            assert n == 1 or (name, axis) in moving or spec.frozen.get((name, axis)), (name, axis)


class Options(nn.Module):
    """Takes flags, a list of tensors, a dict and nothing at all, as forward methods do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 10), nn.Linear(10, 3)

    def forward(
        self,
        xs: list[Tensor],
        extra: dict[str, Tensor],
        mask: Tensor | None = None,
        scale: float = 1.0,
        mode: str = "sum",
    ) -> Tensor:
        h = torch.relu(self.a(torch.stack(xs).sum(0) + extra["shift"])) * scale
        if mask is not None:
            h = h * mask
        return self.b(h if mode == "sum" else -h)


@pytest.mark.parametrize("mask", [None, torch.rand(4, 1)])
def test_inputs_that_are_not_tensors(mask: Tensor | None) -> None:
    x = torch.randn(4, 5)
    inputs = {"xs": [x, x + 1], "extra": {"shift": x}, "mask": mask, "scale": 0.5, "mode": "negative"}
    spec = lmc.permutation_spec(Options(), inputs)
    assert sizes(spec) == [10]
    spec.certify(Options(), inputs)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_compiled_module(backend: str) -> None:
    spec = lmc.permutation_spec(torch.compile(Block(), backend=backend), torch.randn(4, 5))
    assert sizes(spec) == [10]
    assert all(name.startswith("_orig_mod.") for name in spec.shapes)


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(2, 5))])
def test_torchscript_is_recorded_alone_and_as_a_part(compiled: Callable) -> None:
    plain = Block().eval()
    expected = lmc.permutation_spec(plain, torch.randn(4, 5))
    spec = lmc.permutation_spec(compiled(plain), torch.randn(4, 5))
    assert spec.patterns == expected.patterns and sizes(spec) == [10]
    assert spec.certificate is not None and spec.certificate.max_error < 1e-9
    part = nn.Sequential(nn.Linear(7, 5), compiled(plain))
    assert sorted(sizes(lmc.permutation_spec(part, torch.randn(4, 7)))) == [5, 10]


def test_frozen_torchscript_has_no_weights() -> None:
    frozen = torch.jit.freeze(torch.jit.script(Block().eval()))
    data = torch.randn(4, 5), torch.arange(4) % 3
    for call in (
        lambda: lmc.permutation_spec(frozen, data[0]),
        lambda: lmc.merge.average([frozen, frozen]),
        lambda: lmc.loss_path(frozen, frozen, frozen, data, progress=False),
    ):
        with pytest.raises(lmc.WeightsError, match="was frozen.*from before"):
            call()


def test_uninitialised_module() -> None:
    with pytest.raises(lmc.LmcError):
        lmc.permutation_spec(nn.Sequential(nn.LazyLinear(10), nn.ReLU(), nn.Linear(10, 3)), torch.randn(4, 5))
    with pytest.raises(lmc.WeightsError, match="0.weight: a lazy layer.*call the model once"):
        lmc.merge.average([nn.Sequential(nn.LazyLinear(10)) for _ in range(2)])


def test_one_layer_used_for_everything() -> None:
    """A square layer applied three times: the input's order holds its units in place."""
    layer = nn.Linear(6, 6)
    assert (
        sizes(lmc.permutation_spec(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer), torch.randn(4, 6))) == []
    )


def test_batch_of_one() -> None:
    spec = lmc.permutation_spec(Block().eval(), torch.randn(1, 5))
    assert sizes(spec) == [10]
    spec.certify(Block(), torch.randn(1, 5), also=torch.randn(7, 5))
