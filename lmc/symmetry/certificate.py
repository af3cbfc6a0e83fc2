"""The result of a certification: which precision was reached, and whether an error would have been seen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmc.core.extras import require
from lmc.core.results import Result

if TYPE_CHECKING:
    import pandas as pd

VISIBLE = 1e3


@dataclass(frozen=True)
class Evidence:
    """What was seen of one family of groups.

    Attributes:
        error: largest change of the outputs when the family moved with all the others, relative to their largest value.
        power: change of the outputs when the family moves and one of the tensors that it touches is left behind; of
            specs with many families the rate of change, when one of the tensors begins to move alone.
    """

    error: float
    power: float


@dataclass(frozen=True)
class Certificate(Result):
    """What was checked, how exactly the outputs agreed, and how far apart they are when a group is broken on purpose.

    A group whose breakage is invisible is not proven by equal outputs: its name is in `unverified`.

    Attributes:
        max_error: largest difference of outputs, relative to their largest absolute value.
        tolerance: what it was held against.
        trials: number of permutations tried, each on other weights.
        groups: number of groups that they moved.
        moved: share of the weight entries that changed places (a certificate in which nothing moves proves nothing).
        inputs: shapes of the example inputs used.
        dtype: the precision of the arithmetic.
        families: family of groups -> error and power.
        outputs: names of the outputs compared, if the model returns several.
    """

    max_error: float
    tolerance: float
    trials: int
    groups: int
    moved: float
    inputs: tuple[tuple[tuple[int, ...], ...], ...]
    dtype: str = "float64"
    families: Mapping[str, Evidence] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @property
    def power(self) -> float:
        """The smallest power of the families that could be verified."""
        seen = [e.power for name, e in self.families.items() if name not in self.unverified]
        return min(seen, default=0.0)

    @property
    def unverified(self) -> tuple[str, ...]:
        """The families for which an error would not have been seen: their power is not far above the tolerance."""
        return tuple(name for name, e in self.families.items() if not e.power > VISIBLE * self.tolerance)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each family of groups: error, power, and whether an error would have been seen."""
        rows = [(name, e.error, e.power, name not in self.unverified) for name, e in self.families.items()]
        return require("pandas").DataFrame(rows, columns=["family", "error", "power", "verified"])

    def __str__(self) -> str:
        tried = "one permutation" if self.trials == 1 else f"{self.trials} random permutations"
        text = (
            f"certified: {tried} of {self.groups} groups, {self.moved:.0%} of the weights moved, "
            f"outputs equal to {self.max_error:.1e} ({self.dtype})"
        )
        if self.power:
            text += f", changed by {self.power:.1e} or more when one group is broken"
        if self.unverified:
            text += f"; not verified, as breaking them changes nothing here: {', '.join(self.unverified)}"
        return text
