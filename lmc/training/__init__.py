"""Training of small networks.

train                       many seeds of one architecture at once: Trained, with a History and the Recipe
branches                    a run, and what becomes of it from some epochs on in other orders of the data: Branches
intrinsic_dimension         of a task, by training inside random subspaces: an IntrinsicDimension (Li et al. 2018)
projection                  a random subspace of weights: a Projection
"""

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


def __dir__() -> list[str]:
    return __all__
