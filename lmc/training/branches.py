"""Branches of a run: from when on do two continuations of one network stay connected?"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmc.core.context import own_context, warn
from lmc.errors import InputError
from lmc.network.batches import reread
from lmc.training.loop import train
from lmc.training.run import Trained, at_least_one, whole_numbers
from lmc.weights import Weights


@dataclass(frozen=True, eq=False)
class Branches:
    """A run, and what became of it from some epochs on in other orders of the data.

    Attributes:
        trunk: the run itself, with its weights at the epochs in question.
        children: epoch -> the finished networks that branched off there, one for each seed.
    """

    trunk: Trained
    children: Mapping[int, Trained]

    def pairs(self) -> dict[int, tuple[Weights, Weights]]:
        """Epoch -> the first two children, whose barrier is the instability of the trunk at that epoch."""
        return {epoch: (found[0], found[1]) for epoch, found in self.children.items()}

    def __repr__(self) -> str:
        epochs = ", ".join(map(str, self.children))
        return f"Branches({self.trunk.model} on {self.trunk.data}, from epochs {epochs}; {self.trunk.recipe})"


@own_context
def branches(
    model: nn.Module,
    data: Any,
    *,
    at: Iterable[int],
    seeds: Iterable[int] = (1, 2),
    seed: int = 0,
    epochs: int = 20,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Any,
) -> Branches:
    """Train one network, and go on from some of its epochs with other orders of the data (Frankle et al. 2020).

    Instability analysis (arXiv:1912.05671, algorithm 1): children of one epoch share weights and schedule, and differ in
    the order of the data alone. The epoch from which on their barrier vanishes,
    `lmc.loss_path(model, *branches.pairs()[epoch], data).barrier`, is where the run became stable.

    Args:
        model, data, epochs, device, progress: as for `train`.
        at: the epochs to branch off from, 0 (the initialisation) to `epochs - 1`.
        seeds: of the children's orders, at least two, none of them the trunk's.
        seed: of the trunk: its initialisation and order.
        options: further arguments of `train`; `init` is what the trunk starts from.

    An interrupt returns the branches of the epochs that are done, with a warning, once there is one.

    Raises:
        InputError: epochs outside the run, fewer than two seeds, or those of the trunk; and what `train` raises.
        DataError: unusable data.
    """
    at_least_one("epochs", epochs)
    wanted, orders = sorted(set(whole_numbers("at", at, epochs))), whole_numbers("seeds", seeds)
    if len(orders) < 2 or seed in orders:
        raise InputError(f"seeds={orders}: expected at least two, other than the trunk's {seed}")
    if taken := sorted({"keep", "start"} & options.keys()):
        raise InputError(f"{taken[0]}: branches decides it, by at=")
    init, data = options.pop("init", None), reread(data)
    common: dict[str, Any] = {"epochs": epochs, "device": device, "progress": progress, **options}
    trunk = train(model, data, seeds=[seed], keep=wanted, init=init, **common)
    if trunk.interrupted:
        raise KeyboardInterrupt
    children: dict[int, Trained] = {}
    for epoch in wanted:
        found = train(model, data, seeds=orders, init=trunk.trajectory[0][epoch], start=epoch, **common)
        if found.interrupted:
            if not children:
                raise KeyboardInterrupt
            warn(f"interrupted: branches of {len(children)} of {len(wanted)} epochs were trained")
            break
        children[epoch] = found
    return Branches(trunk, children)
