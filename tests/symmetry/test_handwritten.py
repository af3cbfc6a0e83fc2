"""What is discovered equals what people write by hand for the architectures of Git Re-Basin."""

from functools import cache

import pytest
import torch
from handwritten import (
    ATTENTION,
    EXPERTS,
    GROUPED_QUERY,
    LAYER_NORM,
    mlp,
    resnet20,
    resnet50,
    vgg,
)
from small_models import BRANCHES, GROUPED, RESIDUAL, Attention, Branches, Experts, GroupedConvolution, ResidualMLP

import lmc
from lmc import models


def bottleneck_resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[3, 4, 6, 3], layer_type="bottleneck", num_labels=5
    )
    return ResNetForImageClassification(config)


CASES = {
    "MLP": (lambda: models.mlp(784, [64, 64, 64], 10), mlp(3), {}, (2, 784)),
    "VGG16": (lambda: models.vgg(1 / 8, config="vgg16", image=(3, 32, 32)), vgg(13), {}, (2, 3, 32, 32)),
    "ResNet20": (lambda: models.resnet20(1), resnet20(), {}, (2, 3, 16, 16)),
    "ResNet20 with layer norm": (lambda: models.resnet20(1, norm="layer"), resnet20(LAYER_NORM), {}, (2, 3, 16, 16)),
    "ResNet50": (bottleneck_resnet, resnet50(), {}, (2, 3, 64, 64)),
    "attention": (Attention, ATTENTION, {"head": 4}, (2, 6, 5)),
    "grouped-query attention": (lambda: Attention(kv=2, bias=False), GROUPED_QUERY, {"kv": 2, "rep": 2}, (2, 6, 5)),
    "experts": (Experts, EXPERTS, {}, (6, 5)),
    "branches": (Branches, BRANCHES, {}, (3, 2, 4, 4)),
    "grouped convolution": (GroupedConvolution, GROUPED, {"g": 2}, (3, 2, 4, 4)),
    "residual": (ResidualMLP, RESIDUAL, {}, (5, 4)),
}
# ResNet50 is ResNet20 with one layer more in each block, and takes as long as all others; another norm is found in the zoo too.
SLOW = ("ResNet50", "ResNet20 with layer norm")
NAMES = [pytest.param(name, marks=[pytest.mark.thorough] if name in SLOW else []) for name in CASES]


@cache
def discovered(name):
    """The model and what is found in it, once for the tests of one name."""
    build, _, _, shape = CASES[name]
    model = build()
    return model, lmc.permutation_spec(model, torch.randn(shape))


@pytest.mark.parametrize("name", NAMES)
def test_discovered_and_handwritten_specs_are_equal(name):
    _, patterns, sizes, _ = CASES[name]
    model, found = discovered(name)
    written = lmc.PermutationSpec.from_patterns(patterns, model, **sizes)
    assert found.differences(written) == []
    assert found == written and found.buffers == written.buffers


@pytest.mark.parametrize("name", NAMES)
def test_discovered_patterns_can_be_read_back(name):
    _, found = discovered(name)
    assert "patterns" in found.to_dict()
    assert lmc.PermutationSpec.from_dict(found.to_dict()) == found


def test_only_second_names_of_tied_tensors_are_aliases():
    assert lmc.permutation_spec(models.mlp(9, [8], 4), torch.randn(2, 9)).aliases == {}
    tied = models.gpt(11, 6, tied=True)
    spec = lmc.permutation_spec(tied, torch.randint(0, 11, (2, 6)))
    assert spec.aliases == {"head.weight": "token.weight"}
    assert sum(spec.parameters.values()) == sum(p.numel() for p in tied.parameters())
