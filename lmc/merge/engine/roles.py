"""Aliases and masks among the tensors of state dicts; read from disk in chunks."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lmc.merge.engine.chunks import chunks
from lmc.weights import tied_names
from lmc.weights.checkpoint import Checkpoint
from lmc.weights.numbers import wide


def outline(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names with tensors of the right shape and dtype; nothing is read from a checkpoint on disk."""
    return state.outline() if isinstance(state, Checkpoint) else state


def infinite(state: Mapping[str, Tensor], name: str) -> bool:
    """True where the tensor holds an infinity and no NaN.

    On disk, reading all tensors for this would take as long as the merge: those called "weight" and "bias" are looked
    into at both ends only, where a causal mask has some.
    """
    if not isinstance(state, Checkpoint):
        return _holds_infinity([state[name].detach()])
    shell, edge = outline(state)[name], 256
    if name.rpartition(".")[2] in ("weight", "bias") and shell.numel() > 2 * edge:
        ends = (slice(0, edge), slice(shell.numel() - edge, shell.numel()))
        if not any(_holds_infinity([state.read(name, end)]) for end in ends):
            return False
    return _holds_infinity(state.read(name, chunk) for chunk in chunks(shell))


def _holds_infinity(pieces: Iterable[Tensor]) -> bool:
    found = False
    for piece in pieces:
        piece = piece.to(wide(piece.dtype))
        if not bool(torch.isfinite(piece.sum())):
            if bool(piece.isnan().any()):
                return False
            found = found or bool(piece.isinf().any())
    return found


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str) -> bool:
    if isinstance(a, Checkpoint) and isinstance(b, Checkpoint):
        return all(torch.equal(a.read(name, chunk), b.read(name, chunk)) for chunk in chunks(outline(a)[name]))
    return torch.equal(a[name].detach(), b[name].detach())


def tied(states: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Second names of one storage, with the first name: tied in one weight set, and tied or equal in all others."""
    first_name: dict[str, str] = {}
    for state in states:
        for name, first in tied_names(state).items():
            first_name.setdefault(name, first)
    known = [tied_names(state) for state in states]
    ties: dict[str, str] = {}
    for name, first in first_name.items():
        if all(
            own.get(name, name) == own.get(first, first) or torch.equal(state[name], state[first])
            for own, state in zip(known, states, strict=True)
        ):
            ties[name] = ties.get(first, first)
    return ties
