"""Training many seeds of one architecture at once."""

from lmc.training.loop import train
from lmc.training.run import History, Recipe, Trained

__all__ = ["History", "Recipe", "Trained", "train"]
