"""Numbers of weights: which dtypes take part in sums, in which dtype sums are made, and the way back."""

import torch
from torch import Tensor

from lmc.errors import WeightsError


def inexact(tensor: Tensor) -> bool:
    """True where the values take part in sums: floating-point or complex, not integers or booleans."""
    return tensor.is_floating_point() or tensor.is_complex()


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of these are summed: float32, complex64, or the widest of them if that is wider."""
    found = torch.float32
    for dtype in dtypes:  # torch does not promote float8
        found = torch.promote_types(found, torch.float32 if dtype.itemsize == 1 else dtype)
    return found


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`.

    Raises:
        WeightsError: a finite value leaves the range of `dtype`, such as 65504 of float16; the tensor is named.
    """
    if dtype.itemsize < tensor.dtype.itemsize and dtype.is_floating_point and tensor.numel():
        values = tensor.to(wide(tensor.dtype)).abs()
        # Asked of the values, not of the result: casts to float8 may stop at its largest number.
        if bool(((values > torch.finfo(dtype).max) & torch.isfinite(values)).any()):
            raise WeightsError(
                f"{name}: the result leaves the range of {str(dtype).removeprefix('torch.')}, up to "
                f"{torch.finfo(dtype).max:g}; convert the models to float32 or bfloat16 first, or use a smaller scale"
            )
    return tensor.to(dtype)
