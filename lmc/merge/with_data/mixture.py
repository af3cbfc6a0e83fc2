"""Mixtures of weights whose coefficients are learned: what AdaMerging, learned soups and model averaging share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lmc.merge.engine.assembly import assemble
from lmc.merge.engine.tensors import WeightSets
from lmc.weights import StateDict, Weights


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

    def __call__(self, coefficients: Mapping[Any, Tensor]) -> Weights:
        """The weights, without statistics, for the coefficients `(T,)` of each group."""
        found = {}
        for name, origin in self.origin.items():
            shares = coefficients[self.groups[name]].to(origin.dtype)
            moved = origin + torch.einsum("t,t...->...", shares, self.steps[name])
            found[name] = moved.to(self.sets.shells[name].dtype)
        return found

    @torch.no_grad()
    def whole(self, coefficients: Mapping[Any, Tensor]) -> StateDict:
        """All tensors of the result, on the device of the models."""
        found = self(coefficients)
        home = self.sets.shells
        merged = assemble(self.sets, lambda name: found[name].to(home[name].device), lambda _: self.shares)
        return StateDict(merged, like=self.sets.states[0])
