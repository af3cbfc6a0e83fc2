"""The landscape: losses of many weight sets over paths, planes and curves between networks."""

from lmc.landscape.curvature import Curvature, curvature
from lmc.landscape.curve import Curve, bezier_curve, polygonal_chain
from lmc.landscape.evaluation.evaluator import Evaluator, Score, evaluate
from lmc.landscape.layerwise import LayerwiseBarriers, layerwise_barriers
from lmc.landscape.multiplicity import Multiplicity, multiplicity
from lmc.landscape.pairs import PairwiseBarriers, pairwise_barriers
from lmc.landscape.path import Barrier, Path, barrier, loss_path
from lmc.landscape.planes.plane import Plane, loss_plane, random_plane, trajectory_plane
from lmc.landscape.similarity import Similarity, linear_cka, similarity
from lmc.landscape.simplex import Mixture, Simplex, Triangle, loss_simplex, loss_triangle
from lmc.landscape.telescoping import Telescope, gradient_change, telescope
from lmc.landscape.variance import VarianceRatios, variance_ratios

__all__ = [
    "Barrier",
    "Curvature",
    "Curve",
    "Evaluator",
    "LayerwiseBarriers",
    "Mixture",
    "Multiplicity",
    "PairwiseBarriers",
    "Path",
    "Plane",
    "Score",
    "Similarity",
    "Simplex",
    "Telescope",
    "Triangle",
    "VarianceRatios",
    "barrier",
    "bezier_curve",
    "curvature",
    "evaluate",
    "gradient_change",
    "layerwise_barriers",
    "linear_cka",
    "loss_path",
    "loss_plane",
    "loss_simplex",
    "loss_triangle",
    "multiplicity",
    "pairwise_barriers",
    "polygonal_chain",
    "random_plane",
    "similarity",
    "telescope",
    "trajectory_plane",
    "variance_ratios",
]


def __dir__() -> list[str]:
    return __all__
