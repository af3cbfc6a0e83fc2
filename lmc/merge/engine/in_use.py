"""Weights on disk that are written otherwise than they are used: read as they are used, and written so that they fit.

A weight normalisation, a spectral normalisation or a pruning mask is known by the names (`lmc.network.derived`). Each of its
tensors is made, when it is read, of all of them; of a merge the derived ones are computed from the others.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lmc.merge.engine.chunks import Latest, Made, Make
from lmc.network.derived import Derived, derived_in
from lmc.weights import Weights
from lmc.weights.agreement import outline
from lmc.weights.checkpoint import Checkpoint, Remade, Stored, flat, size_of


@dataclass(frozen=True, eq=False)
class InUse(Remade):
    """A stored tensor as `kind` gauges it.

    Attributes:
        parts: all tensors of the kind, as they are stored.
        latest: what was read last of the checkpoint: chunks, and the tensors of one kind, are asked for one after the other.
    """

    name: str
    kind: Derived
    parts: Mapping[str, Stored]
    latest: Latest

    @property
    def held(self) -> int:
        """Bytes that reading holds besides the chunk: the tensors as gauged, and for a moment in float64 and as stored."""
        return 4 * sum(size_of(part.dtype, part.shape) for part in self.parts.values())

    def read(self, chunk: slice | None = None) -> Tensor:
        whole = self.latest(self.kind, "gauged", self._gauged)[self.name]
        return whole.clone() if chunk is None else flat(whole, chunk).clone()

    def _gauged(self) -> Weights:
        stored = {name: entry.read() for name, entry in self.parts.items()}
        return stored | self.kind.gauge(stored)


def tensors_of(kind: Derived) -> list[str]:
    """The names of all tensors of a kind."""
    return [getattr(kind, part.name) for part in fields(kind) if isinstance(getattr(kind, part.name), str)]


def in_use(weights: Checkpoint) -> Checkpoint:
    """The same function, its weights as they are used."""
    stored, latest = dict(weights.stored), Latest()
    for kind in derived_in(weights.outline()):
        parts = {name: weights.entry(name) for name in tensors_of(kind)}
        stored |= {name: InUse(parts[name], name, kind, parts, latest) for name in parts if name in stored}
    return Checkpoint(weights.path, stored, weights.ties, weights.notes, weights.metadata)


def settling(make: Make, like: Mapping[str, Tensor]) -> Make:
    """The maker of the tensors of a merge, derived ones so that they fit the others; `like` is one of the models, in use."""
    shapes = outline(like)
    owners = {name: kind for kind in derived_in(shapes) for name in kind.derived}

    def settled(kind: Derived) -> Weights:
        found: Weights = {}
        names = tensors_of(kind)
        for name, chunk, tensor in make(names):
            if chunk is None:
                found[name] = tensor
            else:
                found.setdefault(name, torch.empty(shapes[name].shape, dtype=tensor.dtype)).view(-1)[chunk] = tensor
        return found | kind.settle(found, {name: like[name] for name in names})

    def made(names: Iterable[str]) -> Iterator[Made]:
        last: tuple[Derived | None, Weights] = (None, {})
        for name in names:
            if (kind := owners.get(name)) is None:
                yield from make([name])
                continue
            if last[0] is not kind:
                last = kind, settled(kind)
            yield name, None, last[1][name]

    return made
