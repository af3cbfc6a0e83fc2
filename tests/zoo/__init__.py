"""The zoo: architectures whose permutation symmetries are derived by hand, one file per family."""

from . import attention, convnets, experts, mlps, modern, own, pretrained, pretrained_more, recurrent, residual, unusual
from .entry import Entry, S, Symmetry, grouped_query, heads

ENTRIES: list[Entry] = [
    entry
    for family in (
        mlps,
        convnets,
        residual,
        recurrent,
        experts,
        attention,
        modern,
        unusual,
        own,
        pretrained,
        pretrained_more,
    )
    for entry in family.ENTRIES
]

__all__ = ["ENTRIES", "Entry", "S", "Symmetry", "grouped_query", "heads"]
