"""Weights are `dict[str, Tensor]`, exactly what `module.state_dict()` gives: arithmetic on them, and whether they fit.

Functions of the package return them as `StateDict`, which prints short.
"""

from lmc.weights.agreement import agreeing, as_weights, check_compatible, check_finite, fitted
from lmc.weights.arithmetic import distance, dot, lerp, mean
from lmc.weights.state import ModelOrWeights, StateDict, Weights, tied_names

__all__ = [
    "ModelOrWeights",
    "StateDict",
    "Weights",
    "agreeing",
    "as_weights",
    "check_compatible",
    "check_finite",
    "distance",
    "dot",
    "fitted",
    "lerp",
    "mean",
    "tied_names",
]


def __dir__() -> list[str]:
    return __all__
