"""lmc: linear mode connectivity and weight-space merging.

What may move: the symmetries of a network.
    permutation_spec            groups of interchangeable units, found and certified: a PermutationSpec
    Group, Table                what a spec is made of: a kind of units, and their places in one tensor
    continuous_symmetries       scales, signs, rotations and invertible mixings: ContinuousSymmetries
    Permutation, Certificate    an element of a spec, which applies to weights; what was proven, and how
    Element                     an element of the whole group: units scaled, flipped or mixed, then permuted
    canonical                   the weights of the same function whose scales and signs are fixed

Which move: one network brought onto another.
    connect                     by whatever connects the two best, within a time: a Connection
    weight_matching             by weights (Git Re-Basin)
    activation_matching         by what units do on the same inputs
    straight_through_matching   by the loss of the midpoint, through rounded matrices
    sinkhorn_matching           by the loss of the line, through relaxed permutations
    match_many                  several networks into one common order
    ot_fusion                   networks of other widths, by optimal transport
    align                       all of these, rotations, comparisons, barriers over training

What it looks like: losses between networks.
    loss_path                   along the line between two: a Path with its barrier
    bezier_curve, polygonal_chain   along a trained Curve
    loss_plane, random_plane, trajectory_plane   over a Plane through three, around one, along a run
    loss_triangle, loss_simplex over mixtures of three or more: a Triangle, a Simplex
    Task                        how outputs are judged, where they are no plain classes
    landscape                   all of these, layer by layer, telescoping, similarity, multiplicity, curvature, variance

What comes of it: weights combined.
    recalibrate_batchnorm       statistics of batch normalisation estimated again
    repair                      averages whose units keep their spread (REPAIR)
    open_checkpoint             weights on disk as a Checkpoint, read when asked for
    merge                       averages, task vectors, soups and many other methods, in memory and on disk
    weights                     arithmetic on state dicts

Many times over: any function at every combination of a grid.
    sweep                       on all processors or on the workers of an executor, resumable: a Sweep

To try it on: data, models, training. Errors are LmcError: InputError, DataError, WeightsError, MismatchError, SpecError,
TraceError, CertificateError, WorkerError, MissingPackageError.

Everything is imported when it is first asked for, so that `import lmc` takes no time.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lmc.core.files import __version__ as __version__

if TYPE_CHECKING:
    from lmc import align, data, landscape, merge, models, training, weights
    from lmc.align.activations.matching import activation_matching
    from lmc.align.connecting.connect import connect
    from lmc.align.connecting.result import Connection
    from lmc.align.many import match_many
    from lmc.align.relaxed.sinkhorn import sinkhorn_matching
    from lmc.align.relaxed.straight_through import straight_through_matching
    from lmc.align.transport.fusion import ot_fusion
    from lmc.align.weight_matching.matching import weight_matching
    from lmc.core.sweep import Sweep, sweep
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
        WorkerError,
    )
    from lmc.landscape.curves.curve import Curve, bezier_curve, polygonal_chain
    from lmc.landscape.path import Path, loss_path
    from lmc.landscape.planes.plane import Plane, loss_plane, random_plane, trajectory_plane
    from lmc.landscape.simplices.simplex import loss_simplex, loss_triangle
    from lmc.landscape.simplices.simplex_result import Simplex, Triangle
    from lmc.network.batchnorm import recalibrate_batchnorm
    from lmc.network.repair import repair
    from lmc.network.task import Task
    from lmc.symmetry.canonical import canonical
    from lmc.symmetry.continuous.find import continuous_symmetries
    from lmc.symmetry.element import Element
    from lmc.symmetry.find import permutation_spec
    from lmc.symmetry.groups.group import Group, Table
    from lmc.symmetry.groups.kinds import ContinuousSymmetries
    from lmc.symmetry.groups.symmetries import Certificate
    from lmc.symmetry.spec import Permutation, PermutationSpec
    from lmc.weights.checkpoint import Checkpoint
    from lmc.weights.opening import open_checkpoint

__all__ = [
    "Certificate",
    "CertificateError",
    "Checkpoint",
    "Connection",
    "ContinuousSymmetries",
    "Curve",
    "DataError",
    "Element",
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
    "Sweep",
    "Table",
    "Task",
    "TraceError",
    "Triangle",
    "WeightsError",
    "WorkerError",
    "activation_matching",
    "align",
    "bezier_curve",
    "canonical",
    "connect",
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
    "sweep",
    "training",
    "trajectory_plane",
    "weight_matching",
    "weights",
]

# Where names are defined that are not rooms.
_HOMES = {
    "activation_matching": "lmc.align.activations.matching",
    "connect": "lmc.align.connecting.connect",
    "Connection": "lmc.align.connecting.result",
    "match_many": "lmc.align.many",
    "sinkhorn_matching": "lmc.align.relaxed.sinkhorn",
    "straight_through_matching": "lmc.align.relaxed.straight_through",
    "ot_fusion": "lmc.align.transport.fusion",
    "weight_matching": "lmc.align.weight_matching.matching",
    "CertificateError": "lmc.errors",
    "DataError": "lmc.errors",
    "InputError": "lmc.errors",
    "LmcError": "lmc.errors",
    "MismatchError": "lmc.errors",
    "MissingPackageError": "lmc.errors",
    "SpecError": "lmc.errors",
    "TraceError": "lmc.errors",
    "WeightsError": "lmc.errors",
    "WorkerError": "lmc.errors",
    "Sweep": "lmc.core.sweep",
    "sweep": "lmc.core.sweep",
    "Curve": "lmc.landscape.curves.curve",
    "bezier_curve": "lmc.landscape.curves.curve",
    "polygonal_chain": "lmc.landscape.curves.curve",
    "Path": "lmc.landscape.path",
    "loss_path": "lmc.landscape.path",
    "Plane": "lmc.landscape.planes.plane",
    "loss_plane": "lmc.landscape.planes.plane",
    "random_plane": "lmc.landscape.planes.plane",
    "trajectory_plane": "lmc.landscape.planes.plane",
    "Simplex": "lmc.landscape.simplices.simplex_result",
    "Triangle": "lmc.landscape.simplices.simplex_result",
    "loss_simplex": "lmc.landscape.simplices.simplex",
    "loss_triangle": "lmc.landscape.simplices.simplex",
    "recalibrate_batchnorm": "lmc.network.batchnorm",
    "repair": "lmc.network.repair",
    "Task": "lmc.network.task",
    "ContinuousSymmetries": "lmc.symmetry.groups.kinds",
    "canonical": "lmc.symmetry.canonical",
    "Element": "lmc.symmetry.element",
    "continuous_symmetries": "lmc.symmetry.continuous.find",
    "permutation_spec": "lmc.symmetry.find",
    "Group": "lmc.symmetry.groups.group",
    "Table": "lmc.symmetry.groups.group",
    "Certificate": "lmc.symmetry.groups.symmetries",
    "Permutation": "lmc.symmetry.spec",
    "PermutationSpec": "lmc.symmetry.spec",
    "Checkpoint": "lmc.weights.checkpoint",
    "open_checkpoint": "lmc.weights.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES and (name.startswith("_") or find_spec(f"lmc.{name}") is None):
        raise AttributeError(f"module 'lmc' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name) if name in _HOMES else import_module(f"lmc.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
