"""Differences between models, as tables: tensors that do not fit together, and norms, cosines and conflicts by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lmc.merge.engine.tensors import outline
from lmc.weights import tied_names
from lmc.weights.agreement import optional
from lmc.weights.checkpoint import Checkpoint
from lmc.weights.state import wide

Kind = Literal["missing", "shape", "dtype", "tie", "buffer"]


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same kind of thing everywhere.

    Attributes:
        name: of the tensor.
        kind: what differs: it is "missing" somewhere (or an optional "buffer" is, which does no harm), its "shape", its
            "dtype", or what it is a "tie" with.
        found: what each model (and last the base, if there is one) has, in words.
    """

    name: str
    kind: Kind
    found: tuple[str, ...]


def differences(states: Sequence[Mapping[str, Tensor]]) -> tuple[Difference, ...]:
    """All tensors in which the weight sets differ other than by values; nothing is read from checkpoints on disk."""
    outlines = [outline(state) for state in states]
    ties = [state.ties if isinstance(state, Checkpoint) else tied_names(state) for state in states]
    rows = []
    for name in dict.fromkeys(name for seen in outlines for name in seen):
        tensors = [seen.get(name) for seen in outlines]
        shapes = {None if tensor is None else tuple(tensor.shape) for tensor in tensors}
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        kind: Kind | None = (
            "missing" if None in shapes else "shape" if len(shapes) > 1 else "dtype" if len(dtypes) > 1 else None
        )
        if kind == "missing" and any(tensor is not None and optional(name, tensor) for tensor in tensors):
            kind = "buffer"
        if kind:
            rows.append(Difference(name, kind, tuple(map(_describe, tensors))))
        elif len(partners := {tied.get(name) for tied in ties}) > 1 and None in partners:
            rows.append(Difference(name, "tie", tuple(_partner(tied.get(name)) for tied in ties)))
    return tuple(rows)


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _partner(name: str | None) -> str:
    return f"one with {name}" if name else "on its own"


COLUMNS_AT_ONCE = 1 << 20  # values of each model that are compared at a time, in float64


@dataclass(frozen=True, eq=False)
class LayerReport:
    """Comparison of the models in one layer (the tensors of one module), or in all of them.

    Attributes:
        name: of the module.
        size: number of values of each model.
        base_norm: Euclidean norm of the base; NaN without one.
        norms: (M,) of the task vectors, or of the weights where there is no base.
        cosines: (M, M) between them; NaN where one is zero.
        conflict: share of the values moved by at least two task vectors whose signs disagree; NaN without a base.
    """

    name: str
    size: int
    base_norm: float
    norms: np.ndarray
    cosines: np.ndarray
    conflict: float


class _Sums:
    """Sums over tensors: inner products of the models' vectors, the base's square, counts of signs."""

    def __init__(self, count: int) -> None:
        self.size = self.contested = self.conflicting = 0
        self.base_square = 0.0
        self.dots = np.zeros((count, count))

    def add(self, vectors: Tensor, base: Tensor | None) -> None:
        """`vectors` (M, n) in float64: task vectors, or weights where `base` (n,) is None."""
        self.size += vectors.shape[1]
        self.dots += (vectors @ vectors.T).cpu().numpy()
        if base is None:
            return
        self.base_square += float(base @ base)
        up, down = (vectors > 0.0), (vectors < 0.0)
        self.contested += int(((up | down).sum(0) > 1).sum())
        self.conflicting += int((up.any(0) & down.any(0)).sum())


class Survey:
    """Goes through the tensors of all models once."""

    def __init__(self, states: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None) -> None:
        self.states, self.base = states, base
        self.total, self.matrices = _Sums(len(states)), _Sums(len(states))
        self.layers: dict[str, _Sums] = {}
        self.faults: dict[int, str] = {}

    def add(self, name: str) -> None:
        tensors = [state[name].detach() for state in self.states]
        tensors += [] if self.base is None else [self.base[name].detach()]
        tensors = [tensor.to(wide(*(t.dtype for t in tensors))) for tensor in tensors]
        bad = [i for i, tensor in enumerate(tensors) if not bool(torch.isfinite(tensor).all())]
        for i in bad:
            self.faults.setdefault(i, name)
        if bad:
            return
        sums = [self.total, self.layers.setdefault(name.rpartition(".")[0], _Sums(len(self.states)))]
        sums += [self.matrices] if tensors[0].ndim > 1 else []
        tensors = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
        flat = [tensor.reshape(-1) for tensor in tensors]
        for start in range(0, len(flat[0]), COLUMNS_AT_ONCE):
            part = torch.stack([tensor[start : start + COLUMNS_AT_ONCE].double().cpu() for tensor in flat])
            base = None if self.base is None else part[-1]
            vectors = part if base is None else part[:-1] - base
            for each in sums:
                each.add(vectors, base)

    def layer(self, name: str, sums: _Sums) -> LayerReport:
        norms = np.sqrt(np.diag(sums.dots))
        products = np.outer(norms, norms)
        cosines = np.divide(sums.dots, products, out=np.full_like(products, np.nan), where=products > 0.0)
        missing = float("nan")
        conflict = sums.conflicting / sums.contested if sums.contested else missing
        return LayerReport(
            name, sums.size, missing if self.base is None else sums.base_square**0.5, norms, cosines, conflict
        )
