"""Training many seeds of one architecture at once; branches of a run, and training inside random subspaces."""

from lmc.training.branches import Branches, branches
from lmc.training.intrinsic import IntrinsicDimension, Projection, intrinsic_dimension, projection
from lmc.training.loop import train
from lmc.training.run import History, Recipe, Trained

__all__ = [
    "Branches",
    "History",
    "IntrinsicDimension",
    "Projection",
    "Recipe",
    "Trained",
    "branches",
    "intrinsic_dimension",
    "projection",
    "train",
]
