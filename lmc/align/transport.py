"""Optimal-transport fusion: A's units spread over B's, then averaged (Singh and Jaggi 2020, arXiv:1910.05653)."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lmc.align.activations import Site, collect
from lmc.align.couplings import Coupling, View, couple, paired_rows
from lmc.align.taps import candidates, choose, live_taps
from lmc.align.widths import check_alone, check_depth, check_fixed_axes, guess_inputs, spec_of_width
from lmc.errors import InputError, MismatchError, SpecError
from lmc.inputs import call_module, first_of, input_batches
from lmc.network import Network, pick_device
from lmc.symmetry.find import permutation_spec
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, as_weights, check_finite, mean


@dataclass(frozen=True, eq=False)
class Fusion(Mapping[str, Tensor]):
    """Fused weights in the widths of B: a mapping, to be used wherever weights are.

    Attributes:
        weights: the average of B and the transported models.
        transported: each A in the units of B, before averaging.
        couplings: for each A the plans (n_a, n_b) by group; `family[i->j]` between what lies within two units.
        info: how they were made.
    """

    weights: Weights
    transported: tuple[Weights, ...]
    couplings: tuple[dict[str, Tensor], ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        return f"Fusion({len(self.transported) + 1} models, by {self.info.get('metric')}, {len(self)} tensors)"


def ot_fusion(
    model_b: nn.Module,
    a: ModelOrWeights | Sequence[ModelOrWeights],
    b: ModelOrWeights,
    inputs: Any = None,
    *,
    spec: PermutationSpec | UnboundSpec | None = None,
    share: float | None = None,
    regularization: float = 0.0,
    squared: bool = False,
    standardize: bool = True,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Fusion:
    """Fuse A into the units of B, the anchor: same depth, widths may differ.

    For each group of units a coupling T of uniform marginals makes the transport cost least. With `inputs`, the cost is
    the distance between what units do, before the nonlinearity; without, between their incoming weights, the inputs of A
    already expressed in units of B, group after group from the inputs on. Where a unit is computed, it becomes the mean
    of A's units by its column of T; where it is consumed, A's outgoing weights are split by rows of T. For equal widths
    that is the paper's formula, and exact couplings are permutations. Residual streams have one coupling, heads nested
    ones. Running statistics are transported too, but belong to neither network after averaging: re-estimate them.

    Args:
        model_b: a module with B's architecture; not touched.
        a: one model or several. A module where widths differ and `inputs` are given, else a state dict will do.
        b: the anchor: a module or state dict.
        inputs: as in `activation_matching`; a few hundred examples are enough.
        spec: the symmetries of B; default: those that `permutation_spec` finds on the inputs, or on made-up ones.
        share: of B in the average; default: all models equally.
        regularization: 0 for exact couplings; above, entropic ones, relative to the median cost (0.05 is soft).
        squared: costs are squared distances.
        standardize: compare activations after bringing each to mean 0 and variance 1.
        batch_size, device, progress: as in `activation_matching`.

    Raises:
        MismatchError: different depths or kinds of layers. InputError: POT is needed and missing, or a bad argument.
        SpecError: a spec that does not fit, or symmetries that transport cannot follow. DataError: unusable inputs.
    """
    started = time.perf_counter()
    several = isinstance(a, Sequence)
    sources = list(a) if several else [a]
    if not sources or regularization < 0 or (share is not None and not 0 <= share <= 1):
        raise InputError(f"{len(sources)} models, {regularization=}, {share=}: expected at least 1, >= 0, and 0 to 1")
    anchor = as_weights(b)
    check_finite(anchor, "b")
    chosen = pick_device(device, anchor)
    anchor = {name: tensor.to(chosen) for name, tensor in anchor.items()}
    network = Network(model_b, chosen)
    network.check(anchor, "b")
    if spec is None:
        example = guess_inputs(model_b) if inputs is None else first_of(next(input_batches(model_b, inputs, 2)), 2)
        network.load(anchor)
        spec = permutation_spec(network.module, example, progress=progress)
    spec = spec.bind(anchor)
    check_alone(spec)

    transported, couplings = [], []
    for k, source in enumerate(sources):
        name = f"a[{k}]" if several else "a"
        problem = _Problem(spec, network, anchor, source, name, regularization, squared)
        problem.solve(None if inputs is None else problem.distances(inputs, standardize, batch_size, progress))
        transported.append(problem.transported())
        couplings.append({n: t for coupling in problem.solved.values() for n, t in coupling.plans().items()})
    rest = (1.0 - share) / len(sources) if share is not None else 1.0 / (len(sources) + 1)
    weights = mean([anchor, *transported], [1.0 - rest * len(sources), *([rest] * len(sources))])
    info = {
        "method": "ot_fusion",
        "metric": "weights" if inputs is None else "activations",
        "regularization": regularization,
        "share": 1.0 - rest * len(sources),
        "seconds": time.perf_counter() - started,
    }
    return Fusion(weights, tuple(transported), tuple(couplings), info)


class _Problem:
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
            self.solved[root], _ = couple(self.specs, pair, squares, self.regularization, self.squared)

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
        left, right = torch.ones(length_a, dtype=torch.bool), torch.ones(length_b, dtype=torch.bool)
        for coupling in couplings:
            producing = self.producing[view]
            for rows_a, rows_b in paired_rows(coupling.a, coupling.b, view):
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
        result[right.to(front.device)] = front[left.to(front.device)]
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
