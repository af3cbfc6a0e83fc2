"""A spec as text and as HTML: families of groups with their places, and the axes that stay with the reasons."""

import html
from collections.abc import Mapping

from lmc.symmetry.groups.symmetries import Symmetries
from lmc.symmetry.notation.grammar import IRREGULAR, Name, generic, names_in, parse, renamed, write

_MAX_TENSORS = 4
_MAX_LINES = 60


def headline(spec: Symmetries) -> str:
    total = sum(spec.parameters.values())
    return (
        f"{len(spec.groups)} groups, 10^{spec.log10_order:.1f} symmetries, "
        f"{spec.coverage:.1%} of {total:,} parameters move, {proof(spec)}"
    )


def proof(spec: Symmetries) -> str:
    """The degree to which the spec is proven, and what it keeps: `certified to 1e-14 (broken: 2e-02), keeps logits, boxes`."""
    found = spec.certificate
    text = "not certified" if found is None else f"certified to {found.bound:.0e}"
    if found is not None and found.power:
        text += f" (broken: {found.power:.0e})"
    if found is not None and found.unverified:
        text += f", not verified: {_shorten(found.unverified)}"
    return f"{text}, keeps {_shorten(spec.outputs)}" if spec.outputs else text


def ordered_families(spec: Symmetries) -> list[str]:
    """The families along the network, those nested in another right behind it."""
    outer = {
        family: [spec.groups[parent].family for parent, _ in spec.groups[names[0]].within]
        for family, names in spec.families.items()
    }
    order: list[str] = []

    def visit(family: str) -> None:
        if family not in order:
            order.append(family)
            for child, parents in outer.items():
                if family in parents:
                    visit(child)

    for family, parents in outer.items():
        if not parents:
            visit(family)
    return order


def family_rows(spec: Symmetries, patterns: Mapping[str, str]) -> list[tuple[str, str, str, str, str]]:
    """(family, units, inside, tensors with their patterns, what is admitted beyond permutations), families that differ only
    by a layer number in one row."""
    merged: dict[tuple[str, int, int, tuple[str, ...], tuple[str, ...], str], list[str]] = {}
    for family in ordered_families(spec):
        names = spec.families[family]
        first = spec.groups[names[0]]
        inside = tuple(dict.fromkeys(generic(spec.groups[parent].family) for parent, _ in first.within))
        tensors = tuple(generic(tensor_text(spec, tensor, patterns[tensor])) for tensor in first.tables)
        key = (generic(family), first.size, len(names), inside, tensors, spec.beyond(family))
        merged.setdefault(key, []).append(family)
    rows = []
    for (name, size, count, inside, tensors, beyond), families in merged.items():
        if len(families) == 1:
            group = spec.groups[spec.families[families[0]][0]]
            name, tensors = families[0], tuple(tensor_text(spec, tensor, patterns[tensor]) for tensor in group.tables)
            inside = tuple(dict.fromkeys(spec.groups[parent].family for parent, _ in group.within))
        times = f"{len(families)} x " if len(families) > 1 else ""
        nested = f" in each of {count}" if inside else ""
        where = _shorten(tuple(dict.fromkeys(tensors)))
        rows.append((name, f"{times}{size}{nested}", ", ".join(inside), where, beyond))
    return rows


def tensor_text(spec: Symmetries, tensor: str, pattern: str) -> str:
    """A tensor and its pattern, in which groups go by the last part of their names where that is clear."""
    if IRREGULAR in pattern.split():
        return f'{tensor} "{pattern}"'
    axes = parse(pattern)
    shorts = {name: Name(_last_part(name)) for axis in axes for name in names_in(axis) if name in spec.families}
    if len(set(shorts.values())) == len(shorts):
        axes = tuple(renamed(axis, shorts) for axis in axes)
    return f'{tensor} "{write(axes)}"'


def _last_part(name: str) -> str:
    parts = name.split(".")
    start = next((k for k in range(len(parts) - 1, -1, -1) if not parts[k].isdigit()), 0)
    return ".".join(parts[start:])


def frozen_rows(spec: Symmetries) -> list[tuple[str, str]]:
    """(reason, axes that it holds): axes of size > 1 that do not move, merged over layers that stay for one reason."""
    axes: dict[tuple[str, str], list[int]] = {}
    for (tensor, axis), reason in spec.frozen.items():
        axes.setdefault((generic(tensor), reason), [])
        if axis not in axes[generic(tensor), reason]:
            axes[generic(tensor), reason].append(axis)
    reasons: dict[str, dict[str, list[str]]] = {}
    for (tensor, reason), found in axes.items():
        kind, _, detail = reason.partition(" (")
        numbers = ", ".join(map(str, sorted(found)))
        place = f"{tensor} {'axes' if len(found) > 1 else 'axis'} {numbers}"
        reasons.setdefault(kind, {}).setdefault(detail.rstrip(")"), []).append(place)
    rows = []
    for kind, details in reasons.items():
        where = f" ({next(iter(details))})" if len(details) == 1 and next(iter(details)) else ""
        rows.append((kind + where, _shorten(tuple(place for places in details.values() for place in places), "; ")))
    return rows


def as_text(spec: Symmetries, patterns: Mapping[str, str]) -> str:
    lines = [f"PermutationSpec: {headline(spec)}"]
    rows = family_rows(spec, patterns)
    width = max((len(name) for name, *_ in rows), default=0)
    for name, units, inside, tensors, beyond in rows[:_MAX_LINES]:
        nested = f" {inside}" if inside else ""
        lines.append(f"  {name:<{width}}  {units}{nested}:  {tensors}" + (f"  + {beyond}" if beyond else ""))
    if len(rows) > _MAX_LINES:
        lines.append(f"  ... and {len(rows) - _MAX_LINES} more families")
    stays = frozen_rows(spec)
    if stays:
        lines.append("  stays:")
        lines += [f"    {places}: {reason}" for reason, places in stays[:_MAX_LINES]]
    if spec.assumed:
        lines.append("  as on the example:")
        lines += [f"    {what}" for what in spec.assumed[:_MAX_LINES]]
    return "\n".join(lines)


def as_html(spec: Symmetries, patterns: Mapping[str, str]) -> str:
    def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
        head = "".join(f"<th style='text-align:left'>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    parts = [f"<p><b>PermutationSpec</b>: {html.escape(headline(spec))}</p>"]
    columns = ("group", "units", "inside", "where", "beyond permutations")[: 4 if spec.continuous is None else 5]
    parts.append(table(columns, [row[: len(columns)] for row in family_rows(spec, patterns)[:_MAX_LINES]]))
    stays = frozen_rows(spec)
    if stays:
        rows = [(places, reason) for reason, places in stays[:_MAX_LINES]]
        parts.append(f"<details><summary>what stays, and why</summary>{table(('axes', 'reason'), rows)}</details>")
    if spec.assumed:
        rows = [(what,) for what in spec.assumed[:_MAX_LINES]]
        parts.append(f"<details><summary>as on the example</summary>{table(('value',), rows)}</details>")
    return "".join(parts)


def _shorten(items: tuple[str, ...], between: str = ", ") -> str:
    more = len(items) - _MAX_TENSORS
    return between.join(items[:_MAX_TENSORS]) + (f"{between}... ({more} more)" if more > 0 else "")
