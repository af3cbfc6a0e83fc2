"""The continuous symmetries of a group of units, from the null space of a Jacobian.

A continuous symmetry mixes the units at each occurrence o by exp(t A_o), for constant matrices A_o; the outputs stay the same
if, at every point of weight space, the changes of the outputs along A_o add up to zero over the occurrences. So changes along
a basis of generators at each occurrence are measured at several random points, stacked below each other (the coefficients
must be the same at all points), and the null space is the Lie algebra. Its dimension distinguishes the kinds: of the six
generators that mix three units, all are free (general linear), or three (orthogonal), or one (orthogonal, fixing the vector
of ones).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.symmetry.groups.group import Group, Rows
from lmc.symmetry.groups.symmetries import Symmetries
from lmc.symmetry.proof.probe import Probe, draw
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector
from lmc.weights import Weights

if TYPE_CHECKING:
    import pandas as pd


MOST_COLUMNS = 8  # of a table that are told apart: gates of a cell, copies of a unit; more are the pixels of one


@dataclass(frozen=True, eq=False)
class Occurrence:
    """The units of a group at one place of one tensor.

    Attributes:
        name: the tensor, with the axes where it has several tables, and the column where a unit has a few places.
        tensor: name of the tensor.
        dims: the axes concerned.
        rows: (n, m) flat positions over `dims` that belong to each unit.
    """

    name: str
    tensor: str
    dims: tuple[int, ...]
    rows: Rows

    def mixed(self, weights: Weights, matrix: Tensor) -> Tensor:
        """The tensor with its first units u replaced by `matrix` (k, k) u."""
        tensor = weights[self.tensor].clone()
        front = tensor.movedim(self.dims, tuple(range(len(self.dims))))  # a view
        flat = front.flatten(0, len(self.dims) - 1) if len(self.dims) > 1 else front
        positions = torch.from_numpy(self.rows[: len(matrix)]).to(tensor.device)
        units = flat[positions]
        flat[positions] = torch.einsum("ij,j...->i...", matrix.to(tensor), units)
        if len(self.dims) == 1:
            return tensor
        return flat.reshape(front.shape).movedim(tuple(range(len(self.dims))), self.dims).contiguous()


def occurrences(spec: Symmetries, group: Group) -> Iterator[Occurrence]:
    """Each place of a group, tied tensors once."""
    for tensor, tables in group.tables.items():
        if tensor in spec.aliases:
            continue
        for table in tables:
            axes = f" axis {','.join(map(str, table.dims))}" if len(tables) > 1 else ""
            columns = table.rows.shape[1]
            if 1 < columns <= MOST_COLUMNS:
                for c in range(columns):
                    yield Occurrence(f"{tensor}{axes}[{c}]", tensor, table.dims, table.rows[:, c : c + 1])
            else:
                yield Occurrence(f"{tensor}{axes}", tensor, table.dims, table.rows)


def changed(spec: Symmetries, weights: Weights, places: Mapping[Occurrence, Tensor]) -> Weights:
    """The weights with the units mixed at some occurrences, tied tensors under all their names."""
    result = dict(weights)
    for place, matrix in places.items():
        result[place.tensor] = place.mixed(result, matrix)
    for alias, first in spec.aliases.items():
        if result[first] is not weights[first]:
            result[alias] = result[first]
    return result


STEP = 1e-7  # of central differences in float64: small, as none may step over the kink of a ReLU
RANK = 1e-5  # singular values below this share of the largest are zero: the noise of differences is 1e-9
DEAD = 1e-6  # columns below this share of the largest: nothing depends on the occurrence
MOST_TRIED = 6  # occurrences of which all subsets are tried for signs
MIXINGS = {
    2: {2: "general linear", 1: "orthogonal"},
    3: {6: "general linear", 3: "orthogonal", 1: "orthogonal fixing 1"},
}


@dataclass(frozen=True)
class Kind:
    """Symmetries of the units of a family beyond changing places.

    Attributes:
        scales: for each independent scale the exponents: occurrence -> e, if the units are multiplied there by s^e.
        sign: whether a unit's sign may be flipped, with the occurrences that go with it.
        mixing: "none", "orthogonal", "orthogonal fixing 1" or "general linear".
        error: largest relative change of the outputs under finite random elements.
        power: change of the outputs when one occurrence of such an element is left out.
        free: occurrences that the outputs do not depend on, such as the bias of keys before a softmax.
    """

    scales: tuple[Mapping[str, float], ...]
    sign: bool
    mixing: str
    error: float
    power: float
    free: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = ["permutation"]
        words += [f"scale ({', '.join(f'{name} {e:+g}' for name, e in scale.items())})" for scale in self.scales[:1]]
        words += [f"{len(self.scales) - 1} further scales"] if len(self.scales) > 1 else []
        words += ["sign"] if self.sign else []
        words += [self.mixing] if self.mixing != "none" else []
        return " + ".join(words)


@dataclass(frozen=True)
class ContinuousSymmetries(Result):
    """The kind of each family of groups of a spec.

    Attributes:
        kinds: family -> kind.
        tolerance: relative change of the outputs that finite elements were held against.
    """

    kinds: dict[str, Kind]
    tolerance: float

    def __repr__(self) -> str:
        if all(str(kind) == "permutation" for kind in self.kinds.values()):
            return "ContinuousSymmetries: none, permutations only"
        width = max(map(len, self.kinds))
        return "\n".join(
            ["ContinuousSymmetries:", *(f"  {name:<{width}}  {kind}" for name, kind in self.kinds.items())]
        )

    def to_frame(self) -> "pd.DataFrame":
        """A row for each family: number of scales, sign, mixing, error, power."""
        rows = [(name, len(k.scales), k.sign, k.mixing, k.error, k.power) for name, k in self.kinds.items()]
        return require("pandas").DataFrame(rows, columns=["family", "scales", "sign", "mixing", "error", "power"])


def continuous_symmetries(
    spec: Symmetries,
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: OutputSelector = None,
    draws: int = 3,
    seed: int = 0,
    tolerance: float = 1e-9,
    progress: bool = True,
) -> ContinuousSymmetries:
    """The positive scales, signs, rotations and invertible mixings that each family of units admits.

    Args:
        spec: the groups of the architecture.
        model: gives the architecture; not changed.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        outputs: the outputs that must stay the same, as in `lmc.permutation_spec`.
        draws: number of random points of weight space, at least; more are drawn where the outputs are few.
        tolerance: allowed change of the outputs under finite elements, relative to their largest value.
        progress: show a bar when it takes longer than two seconds.

    Raises:
        CertificateError: the module cannot be computed in double precision.
        InputError: inputs that show nothing.
        SpecError: the spec does not fit the module.
    """
    spec.check(model)
    if draws < 1:
        raise InputError(f"draws={draws}: at least one point is needed")
    lab = _Lab(spec, model, inputs, outputs, seed)
    kinds = {
        family: _kind(lab, list(occurrences(spec, group)), group.size, draws, tolerance)
        for family, names in tqdm(spec.families.items(), desc="continuous symmetries", disable=not progress)
        if (group := spec.groups[names[0]])
    }
    return ContinuousSymmetries(kinds, tolerance)


class _Lab:
    """Outputs at random points of weight space, and their changes along generators."""

    def __init__(self, spec: Symmetries, model: nn.Module, inputs: Inputs, outputs: OutputSelector, seed: int) -> None:
        self.spec, self.model, self.inputs, self.seed = spec, model, inputs, seed
        self.probe = Probe(model, outputs)
        self.points: list[tuple[Weights, Tensor]] = []

    def point(self, number: int) -> tuple[Weights, Tensor]:
        """Weights of another draw, and the outputs there."""
        while len(self.points) <= number:
            drawn = draw(self.model, 1 + len(self.points), self.seed)
            weights = {n: t.double() if t.is_floating_point() else t for n, t in drawn.items()}
            self.points.append((weights, self.at(weights)))
        return self.points[number]

    def at(self, weights: Weights) -> Tensor:
        found = self.probe.outputs_of(self.inputs, weights)
        real = [torch.view_as_real(x) if x.is_complex() else x for x in found]
        return torch.cat([x.reshape(-1).double().cpu() for x in real])

    def column(self, place: Occurrence, generator: Tensor, points: int) -> Tensor:
        """The derivative of the outputs along 1 + t generator at one occurrence, over several points."""
        identity = torch.eye(len(generator), dtype=torch.float64)
        found = []
        for number in range(points):
            weights, _ = self.point(number)
            ends = [self.at(changed(self.spec, weights, {place: identity + t * generator})) for t in (STEP, -STEP)]
            found.append((ends[0] - ends[1]) / (2 * STEP))
        return torch.cat(found)

    def difference(self, places: Mapping[Occurrence, Tensor]) -> float:
        """The change of the outputs under a finite element, relative to their largest value, at the first point."""
        weights, reference = self.point(0)
        moved = self.at(changed(self.spec, weights, places))
        return float((moved - reference).abs().max() / reference.abs().max().clamp_min(1e-300))


def _kind(lab: _Lab, places: Sequence[Occurrence], size: int, draws: int, tolerance: float) -> Kind:
    units = min(3, size)
    points = max(draws, math.ceil(2 * len(places) * units * (units - 1) / max(1, len(lab.point(0)[1]))))
    one = _unit(1, 0, 0)
    columns = {place: lab.column(place, one, points) for place in places}
    largest = max(float(column.norm()) for column in columns.values())
    live = [place for place in places if float(columns[place].norm()) > DEAD * largest]
    free = tuple(place.name for place in places if place not in live)
    error, power = 0.0, math.inf
    scales = []
    for row in _reduced(_null([columns[place] for place in live])):
        element = {p: torch.exp(0.5 * row[k]).reshape(1, 1) for k, p in enumerate(live) if abs(float(row[k])) > 1e-6}
        change = lab.difference(element)
        if change <= tolerance:
            scales.append({p.name: _rounded(float(row[k])) for k, p in enumerate(live) if p in element})
            error, power = max(error, change), min(power, _power(lab, element))
    pairs = [(i, j) for i in range(units) for j in range(units) if i != j]
    basis = _null([lab.column(place, _unit(units, i, j), points) for i, j in pairs for place in live])
    mixing = MIXINGS.get(units, {}).get(len(basis), "none")
    if mixing != "none":
        weights = torch.randn(len(basis), dtype=torch.float64, generator=torch.Generator().manual_seed(lab.seed))
        chosen = 0.3 * (weights @ basis) / float((weights @ basis).abs().max())
        element = {}
        for k, place in enumerate(live):
            generator = torch.zeros(units, units, dtype=torch.float64)
            for p, (i, j) in enumerate(pairs):
                generator[i, j] = chosen[p * len(live) + k]
            element[place] = torch.linalg.matrix_exp(generator)
        change = lab.difference(element)
        if change <= tolerance:
            error, power = max(error, change), min(power, _power(lab, element))
        else:
            mixing = "none"
    sign = mixing == "general linear" or _sign(lab, live, scales, tolerance)
    return Kind(tuple(scales), sign, mixing, error, power if math.isfinite(power) else 0.0, free)


def _power(lab: _Lab, element: Mapping[Occurrence, Tensor]) -> float:
    """The change of the outputs when the first occurrence of an element is left out."""
    return lab.difference(dict(list(element.items())[1:]))


def _sign(lab: _Lab, live: Sequence[Occurrence], scales: Sequence[Mapping[str, float]], tolerance: float) -> bool:
    """Whether some unit of sign patterns keeps the function: those with odd exponents of a scale; else all subsets of a few
    occurrences, or all of many."""
    patterns: list[set[str]] = []
    for scale in scales:
        least = min(abs(e) for e in scale.values())
        patterns.append({name for name, e in scale.items() if round(e / least) % 2})
    patterns.append({place.name for place in live})
    if len(live) <= MOST_TRIED:
        patterns += [{p.name for k, p in enumerate(live) if bits >> k & 1} for bits in range(1, 2 ** len(live))]
    minus = -torch.ones(1, 1, dtype=torch.float64)
    return any(
        lab.difference({place: minus for place in live if place.name in pattern}) <= tolerance for pattern in patterns
    )


def _unit(size: int, i: int, j: int) -> Tensor:
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[i, j] = 1.0
    return matrix


def _null(columns: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis (k, columns) of the coefficients under which the columns add up to zero."""
    if not columns:
        return torch.zeros(0, 0, dtype=torch.float64)
    jacobian = torch.stack(list(columns), 1)
    norms = jacobian.norm(dim=0).clamp_min(1e-300)
    _, values, right = torch.linalg.svd(jacobian / norms, full_matrices=True)
    rank = int((values > RANK * values[0]).sum())
    return right[rank:] / norms


def _reduced(basis: Tensor) -> Tensor:
    """The reduced row echelon form of a basis, each row scaled to a largest exponent of 1."""
    rows, lead = basis.clone(), 0
    for k in range(len(rows)):
        while lead < rows.shape[1] and float(rows[k:, lead].abs().max()) < 1e-5 * float(rows.abs().max()):
            rows[k:, lead] = 0
            lead += 1
        if lead == rows.shape[1]:
            break
        best = k + int(rows[k:, lead].abs().argmax())
        rows[[k, best]] = rows[[best, k]]
        rows[k] = rows[k] / rows[k, lead].clone()
        for other in range(len(rows)):
            if other != k:
                rows[other] = rows[other] - rows[other, lead].clone() * rows[k]
        lead += 1
    return rows / rows.abs().amax(1, keepdim=True)


def _rounded(exponent: float) -> float:
    """The nearest multiple of a twelfth, if the exponent is one."""
    nearest = round(exponent * 12) / 12
    return nearest if abs(nearest - exponent) < 1e-4 else exponent
