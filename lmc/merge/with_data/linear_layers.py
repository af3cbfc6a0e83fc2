"""Layers as matrices: what is multiplied with what."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fits(module: nn.Module) -> bool:
    """Whether a layer is a matrix that we know how to read: linear, a convolution over patches, or GPT-2's Conv1D."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """`(rows, inputs)`: what the weight matrix is multiplied with, float32 or wider."""
    x = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        assert not isinstance(module.padding, str)
        x = x if x.ndim == len(module.kernel_size) + 2 else x[None]
        how = [module.kernel_size, module.dilation, module.padding, module.stride]
        if isinstance(module, nn.Conv1d):  # an image one pixel high
            x, how = x[..., None, :], [(neutral, *size) for neutral, size in zip((1, 1, 0, 1), how, strict=True)]
        return F.unfold(x, *how).mT.flatten(0, 1)  # from (N, in * kh * kw, positions)
    return x.reshape(-1, x.shape[-1])


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """`(inputs, outputs)`."""
    return weight.flatten(1).T if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) else weight


def as_weight(module: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """What `as_matrix` made, back in the shape of the weight."""
    return (matrix.T if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) else matrix).reshape(shape)
