"""The result of connecting a pair of networks: the networks, the way between them, and how both were found."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmc.core.extras import require
from lmc.core.results import Result
from lmc.landscape.path import Path
from lmc.symmetry.spec import Permutation
from lmc.weights import Weights

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Attempt:
    """One method that was tried.

    Attributes:
        method: its name.
        barrier: on the held-out part of the training data, mixed as `lmc.connect` says, in the unit of the loss; NaN where the
            method gave nothing.
        seconds: that it took, judging included.
        note: why it gave nothing, or ended early.
    """

    method: str
    barrier: float
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class SameFunction(Result):
    """A check in float64 arithmetic that moved weights compute what the weights of B compute.

    Attributes:
        max_error: largest difference of the outputs, as a share of their largest value.
        tolerance: what it was held against: of the rounding of the stored weights, which a permutation does without.
        power: the same difference between A and B, which are other functions.
    """

    max_error: float
    tolerance: float
    power: float

    def __str__(self) -> str:
        return (
            f"B moved computes what B computes: outputs equal to {self.max_error:.0e} of their size "
            f"(A's differ by {self.power:.1g})"
        )


@dataclass(frozen=True, eq=False)
class Connection(Result):
    """Two networks connected as well as could be within the time.

    Attributes:
        a: A, with its normalisations folded where that lets streams rotate; computes what A computes.
        weights: B moved; computes what B computes. Interpolate between these two.
        path: from `a` to `weights`. naive: between the two as they were given.
        method: what B was moved by. reason: why this, in words.
        certificate: that B moved computes what B computes.
        tried: all that was tried, in order.
        repaired: statistics between the ends are repaired on `path` (`repair="repair"` of `lmc.loss_path`).
        permutation: the move, where it is one and nothing more.
        held_out: examples of the training data by which was chosen.
        budget: seconds that were allowed; None: any. seconds: that were taken.
        interrupted: whether it was ended from outside.
    """

    a: Weights
    weights: Weights
    path: Path
    naive: Path
    method: str
    reason: str
    certificate: SameFunction
    tried: tuple[Attempt, ...]
    repaired: bool = False
    permutation: Permutation | None = None
    held_out: int = 0
    budget: float | None = None
    seconds: float = math.nan
    interrupted: bool = False
    unit: str = field(default="nats")

    @property
    def barrier(self) -> float:
        """Of the loss on `path`, on the test split if there is one."""
        return self.path.barrier

    def to_frame(self) -> "pd.DataFrame":
        """A row for each method tried: method, barrier on the held-out examples, seconds, note."""
        rows = [(each.method, each.barrier, each.seconds, each.note) for each in self.tried]
        return require("pandas").DataFrame(rows, columns=["method", "barrier", "seconds", "note"])

    def __str__(self) -> str:
        unit = f" {self.unit}".rstrip()
        allowed = "" if self.budget is None else f" of {self.budget:g} allowed"
        repaired = ", statistics repaired between the ends" if self.repaired else ""
        lines = [
            f"Connection by {self.method}: {self.path.split} barrier {self.naive.barrier:.3f} before, "
            f"{self.path.barrier:.3f}{unit} after{repaired}",
            f"  {self.reason}",
            f"  {self.certificate}",
            f"  {self.seconds:.1f} s{allowed}; chosen by {self.held_out} examples held out of the training data:",
        ]
        width = max(len(each.method) for each in self.tried)
        for each in self.tried:
            barrier = "" if math.isnan(each.barrier) else f"{each.barrier:8.3f}"
            lines.append(f"    {each.method:{width}} {barrier:>8} {each.seconds:7.1f} s  {each.note}".rstrip())
        return "\n".join(lines)

    __repr__ = __str__
