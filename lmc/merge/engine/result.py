"""Weights that remember how they were found."""

from collections.abc import Mapping
from typing import Generic, TypeVar

from torch import Tensor

from lmc.weights import StateDict

Report = TypeVar("Report")


class Merged(StateDict, Generic[Report]):
    """A state dict like any other, with `.report`: what the search or the soup saw on the way.

    Saved with `torch.save`, it becomes a plain state dict.
    """

    def __init__(self, weights: Mapping[str, Tensor], report: Report) -> None:
        super().__init__(weights)
        self.report = report

    @property
    def weights(self) -> StateDict:
        """The weights without the report."""
        return StateDict(self)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.report}"
