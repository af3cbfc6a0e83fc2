"""Groups sorted by what their matching depends on: alone, or together with others that own the same channels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmc.align.activations.collect import Site
from lmc.align.activations.taps import Tap, groups_at
from lmc.align.weight_matching.algorithm import Descent
from lmc.align.weight_matching.blocks import build_blocks
from lmc.align.weight_matching.gains import assign, inner_product, opening_prices
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.spec import PermutationSpec

_SWEEPS = 100
# Between assignments of equal value, units stay where they are.
_STAY = 1e-9


@dataclass(frozen=True)
class Cluster:
    """Groups that are matched together: one within another, or two that order the same channels.

    Attributes:
        groups: their names; a single one is matched by one assignment.
        taps: where they are seen.
    """

    groups: tuple[str, ...]
    taps: tuple[Tap, ...]

    @property
    def name(self) -> str:
        return self.groups[0]

    def sites(self, spec: PermutationSpec) -> list[Site]:
        """The channels to observe: the units of a lone group, else all channels of each tap."""
        if len(self.groups) == 1:
            return [
                Site(tap, self.name, torch.from_numpy(table.rows), torch.from_numpy(table.rows))
                for tap in self.taps
                for table in spec.groups[self.name].tables[tap.tensor]
                if table.dims == (tap.axis,)
            ]
        every = {tap: torch.arange(spec.shapes[tap.tensor][tap.axis])[:, None] for tap in self.taps}
        return [Site(tap, tap.name, rows, rows) for tap, rows in every.items()]

    def match(self, spec: PermutationSpec, scores: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float, float]:
        """The best permutations for the scores `(n, n)` of the sites: (indices, their score, the score of the identity)."""
        if len(self.groups) > 1:
            return self._match_together(spec, scores)
        score = scores[self.name]
        favoured = score.clone()
        favoured.diagonal().add_(_STAY * max(map(abs, score.aminmax())))
        index, _ = assign(favoured, opening_prices(favoured))
        stay = float(score.diagonal().sum())
        value = float(score.gather(1, index[:, None].to(score.device)).sum())
        return {self.name: index}, value, stay

    def _match_together(
        self, spec: PermutationSpec, scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], float, float]:
        """Weight matching of the scores, as a tensor that only B's channels move along.

        `sum_k G[k, p[k]]` is the inner product of G with the identity matrix whose rows are permuted by p.
        """
        tensors = {tap.name: scores[tap.name] for tap in self.taps}
        groups = {name: self._observed(spec, spec.groups[name]) for name in self.groups}
        small = PermutationSpec(groups, {name: tuple(score.shape) for name, score in tensors.items()})
        still = {name: torch.eye(len(score), dtype=score.dtype, device=score.device) for name, score in tensors.items()}
        favoured = {name: score + _STAY * score.abs().max() * still[name] for name, score in tensors.items()}
        descent = Descent(small, build_blocks(small, tensors), favoured, still).grow_outwards().run(_SWEEPS)
        return dict(descent.pi), inner_product(tensors, descent.state), inner_product(tensors, still)

    def _observed(self, spec: PermutationSpec, group: Group) -> Group:
        tables = {
            tap.name: found
            for tap in self.taps
            if (found := tuple(Table((0,), t.rows) for t in group.tables.get(tap.tensor, ()) if t.dims == (tap.axis,)))
        }
        return Group(group.name, group.size, tables, group.family, group.within)


def clusters(spec: PermutationSpec, taps: Sequence[Tap]) -> tuple[list[Cluster], list[Cluster]]:
    """All groups of the spec in clusters: those that are seen at the taps, and those of which some group is not."""
    leader = {name: name for name in spec.groups}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    def join(names: Iterable[str]) -> None:
        first, *others = map(find, names)
        for other in others:
            leader[find(other)] = find(first)

    for group in spec.groups.values():
        join([group.name, *(parent for parent, _ in group.within)])
    seen_at: dict[str, list[Tap]] = {}
    for tap in taps:
        for name in groups_at(spec, tap):
            seen_at.setdefault(name, []).append(tap)
        for names in _sharing(spec, tap):
            join(names)
    members: dict[str, list[str]] = {}
    for name in spec.groups:
        members.setdefault(find(name), []).append(name)
    seen, unseen = [], []
    for names in members.values():
        at = tuple(dict.fromkeys(tap for name in names for tap in seen_at.get(name, ())))
        (seen if all(name in seen_at for name in names) else unseen).append(Cluster(tuple(names), at))
    return seen, unseen


def _sharing(spec: PermutationSpec, tap: Tap) -> list[list[str]]:
    """Pairs of groups that own a channel of the tap in common."""
    owner = np.full(spec.shapes[tap.tensor][tap.axis], -1)
    names: list[str] = []
    pairs = []
    for name, table in spec.tables_by_tensor[tap.tensor]:
        if table.dims == (tap.axis,):
            pairs += [[names[k], name] for k in np.unique(owner[table.rows]) if k >= 0 and names[k] != name]
            owner[table.rows] = len(names)
            names.append(name)
    return pairs
