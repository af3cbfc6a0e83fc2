"""One network transported into the units of another, group after group (Singh and Jaggi 2020, algorithm 1)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lmc.align.activations.collect import Site, collect
from lmc.align.activations.taps import candidates, choose, live_taps
from lmc.align.transport.couplings import Coupling, Importance, View, couple, paired_rows
from lmc.align.transport.widths import check_depth, check_fixed_axes, spec_of_width
from lmc.errors import InputError, MismatchError, SpecError
from lmc.network.inputs import call_module, first_of, input_batches
from lmc.network.network import Network
from lmc.symmetry.spec import PermutationSpec
from lmc.weights.arithmetic import ModelOrWeights, Weights, as_weights, check_finite


class Problem:
    """One A to be transported onto B."""

    def __init__(
        self,
        spec: PermutationSpec,
        network: Network,
        b: Weights,
        source: ModelOrWeights,
        name: str,
        regularization: float,
        squared: bool,
        importance: str | None,
    ) -> None:
        self.network, self.source, self.b, self.name = network, source, b, name
        self.a = {key: tensor.to(network.device) for key, tensor in as_weights(source).items()}
        check_finite(self.a, name)
        check_depth(self.a, b, name)
        check_fixed_axes(self.a, b, name, spec)
        self.specs = (spec_of_width(spec, self.a), spec)
        self.regularization, self.squared = regularization, squared
        self.solved: dict[str, Coupling] = {}
        self.roots = [group.name for group in spec.groups.values() if not group.within]
        sides = {(tap.tensor, tap.axis): tap.side for tap in candidates(spec, network.module)}
        self.producing = {
            (tensor, table.dims[0]): sides.get((tensor, table.dims[0]), _side(tensor, table.dims[0], b)) == "output"
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
            return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1).double().abs().pow(order).sum(1).cpu()

        here = [
            view for view, producing in self.producing.items() if producing and view[0] not in self.specs[1].buffers
        ]
        found = {(name, axis): (powers(self.a[name], axis), powers(self.b[name], axis)) for name, axis in here}
        return Importance(order, found)

    def _views(self, root: str, todo: Mapping[str, None]) -> Iterator[View]:
        """Axes of parameters that the group lies on and whose other axes are expressed in units of B already."""
        spec = self.specs[1]
        for tensor, tables in spec.groups[root].tables.items():
            roots_here = [(_root(spec, name), table.dims) for name, table in spec.tables_by_tensor[tensor]]
            for table in tables:
                others = [name for name, dims in roots_here if dims != table.dims]
                if tensor not in spec.buffers and not any(name in todo for name in others):
                    yield tensor, table.dims[0]

    def _weight(self, views: Iterable[View]) -> float:
        """How many numbers the tensors have in which units are computed; a trifle for each one in which they are not."""
        return sum(self.b[tensor].numel() if self.producing[tensor, axis] else 1e-6 for tensor, axis in views)

    def _compare(self, view: View) -> Tensor:
        """Squared distances (K_a, K_b) between the slices of a parameter along one axis."""
        tensor, axis = view
        ours = self._move(tensor, self.a[tensor], skip=axis).movedim(axis, 0).double()
        theirs = self.b[tensor].movedim(axis, 0).double()
        ours, theirs = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
        square = torch.addmm(theirs.square().sum(1), ours, theirs.T, alpha=-2.0)
        return square.add_(ours.square().sum(1)[:, None]).clamp_min_(0.0)

    def distances(self, inputs: Any, standardize: bool, batch_size: int, progress: bool) -> dict[View, Tensor]:
        """Mean squared distances (K_a, K_b) between channels before the nonlinearity, at every view that shows them."""
        same = all(tensor.shape == self.b[key].shape for key, tensor in self.a.items())
        if not same and not isinstance(self.source, nn.Module):
            raise InputError(f"{self.name}: widths differ from b's, so that activations need it as a module")
        ours = self.network if same else Network(self.source, self.network.device)  # type: ignore[arg-type]
        batches = input_batches(self.network.module, inputs, batch_size)
        first = next(batches)
        probe = first_of(first, 1)
        self.network.load(self.b)
        spec_a, spec_b = self.specs
        run = lambda: call_module(self.network.module, probe, self.network.device)  # noqa: E731
        taps = choose(spec_b, live_taps(spec_b, self.network.module, run), "output")
        sites = []
        for tap in taps:
            lengths = (self.a[tap.tensor].shape[tap.axis], self.b[tap.tensor].shape[tap.axis])
            sites.append(Site(tap, f"{tap.tensor}|{tap.axis}", *(torch.arange(n)[:, None] for n in lengths)))
        moments = collect((ours, self.network), (self.a, self.b), sites, chain([first], batches), progress)
        found = {}
        for tap in taps:
            m = moments[f"{tap.tensor}|{tap.axis}"]
            if standardize:
                found[tap.tensor, tap.axis] = 2.0 - 2.0 * m.correlation()
            else:
                square_a, square_b = m.uncentred_squares()
                total = (square_a[:, None] + square_b - 2.0 * m.cross_product()).clamp_min_(0.0)
                found[tap.tensor, tap.axis] = total / m.samples
        return found

    def transported(self) -> Weights:
        """All of A in the units of B."""
        moved = {}
        for name, tensor in self.a.items():
            target = self.b[name]
            if not tensor.is_floating_point():
                moved[name] = target.clone()
                continue
            moved[name] = self._move(name, tensor).to(target.dtype)
        return moved

    def _move(self, name: str, tensor: Tensor, skip: int | None = None) -> Tensor:
        """One tensor of A with all axes but `skip` in units of B."""
        moved = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for axis in range(tensor.ndim):
            here = [c for c in self.solved.values() if paired_rows_any(self.specs[1], c.b.name, (name, axis))]
            if axis != skip and here:
                front = moved.movedim(axis, 0)
                moved = self._move_axis((name, axis), front, here).movedim(0, axis)
        return moved

    def _move_axis(self, view: View, front: Tensor, couplings: Sequence[Coupling]) -> Tensor:
        """The first axis of `front` from channels of A to channels of B."""
        length_a, length_b = len(front), self.b[view[0]].shape[view[1]]
        result = front.new_zeros(length_b, *front.shape[1:])
        left, right = (torch.ones(n, dtype=torch.bool, device=front.device) for n in (length_a, length_b))
        for coupling in couplings:
            producing = self.producing[view]
            for rows_a, rows_b in paired_rows(coupling.a, coupling.b, view, front.device):
                left[rows_a.flatten()], right[rows_b.flatten()] = False, False
                if coupling.inner:
                    continue
                if coupling.index is not None:
                    result[rows_b.flatten()] = front[rows_a[coupling.index].flatten()]
                    continue
                share = coupling.share(producing).to(front)
                units = front[rows_a.flatten()].reshape(len(rows_a), -1)
                result[rows_b.flatten()] = (share @ units).reshape(-1, *front.shape[1:])
            if coupling.inner:
                matrix = coupling.matrix(view, producing, (length_b, length_a)).to(front)
                result += (matrix @ front.reshape(length_a, -1)).reshape(result.shape)
        if int(left.sum()) != int(right.sum()):
            raise MismatchError(
                f"{view[0]}, axis {view[1]}: {int(left.sum())} positions of {self.name} and {int(right.sum())} of b "
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
    """What a parameter outside the known modules does with an axis: matrices have inputs second."""
    return "input" if axis == 1 and weights[tensor].ndim == 2 and tensor.endswith("weight") else "output"
