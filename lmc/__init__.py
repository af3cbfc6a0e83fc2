"""lmc: linear mode connectivity and weight-space merging.

Find what may move, choose the move, look at the landscape, combine the weights.
"""

from lmc.align.weight_matching import weight_matching
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
from lmc.symmetry.certify import Certificate
from lmc.symmetry.group import Group, Table
from lmc.symmetry.permutation import Permutation
from lmc.symmetry.spec import PermutationSpec

__version__ = "0.1.0"
