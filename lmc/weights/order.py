"""Orders that do not depend on how weights were stored: names by their numbers, tensors by their depth in a network.

Keys of a stored state dict come in the order in which a tool wrote them; that order means nothing. Depth is told from
names and from modules.
"""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from lmc.errors import InputError


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key to sort names by, numbers by their value: "layers.2" before "layers.10"."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def numbered_depths(names: Iterable[str]) -> dict[str, float]:
    """Depths from 0 (first block) to 1 (last block) of the names inside numbered blocks; the others are left out.

    Blocks are modules that differ by one number, `layers.0`, `h.11`, `fc2`, `layer4`; the outermost number counts. Two
    towers with equally many blocks (`encoder.0`, `decoder.0`) lie beside each other.

    Raises:
        InputError: no numbered modules, or several series that may follow one another (`conv1`, `conv2`, `fc1`).
    """
    # For every name the numbers in its module path from the outermost on, each with what stands before it.
    found = {
        name: [(path[: m.start()], int(m[1])) for m in re.finditer(r"(\d+)(?=\.|$)", path)]
        for name in names
        for path in [name if name.rpartition(".")[2].isdigit() else name.rpartition(".")[0]]
    }
    series: dict[str, set[int]] = {}
    for numbers in found.values():
        for before, number in numbers:
            series.setdefault(before, set()).add(number)
    places = {
        name: next(((before, number) for before, number in numbers if len(series[before]) > 1), None)
        for name, numbers in found.items()
    }
    used = {place[0]: sorted(series[place[0]]) for place in places.values() if place}
    homes = {before.rpartition(".")[0] for before in used}
    if len({len(numbers) for numbers in used.values()}) != 1 or len(homes) != len(used):
        lengths = {before + "*": len(numbers) for before, numbers in used.items()}
        raise InputError(f"cannot tell the blocks from the names (numbered modules: {lengths or 'none'})")
    return {name: used[place[0]].index(place[1]) / (len(used[place[0]]) - 1) for name, place in places.items() if place}


def modules_in_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules that hold the tensors `names`, in the order in which the model registers them."""
    wanted = {name.rpartition(".")[0] or name for name in names}
    return list(dict.fromkeys(m for name in model.state_dict() if (m := name.rpartition(".")[0] or name) in wanted))


def model_depths(model: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """As `numbered_depths`; where blocks are not numbered clearly, each module is one, in the model's order."""
    try:
        return numbered_depths(names)
    except InputError:
        modules = modules_in_order(model, names)
    last = max(len(modules) - 1, 1)
    return {name: modules.index(name.rpartition(".")[0] or name) / last for name in names}
