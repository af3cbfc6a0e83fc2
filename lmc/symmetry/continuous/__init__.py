"""More than permutations: the scales, signs, rotations and invertible mixings of units that keep the function."""

from lmc.symmetry.continuous.find import continuous_symmetries
from lmc.symmetry.groups.kinds import ContinuousSymmetries, Kind

__all__ = ["ContinuousSymmetries", "Kind", "continuous_symmetries"]
