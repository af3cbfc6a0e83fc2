"""The axis-pattern notation: how permutation symmetries are written, and read back.

A pattern has one item per axis of a tensor, in the spirit of einops:

    "c2 c1 . ."         names are permutation groups, "." is an axis that stays
    "h (c2 .)"          a product: each unit of c2 owns a block of positions (flatten); an integer is "." of that size
    "o (a + b)"         a sum: a concatenation of two groups
    "(head qk) d"       nesting: units of qk inside each head, a group `qk[i]` for every head
    "e e/f d"           nesting across axes: the units of f inside each unit of e (stacked experts)
    "(head /v) d"       not nested: one group v, the same in all heads
    "'2' '0'"           quoted, a name may hold any character ("''" is a quote): groups of `nn.Sequential` are numbers

Inside a product a name is nested in the names to its left, as far as these stand to its left wherever it occurs: with
"(kv rep qk) d" and "(kv qk) d", qk lives in kv only. A path such as "e/f" says it outright, for every occurrence.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmc.errors import SpecError

IRREGULAR = "table"  # stands for an axis that the notation cannot say
_PART = r"(?:'(?:[^']|'')*'|\w[\w.\-]*)"
_TOKEN = re.compile(rf"\s*(?:(?P<int>\d+(?![\w.\-/]))|(?P<name>/?{_PART}(?:/{_PART})*)|(?P<op>[().+]))")


@dataclass(frozen=True)
class Name:
    """A group; `path` holds the names it is said to live in (`None`: not said, `()`: said to live in none)."""

    name: str
    path: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Fixed:
    """Positions that stay; `size` is None for "." (worked out from the axis)."""

    size: int | None = None


@dataclass(frozen=True)
class Product:
    factors: "tuple[Factor, ...]"


@dataclass(frozen=True)
class Sum:
    terms: tuple[Product, ...]


Factor = Name | Fixed | Sum
Axis = Sum


def parse(pattern: str, tensor: str = "pattern") -> tuple[Axis, ...]:
    """One `Axis` per item of `pattern`. Raises `SpecError` showing where the text stops making sense."""
    tokens, position = [], 0
    text = pattern.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise SpecError(f"{tensor}: cannot read {pattern!r} at {text[position:].strip()!r}")
        tokens.append((match.lastgroup, match.group(match.lastgroup or 0)))
        position = match.end()
    axes = []
    rest = tokens
    while rest:
        factor, rest = _factor(rest, pattern, tensor)
        axes.append(factor if isinstance(factor, Sum) else Sum((Product((factor,)),)))
    return tuple(axes)


def parse_all(patterns: Mapping[str, str]) -> dict[str, tuple[Axis, ...]]:
    """The axes of each tensor, by which groups are laid out. Raises `SpecError` for an axis of which a pattern says nothing."""
    for tensor, pattern in patterns.items():
        if IRREGULAR in pattern.split():
            raise SpecError(
                f"{tensor}: {IRREGULAR!r} in {pattern!r} stands for an axis that no pattern says; keep the whole spec with "
                f"spec.save or spec.to_dict, or quote it, \"'{IRREGULAR}'\", if a group is called so"
            )
    return {tensor: parse(pattern, tensor) for tensor, pattern in patterns.items()}


def _factor(tokens: list, pattern: str, tensor: str) -> tuple[Factor, list]:
    (kind, text), rest = tokens[0], tokens[1:]
    if kind == "name":
        *path, name = (unquoted(part) for part in re.findall(_PART, text))
        return Name(name, tuple(path) if path or text.startswith("/") else None), rest
    if kind == "int":
        return Fixed(int(text)), rest
    if text == ".":
        return Fixed(), rest
    if text != "(":
        raise SpecError(f"{tensor}: {text!r} out of place in {pattern!r}")
    terms, factors = [], []
    while True:
        if not rest:
            raise SpecError(f"{tensor}: a parenthesis is never closed in {pattern!r}")
        text = rest[0][1]
        if text in (")", "+"):
            if not factors:
                raise SpecError(f"{tensor}: nothing before {text!r} in {pattern!r}")
            terms.append(Product(tuple(factors)))
            factors, rest = [], rest[1:]
            if text == ")":
                return Sum(tuple(terms)), rest
        else:
            factor, rest = _factor(rest, pattern, tensor)
            factors.append(factor)


def unquoted(part: str) -> str:
    """The name that a word of a pattern stands for."""
    return part[1:-1].replace("''", "'") if part.startswith("'") else part


def write(axes: Sequence[Axis]) -> str:
    """The pattern that `parse` reads as these axes."""
    return " ".join(_written(axis, outermost=True) for axis in axes)


def word(name: str) -> str:
    """A name as it stands in a pattern: quoted unless it is a plain word that means nothing else."""
    plain = re.fullmatch(r"\w[\w.\-]*", name) and not name.isdigit() and name != IRREGULAR
    return name if plain else "'" + name.replace("'", "''") + "'"


def _written(factor: Factor, outermost: bool = False) -> str:
    if isinstance(factor, Fixed):
        return "." if factor.size is None else str(factor.size)
    if isinstance(factor, Name):
        lone = "/" if factor.path == () else ""
        return lone + "/".join(word(name) for name in (*(factor.path or ()), factor.name))
    alone = outermost and len(factor.terms) == len(factor.terms[0].factors) == 1
    text = " + ".join(" ".join(_written(inner) for inner in term.factors) for term in factor.terms)
    return text if alone else f"({text})"


def renamed(axis: Axis, names: Mapping[str, Name]) -> Axis:
    """The axis with some of its names replaced."""
    return Sum(tuple(Product(tuple(_renamed(factor, names) for factor in term.factors)) for term in axis.terms))


def _renamed(factor: Factor, names: Mapping[str, Name]) -> Factor:
    if isinstance(factor, Name):
        return names.get(factor.name, factor)
    return renamed(factor, names) if isinstance(factor, Sum) else factor


def names_in(axis: Axis) -> list[str]:
    """The group names of an axis, from left to right, each once."""
    found: dict[str, None] = {}
    for term in axis.terms:
        for factor in term.factors:
            if isinstance(factor, Name):
                found[factor.name] = None
            elif isinstance(factor, Sum):
                found.update(dict.fromkeys(names_in(factor)))
    return list(found)


def ancestors(patterns: Mapping[str, tuple[Axis, ...]]) -> dict[str, tuple[str, ...]]:
    """For each name the names it lives in, outermost first (see the module's docstring for the rule)."""
    said: dict[str, tuple[str, ...]] = {}
    seen: dict[str, list[tuple[str, ...]]] = {}

    def visit(axis: Axis, left: tuple[str, ...], tensor: str) -> None:
        for term in axis.terms:
            before = left
            for factor in term.factors:
                if isinstance(factor, Name):
                    if factor.name in before:
                        raise SpecError(f"{tensor}: {factor.name!r} stands twice in one product")
                    if factor.path is not None and said.setdefault(factor.name, factor.path) != factor.path:
                        raise SpecError(f"{tensor}: {factor.name!r} is said to live in two different places")
                    seen.setdefault(factor.name, []).append(before)
                    before = (*before, factor.name)
                elif isinstance(factor, Sum):
                    visit(factor, before, tensor)
                    before = (*before, *names_in(factor))

    for tensor, axes in patterns.items():
        for axis in axes:
            visit(axis, (), tensor)
    direct = {
        name: said[name] if name in said else tuple(n for n in lefts[0] if all(n in left for left in lefts))
        for name, lefts in seen.items()
    }
    return {name: _closure(name, direct, ()) for name in direct}


def _closure(name: str, direct: Mapping[str, tuple[str, ...]], trail: tuple[str, ...]) -> tuple[str, ...]:
    if name in trail:
        raise SpecError(f"{name!r} is said to live inside itself: {' / '.join((*trail, name))}")
    if name not in direct:
        raise SpecError(f"{trail[-1]!r} is said to live in {name!r}, which no tensor has")
    found: dict[str, None] = {}
    for parent in direct[name]:
        found.update(dict.fromkeys(_closure(parent, direct, (*trail, name))))
        found[parent] = None
    return tuple(found)


def solve_sizes(
    patterns: Mapping[str, tuple[Axis, ...]], shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, int]
) -> dict[str, int]:
    """The size of every name, from the tensor shapes and the sizes given. Raises `SpecError` if they disagree."""
    sizes = dict(known)
    while True:
        before = len(sizes)
        for tensor, axes in patterns.items():
            for k, axis in enumerate(axes):
                _solve_sum(axis, shapes[tensor][k], sizes, f"{tensor}, axis {k}")
        if len(sizes) == before:
            break
    for tensor, axes in patterns.items():
        for k, axis in enumerate(axes):
            unknown = [name for name in names_in(axis) if name not in sizes]
            if unknown:
                raise SpecError(f"{tensor}, axis {k}: the size of {unknown[0]!r} is open: pass it, {unknown[0]}=...")
            size, open_dots = _measure(axis, sizes)
            if open_dots > 1:
                raise SpecError(f"{tensor}, axis {k}: more than one '.' in a composed axis: give sizes as integers")
            if open_dots == 0 and size != shapes[tensor][k]:
                raise SpecError(
                    f"{tensor}, axis {k}: the pattern makes {size} positions, the tensor has {shapes[tensor][k]}"
                )
    return sizes


def _solve_sum(axis: Sum, length: int, sizes: dict[str, int], where: str) -> None:
    """Fill in the one unknown name of a sum of products, if there is exactly one."""
    open_terms, total = [], 0
    for term in axis.terms:
        size, unknown = 1, []
        for factor in term.factors:
            value = _value(factor, sizes)
            if value is None:
                unknown.append(factor)
            else:
                size *= value
        if unknown:
            open_terms.append((size, unknown))
        else:
            total += size
    if len(open_terms) != 1 or len(open_terms[0][1]) != 1:
        return
    (size, (factor,)) = open_terms[0]
    left = length - total
    if size == 0 or left < min(1, length) or left % size:
        raise SpecError(f"{where}: {length} positions cannot be divided as the pattern says ({left} over {size})")
    if isinstance(factor, Name):
        sizes[factor.name] = left // size
    elif isinstance(factor, Sum):
        _solve_sum(factor, left // size, sizes, where)


def _value(factor: Factor, sizes: Mapping[str, int]) -> int | None:
    if isinstance(factor, Name):
        return sizes.get(factor.name)
    if isinstance(factor, Fixed):
        return factor.size
    values = [[_value(f, sizes) for f in term.factors] for term in factor.terms]
    if any(value is None for row in values for value in row):
        return None
    return sum(math.prod(row) for row in values)  # type: ignore[arg-type]


def generic(text: str) -> str:
    """Layer numbers ("layers.3.fc") written as "*", so that equal layers share a line."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", text)


def _measure(axis: Axis, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(size without the dots, number of dots) of an axis whose names are all known."""
    total, dots = 0, 0
    for term in axis.terms:
        size = 1
        for factor in term.factors:
            if isinstance(factor, Sum):
                inner, inner_dots = _measure(factor, sizes)
                size, dots = size * inner, dots + inner_dots
            elif isinstance(factor, Fixed) and factor.size is None:
                dots += 1
            else:
                size *= _value(factor, sizes) or 1
        total += size
    return total, dots
