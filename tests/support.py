"""Helpers of many tests: comparing weights, small classification data, small classifiers, what pages hold, programs as modules."""

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

Split = tuple[Tensor, Tensor]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, ordered: bool = True) -> bool:
    """The same names, dtypes and bits, and the names in the same order."""
    if a.keys() != b.keys() or (ordered and list(a) != list(b)):
        return False
    return all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 1e-12) -> bool:
    """The same names in the same order, and values within an absolute tolerance."""
    return list(a) == list(b) and all(torch.allclose(a[k], b[k], rtol=0, atol=tolerance) for k in a)


def blobs(count: int, seed: int, *, classes: int = 4, dims: int = 8, spread: float = 0.6, shift: float = 0.0) -> Split:
    """Gaussian classes around centres that are the same for every seed."""
    centres = torch.randn(classes, dims, generator=torch.Generator().manual_seed(9))
    targets = torch.arange(count) % classes
    noise = torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))
    return centres[targets] + shift + spread * noise, targets


def splits(train: int, test: int, **options: float) -> SimpleNamespace:
    """Blobs with a train and a test split."""
    return SimpleNamespace(train=blobs(train, 0, **options), test=blobs(test, 1, **options))


def classifier(
    seed: int, sizes: tuple[int, int, int] = (8, 12, 4), *, norm: bool = False, dropout: float | None = None
) -> nn.Sequential:
    """A network with one hidden layer, drawn from `seed`; the global random state is left alone."""
    inputs, hidden, classes = sizes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = [nn.Linear(inputs, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU()]
        return nn.Sequential(*first, *([] if dropout is None else [nn.Dropout(dropout)]), nn.Linear(hidden, classes))


def trained(model: nn.Module, data: Split, steps: int = 40, lr: float = 2e-2) -> nn.Module:
    """The module itself, after steps of Adam on all of the data."""
    optimiser = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimiser.step()
    return model


def embedded(document: str) -> dict:
    """The state of the explorer in a page, or in the output of a notebook."""
    found = re.search(r"^const state = (.*);$", document, re.MULTILINE)
    assert found and "<" not in found[1]
    return json.loads(found[1])


def tool(name: str) -> ModuleType:
    """A program of this project that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, Path(__file__).parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
