"""One tensor in a file: what is known of it without reading it, and reading it or a chunk of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lmc.errors import DataError
from lmc.weights.numbers import narrowed

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class Stored(Protocol):
    """One tensor in a file: what is known without reading it, and how to read it."""

    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    def read(self, chunk: slice | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Extent:
    """A tensor in a safetensors file, from byte `start` on."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """The number of values."""
        return torch.Size(self.shape).numel()

    def read(self, chunk: slice | None = None) -> Tensor:
        """The tensor, or this chunk of it flattened, in memory of its own."""
        first, shape = (0, self.shape) if chunk is None else (chunk.start, (chunk.stop - chunk.start,))
        tensor = torch.empty(shape, dtype=self.dtype)
        if tensor.numel() == 0:
            return tensor
        target = as_bytes(tensor)
        with open(self.file, "rb") as file:
            file.seek(self.start + first * self.dtype.itemsize)
            if file.readinto(target) != target.nbytes:
                raise DataError(f"{self.file}: cut short since it was opened")
        return tensor


@dataclass(frozen=True)
class Mapped:
    """A tensor of a `.pt` file that is mapped into memory."""

    file: Path
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return self.tensor.numel()

    def read(self, chunk: slice | None = None) -> Tensor:
        """The tensor, or this chunk of it flattened, in memory of its own."""
        return self.tensor.detach().clone() if chunk is None else flat(self.tensor.detach(), chunk).clone()


@dataclass(frozen=True)
class Cast:
    """A stored tensor that is read in another dtype; `name` is for errors."""

    stored: Stored
    dtype: torch.dtype
    name: str

    @property
    def file(self) -> Path:
        return self.stored.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def size(self) -> int:
        """The number of values."""
        return self.stored.size

    def read(self, chunk: slice | None = None) -> Tensor:
        """The tensor, or this chunk of it flattened, in memory of its own."""
        return narrowed(self.stored.read(chunk), self.dtype, self.name)


def size_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def flat(tensor: Tensor, chunk: slice) -> Tensor:
    """The values from `chunk.start` to `chunk.stop` of a flattened tensor, without copying the others."""
    if tensor.is_contiguous():
        return tensor.view(-1)[chunk]
    places = torch.arange(chunk.start, chunk.stop, device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]


def as_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor that is not empty, contiguous and on the CPU; writing to them changes it."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
