"""One network transported into the units of another, group after group (Singh and Jaggi 2020, algorithm 1)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lmc.align.activations.collect import Site, candidates, choose, collect, live_taps
from lmc.align.transport.couplings import Coupling, Importance, View, couple, paired_rows
from lmc.errors import InputError, MismatchError, SpecError
from lmc.network.derived import gauged
from lmc.network.inputs import first_of, input_batches
from lmc.network.network import Network
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import ModelOrWeights, Weights, check_finite
from lmc.weights.state import inexact

_SIDES = (8, 16, 28, 32, 64, 96, 128, 224)


class Problem:
    """One B to be transported onto A."""

    def __init__(
        self,
        spec: PermutationSpec,
        network: Network,
        a: Weights,
        b: Weights,
        source: ModelOrWeights,
        name: str,
        regularization: float,
        squared: bool,
        importance: str | None,
    ) -> None:
        self.network, self.source, self.a, self.name = network, source, a, name
        self.b = gauged({key: tensor.to(network.device) for key, tensor in b.items()}, network.module)
        check_finite(self.b, name)
        check_depth(a, self.b, name)
        check_fixed_axes(a, self.b, name, spec)
        self.specs = (spec_of_width(spec, self.b), spec)
        self.regularization, self.squared = regularization, squared
        self.solved: dict[str, Coupling] = {}
        self.roots = [group.name for group in spec.groups.values() if not group.within]
        sides = {(tap.tensor, tap.axis): tap.side for tap in candidates(spec, network.module)}
        self.producing = {
            (tensor, table.dims[0]): sides.get((tensor, table.dims[0]), _side(tensor, table.dims[0], a)) == "output"
            for tensor, tables in spec.tables_by_tensor.items()
            for _, table in tables
        }
        self.importance = None if importance is None else self._importance(int(importance[1:]))

    def solve(self, distances: Mapping[View, Tensor] | None) -> None:
        """Couple all groups, each time the one of whose incoming weights the largest part can be compared."""
        todo = dict.fromkeys(self.roots)
        while todo:
            known = {root: list(self._views(root, todo)) for root in todo}
            root = max(
                todo, key=lambda r: (bool(known[r]), self._weight(known[r]) / (self._weight(self._views(r, {})) or 1.0))
            )
            del todo[root]
            pair = (self.specs[0].groups[root], self.specs[1].groups[root])
            if distances is None:
                views = [v for v in known[root] if self.producing[v]] or known[root]
                squares = {view: self._compare(view) for view in views}
            else:
                squares = {view: d for view, d in distances.items() if paired_rows_any(self.specs[1], root, view)}
            if not squares:
                raise SpecError(
                    f"group {root!r}: nothing to compare its units by; leave it out: spec.without({root!r})"
                )
            self.solved[root], _ = couple(self.specs, pair, squares, self.regularization, self.squared, self.importance)

    def _importance(self, order: int) -> Importance:
        """The powers of the weights at all views of parameters where units are computed."""

        def powers(tensor: Tensor, axis: int) -> Tensor:
            return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1).abs().double().pow(order).sum(1).cpu()

        here = [
            view for view, producing in self.producing.items() if producing and view[0] not in self.specs[1].buffers
        ]
        found = {(name, axis): (powers(self.b[name], axis), powers(self.a[name], axis)) for name, axis in here}
        return Importance(order, found)

    def _views(self, root: str, todo: Mapping[str, None]) -> Iterator[View]:
        """Axes of parameters on which the group has units and whose other axes are expressed in units of A already."""
        spec = self.specs[1]
        for tensor, tables in spec.groups[root].tables.items():
            roots_here = [(_root(spec, name), table.dims) for name, table in spec.tables_by_tensor[tensor]]
            for table in tables:
                others = [name for name, dims in roots_here if dims != table.dims]
                if tensor not in spec.buffers and not any(name in todo for name in others):
                    yield tensor, table.dims[0]

    def _weight(self, views: Iterable[View]) -> float:
        """The count of numbers in the tensors in which units are computed; a trifle for each one in which they are not."""
        return sum(self.a[tensor].numel() if self.producing[tensor, axis] else 1e-6 for tensor, axis in views)

    def _compare(self, view: View) -> Tensor:
        """Squared distances (K_b, K_a) between the slices of a parameter along one axis."""
        tensor, axis = view
        theirs, ours = (
            (torch.view_as_real(x) if x.is_complex() else x).movedim(axis, 0).reshape(x.shape[axis], -1).double()
            for x in (self._move(tensor, self.b[tensor], skip=axis), self.a[tensor])
        )
        # |x - y|² = |x|² + |y|² - 2 xy, one matrix product for all pairs; rounding may leave it a little below 0.
        square = torch.addmm(ours.square().sum(1), theirs, ours.T, alpha=-2.0)
        return square.add_(theirs.square().sum(1)[:, None]).clamp_min_(0.0)

    def distances(self, inputs: Any, standardize: bool, batch_size: int, progress: bool) -> dict[View, Tensor]:
        """Mean squared distances (K_b, K_a) between channels before the nonlinearity, at every view that shows them."""
        same = all(tensor.shape == self.a[key].shape for key, tensor in self.b.items())
        if not same and not isinstance(self.source, nn.Module):
            raise InputError(f"{self.name}: widths differ from a's, so that activations need it as a module")
        other = self.network if same else Network(self.source, self.network.device)  # type: ignore[arg-type]
        batches = input_batches(self.network.module, inputs, batch_size)
        first = next(batches)
        probe = first_of(first, 2)
        self.network.check_inputs(self.a, probe, "inputs")
        self.network.load(self.a)
        run = lambda: self.network.result(probe)  # noqa: E731
        taps = choose(self.specs[1], live_taps(self.specs[1], self.network.module, run), "output")
        sites = []
        for tap in taps:
            lengths = (self.b[tap.tensor].shape[tap.axis], self.a[tap.tensor].shape[tap.axis])
            sites.append(Site(tap, f"{tap.tensor}|{tap.axis}", *(torch.arange(n)[:, None] for n in lengths)))
        networks, called = (other, self.network), (self.name, "a")
        moments = collect(networks, (self.b, self.a), sites, chain([first], batches), progress, called)
        found = {}
        for tap in taps:
            m = moments[f"{tap.tensor}|{tap.axis}"]
            if standardize:
                found[tap.tensor, tap.axis] = 2.0 - 2.0 * m.correlation()
            else:
                theirs, ours = m.uncentred_squares()
                total = (theirs[:, None] + ours - 2.0 * m.cross_product()).clamp_min_(0.0)
                found[tap.tensor, tap.axis] = total / m.samples
        return found

    def transported(self) -> Weights:
        """All of B in the units of A."""
        moved = {}
        for name, tensor in self.b.items():
            target = self.a[name]
            if not inexact(tensor):
                moved[name] = target.clone()
                continue
            moved[name] = self._move(name, tensor).to(target.dtype)
        return moved

    def _move(self, name: str, tensor: Tensor, skip: int | None = None) -> Tensor:
        """One tensor of B with all axes but `skip` in units of A."""
        moved = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for axis in range(tensor.ndim):
            here = [c for c in self.solved.values() if paired_rows_any(self.specs[1], c.anchor.name, (name, axis))]
            if axis != skip and here:
                front = moved.movedim(axis, 0)
                moved = self._move_axis((name, axis), front, here).movedim(0, axis)
        return moved

    def _move_axis(self, view: View, front: Tensor, couplings: Sequence[Coupling]) -> Tensor:
        """The first axis of `front` from channels of B to channels of A."""
        theirs, ours = len(front), self.a[view[0]].shape[view[1]]
        result = front.new_zeros(ours, *front.shape[1:])
        left, right = (torch.ones(n, dtype=torch.bool, device=front.device) for n in (theirs, ours))
        for coupling in couplings:
            producing = self.producing[view]
            for source, target in paired_rows(coupling.moving, coupling.anchor, view, front.device):
                left[source.flatten()], right[target.flatten()] = False, False
                if coupling.inner:
                    continue
                if coupling.index is not None:
                    result[target.flatten()] = front[source[coupling.index].flatten()]
                    continue
                share = coupling.share(producing).to(front)
                units = front[source.flatten()].reshape(len(source), -1)
                result[target.flatten()] = (share @ units).reshape(-1, *front.shape[1:])
            if coupling.inner:
                matrix = coupling.matrix(view, producing, (ours, theirs)).to(front)
                result += (matrix @ front.reshape(theirs, -1)).reshape(result.shape)
        if int(left.sum()) != int(right.sum()):
            raise MismatchError(
                f"{view[0]}, axis {view[1]}: {int(left.sum())} positions of {self.name} and {int(right.sum())} of a "
                "belong to no unit"
            )
        result[right] = front[left]
        return result


def paired_rows_any(spec: PermutationSpec, root: str, view: View) -> bool:
    """Whether a root group has units on an axis of a tensor."""
    return any(table.dims == (view[1],) for table in spec.groups[root].tables.get(view[0], ()))


def _root(spec: PermutationSpec, name: str) -> str:
    while spec.groups[name].within:
        name = spec.groups[name].within[0][0]
    return name


def _side(tensor: str, axis: int, weights: Weights) -> str:
    """The use that a parameter outside the known modules makes of an axis: matrices have inputs second."""
    return "input" if axis == 1 and weights[tensor].ndim == 2 and tensor.endswith("weight") else "output"


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
