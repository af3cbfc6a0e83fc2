"""What the landscape looks like: losses of many weight sets over paths, planes and curves between networks."""

from lmc.landscape.curvature import Curvature, curvature
from lmc.landscape.curve import Curve, bezier_curve, polygonal_chain
from lmc.landscape.evaluation import Evaluator, Score, evaluate
from lmc.landscape.path import Barrier, Path, barrier, loss_path
from lmc.landscape.plane import Plane, loss_plane, random_plane
from lmc.landscape.similarity import Similarity, linear_cka, similarity

__all__ = [
    "Barrier",
    "Curvature",
    "Curve",
    "Evaluator",
    "Path",
    "Plane",
    "Score",
    "Similarity",
    "barrier",
    "bezier_curve",
    "curvature",
    "evaluate",
    "linear_cka",
    "loss_path",
    "loss_plane",
    "polygonal_chain",
    "random_plane",
    "similarity",
]
