"""lmc: linear mode connectivity and weight-space merging.

Find what may move, choose the move, look at the landscape, combine the weights.
"""

from lmc import data, merge, models, training, weights

# Which move: permutations that bring one network onto another.
from lmc.align.weight_matching import weight_matching

# What can go wrong.
from lmc.errors import (
    CertificateError,
    DataError,
    InputError,
    LmcError,
    MismatchError,
    SpecError,
    TraceError,
    WeightsError,
)

# What it looks like: losses between networks.
from lmc.landscape.path import Path, loss_path
from lmc.repair import recalibrate_batchnorm

# What may move: the symmetries of a network.
from lmc.symmetry.certify import Certificate
from lmc.symmetry.find import permutation_spec
from lmc.symmetry.group import Group, Table
from lmc.symmetry.permutation import Permutation
from lmc.symmetry.spec import PermutationSpec

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "CertificateError",
    "DataError",
    "Group",
    "InputError",
    "LmcError",
    "MismatchError",
    "Path",
    "Permutation",
    "PermutationSpec",
    "SpecError",
    "Table",
    "TraceError",
    "WeightsError",
    "data",
    "loss_path",
    "merge",
    "models",
    "permutation_spec",
    "recalibrate_batchnorm",
    "training",
    "weight_matching",
    "weights",
]
