"""What the landscape looks like: losses of many weight sets over paths between networks."""

from lmc.landscape.evaluation import Evaluator, Score, evaluate
from lmc.landscape.path import Barrier, Path, barrier, loss_path

__all__ = ["Barrier", "Evaluator", "Path", "Score", "barrier", "evaluate", "loss_path"]
