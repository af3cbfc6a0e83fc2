"""Weight matching over orthogonal matrices and permutations by coordinate ascent on `sum <A, g(B)>`; invertible matrices."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lmc.align.relaxed.soft import SoftMoves, as_matrices
from lmc.align.weight_matching.gains import assign, inner_product
from lmc.errors import SpecError
from lmc.symmetry.groups.group import Group
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

Matrices = dict[str, Tensor]

_ROUNDING = 1e-12
_MOST_CONDITION = 1e4  # of an invertible matrix to start from
_HALVINGS = 12
_GAIN = 1e-6  # relative, of a step that is the last


def nearest_rotation(gain: Tensor, ones: bool = False) -> Tensor:
    """The orthogonal Q (n, n) that maximises `sum Q * gain`; with `ones` among those that leave the vector of ones alone.

    It is `U V^T` of the singular value decomposition of the gain (Schönemann 1966).
    """
    n = len(gain)
    if ones:
        gain = gain - gain.mean(0, keepdim=True)
        gain = gain - gain.mean(1, keepdim=True)
        gain = gain + (gain.norm() + 1.0) / n
    u, _, v = torch.linalg.svd(gain)
    return u @ v


def nearest_invertible(a: Tensor, b: Tensor, dual_a: Tensor, dual_b: Tensor, steps: int) -> Tensor:
    """The invertible M (n, n) for which `|a - M b|^2 + |dual_a - M^-T dual_b|^2` is least, as far as descent finds it.

    Starts are the nearest rotation and the least squares of either part alone, which are exact where a M exists that brings
    b onto a; from the best of them by Gauss-Newton steps M <- (1 + S) M. With the residuals r, s of the two parts, S solves
    the Sylvester equation `S (M b)(M b)^T + (M^-T dual_b)(M^-T dual_b)^T S = r (M b)^T - (M^-T dual_b) s^T`; steps are
    halved until the sum is smaller. It grows without bound towards singular matrices, so that none is reached.

    Args:
        a, b: (n, p), what M mixes.
        dual_a, dual_b: (n, q), what its inverse transpose mixes.
        steps: at most, of Gauss-Newton.
    """

    def both(m: Tensor) -> tuple[Tensor, Tensor]:
        return m @ b, torch.linalg.solve(m.T, dual_b)

    def loss(m: Tensor) -> float:
        x, z = both(m)
        return float((a - x).square().sum() + (dual_a - z).square().sum())

    starts = [nearest_rotation(a @ b.T + dual_a @ dual_b.T)]
    if min(a.shape[1], dual_a.shape[1]) >= len(a):
        starts.append(a @ torch.linalg.pinv(b))
        starts.append(torch.linalg.pinv(dual_a @ torch.linalg.pinv(dual_b)).T)
    m = min((start for start in starts if float(torch.linalg.cond(start)) < _MOST_CONDITION), key=loss)
    value = loss(m)
    for _ in range(steps):
        x, z = both(m)
        p, u = torch.linalg.eigh(x @ x.T)
        q, v = torch.linalg.eigh(z @ z.T)
        right = v.T @ ((a - x) @ x.T - z @ (dual_a - z).T) @ u
        step = v @ (right / (p[None, :] + q[:, None]).clamp_min(1e-12 * float(p.max() + q.max()) + 1e-300)) @ u.T
        for halving in range(_HALVINGS):
            trial = m + 0.5**halving * step @ m
            better = loss(trial)
            if better < value:
                break
        else:
            return m
        done = value - better <= _GAIN * value
        m, value = trial, better
        if done:
            return m
    return m


def unmoved(spec: PermutationSpec, like: Tensor) -> Matrices:
    """The identity matrix for every group."""
    return as_matrices(spec.identity().indices, like)


class Ascent:
    """Matrices for all groups, improved group by group; heads together with what is in them.

    Args:
        rotated: group -> whether its rotations leave the vector of ones alone; the other groups are permuted.
        a, b: the parameters that are matched, in float64.
        start: matrices to start from.
    """

    def __init__(
        self, spec: PermutationSpec, rotated: Mapping[str, bool], a: Weights, b: Weights, start: Matrices | None = None
    ) -> None:
        self.spec, self.rotated, self.a, self.b = spec, rotated, a, b
        self._still = unmoved(spec, next(iter(a.values())))
        self._mix = SoftMoves(spec, b, next(iter(a.values())).device)
        self._inside: dict[str, list[Group]] = {}
        for group in spec.groups.values():
            for parent, _ in group.within:
                if len(group.within) > 1 or spec.groups[parent].within:
                    raise SpecError(f"group {group.name!r} is more than one level deep; rotations are matched on one")
                self._inside.setdefault(parent, []).append(group)
        self.matrices = start or self._outwards()
        self.value = self._objective(self.matrices)

    def _objective(self, matrices: Matrices) -> float:
        return inner_product(self.a, self._mix(matrices, self.b))

    def _outwards(self) -> Matrices:
        """Rotations of streams by the tensors on which nothing else moves (embeddings, the output layer)."""
        found = dict(self._still)
        for name in self.rotated:
            group = self.spec.groups[name]
            alone = [t for t in group.tables if t in self.a and {g for g, _ in self.spec.tables_by_tensor[t]} == {name}]
            if alone and not group.within:
                found[name] = self._solve(
                    name, self._features(name, self.a, alone) @ self._features(name, self.b, alone).T
                )
        return found

    def sweep(self, only: Iterable[str] | None = None) -> None:
        """Solve every outermost group once, given all others."""
        for name, group in self.spec.groups.items():
            if not group.within and (only is None or name in only):
                step = self._nested(name) if name in self._inside else self._single(name)
                value = self._objective(self.matrices | step)
                if value > self.value + _ROUNDING * abs(self.value):  # a group that meets itself may do worse
                    self.matrices, self.value = self.matrices | step, value

    def _single(self, name: str) -> Matrices:
        others = self._mix(self.matrices | {name: self._still[name]}, self.b)
        return {name: self._solve(name, self._features(name, self.a) @ self._features(name, others).T)}

    def _nested(self, name: str) -> Matrices:
        """Units and their insides: the gain of a pair of units is the optimum of the problem inside them."""
        inside = self._inside[name]
        still = {g: self._still[g] for g in (name, *(group.name for group in inside))}
        others = self._mix(self.matrices | still, self.b)
        shared = {tensor for group in inside for tensor in group.tables}
        outside = [tensor for tensor in self.spec.groups[name].tables if tensor in self.a and tensor not in shared]
        gain = torch.zeros_like(self._still[name])
        if outside:
            gain += self._features(name, self.a, outside) @ self._features(name, others, outside).T
        mine, theirs = ({g.name: self._features(g.name, side) for g in inside} for side in (self.a, others))
        solved: dict[tuple[str, str], Tensor] = {}
        for ours in inside:
            for yours in (g for g in inside if g.family == ours.family):
                pairs = mine[ours.name] @ theirs[yours.name].T
                solved[ours.name, yours.name] = self._solve(ours.name, pairs)
                gain[ours.within[0][1], yours.within[0][1]] += (solved[ours.name, yours.name] * pairs).sum()
        index, _ = assign(gain)
        step = {name: self._still[name][index]}
        for group in inside:
            source = (name, int(index[group.within[0][1]]))
            step[group.name] = solved[group.name, self.spec.by_place[group.family, (source,)]]
        return step

    def _solve(self, name: str, gain: Tensor) -> Tensor:
        """The best matrix of a group for a gain (n, n)."""
        if name in self.rotated:
            return nearest_rotation(gain, self.rotated[name])
        return self._still[name][assign(gain)[0]]

    def _features(self, name: str, weights: Weights, tensors: Iterable[str] | None = None) -> Tensor:
        """`(n, everything)`: what the tensors hold of each unit of a group."""
        found = []
        for tensor, tables in self.spec.groups[name].tables.items():
            if tensor in weights and (tensors is None or tensor in tensors):
                for table in tables:
                    front = weights[tensor].movedim(table.dims, tuple(range(len(table.dims))))
                    flat = front.reshape(-1, *front.shape[len(table.dims) :])
                    rows = torch.from_numpy(table.rows).to(flat.device)
                    found.append(flat[rows.flatten()].reshape(len(rows), -1))
        return torch.cat(found, dim=1)
