"""Weights to certify on: nothing is 0 or 1 by design, and signals survive from the input to the output.

Default initialisations hide errors: biases are zero, norms and fresh statistics are the same for all units, a scale of
1e-6 switches a branch off, and standard deviations far below 1 / sqrt(fan-in) let signals fade below rounding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lmc.weights import Weights

BLOCK = 1_000_003  # prime, so that no two rows of a larger tensor get the same piece of the repeated block
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def draw(module: nn.Module, number: int, seed: int) -> Weights:
    """One set of weights for a module, on the CPU in single precision; tied tensors stay one.

    Args:
        number: draw 0 keeps the module's own weights, with noise, wherever their size lets signals through; later draws
            keep their sizes only.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed + number)
    kinds = {id(p): (kind, part) for kind in module.modules() for part, p in kind._parameters.items() if p is not None}
    drawn: dict[int, Tensor] = {}
    result: Weights = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in drawn:
            value = tensor.detach().cpu()
            if value.is_floating_point() or value.is_complex():
                value = value.to(torch.complex64 if value.is_complex() else torch.float32)
                if id(tensor) in kinds:
                    value = _parameter(value, *kinds[id(tensor)], number, generator)
                else:
                    value = _buffer(value, generator)
            drawn[id(tensor)] = value
        result[name] = drawn[id(tensor)]
    return result


def _parameter(own: Tensor, kind: nn.Module, part: str, number: int, generator: torch.Generator) -> Tensor:
    noise = _noise(own, generator)
    if own.ndim < 2:
        return _vector(own, noise, number)
    size = _size(own)
    wanted = 1.0 if isinstance(kind, EMBEDDINGS) else _fan_in(own, kind, part) ** -0.5
    least = wanted / 50 if isinstance(kind, EMBEDDINGS) else wanted / 4
    kept = size if least <= size <= 4 * wanted else wanted
    if number > 0 or size == 0:
        return noise.mul_(kept)
    return noise.mul_(0.3 * kept).add_(own, alpha=kept / size)


def _vector(own: Tensor, noise: Tensor, number: int) -> Tensor:
    """Biases, gains, slopes, temperatures: those of one sign keep it, and are near 1 where they are next to nothing."""
    if own.is_complex():
        return own + 0.3 * noise
    sign = float(own.sign().mean()) if own.numel() else 0.0
    size = _size(own)
    if abs(sign) == 1:
        base = torch.full_like(own, sign) if size < 0.05 else own
        return base * torch.exp(0.3 * noise)
    return own + 0.3 * max(size, 0.3 if number == 0 else 1.0) * noise


def _buffer(own: Tensor, generator: torch.Generator) -> Tensor:
    """Fresh statistics (all zeros, all ones) get noise; measured ones, masks and tables, constants of the architecture,
    tell units apart already and have values that the module relies on."""
    if own.numel() < 2 or own.is_complex() or bool((own != own.reshape(-1)[0]).any()) or not math.isfinite(own.sum()):
        return own
    noise = _noise(own, generator)
    return own * torch.exp(0.2 * noise) if bool(own.reshape(-1)[0] > 0) else own + 0.3 * noise


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal values; a large tensor repeats a block of them, as drawing is slower than all that follows."""
    count = like.numel()
    block = torch.randn(min(count, BLOCK), generator=generator, dtype=like.dtype)
    if count > BLOCK:
        block = block.repeat(-(-count // BLOCK))[:count]
    return block.reshape(like.shape)


def _size(tensor: Tensor) -> float:
    """The root of the mean square."""
    return float(torch.linalg.vector_norm(tensor)) / math.sqrt(max(1, tensor.numel()))


def _fan_in(tensor: Tensor, kind: nn.Module, part: str) -> int:
    """The number of inputs of a unit: of a bare parameter, whose layout is not known, the larger of its last two axes."""
    if part in ("weight", "original", "original0", "original1", "weight_v", "weight_g") or part.startswith(
        ("weight_", "in_proj")
    ):
        axis = 1 if isinstance(kind, _ConvTransposeNd) else 0
        return max(1, tensor.numel() // max(1, tensor.shape[axis]))
    return max(1, *tensor.shape[-2:])
