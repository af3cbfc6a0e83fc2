"""The exact k-th smallest value of tensors that are seen one at a time, in bounded memory.

Floating-point numbers, read as integers with the negative ones flipped, sort like integers. A radix selection then
counts 16 bits at a time: 2 passes over float32 values, 4 over float64, and a table of 65536 counts per model instead
of a sorted copy of all parameters.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_DIGIT = 16
_MASK = (1 << _DIGIT) - 1
_SIGN = 1 << (_DIGIT - 1)
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_smallest(passes: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> Tensor:
    """For each model t the `ranks[t]`-th smallest value (1 = the minimum) over all its tensors.

    Args:
        passes: starts a new pass over the values, tensors `(models, *shape)`, all of one dtype (float32 or float64).
        ranks: one rank per model, from 1 to the number of its values.

    Returns:
        `(models,)` on the CPU: values that occur, of the dtype of the values.
    """
    probe = next(iter(passes()))
    top = probe.element_size() * 8 - _DIGIT
    prefix, remaining = [0] * len(ranks), list(ranks)
    for shift in range(top, -1, -_DIGIT):
        counts = torch.zeros(len(ranks), 1 << _DIGIT, dtype=torch.int64)
        for values in passes():
            for t, keys in enumerate(_sortable(values)):
                if shift < top:
                    keys = keys[(keys >> (shift + _DIGIT)) == prefix[t]]
                digits = (keys >> shift) & _MASK
                if shift == top:  # the sign is in the top digit: negative keys come first
                    digits = digits ^ _SIGN
                counts[t] += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        below = counts.cumsum(1)
        for t, rank in enumerate(remaining):
            digit = int(torch.searchsorted(below[t], rank))
            remaining[t] = rank - (int(below[t, digit - 1]) if digit else 0)
            prefix[t] = digit - _SIGN if shift == top else (prefix[t] << _DIGIT) | digit
    keys = torch.tensor(prefix, dtype=torch.int64).to(_INTEGERS[probe.dtype])
    return _flip(keys).view(probe.dtype)


def _sortable(values: Tensor) -> Tensor:
    """`(models, n)` int64 keys in the order of the values (minus zero counts as zero)."""
    keys = (values + 0.0).reshape(len(values), -1).contiguous().view(_INTEGERS[values.dtype])
    return _flip(keys).long()


def _flip(keys: Tensor) -> Tensor:
    """Negative numbers have their magnitude bits inverted; its own inverse."""
    lowest = torch.iinfo(keys.dtype).min
    return torch.where(keys < 0, ~keys ^ lowest, keys)
