"""Arithmetic on weights: plain `dict[str, Tensor]`, exactly what `module.state_dict()` gives.

Wherever weights are asked for, an `nn.Module` is taken too. Nothing is changed in place. Floating-point and complex
tensors take part in the arithmetic; integer and boolean tensors (batch counters, position ids) are copied from the first
argument. Sums are made in float32 at least, and in the widest dtype of the arguments, and cast to the dtype of the first
argument; a value outside its range raises `WeightsError`.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lmc.core.context import own_context
from lmc.errors import InputError
from lmc.weights.agreement import as_weights, check_compatible, fitting, shared
from lmc.weights.checkpoint import Checkpoint
from lmc.weights.state import ModelOrWeights, StateDict, Weights, inexact, narrowed, wide

_PART = 1 << 20  # values


@own_context
def lerp(a: ModelOrWeights, b: ModelOrWeights, alpha: float) -> StateDict:
    """`(1 - alpha) a + alpha b`, entry by entry; exactly `a` at 0 and exactly `b` at 1 (integers come from `a`).

    Of weights under a weight or spectral normalisation it mixes the tensors that are stored; `lmc.merge.average` and
    `lmc.loss_path` mix the weights that are used.
    """
    if not hasattr(type(alpha), "__float__"):
        raise InputError(f"alpha={alpha!r}: expected a number")
    a, b = _pair(a, b)
    return StateDict({name: _combine(name, [x, b[name]], [1.0 - alpha, alpha]) for name, x in a.items()}, like=a)


@own_context
def mean(models: Sequence[ModelOrWeights], weights: Sequence[float] | None = None) -> StateDict:
    """The weighted mean of several weight sets, entry by entry as in `lerp`; `weights` sum to 1 (default: all equal)."""
    states = [as_weights(model) for model in models]
    if not states:
        raise InputError("mean of no weights at all: pass at least one model")
    coefficients = [1.0 / len(states)] * len(states) if weights is None else [float(w) for w in weights]
    if len(coefficients) != len(states):
        raise InputError(f"{len(coefficients)} weights for {len(states)} models")
    if not abs(sum(coefficients) - 1.0) <= 1e-6:
        raise InputError(f"weights sum to {sum(coefficients):g}, not to 1")
    for i, state in enumerate(states[1:], start=1):
        states[i] = shared(states[0], state, names := ("models[0]", f"models[{i}]"))
        check_compatible(states[0], states[i], names)
    return mixture(states, coefficients)


def mixture(states: Sequence[Weights], shares: Sequence[float]) -> StateDict:
    """`sum_i s_i theta_i` of weight sets that are known to fit each other: what is evaluated at thousands of points."""
    return StateDict(
        {name: _combine(name, [state[name] for state in states], shares) for name in states[0]}, like=states[0]
    )


@own_context
def dot(a: ModelOrWeights, b: ModelOrWeights) -> float:
    """`sum <a, b>` over all floating-point and complex tensors, in float64; of complex numbers the real part."""
    a, b = _pair(a, b)
    return _total((_real(x) * _real(b[name])).sum() for name, x in a.items() if inexact(x))


@own_context
def distance(a: ModelOrWeights, b: ModelOrWeights) -> float:
    """Euclidean distance over all floating-point and complex tensors, in float64; opened checkpoints are read in parts."""
    both = _parts(a, b) if isinstance(a, Checkpoint) and isinstance(b, Checkpoint) else _together(*_pair(a, b))
    return _total((_real(x) - _real(y)).square().sum() for x, y in both if inexact(x)) ** 0.5


def _total(sums: Iterable[Tensor]) -> float:
    """The sum of some numbers, for which a device is asked once."""
    found = list(sums)
    return sum(torch.stack([each.to(found[0].device) for each in found]).tolist()) if found else 0.0


def _together(a: Weights, b: Weights) -> Iterator[tuple[Tensor, Tensor]]:
    return ((x, b[name]) for name, x in a.items())


def _parts(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[Tensor, Tensor]]:
    """The same parts of the tensors of two checkpoints, flattened."""
    b, lacking = fitting(a, b, ("a", "b"))
    shells = {name: shell for name, shell in a.outline().items() if name not in lacking}
    check_compatible(shells, b.outline())
    for name, shell in shells.items():
        for start in range(0, shell.numel(), _PART):
            part = slice(start, min(start + _PART, shell.numel()))
            yield a.read(name, part), b.read(name, part)


def _pair(a: ModelOrWeights, b: ModelOrWeights) -> tuple[StateDict, StateDict]:
    a, b = as_weights(a), as_weights(b)
    b = shared(a, b, ("a", "b"))
    check_compatible(a, b)
    return a, b


def _real(tensor: Tensor) -> Tensor:
    """In float64; complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor.to(torch.complex128)) if tensor.is_complex() else tensor.double()


def _combine(name: str, tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """`sum_i c_i t_i`; a lone coefficient of 1 returns its tensor untouched."""
    first = tensors[0]
    if not inexact(first):
        return first.clone()
    used = [(t, c) for t, c in zip(tensors, coefficients, strict=True) if c != 0.0]
    if len(used) == 1 and used[0][1] == 1.0:
        return narrowed(used[0][0].clone(), first.dtype, name)
    dtype = wide(*(tensor.dtype for tensor in tensors))
    total = torch.zeros_like(first, dtype=dtype)
    for tensor, coefficient in used:
        total.add_(tensor.to(dtype), alpha=coefficient)
    return narrowed(total, first.dtype, name)
