"""The result of a merge: its tensors one after the other, and weights that remember how they were found."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lmc.errors import InputError
from lmc.merge.engine.chunks import Chunk, Cut
from lmc.merge.engine.tensors import WeightSets
from lmc.network.derived import settled
from lmc.weights import StateDict
from lmc.weights.checkpoint import flat
from lmc.weights.numbers import inexact, narrowed

Report = TypeVar("Report")


class Merged(StateDict, Generic[Report]):
    """A state dict like any other, with `.report`: what the search or the soup saw on the way.

    Saved with `torch.save`, it becomes a plain state dict.
    """

    def __init__(self, weights: Mapping[str, Tensor], report: Report) -> None:
        super().__init__(weights)
        self.report = report

    @property
    def weights(self) -> StateDict:
        """The weights without the report."""
        return StateDict(self)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.report}"


def assemble(
    sets: WeightSets, merged: Callable[[str], Tensor], shares: Callable[[str], tuple[Sequence[float], float]]
) -> Iterator[tuple[str, Tensor]]:
    """Every name of the result with its tensor, in the order of the first model, one tensor at a time.

    Args:
        sets: the inputs.
        merged: the merged tensor for the name of a weight; any dtype, cast here.
        shares: for the name of a statistic the share of each model and of the base in its average; they sum to 1.
    """
    return joined(sets, assemble_chunks(sets, lambda name, chunk: merged(name), shares, "whole"))


def assemble_chunks(
    sets: WeightSets,
    merged: Callable[[str, Chunk], Tensor],
    shares: Callable[[str], tuple[Sequence[float], float]],
    cut: Cut,
) -> Iterator[tuple[str, Chunk, Tensor]]:
    """As `assemble`, large tensors in chunks that `cut` allows; aliases are left out."""
    weights = frozenset(sets.weights)
    first = sets.shells
    names = [name for name in first if name not in sets.skip and name not in sets.ties]
    for name, chunk in sets.walk(names, cut):
        original = first[name]
        if name in weights:
            tensor = merged(name, chunk)
        elif name in sets.statistics:
            tensor = sets.combine(name, *shares(name), chunk=chunk)
        else:
            whole = sets.states[0][name].detach()
            tensor = whole.clone() if chunk is None else flat(whole, chunk).clone()
        shape = tuple(original.shape) if chunk is None else (chunk.stop - chunk.start,)
        if tensor.shape != shape:
            raise InputError(f"{name}: the method gave shape {tuple(tensor.shape)}, expected {shape}")
        dtype = sets.form[name][0]
        if name in sets.pairs:  # a chunk of pairs begins and ends with a whole one
            tensor = torch.view_as_complex(
                narrowed(tensor, dtype.to_real(), name).contiguous().view(*shape[:-1], -1, 2)
            )
            tensor = tensor if chunk is not None else tensor.view(sets.form[name][1])
            chunk = None if chunk is None else slice(chunk.start // 2, chunk.stop // 2)
        yield name, chunk, narrowed(tensor, dtype, name) if inexact(tensor) else tensor


def joined(sets: WeightSets, found: Iterable[tuple[str, Chunk, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors from `assemble_chunks`, and the aliases, in the order of the first model."""
    if sets.derived:
        yield from settled(dict(joined(replace(sets, derived=False), found))).items()
        return
    first = sets.shells
    names = iter([name for name in first if name not in sets.skip])
    again = {sets.ties[name] for name in first if name in sets.ties and name not in sets.skip}
    done: dict[str, Tensor] = {}

    def ties_before(stop: str | None) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            if name == stop:
                return
            yield name, done[sets.ties[name]]

    whole = torch.empty(0)
    for name, chunk, tensor in found:
        if chunk is not None:
            if chunk.start == 0:
                whole = torch.empty(sets.form[name][1], dtype=tensor.dtype, device=tensor.device)
            whole.view(-1)[chunk] = tensor
            if chunk.stop < whole.numel():
                continue
            tensor = whole
        yield from ties_before(name)
        if name in again:
            done[name] = tensor
        yield name, tensor
    yield from ties_before(None)
