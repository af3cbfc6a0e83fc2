"""The moves that a group of units admits beyond changing places, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmc.core.extras import require
from lmc.core.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Kind:
    """Symmetries of the units of a family beyond changing places, by occurrence: a tensor, with the axis where it has
    several tables, and the column where a unit has a few places.

    Attributes:
        scales: for each independent scale the exponents: occurrence -> e, if a unit is multiplied there by s^e, s > 0.
        signs: for each independent change of signs the occurrences at which a unit is multiplied by -1.
        mixing: "none", "orthogonal", "orthogonal fixing 1" (the vector of ones stays) or "general linear".
        mixes: for each independent mixing by a matrix M: occurrence -> 1, where units u become M u, or -1, where they
            become the inverse transpose of M times u; for orthogonal M the two are one.
        error: largest change of the outputs under random finite elements, relative to their size.
        power: the rate at which the outputs change, in the same unit, if one occurrence does not move with the others.
        free: occurrences that the outputs do not depend on, such as the bias of keys before a softmax.
    """

    scales: tuple[Mapping[str, float], ...] = ()
    signs: tuple[tuple[str, ...], ...] = ()
    mixing: str = "none"
    mixes: tuple[Mapping[str, int], ...] = ()
    error: float = 0.0
    power: float = 0.0
    free: tuple[str, ...] = ()

    @property
    def sign(self) -> bool:
        """Whether the sign of a unit may be flipped, at some of its occurrences together."""
        return bool(self.signs)

    @property
    def trivial(self) -> bool:
        """Whether the units may change places, and no more."""
        return not (self.scales or self.signs or self.mixes)

    def __str__(self) -> str:
        words = ["permutation"]
        words += [f"scale ({_exponents(scale)})" for scale in self.scales[:1]]
        words += [f"{len(self.scales) - 1} further scales"] if len(self.scales) > 1 else []
        words += ["sign"] if self.signs else []
        words += [self.mixing] if self.mixes else []
        return " + ".join(words)

    @property
    def beyond(self) -> str:
        """The moves beyond permutations, without exponents: "2 scales + sign"; empty if there is nothing."""
        words = [f"{len(self.scales)} scales" if len(self.scales) > 1 else "scale"] if self.scales else []
        words += ["sign"] if self.signs else []
        words += [self.mixing] if self.mixes else []
        return " + ".join(words)


_MOST_SHOWN = 6  # occurrences of a scale that are printed


def _exponents(scale: Mapping[str, float]) -> str:
    shown = [f"{name} {e:+.4g}" for name, e in scale.items()]
    more = len(shown) - _MOST_SHOWN
    return ", ".join(shown[:_MOST_SHOWN]) + (f", ... ({more} more)" if more > 0 else "")


@dataclass(frozen=True)
class ContinuousSymmetries(Result):
    """The kind of each family of groups of a spec.

    Attributes:
        kinds: family -> kind.
        tolerance: relative change of the outputs that finite elements were held against; larger than what was asked for
            where the module computes in single precision.
    """

    kinds: dict[str, Kind]
    tolerance: float

    def of(self, families: Mapping[str, str]) -> "ContinuousSymmetries":
        """Those of some families: new name -> name here."""
        kinds = {new: self.kinds[old] for new, old in families.items() if old in self.kinds}
        return ContinuousSymmetries(kinds, self.tolerance)

    def __repr__(self) -> str:
        if all(kind.trivial for kind in self.kinds.values()):
            return "ContinuousSymmetries: none, permutations only"
        width = max(map(len, self.kinds))
        return "\n".join(
            ["ContinuousSymmetries:", *(f"  {name:<{width}}  {kind}" for name, kind in self.kinds.items())]
        )

    def to_frame(self) -> "pd.DataFrame":
        """A row for each family: number of scales, sign, mixing, error, power."""
        rows = [(name, len(k.scales), k.sign, k.mixing, k.error, k.power) for name, k in self.kinds.items()]
        return require("pandas").DataFrame(rows, columns=["family", "scales", "sign", "mixing", "error", "power"])
