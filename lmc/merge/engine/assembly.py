"""The result of a merge: its tensors one after the other, weights that remember how they were found, and mixtures whose
coefficients are learned."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lmc.errors import InputError
from lmc.merge.engine.chunks import Chunk, Cut, Made, Make
from lmc.merge.engine.tensors import WeightSets
from lmc.network.derived import following, settled
from lmc.weights import StateDict, Weights
from lmc.weights.checkpoint import flat
from lmc.weights.state import inexact, narrowed

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
    return joined(sets, assembler(sets, lambda name, chunk: merged(name), shares, "whole"))


def assembler(
    sets: WeightSets,
    merged: Callable[[str, Chunk], Tensor],
    shares: Callable[[str], tuple[Sequence[float], float]],
    cut: Cut,
) -> Make:
    """The maker of the tensors of names that are no aliases, as `assemble` does, large ones in chunks that `cut` allows."""
    weights = frozenset(sets.weights)
    first = sets.shells

    def made(names: Iterable[str]) -> Iterator[Made]:
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

    return made


def joined(sets: WeightSets, made: Make) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors from their chunks, and the aliases, in the order of the first model."""
    if sets.derived:
        yield from settled(dict(joined(replace(sets, derived=False), made)), dict(sets.states[0])).items()
        return
    first = sets.shells
    names = iter(first)
    again = {sets.ties[name] for name in first if name in sets.ties}
    done: dict[str, Tensor] = {}

    def ties_before(stop: str | None) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            if name == stop:
                return
            yield name, done[sets.ties[name]]

    whole = torch.empty(0)
    for name, chunk, tensor in made(name for name in first if name not in sets.ties):
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


class Mixture:
    """`origin + sum_t c[g, t] step_t`, where g is the group of a tensor, as a function of c that autograd follows.

    Args:
        sets: the models.
        origin: name of a weight -> `(*shape)`.
        steps: name of a weight -> `(T, *shape)`.
        groups: name of a weight -> its group.
        shares: of the models and of the base in averaged statistics.
        device: where to compute.
    """

    def __init__(
        self,
        sets: WeightSets,
        origin: Callable[[str], Tensor],
        steps: Callable[[str], Tensor],
        groups: Mapping[str, Any],
        shares: tuple[Sequence[float], float],
        device: torch.device,
    ) -> None:
        self.sets, self.groups, self.shares = sets, groups, shares
        self.origin = {name: origin(name).to(device) for name in sets.weights}
        self.steps = {name: steps(name).to(device) for name in sets.weights}
        first = dict(sets.states[0]) if sets.derived else {}
        self._derived = {name: first[name].to(device) for name in following(first)}

    def __call__(self, coefficients: Mapping[Any, Tensor]) -> Weights:
        """The weights, without statistics but with derived tensors of their own, for the coefficients `(T,)` of each group."""
        found = {}
        for name, origin in self.origin.items():
            shares = coefficients[self.groups[name]].to(origin.dtype)
            moved = origin + torch.einsum("t,t...->...", shares, self.steps[name])
            found[name] = moved.to(self.sets.shells[name].dtype)
        return settled(found | self._derived, dict(self.sets.states[0])) if self._derived else found

    @torch.no_grad()
    def whole(self, coefficients: Mapping[Any, Tensor]) -> StateDict:
        """All tensors of the result, on the device of the models."""
        found = self(coefficients)
        home = self.sets.shells
        merged = assemble(self.sets, lambda name: found[name].to(home[name].device), lambda _: self.shares)
        return StateDict(merged, like=self.sets.states[0])
