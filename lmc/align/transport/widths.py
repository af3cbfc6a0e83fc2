"""One architecture in another width: its symmetries, what cannot differ, and example inputs made up."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmc.errors import InputError, MismatchError, SpecError
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

_SIDES = (8, 16, 28, 32, 64, 96, 128, 224)


def spec_of_width(spec: PermutationSpec, weights: Weights) -> PermutationSpec:
    """The same symmetries in weights whose groups may have other sizes, by way of the axis patterns.

    Raises:
        SpecError: the patterns do not fit the weights, or do not say everything ("table").
    """
    if all(spec.shapes[name] == tuple(weights[name].shape) for name in spec.shapes if name in weights):
        return spec
    irregular = [name for name, pattern in spec.patterns.items() if "table" in pattern.split()]
    if irregular:
        raise SpecError(f"{irregular[0]}: pattern {spec.patterns[irregular[0]]!r} does not carry over to other widths")
    holders = {spec.groups[parent].family for group in spec.groups.values() for parent, _ in group.within}
    sizes = {group.family: group.size for group in spec.groups.values()}
    try:
        found = PermutationSpec.from_patterns(spec.patterns, weights)
    except SpecError:  # "(head unit)" leaves open how many heads there are: as many as before
        found = PermutationSpec.from_patterns(spec.patterns, weights, **{name: sizes[name] for name in sorted(holders)})
    return found.bind(weights)


def check_alone(spec: PermutationSpec) -> None:
    """Raise `SpecError` for groups that transport cannot follow: tables over several axes, channels of two groups."""
    for tensor, tables in spec.tables_by_tensor.items():
        owner: dict[tuple[int, int], str] = {}
        for name, table in tables:
            axis = table.dims[0]
            if table.dims != (axis,):
                raise SpecError(
                    f"{tensor}: group {name!r} spans axes {table.dims}; leave it out: spec.without({name!r})"
                )
            for position in table.rows.ravel().tolist():
                other = owner.get((axis, position))
                if other is not None and not _within(spec, name, other):
                    raise SpecError(
                        f"{tensor}: groups {other!r} and {name!r} share channels; leave one of them as it is: "
                        f"spec.without({spec.groups[other].family!r}) or spec.without({spec.groups[name].family!r})"
                    )
                owner[axis, position] = name


def check_depth(a: Weights, b: Weights, name: str) -> None:
    """Raise `MismatchError` unless both have the same tensors, of the same number of axes and dtype."""
    odd = sorted(a.keys() ^ b.keys())
    if odd:
        where = "a" if odd[0] in a else name
        raise MismatchError(
            f"{odd[0]} is in {where} only: fusion goes layer by layer, so depths and kinds of layers must be equal"
        )
    for key, tensor in a.items():
        if tensor.ndim != b[key].ndim or tensor.dtype != b[key].dtype:
            raise MismatchError(
                f"{key}: {tuple(tensor.shape)} {tensor.dtype} in a, {tuple(b[key].shape)} {b[key].dtype} in {name}"
            )


def check_fixed_axes(a: Weights, b: Weights, name: str, spec: PermutationSpec) -> None:
    """Raise `MismatchError` if an axis that no group spans differs in length."""
    for key, tensor in a.items():
        spanned = {table.dims[0] for _, table in spec.tables_by_tensor.get(key, ())}
        for axis, (ours, theirs) in enumerate(zip(tensor.shape, b[key].shape, strict=True)):
            if ours != theirs and axis not in spanned:
                raise MismatchError(f"{key}: axis {axis} is {ours} in a, {theirs} in {name}, and no group spans it")


def _within(spec: PermutationSpec, name: str, other: str) -> bool:
    return any(parent == other or _within(spec, parent, other) for parent, _ in spec.groups[name].within)


def guess_inputs(model: nn.Module) -> Tensor:
    """Two random examples that the model takes, from the shape of its first layer.

    Raises:
        InputError: there is none that we can think of.
    """
    generator = torch.Generator().manual_seed(0)
    reference = next(model.parameters(), torch.zeros(()))
    for make in _makers(model, generator):
        try:
            example = make().to(reference.device)
            example = example.to(reference.dtype) if example.is_floating_point() else example
            with torch.no_grad():
                model(example)
            return example
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
    raise InputError(
        "no example inputs could be made up for this model: pass inputs, or spec=lmc.permutation_spec(...)"
    )


def _makers(model: nn.Module, generator: torch.Generator) -> list[Callable[[], Tensor]]:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return [lambda shape=(2, module.in_features): torch.randn(shape, generator=generator)]
        if isinstance(module, nn.Embedding):
            return [lambda top=module.num_embeddings: torch.randint(top, (2, 4), generator=generator)]
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            spatial = len(module.kernel_size)
            shapes = [(2, module.in_channels, *(side,) * spatial) for side in _SIDES]
            return [lambda shape=shape: torch.randn(shape, generator=generator) for shape in shapes]
    return []
