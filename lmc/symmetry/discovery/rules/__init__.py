"""One rule per operator family: how units travel through an operator.

A rule takes the operator's arguments with `Tag`s in place of tensors and returns the tag (or tuple of tags) of the
result. It may only add facts to `Units`; it never guesses: operators without a rule freeze everything they touch.
Six classes cover almost everything: moves (M), pointwise (E), symmetric reductions (R), contractions (C), operators
that depend on the order along some dims (F) and indexing by data (I).
"""

from lmc.symmetry.discovery.rules import (
    attention,
    convolution,
    experts,
    indexing,
    joining,
    linear,
    moves,
    normalisation,
    pointwise,
    reductions,
    scattering,
)
from lmc.symmetry.discovery.rules.registry import RULES, Op, interpret, is_pointwise, rule_of

__all__ = [
    "RULES",
    "Op",
    "attention",
    "convolution",
    "experts",
    "indexing",
    "interpret",
    "is_pointwise",
    "joining",
    "linear",
    "moves",
    "normalisation",
    "pointwise",
    "reductions",
    "rule_of",
    "scattering",
]
