"""Signs: sets of occurrences at which a unit may be multiplied by -1, found by trying.

The sets form a vector space over GF(2). Candidates are the occurrences with odd exponents of a scale, those of a mixing,
all, those that make the unit, the same gate of a cell at all its occurrences; beyond these, all sets of a few occurrences,
or sets that are grown as long as the outputs come closer to what they were. Of equal layers the first is searched, and what
it admits is tried on the others; where that is nothing, a change at all occurrences is tried on each of a few layers.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from lmc.symmetry.continuous.columns import UNITS, Lab
from lmc.symmetry.continuous.places import Move, Occurrence
from lmc.symmetry.groups.kinds import Kind
from lmc.symmetry.notation.grammar import generic

MOST_TRIED = 5  # occurrences of which all sets are tried
MOST_GROWN = 12  # occurrences of which sets are grown
MANY = 6  # equal layers beyond the first, of which none is tried where the first admits nothing
SMALL = 1e-6  # changes of the outputs that are looked at twice

Pattern = frozenset[int]


def sign_patterns(lab: Lab, kinds: dict[str, Kind], tolerance: float) -> dict[str, Kind]:
    """The kinds with their signs."""
    equal: dict[tuple[str, ...], list[_Trial]] = {}
    for family, kind in kinds.items():
        trial = _Trial(lab, family, kind)
        equal.setdefault(tuple(generic(place.name) for place in trial.live), []).append(trial)
    found: dict[str, Kind] = {}
    for first, *others in equal.values():
        basis = _Basis(first.implied)
        if not first.implied:
            for pattern in (*_candidates(first.live, first.kind), *_search(len(first.live), basis, first.error)):
                if pattern and not basis.holds(pattern) and first.error(pattern) <= tolerance:
                    basis.add(pattern)
        implied = bool(first.implied) and all(trial.implied == first.implied for trial in others)
        together = [move for trial in others for pattern in basis.patterns for move in trial.moves(pattern)]
        alike = implied or (lab.error(together) <= tolerance if together else len(others) >= MANY)
        for trial in (first, *others):
            own = basis
            if trial is not first and not alike:
                own = _Basis(trial.implied)
                for pattern in (*basis.patterns, frozenset(range(len(trial.live)))):
                    if pattern and not own.holds(pattern) and trial.error(pattern) <= tolerance:
                        own.add(pattern)
            signs = tuple(tuple(trial.live[o].name for o in sorted(pattern)) for pattern in own.patterns)
            worst = max((trial.errors[pattern] for pattern in own.patterns if pattern in trial.errors), default=0.0)
            found[trial.family] = replace(trial.kind, signs=signs, error=max(trial.kind.error, worst))
    return {family: found[family] for family in kinds}


class _Trial:
    """The occurrences of a family, and what a change of signs there does. Tried on a few units at once, since one alone may
    be off; not on all, as normalised streams keep a change of all signs; and where it changes nothing, on others."""

    def __init__(self, lab: Lab, family: str, kind: Kind) -> None:
        self.lab, self.family, self.kind = lab, family, kind
        name, units = lab.chosen(family, 2 * UNITS)
        half = max(1, len(units) // 2)
        self._units = (units[:half], units[half:][:half])
        self.live = [place for place in lab.places(name) if place.name not in kind.free]
        names = [place.name for place in self.live]
        self.implied = [
            frozenset(names.index(name) for name in mix) for mix in kind.mixes if kind.mixing != "orthogonal fixing 1"
        ]
        self.errors: dict[Pattern, float] = {}

    def moves(self, pattern: Pattern, half: int = 0) -> list[Move]:
        units = self._units[half]
        minus = -torch.eye(len(units), dtype=torch.float64)
        return [Move(self.live[o], minus, units) for o in sorted(pattern)]

    def error(self, pattern: Pattern) -> float:
        if pattern not in self.errors:
            error = self.lab.error(self.moves(pattern))
            if error < SMALL:
                error = max(error, self.lab.error(self.moves(pattern, half=1)))
            self.errors[pattern] = error
        return self.errors[pattern]


def _candidates(live: Sequence[Occurrence], kind: Kind) -> Iterator[Pattern]:
    for scale in kind.scales:
        least = min(abs(e) for e in scale.values())
        yield frozenset(o for o, place in enumerate(live) if round(scale.get(place.name, 0.0) / least) % 2)
    yield frozenset(range(len(live)))
    yield frozenset(o for o, place in enumerate(live) if 0 in place.dims)
    columns = {_column(place): None for place in live}
    for column in columns:
        if column:
            yield frozenset(o for o, place in enumerate(live) if _column(place) in ("", column))


def _column(place: Occurrence) -> str:
    return place.name.rpartition("[")[2] if place.name.endswith("]") else ""


def _search(count: int, basis: "_Basis", error: Callable[[Pattern], float]) -> Iterator[Pattern]:
    """Further patterns to try, after the candidates."""
    if count <= MOST_TRIED:
        for size in range(1, count + 1):
            yield from map(frozenset, itertools.combinations(range(count), size))
    elif count <= MOST_GROWN and not basis.patterns:
        for start in (count - 1, 0):
            pattern = frozenset([start])
            while len(pattern) < count:
                grown = min((pattern | {o} for o in range(count) if o not in pattern), key=error)
                if error(grown) >= error(pattern):
                    break
                pattern = grown
                yield pattern


class _Basis:
    """Independent patterns, and whether another one is a sum of them over GF(2)."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self.patterns: list[Pattern] = []
        self._reduced: dict[int, Pattern] = {}  # by smallest element
        for pattern in patterns:
            self.add(pattern)

    def _rest(self, pattern: Pattern) -> Pattern:
        while pattern and min(pattern) in self._reduced:
            pattern = pattern ^ self._reduced[min(pattern)]
        return pattern

    def holds(self, pattern: Pattern) -> bool:
        return not self._rest(pattern)

    def add(self, pattern: Pattern) -> None:
        rest = self._rest(pattern)
        if rest:
            self._reduced[min(rest)] = rest
            self.patterns.append(pattern)
