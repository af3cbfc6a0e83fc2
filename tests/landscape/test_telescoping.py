"""The telescoping account of a run, and the change of gradients along it (Jeffares et al. 2024)."""

import numpy as np
import pytest
import torch
from support import blobs, classifier
from torch import nn

import lmc


def run(model: nn.Module, steps: int = 6, lr: float = 5e-2) -> list[dict[str, torch.Tensor]]:
    """The weights before the first and after every step of plain gradient descent, in float64."""
    model = model.double()
    inputs, targets = blobs(64, 0)
    found = [{k: v.clone() for k, v in model.state_dict().items()}]
    for _ in range(steps):
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs.double()), targets).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        found.append({k: v.clone() for k, v in model.state_dict().items()})
    return found


INPUTS, LABELS = blobs(20, 1)


def test_a_linear_network_is_accounted_for_exactly():
    model = nn.Linear(8, 4)
    found = lmc.landscape.telescope(model, run(model), INPUTS)
    assert found.errors.max() < 1e-13 and found.linear.max() < 1e-13
    assert np.allclose(found.approximation, found.end, atol=1e-12) and np.abs(found.end - found.start).mean() > 1e-3


def test_terms_of_layers_add_up_and_one_step_is_the_linearisation():
    model = classifier(0)
    steps = run(model)
    found = lmc.landscape.telescope(model, steps, INPUTS)
    assert list(found.moved) == ["0", "2"] and all(len(size) == 6 for size in found.sizes.values())
    error = np.abs(found.end - found.start - sum(found.moved.values())).mean()
    assert error == pytest.approx(found.errors[-1], rel=1e-9) and 0 < found.errors[-1] < found.linear[-1]
    once = lmc.landscape.telescope(model, steps[:2], INPUTS)
    assert once.errors[1] == pytest.approx(once.linear[1], rel=1e-9) and once.errors[1] > 0


def test_smaller_steps_along_the_same_way_divide_the_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))  # smooth, so that the law holds exactly
    ends = run(model, 1, lr=1.0)
    errors = []
    for parts in (1, 2, 4, 8):
        way = (lmc.weights.lerp(*ends, k / parts) for k in range(parts + 1))  # a generator: nothing is held
        errors.append(lmc.landscape.telescope(model, way, INPUTS).errors[-1])
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.6 < ratio < 2.6 for ratio in ratios), ratios


def test_training_records_what_the_telescope_takes():
    model = lmc.models.mlp(8, [6], 4)
    trained = lmc.training.train(
        model, blobs(64, 0), seeds=[0, 1], epochs=2, batch_size=16, record=True, progress=False
    )
    assert [len(steps) for steps in trained.steps] == [9, 9]
    assert all(torch.equal(trained.steps[1][-1][k], trained[1][k]) for k in trained[1])
    found = lmc.landscape.telescope(model, trained.steps[0], INPUTS)
    assert len(found.errors) == 9 and found.errors[-1] < found.linear[-1]
    assert "telescope" in repr(found).lower() and len(found.to_frame()) == 8
    with pytest.raises(lmc.errors.InputError, match="record=True"):
        lmc.training.train(model, blobs(64, 0), epochs=1, progress=False).steps[0]


def test_gradients_of_a_module_of_ones_own_class():
    """Its first call is not inside the derivative, where a module cannot be examined."""
    a, b = lmc.models.mlp(8, [6], 4), lmc.models.mlp(8, [6], 4)
    found = lmc.landscape.gradient_change(a, a, b, torch.randn(5, 8))
    assert list(found) == ["fc1", "head"] and min(found.values()) > 0


def test_gradients_of_a_linear_network_never_change_and_those_of_others_settle():
    model = nn.Linear(8, 4)
    ends = run(model, 3)
    assert max(lmc.landscape.gradient_change(model, ends[0], ends[-1], INPUTS).values()) < 1e-28
    deep = classifier(0)
    steps = run(deep, 40)
    early = lmc.landscape.gradient_change(deep, steps[0], steps[1], INPUTS)
    assert list(early) == ["0", "2"] and min(early.values()) > 0
    assert lmc.landscape.gradient_change(deep, steps[3], steps[3], INPUTS) == {"0": 0.0, "2": 0.0}


def test_gradient_change_is_the_mean_over_outputs_and_parameters():
    model = classifier(0).double()
    ends = run(classifier(0), 5)
    many = lmc.landscape.gradient_change(model, ends[0], ends[-1], INPUTS[:4].double(), probes=4000)

    def jacobian(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def outputs(p: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(model, p, (INPUTS[:4].double(),))

        return torch.func.jacrev(outputs)(weights)  # (N, C, *shape)

    first, last = jacobian(ends[0]), jacobian(ends[-1])
    for layer in ("0", "2"):
        squares = [
            (last[f"{layer}.{kind}"] - first[f"{layer}.{kind}"]).square().flatten(2) for kind in ("weight", "bias")
        ]
        assert many[layer] == pytest.approx(float(torch.cat(squares, -1).mean()), rel=0.1)


def test_examples_come_in_every_form_that_inputs_come_in():
    model, steps = classifier(0), run(classifier(0), 2)
    expected = lmc.landscape.telescope(model, steps, INPUTS)
    changes = lmc.landscape.gradient_change(model, steps[0], steps[1], INPUTS)
    pair = (INPUTS, LABELS)
    for form in (pair, {"train": pair, "test": (INPUTS[:3], LABELS[:3])}, [INPUTS[:8], INPUTS[8:]], INPUTS.numpy()):
        found = lmc.landscape.telescope(model, steps, form)
        np.testing.assert_allclose(found.approximation, expected.approximation)
        assert lmc.landscape.gradient_change(model, steps[0], steps[1], form) == pytest.approx(changes)


def test_running_statistics_move_the_outputs_beside_the_account():
    """Inside a term they stay those before the step: what they do is the residual, all of it where nothing else moves."""
    model = classifier(0, norm=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    only = {**before, "1.running_mean": before["1.running_mean"] + 0.3}
    found = lmc.landscape.telescope(model, [before, only], INPUTS)
    assert list(found.moved) == ["0", "1", "3"] and all(size.max() == 0 for size in found.sizes.values())
    assert found.errors[1] == np.abs(found.end - found.start).mean() > 0.01
    nearly = {name: tensor + 1e-6 if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    held = {**nearly, "1.running_mean": before["1.running_mean"], "1.running_var": before["1.running_var"]}
    assert lmc.landscape.telescope(model, [before, held], INPUTS).errors[1] < 1e-9
    assert lmc.landscape.telescope(model, [before, nearly], INPUTS).errors[1] > 1e-7


class Both(nn.Module):
    """Two inputs, each required."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 4), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (self.one(x) + self.two(z)).tanh()


def test_a_pair_of_several_inputs_and_targets_is_taken_apart():
    a, b = Both(), Both()
    x, z = torch.randn(5, 8), torch.randn(5, 3)
    targets = torch.zeros(5, dtype=torch.long)
    expected = lmc.landscape.telescope(a, [a, b], (x, z)).approximation
    for inputs in ((x, z), {"x": x, "z": z}):
        for form in ((inputs, targets), [(inputs, targets)], {"train": (inputs, targets), "test": (inputs, targets)}):
            np.testing.assert_allclose(lmc.landscape.telescope(a, [a, b], form).approximation, expected)


class Words(nn.Module):
    """Attention by torch's own layer, or by its function alone."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.mixing = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) if layer else nn.Linear(8, 24)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mixed = self.mixing(self.embedding(ids))
        if mixed.shape[-1] == 24:
            heads = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in mixed.chunk(3, -1)]
            mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(mixed)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("layer", [True, False])
def test_transformers_are_differentiated_though_fused_attention_cannot_be(layer):
    a = Words(layer)
    b = {name: tensor + 1e-5 * torch.randn_like(tensor) for name, tensor in a.state_dict().items()}
    ids = torch.randint(11, (6, 5))
    found = lmc.landscape.telescope(a, [a, b], ids)
    assert 0 < found.errors[-1] < 1e-3 * np.abs(found.end - found.start).mean()
    assert min(lmc.landscape.gradient_change(a, a, b, ids[:2]).values()) > 0
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_the_average_of_weights_and_of_outputs_part_by_the_second_order():
    """`(f(A) + f(B)) / 2 - f((A + B) / 2) = d'Hd / 8` for `d = A - B`, which is what is left of two telescopes from the middle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    ends = run(model, 1, lr=1.0)
    gaps = []
    for share in (1.0, 0.5, 0.25):
        middle = lmc.weights.lerp(*ends, 0.5)
        found = [lmc.landscape.telescope(model, [middle, lmc.weights.lerp(middle, end, share)], INPUTS) for end in ends]
        gaps.append(np.abs(sum(each.end - each.approximation for each in found) / 2).mean())
        outputs = sum(each.end for each in found) / 2 - found[0].start
        assert np.abs(outputs).mean() == pytest.approx(gaps[-1], rel=1e-6)
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.15) and gaps[1] / gaps[2] == pytest.approx(4, rel=0.05)


def test_bad_input_is_refused():
    model = classifier(0)
    for steps in (model, model.state_dict(), {0: model, 1: model}, 3):
        with pytest.raises(lmc.InputError, match="one after the other, got"):
            lmc.landscape.telescope(model, steps, INPUTS)
    with pytest.raises(lmc.InputError, match="no parameters: no step moves it"):
        lmc.landscape.telescope(nn.Flatten(), [nn.Flatten(), nn.Flatten()], INPUTS)
    with pytest.raises(lmc.MismatchError, match=r"2.weight: shape \(4, 12\) in model, \(5, 12\) in steps"):
        lmc.landscape.telescope(model, [model, classifier(0, (8, 12, 5))], INPUTS)
    for wrong in (INPUTS[:, :5], INPUTS.long()):
        with pytest.raises(lmc.DataError, match="fails on inputs"):
            lmc.landscape.telescope(model, [model, model], wrong)
    with pytest.raises(lmc.InputError, match="outputs: expected a tensor of the module's outputs, got str"):
        lmc.landscape.telescope(model, [model, model], INPUTS, outputs=lambda result: "x")
    bag = nn.EmbeddingBag(5, 3)
    with pytest.raises(lmc.InputError, match="no forward derivative of an operator in EmbeddingBag"):
        lmc.landscape.telescope(bag, [bag, bag], torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(lmc.InputError, match="none"):
        lmc.landscape.telescope(model, [], INPUTS)
    with pytest.raises(lmc.InputError, match="single"):
        lmc.landscape.telescope(model, [model], INPUTS)
    with pytest.raises(lmc.InputError, match=r"train\(record=True\) leaves those of the first in .steps\[0\]"):
        lmc.landscape.telescope(model, lmc.training.train(model, (INPUTS, LABELS), seeds=(0, 1), epochs=1), INPUTS)
    with pytest.raises(lmc.DataError, match="axis 0 counts the examples, and a tensor has none"):
        lmc.landscape.telescope(model, [model, model], INPUTS[:0])
    with pytest.raises(lmc.MismatchError):
        lmc.landscape.telescope(model, [model, nn.Linear(8, 4)], INPUTS)
    for probes in (0, True, 2.0):
        with pytest.raises(lmc.InputError, match="probes"):
            lmc.landscape.gradient_change(model, model, model, INPUTS, probes=probes)
