"""lmc: linear mode connectivity and weight-space merging.

Find what may move, choose the move, look at the landscape, combine the weights.
"""

from lmc import align, data, landscape, merge, models, training, weights

# Which move: permutations and couplings that bring one network onto another.
from lmc.align import (
    activation_matching,
    match_many,
    ot_fusion,
    sinkhorn_matching,
    straight_through_matching,
    weight_matching,
)
from lmc.core.files import __version__ as __version__

# What can go wrong.
from lmc.errors import (
    CertificateError,
    DataError,
    InputError,
    LmcError,
    MismatchError,
    MissingPackageError,
    SpecError,
    TraceError,
    WeightsError,
)

# What it looks like: losses between networks.
from lmc.landscape.curve import Curve, bezier_curve, polygonal_chain
from lmc.landscape.path import Path, loss_path
from lmc.landscape.planes.plane import Plane, loss_plane, random_plane, trajectory_plane
from lmc.landscape.triangle import Simplex, Triangle, loss_simplex, loss_triangle
from lmc.network.batchnorm import recalibrate_batchnorm
from lmc.network.repair import repair
from lmc.network.task import Task
from lmc.symmetry.continuous import ContinuousSymmetries, continuous_symmetries
from lmc.symmetry.find import permutation_spec
from lmc.symmetry.groups.group import Group, Table

# What may move: the symmetries of a network.
from lmc.symmetry.groups.symmetries import Certificate
from lmc.symmetry.spec import Permutation, PermutationSpec
from lmc.weights.checkpoint import Checkpoint
from lmc.weights.opening import open_checkpoint

__all__ = [
    "Certificate",
    "CertificateError",
    "Checkpoint",
    "ContinuousSymmetries",
    "Curve",
    "DataError",
    "Group",
    "InputError",
    "LmcError",
    "MismatchError",
    "MissingPackageError",
    "Path",
    "Permutation",
    "PermutationSpec",
    "Plane",
    "Simplex",
    "SpecError",
    "Table",
    "Task",
    "TraceError",
    "Triangle",
    "WeightsError",
    "activation_matching",
    "align",
    "bezier_curve",
    "continuous_symmetries",
    "data",
    "landscape",
    "loss_path",
    "loss_plane",
    "loss_simplex",
    "loss_triangle",
    "match_many",
    "merge",
    "models",
    "open_checkpoint",
    "ot_fusion",
    "permutation_spec",
    "polygonal_chain",
    "random_plane",
    "recalibrate_batchnorm",
    "repair",
    "sinkhorn_matching",
    "straight_through_matching",
    "training",
    "trajectory_plane",
    "weight_matching",
    "weights",
]
