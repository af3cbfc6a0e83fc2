"""Permutations, rotations and couplings that bring one network B onto another, A.

All that there is, tried in an order within a time:
    connect                     a Connection: both networks, the paths, what was tried (each an Attempt), and a SameFunction
                                that moved weights compute what they computed

Permutations of units, as a `Permutation` whose `apply(b)` gives the moved weights:
    weight_matching             by weights (Git Re-Basin, Ainsworth et al. 2023)
    activation_matching         by what units do on the same inputs (Li et al. 2015)
    straight_through_matching   by the loss of the midpoint, through rounded matrices (Git Re-Basin, section 3.3)
    sinkhorn_matching           by the loss of the line, through relaxed permutations (Peña et al. 2023)
    match_many                  several networks into one common order: Matchings

Beyond permutations:
    ot_fusion                   networks of other widths, by optimal transport: a Fusion (Singh and Jaggi 2020)
    group_matching              scales, signs, rotations and invertible mixings at once: a GroupMatching
    rotation_matching           rotations of residual streams: a RotationMatching (Theus et al. 2025)
    rotatable_groups            the groups that may be rotated: RotatableGroups
    fold_norms                  the same function with normalisation folded into its neighbours, so that groups may be rotated

Studies:
    compare                     METHODS side by side: an AlignmentComparison, one Alignment for each
    barrier_over_time           barriers between two runs, epoch by epoch: Epochs
    inspect_matching            a permutation carried out step by step, group by group: a Matching
    singular_alignment          singular vectors that two networks share, without any matching: a SingularAlignment
"""

from lmc.align.activations.matching import activation_matching
from lmc.align.connecting.connect import connect
from lmc.align.connecting.result import Attempt, Connection, SameFunction
from lmc.align.many import Matchings, match_many
from lmc.align.relaxed.sinkhorn import sinkhorn_matching
from lmc.align.relaxed.straight_through import straight_through_matching
from lmc.align.rotations.folding import fold_norms
from lmc.align.rotations.matching import RotationMatching, rotation_matching
from lmc.align.rotations.rotatable import RotatableGroups, rotatable_groups
from lmc.align.rotations.whole_group import GroupMatching, group_matching
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
    "GroupMatching",
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
    "group_matching",
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
