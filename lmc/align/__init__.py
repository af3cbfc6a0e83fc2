"""Permutations, rotations and couplings that bring one network onto another."""

from lmc.align.activations.matching import activation_matching
from lmc.align.connecting.connect import connect
from lmc.align.connecting.result import Attempt, Connection, SameFunction
from lmc.align.many import Matchings, match_many
from lmc.align.relaxed.sinkhorn import sinkhorn_matching
from lmc.align.relaxed.straight_through import straight_through_matching
from lmc.align.rotations.folding import fold_norms
from lmc.align.rotations.matching import RotationMatching, rotation_matching
from lmc.align.rotations.rotatable import RotatableGroups, rotatable_groups
from lmc.align.study.compare import METHODS, Alignment, AlignmentComparison, compare
from lmc.align.study.epochs import Epochs, barrier_over_time
from lmc.align.study.inspect import Matching, inspect_matching
from lmc.align.study.singular import SingularAlignment, singular_alignment
from lmc.align.transport.fusion import Fusion, ot_fusion
from lmc.align.weight_matching.matching import weight_matching

__all__ = [
    "METHODS",
    "Alignment",
    "AlignmentComparison",
    "Attempt",
    "Connection",
    "Epochs",
    "Fusion",
    "Matching",
    "Matchings",
    "RotatableGroups",
    "RotationMatching",
    "SameFunction",
    "SingularAlignment",
    "activation_matching",
    "barrier_over_time",
    "compare",
    "connect",
    "fold_norms",
    "inspect_matching",
    "match_many",
    "ot_fusion",
    "rotatable_groups",
    "rotation_matching",
    "singular_alignment",
    "sinkhorn_matching",
    "straight_through_matching",
    "weight_matching",
]


def __dir__() -> list[str]:
    return __all__
