"""Weights that remember how they were found."""

from collections import OrderedDict
from typing import Any, Generic, TypeVar

from torch import Tensor

from lmc.weights.arithmetic import Weights

Report = TypeVar("Report")


class Merged(dict[str, Tensor], Generic[Report]):
    """A state dict like any other, with `.report`: what the search or the soup saw on the way.

    Saved with `torch.save`, it becomes a plain state dict.
    """

    def __init__(self, weights: Weights, report: Report) -> None:
        super().__init__(weights)
        self.report = report

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self.values())
        return f"{len(self)} tensors, {size:,} values\n{self.report}"

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())
