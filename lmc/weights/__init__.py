"""Weights are `dict[str, Tensor]`, exactly what `module.state_dict()` gives: arithmetic on them, and whether they fit.

Functions of the package return them as `StateDict`, which prints short; `Weights` and `ModelOrWeights` are types of arguments.

    lerp, mean                  on the line between two; the weighted mean of several
    dot, distance               inner product, Euclidean distance, over parameters
    as_weights                  the weights of a module or mapping, as a StateDict
    agreeing                    several models as finite weights of one architecture, under the names of the first or of a module
    check_compatible            that two are of one architecture
    check_finite                that there is no NaN or infinity
    fitted                      weights under the names of a module's state dict, ready to be loaded
    tied_names                  further names of tensors that have several
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
