"""From groups back to axis patterns: the text in which a specification is shown, compared and saved."""

import re
from collections.abc import Mapping

import numpy as np

from lmc.symmetry.group import Group
from lmc.symmetry.notation.grammar import ancestors, parse
from lmc.symmetry.notation.layout import ABSENT, Units

IRREGULAR = "table"


def describe(groups: Mapping[str, Group], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The pattern of each tensor; an axis that the notation cannot say is written "table"."""
    inside = family_ancestors(groups)
    owners = {tensor: [{} for _ in shape] for tensor, shape in shapes.items()}
    outermost_first = sorted(groups.values(), key=lambda group: len(inside[group.family]))
    broken: set[tuple[str, int]] = set()
    across: dict[tuple[str, int], set[str]] = {}
    for group in outermost_first:
        for tensor, tables in group.tables.items():
            for table in tables:
                _place(group, table.dims, table.rows, shapes[tensor], owners[tensor], inside, broken, across, tensor)
    texts = {
        tensor: [
            IRREGULAR if (tensor, k) in broken else _axis_text(length, owners[tensor][k])
            for k, length in enumerate(shape)
        ]
        for tensor, shape in shapes.items()
    }
    return _with_paths(texts, inside, across)


def family_ancestors(groups: Mapping[str, Group]) -> dict[str, tuple[str, ...]]:
    """For each family the families it lives in, outermost first."""
    found: dict[str, tuple[str, ...]] = {}

    def visit(group: Group) -> tuple[str, ...]:
        if group.family not in found:
            around: dict[str, None] = {}
            for parent, _ in group.within:
                around.update(dict.fromkeys(visit(groups[parent])))
                around[groups[parent].family] = None
            found[group.family] = tuple(around)
        return found[group.family]

    for group in groups.values():
        visit(group)
    return found


def _place(group, dims, rows, shape, axes, inside, broken, across, tensor) -> None:
    """Enter the units of one table into the per-axis owners; a table over several axes must factor onto one of them."""
    if len(dims) == 1:
        _own(axes[dims[0]], group.family, rows, np.arange(group.size), shape[dims[0]], (tensor, dims[0]), broken)
        return
    coordinates = np.unravel_index(rows, [shape[d] for d in dims])
    around = inside[group.family]
    for axis, positions in zip(dims, coordinates, strict=True):
        first = positions[:, :1]
        if (positions == first).all() and len(np.unique(first)) == group.size:
            if not any(name in axes[axis] for name in around):
                across.setdefault((tensor, axis), set()).add(group.family)
                _own(axes[axis], group.family, first, np.arange(group.size), shape[axis], (tensor, axis), broken)
                return
    broken.update((tensor, axis) for axis in dims)


def _own(owners: dict[str, Units], family: str, rows, units, length: int, where, broken) -> None:
    mine = owners.setdefault(family, np.full(length, ABSENT, dtype=np.int64))
    values = np.broadcast_to(units[:, None], rows.shape)
    if ((mine[rows] != ABSENT) & (mine[rows] != values)).any():
        broken.add(where)
    mine[rows] = values


def _axis_text(length: int, owners: Mapping[str, Units]) -> str:
    """One axis as a sum of products; a fixed factor that ends every term is written once, behind the sum."""
    terms: list[list[str]] = []
    start = 0
    while start < length:
        stop, words = _longest_term(start, length, owners)
        if not words:
            return IRREGULAR
        terms.append(words)
        start = stop
    last = terms[0][-1]
    common = len(terms) > 1 and last.isdigit() and all(len(words) > 1 and words[-1] == last for words in terms)
    if common:
        terms = [words[:-1] for words in terms]
    text = " + ".join(" ".join(words) for words in terms)
    if common:
        text = f"({text}) {last}"
    elif len(terms) == 1 and len(terms[0]) == 1:
        return "." if text.isdigit() else text
    fixed = [word for word in re.findall(r"[^\s()]+", text) if word.isdigit()]
    if len(fixed) == 1:
        text = re.sub(rf"(?<![^\s(]){fixed[0]}(?![^\s)])", ".", text)
    return f"({text})"


def _longest_term(start: int, length: int, owners: Mapping[str, Units]) -> tuple[int, list[str]]:
    """The longest product that begins at `start`: (stop, its factors as words; none if there is no such product)."""
    here = {family: units[start:] for family, units in owners.items() if units[start] != ABSENT}
    same = np.ones(length - start, dtype=bool)
    for units in owners.values():
        same &= (units[start:] != ABSENT) == (units[start] != ABSENT)
    reach = length - start if same.all() else int(np.argmin(same))
    if not here:
        return start + reach, [str(reach)]
    period = np.ones(reach, dtype=bool)
    for units in here.values():
        period &= units[:reach] == 0
    breaks = [reach, *(int(i) for i in np.flatnonzero(period)[::-1] if i > 0)]
    for stop in breaks[:64]:
        words = _product_words({family: units[:stop] for family, units in here.items()}, stop)
        if words:
            return start + stop, words
    return length, []


def _product_words(units: Mapping[str, Units], length: int) -> list[str]:
    """`length` positions as an ordered product of the families and fixed factors; empty if they are not one."""
    factors = []
    for family, owner in units.items():
        size = int(owner.max()) + 1
        stride = int(np.argmax(owner != owner[0])) or length
        if owner[0] != 0 or not (owner == (np.arange(length) // stride) % size).all():
            return []
        factors.append((stride, size, family))
    factors.sort(key=lambda factor: (-factor[0], -factor[1]))
    words: list[str] = []
    remaining = length
    for stride, size, family in factors:
        outer, odd = divmod(remaining, stride * size)
        if odd or outer < 1:
            return []
        if outer > 1:
            words.append(str(outer))
        words.append(family)
        remaining = stride
    if remaining > 1:
        words.append(str(remaining))
    return words


def _with_paths(texts: dict[str, list[str]], inside: Mapping[str, tuple[str, ...]], across) -> dict[str, str]:
    """Write out the path of every family whose nesting the positions alone would not tell."""
    readable = {t: parse(" ".join(a for a in axes if a != IRREGULAR), t) for t, axes in texts.items()}
    guessed = _guess(readable)
    explicit = {
        family: "/".join((*inside[family], family)) if inside[family] else f"/{family}"
        for family in inside
        if family in guessed and guessed[family] != set(inside[family])
    }
    result = {}
    for tensor, axes in texts.items():
        result[tensor] = " ".join(a if a in (IRREGULAR, ".") else _rename(a, explicit) for a in axes)
    return result


def _guess(patterns) -> dict[str, set[str]]:
    return {family: set(around) for family, around in ancestors(patterns).items()}


def _rename(text: str, names: Mapping[str, str]) -> str:
    words = text.replace("(", "( ").replace(")", " )").split(" ")
    return " ".join(names.get(word, word) for word in words).replace("( ", "(").replace(" )", ")")
