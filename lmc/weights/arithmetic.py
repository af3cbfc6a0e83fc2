"""Arithmetic on weights: plain `dict[str, Tensor]`, exactly what `module.state_dict()` gives.

Wherever weights are asked for, an `nn.Module` is taken too. Nothing is changed in place. Floating-point
tensors take part in the arithmetic; integer and boolean tensors (batch counters, position ids) are copied
from the first argument. Sums are made in float32 at least and cast back, so that half precision loses nothing
on the way.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lmc.errors import InputError, MismatchError, WeightsError

Weights: TypeAlias = dict[str, Tensor]
ModelOrWeights: TypeAlias = nn.Module | Mapping[str, Tensor]


def as_weights(model: ModelOrWeights) -> Weights:
    """The state dict of a module, or a shallow copy of a mapping, detached from autograd."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise WeightsError(f"expected an nn.Module or a mapping of names to tensors, got {type(model).__name__}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise WeightsError(
                f"{name}: expected a tensor, got {type(tensor).__name__}; "
                "extra state outside parameters and buffers is not supported"
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def tied_names(model: ModelOrWeights) -> dict[str, str]:
    """Second names of tensors that are one and the same (embedding and output head) -> the first name."""
    state = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    first: dict[object, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        shared = tensor.numel() > 0 and not tensor.is_meta
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if shared else id(tensor)
        if place in first:
            tied[name] = first[place]
        else:
            first[place] = name
    return tied


def check_compatible(a: Weights, b: Weights, names: tuple[str, str] = ("a", "b")) -> None:
    """Raise `MismatchError` at the first tensor whose presence, shape, dtype or device differs."""
    left, right = names
    for name in a:
        if name not in b:
            raise MismatchError(f"{name}: in {left} {_describe(a[name])}, missing in {right}: different architectures")
    for name in b:
        if name not in a:
            raise MismatchError(f"{name}: in {right} {_describe(b[name])}, missing in {left}: different architectures")
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape:
            raise MismatchError(f"{name}: shape {tuple(x.shape)} in {left}, {tuple(y.shape)} in {right}")
        if x.dtype != y.dtype:
            raise MismatchError(f"{name}: dtype {x.dtype} in {left}, {y.dtype} in {right}; convert one with .to(dtype)")
        if x.device != y.device:
            raise MismatchError(f"{name}: on {x.device} in {left}, on {y.device} in {right}; move one with .to(device)")


def check_finite(weights: Weights, what: str = "weights") -> None:
    """Raise `WeightsError` naming the first tensor that holds NaN or infinity, and where, or that holds no values."""
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise WeightsError(f"{name} of {what}: on the meta device, which holds no values; load the weights first")
        # One sum tells nearly always; it may overflow, so a suspicious one is looked into.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not bool(torch.isfinite(tensor).all()):
            bad = ~torch.isfinite(tensor)
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise WeightsError(
                f"{name} of {what}: {int(bad.sum())} of {tensor.numel()} values are NaN or infinite, first at {where}"
            )


def finite_pair(a: ModelOrWeights, b: ModelOrWeights) -> tuple[Weights, Weights]:
    """Both as weights: `MismatchError` unless of one architecture, `WeightsError` unless finite."""
    a, b = as_weights(a), as_weights(b)
    check_compatible(a, b)
    check_finite(a, "a")
    check_finite(b, "b")
    return a, b


def lerp(a: ModelOrWeights, b: ModelOrWeights, alpha: float) -> Weights:
    """`(1 - alpha) a + alpha b`; exactly `a` at 0 and exactly `b` at 1 (integers come from `a`)."""
    a, b = as_weights(a), as_weights(b)
    check_compatible(a, b)
    return {name: _combine([x, b[name]], [1.0 - alpha, alpha]) for name, x in a.items()}


def mean(models: Sequence[ModelOrWeights], weights: Sequence[float] | None = None) -> Weights:
    """The weighted mean of several weight sets; `weights` sum to 1 (default: all equal)."""
    states = [as_weights(model) for model in models]
    if not states:
        raise InputError("mean of no weights at all: pass at least one model")
    coefficients = [1.0 / len(states)] * len(states) if weights is None else [float(w) for w in weights]
    if len(coefficients) != len(states):
        raise InputError(f"{len(coefficients)} weights for {len(states)} models")
    if abs(sum(coefficients) - 1.0) > 1e-6:
        raise InputError(f"weights sum to {sum(coefficients):g}, not to 1")
    for i, state in enumerate(states[1:], start=1):
        check_compatible(states[0], state, ("models[0]", f"models[{i}]"))
    return {name: _combine([state[name] for state in states], coefficients) for name in states[0]}


def dot(a: ModelOrWeights, b: ModelOrWeights) -> float:
    """`sum <a, b>` over all floating-point tensors, in float64."""
    a, b = as_weights(a), as_weights(b)
    check_compatible(a, b)
    return sum(float((x.double() * b[name].double()).sum()) for name, x in a.items() if x.is_floating_point())


def distance(a: ModelOrWeights, b: ModelOrWeights) -> float:
    """Euclidean distance over all floating-point tensors, in float64."""
    a, b = as_weights(a), as_weights(b)
    check_compatible(a, b)
    squares = (float((x.double() - b[name].double()).square().sum()) for name, x in a.items() if x.is_floating_point())
    return sum(squares) ** 0.5


def _combine(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """`sum_i c_i t_i`, accumulated in float32 or wider; a lone coefficient of 1 returns its tensor untouched."""
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    used = [(t, c) for t, c in zip(tensors, coefficients, strict=True) if c != 0.0]
    if len(used) == 1 and used[0][1] == 1.0:
        return used[0][0].clone()
    wide = torch.promote_types(first.dtype, torch.float32)
    total = torch.zeros_like(first, dtype=wide)
    for tensor, coefficient in used:
        total.add_(tensor.to(wide), alpha=coefficient)
    return total.to(first.dtype)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
