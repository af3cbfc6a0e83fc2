"""Depth from names and modules: the same whatever the order of keys."""

import random

import pytest
import torch
from torch import nn

import lmc
import lmc.merge as merge
from lmc.errors import InputError
from lmc.weights.state import model_depths, modules_in_order, numbered_depths


def shuffled(names: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(names, len(names))


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (["wte.weight", "h.0.w", "h.2.w", "h.10.w", "ln_f.weight"], {"h.0.w": 0.0, "h.2.w": 0.5, "h.10.w": 1.0}),
        (["fc1.weight", "fc1.bias", "fc2.weight", "head.weight"], {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}),
        (["0.weight", "2.weight", "4.bias"], {"0.weight": 0.0, "2.weight": 0.5, "4.bias": 1.0}),
        (
            ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv2.weight", "layer2.0.conv1.weight", "fc.weight"],
            {"layer1.0.conv1.weight": 0.0, "layer1.1.conv2.weight": 0.0, "layer2.0.conv1.weight": 1.0},
        ),
        (
            [f"{tower}.block.{i}.layer.{j}.w" for tower in ("encoder", "decoder") for i in (0, 1) for j in (0, 1)],
            {f"{t}.block.{i}.layer.{j}.w": float(i) for t in ("encoder", "decoder") for i in (0, 1) for j in (0, 1)},
        ),
        (["list.0", "list.1"], {"list.0": 0.0, "list.1": 1.0}),
        (["vgg16.features.0.w", "vgg16.features.3.w"], {"vgg16.features.0.w": 0.0, "vgg16.features.3.w": 1.0}),
    ],
)
def test_depth_is_that_of_the_outermost_number(names: list[str], depths: dict[str, float]):
    for seed in range(3):
        assert numbered_depths(shuffled(names, seed)) == depths


@pytest.mark.parametrize(
    "names",
    [
        ["stem.weight", "body.weight", "head.weight"],
        ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"],
        ["features.0.weight", "features.3.weight", "classifier.0.weight", "classifier.3.weight", "classifier.6.weight"],
        ["weight_ih_l0", "weight_ih_l1"],
    ],
)
def test_names_that_say_nothing_about_depth_are_refused(names: list[str]):
    with pytest.raises(InputError, match="cannot tell the blocks"):
        numbered_depths(names)


class Unnumbered(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.top = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.top(self.body(self.stem(x).relu()).relu())


def test_a_module_says_its_own_order():
    names = [name for name, _ in Unnumbered().named_parameters()]
    for seed in range(3):
        mixed = shuffled(names, seed)
        assert modules_in_order(Unnumbered(), mixed) == ["stem", "body", "top"]
        assert {name: model_depths(Unnumbered(), mixed)[name] for name in names} == dict(
            zip(names, [0.0, 0.0, 0.5, 0.5, 1.0, 1.0], strict=True)
        )


def test_merges_by_depth_do_not_depend_on_the_order_of_keys():
    model = Unnumbered()
    base, tuned = ({name: torch.full_like(x, value) for name, x in model.state_dict().items()} for value in (0.0, 1.0))
    data = (torch.randn(12, 4), torch.randint(0, 3, (12,)))
    found = []
    for seed in range(3):
        order = shuffled(list(base), seed)
        ours, theirs = ({name: state[name] for name in order} for state in (base, tuned))
        with pytest.raises(InputError, match="pass blocks="):
            merge.lines([theirs], base=ours)
        made = merge.ama(model, [theirs], data, base=ours, steps=3, progress=False)
        groups = merge.mixer(model, [theirs], {"one": data}, base=ours, progress=False).groups
        ranked = merge.compare(model, [theirs], data, base=ours, methods=["lines"], progress=False)
        found.append((made.report.shares, groups, ranked.best.validation, ranked.best.note))
    assert found[0] == found[1] == found[2] and list(found[0][1]) == ["stem", "body", "top"]
    mlp = {name: torch.ones_like(x) for name, x in lmc.models.mlp(4, [3, 3, 3], 2).state_dict().items()}
    zero = {name: torch.zeros_like(x) for name, x in mlp.items()}
    for seed in range(3):
        order = shuffled(list(mlp), seed)
        result = merge.lines([{n: mlp[n] for n in order}], base={n: zero[n] for n in order}, alpha=0.0)
        assert [float(result[f"{name}.bias"][0]) for name in ("fc1", "fc2", "fc3", "head")] == [0.0, 0.5, 1.0, 0.0]
