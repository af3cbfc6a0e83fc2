"""Random numbers for named tensors: the same for the same seed and name, whatever the order and however they are cut."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc.merge.engine.chunks import Chunk

BLOCK = 1 << 14  # entries that are drawn together


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU random generator for one tensor: the same for the same seed and name, whatever the order of names."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Uniform:
    """Numbers from [0, 1) for the entries of a tensor, or of a chunk of it.

    What an entry is given depends on the seed, the tensor's name, the model's place in the list, and the entry's place
    in the tensor: each block of entries has a generator of its own.
    """

    seed: int
    name: str
    chunk: Chunk = None

    def __call__(self, like: Tensor) -> Tensor:
        """As many as `like`, `(models, *shape)`, has entries; in its dtype, on its device."""
        start = 0 if self.chunk is None else self.chunk.start
        stop = start + like[0].numel()
        drawn = torch.empty(
            (len(like), stop - start), dtype=torch.float32
        )  # in float32, so that masks do not depend on the dtype
        for model, row in enumerate(drawn):
            for begin in range(start // BLOCK * BLOCK, stop, BLOCK):
                own = generator(self.seed, f"{model}/{begin}/{self.name}")
                low, high = max(begin, start), min(begin + BLOCK, stop)
                values = torch.rand(BLOCK, generator=own, dtype=torch.float32)
                row[low - start : high - start] = values[low - begin : high - begin]
        return drawn.reshape(like.shape).to(like)
