"""The result of a certification: which precision was reached, on which evidence."""

from dataclasses import dataclass

from lmc.core.results import Result


@dataclass(frozen=True)
class Certificate(Result):
    """What was checked, and how exactly the outputs agreed.

    Attributes:
        max_error: largest difference of outputs, relative to their largest absolute value.
        tolerance: what it was held against.
        trials: number of permutations tried.
        groups: number of groups that they moved.
        moved: share of the weight entries that changed places (a certificate in which nothing moves proves nothing).
        inputs: shapes of the example inputs used.
        dtype: the precision of the arithmetic.
    """

    max_error: float
    tolerance: float
    trials: int
    groups: int
    moved: float
    inputs: tuple[tuple[tuple[int, ...], ...], ...]
    dtype: str = "float64"

    def __str__(self) -> str:
        tried = "one permutation" if self.trials == 1 else f"{self.trials} random permutations"
        return (
            f"certified: {tried} of {self.groups} groups, {self.moved:.0%} of the weights moved, "
            f"outputs equal to {self.max_error:.1e} ({self.dtype})"
        )
