"""All symmetries of a small program by trying every permutation of every axis of every parameter at once."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from zoo.certificate import state_of

Axis = tuple[str, int, int]  # tensor, axis, size
CHUNK = 20_000


@dataclass(frozen=True)
class AxisSymmetries:
    """The exact group of axis-wise symmetries: each element is one permutation for each of `axes`."""

    axes: list[Axis]
    elements: set[tuple[tuple[int, ...], ...]]
    tried: int

    @property
    def log10_order(self) -> float:
        return math.log10(len(self.elements))


def axes_of(module: nn.Module) -> list[Axis]:
    """Axes with more than one entry of the parameters and persistent float buffers."""
    state = {n: t for n, t in state_of(module).items() if t.is_floating_point()}
    return [(name, k, n) for name, tensor in state.items() for k, n in enumerate(tensor.shape) if n > 1]


def combinations(module: nn.Module) -> int:
    """How many combinations of axis permutations there are."""
    return math.prod(math.factorial(n) for _, _, n in axes_of(module))


def all_alive(module: nn.Module, inputs: Tensor) -> bool:
    """Whether every slice of every parameter along every axis has an influence: all symmetries are real ones."""
    state = state_of(module)
    leaves = {n: state[n].requires_grad_() for n, _ in module.named_parameters()}
    result = functional_call(module, {**state, **leaves}, (inputs,))
    probe = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((result * probe).sum(), list(leaves.values()), allow_unused=True)
    for gradient in gradients:
        if gradient is None:
            return False
        for k in range(gradient.dim()):
            if bool((gradient.abs().movedim(k, 0).reshape(gradient.shape[k], -1).sum(1) == 0).any()):
                return False
    return True


def brute_force(module: nn.Module, inputs: Tensor, tolerance: float = 1e-8) -> AxisSymmetries:
    """Every combination of axis permutations under which the output does not change.

    All combinations are tried on one input in batches; what passes is tried again with other weights and another input.
    """
    axes = axes_of(module)
    choices = [list(itertools.permutations(range(n))) for _, _, n in axes]
    total = math.prod(len(c) for c in choices)
    state = state_of(module)
    survivors = np.arange(total)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        reference = functional_call(module, state, (inputs,))
        kept = [
            chunk[changes(module, state, inputs, axes, choices, chunk, reference) <= tolerance]
            for chunk in np.array_split(survivors, math.ceil(len(survivors) / CHUNK))
        ]
        survivors = np.concatenate(kept)
        state = {n: t + 0.1 * torch.rand(t.shape, generator=generator, dtype=t.dtype) for n, t in state.items()}
        inputs = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
    digits = np.unravel_index(survivors, [len(c) for c in choices]) if axes else ()
    elements = {tuple(choices[k][digits[k][e]] for k in range(len(axes))) for e in range(len(survivors))}
    return AxisSymmetries(axes, elements, total)


def changes(
    module: nn.Module,
    state: dict[str, Tensor],
    inputs: Tensor,
    axes: list[Axis],
    choices: list[list[tuple[int, ...]]],
    numbers: np.ndarray,
    reference: Tensor,
) -> np.ndarray:
    """Largest relative change of the output for each numbered combination of permutations."""
    digits = np.unravel_index(numbers, [len(c) for c in choices])
    batch: dict[str, Tensor] = {}
    for (name, k, n), options, digit in zip(axes, choices, digits, strict=True):
        moved = batch.get(name)
        if moved is None:
            moved = state[name].expand(len(numbers), *state[name].shape)
        index = torch.tensor(options)[torch.from_numpy(digit)]  # (combinations, n)
        shape = [len(numbers), *(n if d == k else 1 for d in range(moved.dim() - 1))]
        batch[name] = moved.gather(k + 1, index.view(shape).expand_as(moved))
    fixed = {name: tensor for name, tensor in state.items() if name not in batch}
    with torch.no_grad():
        outputs = vmap(lambda weights: functional_call(module, {**fixed, **weights}, (inputs,)))(batch)
    difference = (outputs - reference).abs().flatten(1).amax(1) / reference.abs().max().clamp_min(1e-12)
    return difference.numpy()
