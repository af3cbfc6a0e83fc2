"""Checks of discovered groups that share no code with the library: permute by the tables, run, compare."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmc.symmetry.groups.group import Group


def parents_first(groups: Iterable[Group]) -> list[Group]:
    """Groups ordered so that each comes after the groups that it lies within."""
    left, done, result = list(groups), set(), []
    while left:
        ready = [g for g in left if all(parent in done or parent == g.name for parent, _ in g.within)]
        if not ready:
            raise AssertionError(f"groups lie within each other or within unknown groups: {[g.name for g in left]}")
        result += ready
        done |= {g.name for g in ready}
        left = [g for g in left if g.name not in done]
    return result


def check_tables(groups: Iterable[Group], shapes: dict[str, tuple[int, ...]]) -> None:
    """Every table has one row per unit, lies inside its tensor, and names no position twice."""
    for group in groups:
        assert group.size > 1 and group.tables, group.name
        for name, tables in group.tables.items():
            for table in tables:
                extent = int(np.prod([shapes[name][d] for d in table.dims]))
                assert table.dims == tuple(sorted(set(table.dims))), (group.name, name, table.dims)
                assert len(table.rows) == group.size, (group.name, name)
                flat = table.rows.reshape(-1)
                assert flat.min() >= 0 and flat.max() < extent and len(np.unique(flat)) == flat.size, (group.name, name)


def positions(shape: tuple[int, ...], group: Group, name: str, order: np.ndarray) -> np.ndarray:
    """Old flat index for each new flat index of one tensor, under one permutation of one group."""
    index = np.arange(int(np.prod(shape))).reshape(shape)
    for table in group.tables.get(name, ()):
        rest = [d for d in range(len(shape)) if d not in table.dims]
        front = index.transpose(*table.dims, *rest)
        flat = front.reshape(int(np.prod(front.shape[: len(table.dims)])), -1).copy()
        flat[table.rows.reshape(-1)] = flat[table.rows[order].reshape(-1)]
        index = flat.reshape(front.shape).transpose(np.argsort([*table.dims, *rest]))
    return index.reshape(-1)


def permuted(state: dict[str, Tensor], groups: Iterable[Group], seed: int) -> dict[str, Tensor]:
    """Weights after one random permutation without fixed choice per group, parents first."""
    generator = np.random.default_rng(seed)
    state = dict(state)
    for group in parents_first(groups):
        order = generator.permutation(group.size)
        while (order == np.arange(group.size)).all():
            order = generator.permutation(group.size)
        for name in group.tables:
            tensor = state[name]
            old = torch.from_numpy(np.ascontiguousarray(positions(tuple(tensor.shape), group, name, order)))
            state[name] = tensor.reshape(-1)[old].view(tensor.shape)
    return state


def call(model: nn.Module, inputs: Any, outputs: Any = None) -> Tensor:
    """The output that must stay the same, as one vector."""
    with torch.no_grad():
        if isinstance(inputs, dict):
            result = model(**inputs)
        else:
            result = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    if not isinstance(result, Tensor):
        result = result[outputs or "logits"]
    return result.reshape(-1).double()


def widen(inputs: Any) -> Any:
    """Float inputs in float64."""
    if isinstance(inputs, dict):
        return {k: widen(v) for k, v in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(widen(v) for v in inputs)
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under every name that they have."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Writes values in place; a tensor with two names takes the one that moved."""
    current = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, old in {k: v.clone() for k, v in current.items()}.items():
            if not torch.equal(old, state[name]):
                current[name].copy_(state[name])


def error(model: nn.Module, inputs: Any, groups: Iterable[Group], seed: int = 0, outputs: Any = None) -> float:
    """Largest change of the output relative to its largest entry when all groups are permuted at once (in place)."""
    before, state = call(model, inputs, outputs), state_of(model)
    load(model, permuted(state, groups, seed))
    after = call(model, inputs, outputs)
    load(model, state)
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
