"""Which move: permutations and couplings that bring one network onto another."""

from lmc.align.activation_matching import activation_matching
from lmc.align.comparison import METHODS, Comparison, compare
from lmc.align.folding import fold_norms
from lmc.align.many import Matchings, match_many
from lmc.align.matching import Matching, inspect_matching
from lmc.align.orthogonal import RotationMatching, rotatable_groups, rotation_matching
from lmc.align.singular import SingularAlignment, singular_alignment
from lmc.align.sinkhorn import sinkhorn_matching
from lmc.align.straight_through import straight_through_matching
from lmc.align.transport import Fusion, ot_fusion
from lmc.align.weight_matching import weight_matching
from lmc.align.widening import Zipped
from lmc.align.zip import zipit

__all__ = [
    "METHODS",
    "Comparison",
    "Fusion",
    "Matching",
    "Matchings",
    "RotationMatching",
    "SingularAlignment",
    "Zipped",
    "activation_matching",
    "compare",
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
    "zipit",
]
