"""The continuous symmetries of a group of units, from the null space of a Jacobian.

A continuous symmetry mixes the units at each occurrence o by exp(t A_o), for constant matrices A_o; the outputs stay the same
if, at every point of weight space, the changes of the outputs along A_o add up to zero over the occurrences. So changes along
generators at each occurrence are measured at several random points, stacked below each other (the coefficients must be the
same at all points, and for all units), and the null space is the Lie algebra. As units may change places, it falls apart:
generators E_ii of scales, E_ij + E_ji and E_ij - E_ji of two units, and the turn of three around the vector of ones. Of the
mixings of two units both kinds are free (general linear), or the second alone (orthogonal), or only the turn of three
(orthogonal, fixing the vector of ones).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmc.core.context import own_context, warn
from lmc.core.progress import Budget
from lmc.errors import InputError
from lmc.symmetry.continuous.columns import Lab, Table
from lmc.symmetry.continuous.places import Move, random_matrix
from lmc.symmetry.continuous.signs import sign_patterns
from lmc.symmetry.groups.kinds import ContinuousSymmetries, Kind
from lmc.symmetry.groups.symmetries import Symmetries
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector

RANK = 1e-8  # singular values below this share of the largest are zero
RANK_OF_DIFFERENCES = 1e-5
DEAD = 1e-10  # columns below this share of the largest: nothing depends on the occurrence
DROWNED = 100.0  # times the rounding of outputs: below, a column shows nothing else
SMALL = 1e-5  # entries of a basis below this are zero, or below the rank where that is larger
AMPLIFIED = 1e4  # singular values may be this much larger than the rounding of outputs


@own_context
def continuous_symmetries(
    spec: Symmetries,
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: OutputSelector = None,
    draws: int = 3,
    seed: int = 0,
    tolerance: float = 1e-9,
    budget: float | None = None,
    progress: bool = True,
) -> ContinuousSymmetries:
    """The positive scales, signs, rotations and invertible mixings that each family of units admits.

    Args:
        spec: the groups of the architecture.
        model: gives the architecture; not changed.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        outputs: the outputs that must stay the same, as in `lmc.permutation_spec`.
        draws: number of random points of weight space, at least; more are drawn of small modules, and where the outputs
            are few.
        tolerance: allowed change of the outputs under finite elements, relative to their largest value.
        budget: seconds that it may take (default: any).
        progress: show a bar when it takes longer than two seconds.

    Raises:
        CertificateError: the module cannot be computed, neither in double precision nor, with a larger tolerance, in single.
        InputError: inputs that show nothing; a budget that does not suffice.
        SpecError: the spec does not fit the module.

    Example:
        >>> import lmc, torch
        >>> model, x = lmc.models.mlp(64, [32], 10), torch.randn(2, 64)
        >>> print(lmc.continuous_symmetries(lmc.permutation_spec(model, x), model, x))
        ContinuousSymmetries:
          fc1  permutation + scale (fc1.weight +1, fc1.bias +1, head.weight -1)
    """
    spec.check(model)
    if draws < 1:
        raise InputError(f"draws={draws}: at least one point is needed")
    if not spec.groups:
        return ContinuousSymmetries({}, tolerance)
    lab = Lab(spec, model, inputs, outputs, draws, seed, Budget(budget), progress)
    if lab.noise > tolerance / 10:
        warn(
            f"{type(model).__name__} computes in lower precision than float64 somewhere: its outputs are rounded by "
            f"{lab.noise:.0e}, so finite elements are held against {100 * lab.noise:.0e}, not {tolerance:.0e}"
        )
        tolerance = 100 * lab.noise
    rank = max(RANK if lab.exact else RANK_OF_DIFFERENCES, AMPLIFIED * lab.noise)
    found = {family: _candidate(table, rank, max(DEAD, DROWNED * lab.noise)) for family, table in lab.tables.items()}
    found = sign_patterns(lab, _tried(lab, found, lab.error, tolerance), tolerance)
    return ContinuousSymmetries(_tried(lab, found, lab.error_elsewhere, tolerance), tolerance)


def _candidate(table: Table, rank: float, dead: float) -> Kind:
    """The kind of a family, by what was measured to first order; nothing depends on columns below a share of the largest."""
    sizes = table.sizes
    live = [o for o, size in enumerate(sizes.tolist()) if size > dead * float(sizes.max())]
    if not live:
        return Kind(free=table.names)
    names, sizes, measured = [table.names[o] for o in live], sizes[live], table.measured[:, live]
    units = range(measured.shape[-1])
    scales = _null([measured[:, :, i, i] for i in units], sizes, rank)
    pairs = list(itertools.combinations(units, 2))
    even = _null([measured[:, :, i, j] + measured[:, :, j, i] for i, j in pairs], sizes, rank)
    odd = _null([measured[:, :, i, j] - measured[:, :, j, i] for i, j in pairs], sizes, rank)
    turns = [_turn(measured, *triple) for triple in itertools.combinations(units, 3)]
    mixing, basis = "none", odd[:0]
    if len(odd) and len(even):
        mixing, basis = "general linear", even
    elif len(odd):
        mixing, basis = "orthogonal", odd
    elif turns and len(found := _null(turns, sizes, rank)):
        mixing, basis = "orthogonal fixing 1", found
    return Kind(
        scales=tuple(_exponents(names, row, rank) for row in scales),
        mixing=mixing,
        mixes=tuple({name: round(e) for name, e in _exponents(names, row, rank).items()} for row in basis),
        free=tuple(name for o, name in enumerate(table.names) if o not in live),
    )


def _turn(measured: Tensor, i: int, j: int, k: int) -> Tensor:
    """The turn of three units around the vector of ones."""
    steps = ((i, j), (j, k), (k, i))
    return sum(measured[:, :, a, b] - measured[:, :, b, a] for a, b in steps)  # pyright: ignore[reportReturnType]


def _null(blocks: Sequence[Tensor], sizes: Tensor, rank: float) -> Tensor:
    """A basis (d, columns), reduced, of the coefficients under which the columns (rows, columns) add up to zero."""
    columns = torch.cat(list(blocks))
    norms = columns.norm(dim=0)
    norms = torch.where(norms > rank * sizes, norms, sizes)
    _, values, right = torch.linalg.svd(columns / norms, full_matrices=columns.shape[0] < columns.shape[1])
    kept = int((values > rank * values.max().clamp_min(rank)).sum())
    small = max(SMALL, rank)
    return _sparse(_reduced(right[kept:] / norms, small), small)


def _reduced(basis: Tensor, small: float) -> Tensor:
    """The reduced row echelon form of a basis, each row scaled to a largest entry of 1; what is small is 0."""
    rows, lead = basis / basis.abs().amax(1, keepdim=True), 0
    for k in range(len(rows)):
        while lead < rows.shape[1] and float(rows[k:, lead].abs().max()) < small:
            rows[k:, lead] = 0
            lead += 1
        if lead == rows.shape[1]:
            return rows[:k]
        best = k + int(rows[k:, lead].abs().argmax())
        rows[[k, best]] = rows[[best, k]]
        rows[k] = rows[k] / rows[k, lead].clone()
        for other in range(len(rows)):
            if other != k:
                rows[other] = rows[other] - rows[other, lead].clone() * rows[k]
        lead += 1
    return rows / rows.abs().amax(1, keepdim=True)


def _sparse(rows: Tensor, small: float) -> Tensor:
    """The same space by rows with fewer entries that are not small, where one row can take away entries of another."""
    better = True
    while better:
        better = False
        for i, j in itertools.permutations(range(len(rows)), 2):
            for column in ((rows[i].abs() > small) & (rows[j].abs() > small)).nonzero().flatten().tolist():
                trial = rows[i] - rows[j] * (rows[i, column] / rows[j, column])
                if int((trial.abs() > small).sum()) < int((rows[i].abs() > small).sum()):
                    rows[i], better = trial, True
                    break
    if not len(rows):
        return rows
    first = rows.gather(1, (rows.abs() > small).int().argmax(1, keepdim=True)).sign()
    return rows * first / rows.abs().amax(1, keepdim=True)


def _exponents(names: Sequence[str], row: Tensor, rank: float) -> dict[str, float]:
    """The entries of a row that are not zero, as multiples of a twelfth where they are."""
    found, small = {}, max(10 * SMALL, rank)
    for name, exponent in zip(names, row.tolist(), strict=True):
        nearest = round(exponent * 12) / 12
        if abs(exponent) > small:
            found[name] = nearest if abs(nearest - exponent) < small else exponent
    return found


def _tried(
    lab: Lab, kinds: dict[str, Kind], change: Callable[[Sequence[Move]], float], tolerance: float
) -> dict[str, Kind]:
    """The kinds, of which finite random elements keep the outputs: all families at once, and one by one where that fails."""
    elements = {family: _elements(lab, family, kind) for family, kind in kinds.items()}
    together = change([move for each in elements.values() for moves in each for move in moves])
    found = {}
    for family, kind in kinds.items():
        error = together if elements[family] else 0.0
        if error > tolerance:
            errors = [change(moves) for moves in elements[family]]
            kept = iter([error <= tolerance for error in errors])
            scales, mixes, signs = (
                tuple(each for each in parts if next(kept)) for parts in (kind.scales, kind.mixes, kind.signs)
            )
            kind = replace(kind, scales=scales, mixes=mixes, signs=signs, mixing=kind.mixing if mixes else "none")
            error = max((error for error in errors if error <= tolerance), default=0.0)
        found[family] = replace(kind, error=max(error, kind.error), power=_power(lab.tables[family], kind))
    return found


def _elements(lab: Lab, family: str, kind: Kind) -> list[list[Move]]:
    """A random element for each scale and each mixing of a family, and one for each change of signs, in one of its groups."""
    name, units = lab.chosen(family)
    places = {place.name: place for place in lab.places(name)}

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=lab.generator, dtype=torch.float64)

    elements = []
    for scale in kind.scales:
        factors = 0.5 * noise(len(units))
        elements.append([Move(places[o], torch.diag(torch.exp(e * factors)), units) for o, e in scale.items()])
    for mix in kind.mixes:
        matrix = random_matrix(kind.mixing, noise(len(units), len(units)))
        inverse = torch.linalg.inv(matrix).T
        elements.append([Move(places[o], matrix if e > 0 else inverse, units) for o, e in mix.items()])
    minus = -torch.eye(len(units), dtype=torch.float64)
    elements += [[Move(places[o], minus, units) for o in sign] for sign in kind.signs]
    return elements


def _power(table: Table, kind: Kind) -> float:
    """The least rate at which the outputs change when one occurrence moves alone: by a scale, or in any direction."""
    rows = table.measured.shape[0]
    alone = table.measured.diagonal(dim1=2, dim2=3).square().sum((0, 2)).sqrt()
    rates = torch.where(alone > RANK * table.sizes, alone, table.sizes) / rows**0.5
    used = {name for part in (*kind.scales, *kind.mixes) for name in part}
    return min((rate for name, rate in zip(table.names, rates.tolist(), strict=True) if name in used), default=0.0)
