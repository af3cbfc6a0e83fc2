"""A first pass over the blocks, from what is fixed outwards: each is matched only against what is already matched."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from lmc.align.weight_matching.blocks import UnitBlock


def outwards(blocks: Sequence[UnitBlock], fixed: Mapping[str, Tensor]) -> Iterator[tuple[int, frozenset[str] | None]]:
    """The blocks, the best-informed first, each with the tensors that no unmatched block shares with it.

    A block is the better informed, the larger the share of its numbers that lies in such tensors; None stands for all
    tensors, where a block has none of its own.
    """
    waiting: dict[str, int] = {}  # for each tensor the blocks on it that are still to come
    for block in blocks:
        for name in block.tables:
            waiting[name] = waiting.get(name, 0) + 1
    sizes = {name: fixed[name].numel() for name in waiting}
    todo = dict.fromkeys(range(len(blocks)))

    def settled_share(i: int) -> float:
        tensors = blocks[i].tables
        return sum(sizes[name] for name in tensors if waiting[name] == 1) / sum(sizes[name] for name in tensors)

    while todo:
        i = max(todo, key=settled_share)
        del todo[i]
        yield i, frozenset(name for name in blocks[i].tables if waiting[name] == 1) or None
        for name in blocks[i].tables:
            waiting[name] -= 1
