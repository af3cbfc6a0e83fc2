"""The landscape: losses of many weight sets, over paths, planes, mixtures and curves between networks.

    evaluate                    loss and metrics of one network on every split: a Score for each; Evaluator for many networks
    loss_path                   along the straight line between two: a Path
    barrier                     its highest point over the line between the ends: a Barrier
    pairwise_barriers           between every two of many networks: PairwiseBarriers
    layerwise_barriers          with some layers moving while all others stay: LayerwiseBarriers (Adilova et al. 2024)
    bezier_curve, polygonal_chain   a trained way around a barrier: a Curve (Garipov et al. 2018)
    low_loss_path               a way found by moving layer by layer: a LowLossPath (Tian et al. 2026)
    geodesic_path               the way on which predictions change least: a Geodesic (Tan et al. 2023)
    loss_plane                  the plane through three networks: a Plane
    random_plane                around one network, in directions scaled like its filters (Li et al. 2018)
    trajectory_plane            along a training run, by principal components
    loss_triangle, loss_simplex mixtures of three, or of more: a Triangle, a Simplex of Mixtures (each a Mixture)

What a picture of losses does not show:
    similarity, linear_cka      whether two networks compute the same: a Similarity
    curvature                   eigenvalues and trace of the Hessian: a Curvature
    multiplicity                the decisions of several networks, example by example: a Multiplicity
    telescope, gradient_change  what training did to the outputs, step by step and layer by layer: a Telescope
    variance_ratios             the variance that averaging takes from each layer: VarianceRatios
"""

from lmc.landscape.curvature import Curvature, curvature
from lmc.landscape.curves.curve import Curve, bezier_curve, polygonal_chain
from lmc.landscape.curves.geodesic import Geodesic, geodesic_path
from lmc.landscape.curves.low_loss import LowLossPath, low_loss_path
from lmc.landscape.evaluation.evaluator import Evaluator, Score, evaluate
from lmc.landscape.layerwise import LayerwiseBarriers, layerwise_barriers
from lmc.landscape.multiplicity import Multiplicity, multiplicity
from lmc.landscape.pairs import PairwiseBarriers, pairwise_barriers
from lmc.landscape.path import Barrier, Path, barrier, loss_path
from lmc.landscape.planes.plane import Plane, loss_plane, random_plane, trajectory_plane
from lmc.landscape.similarity import Similarity, linear_cka, similarity
from lmc.landscape.simplices.simplex import loss_simplex, loss_triangle
from lmc.landscape.simplices.simplex_result import Mixture, Simplex, Triangle
from lmc.landscape.telescoping import Telescope, gradient_change, telescope
from lmc.landscape.variance import VarianceRatios, variance_ratios

__all__ = [
    "Barrier",
    "Curvature",
    "Curve",
    "Evaluator",
    "Geodesic",
    "LayerwiseBarriers",
    "LowLossPath",
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
    "geodesic_path",
    "gradient_change",
    "layerwise_barriers",
    "linear_cka",
    "loss_path",
    "loss_plane",
    "loss_simplex",
    "loss_triangle",
    "low_loss_path",
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
