"""One rule per operator family: the way of units through an operator.

A rule takes the operator's arguments with `Tag`s in place of tensors and returns the tag (or tuple of tags) of the
result. It may only add facts to `Units`; it never guesses: operators without a rule freeze everything they touch.
Six classes cover almost everything: moves (M), pointwise (E), symmetric reductions (R), contractions (C), operators
that depend on the order along some dims (F) and indexing by data (I).
"""

from lmc.symmetry.rules import contractions, indexing, moves, reductions
from lmc.symmetry.rules.registry import RULES, Op, interpret, is_deterministic, is_pointwise, rule_of

__all__ = [
    "RULES",
    "Op",
    "contractions",
    "indexing",
    "interpret",
    "is_deterministic",
    "is_pointwise",
    "moves",
    "reductions",
    "rule_of",
]
