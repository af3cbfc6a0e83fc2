"""Weights are plain `dict[str, Tensor]`, exactly what `module.state_dict()` gives: arithmetic on them, and opening them from files."""

from lmc.weights.arithmetic import (
    ModelOrWeights,
    Weights,
    as_weights,
    check_compatible,
    check_finite,
    distance,
    dot,
    lerp,
    mean,
    tied_names,
)

__all__ = [
    "ModelOrWeights",
    "Weights",
    "as_weights",
    "check_compatible",
    "check_finite",
    "distance",
    "dot",
    "lerp",
    "mean",
    "tied_names",
]
