"""Every way to align one pair of networks, side by side."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from lmc.align.activations.matching import activation_matching
from lmc.align.many import match_many
from lmc.align.relaxed.sinkhorn import sinkhorn_matching
from lmc.align.relaxed.straight_through import straight_through_matching
from lmc.align.study.singular import singular_alignment
from lmc.align.transport.fusion import ot_fusion
from lmc.align.weight_matching.matching import matched, weight_matching
from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import Budget, beforehand, tqdm
from lmc.core.results import Result
from lmc.core.workers import spread
from lmc.errors import InputError, SpecError
from lmc.landscape.evaluation.evaluation import Repair, some_inputs
from lmc.landscape.path import Path, loss_path
from lmc.network.batches import as_splits, reread
from lmc.network.network import pick_device
from lmc.network.task import Task
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights, distance, dot

if TYPE_CHECKING:
    import pandas as pd

Aligner: TypeAlias = Callable[[PermutationSpec, nn.Module, Weights, Weights, Any], Permutation | Weights]

METHODS: dict[str, Aligner] = {
    "naive": lambda spec, model, a, b, data: b,
    "weight matching": lambda spec, model, a, b, data: weight_matching(spec, a, b, progress=False),
    "Frank-Wolfe": lambda spec, model, a, b, data: match_many(spec, [a, b], progress=False)[1],
    "activation matching": lambda spec, model, a, b, data: activation_matching(spec, model, a, b, data, progress=False),
    "straight-through": lambda spec, model, a, b, data: straight_through_matching(
        spec, model, a, b, data, progress=False
    ),
    "Sinkhorn, l2": lambda spec, model, a, b, data: sinkhorn_matching(spec, model, a, b, target="l2", progress=False),
    "Sinkhorn, midpoint": lambda spec, model, a, b, data: sinkhorn_matching(spec, model, a, b, data, progress=False),
    "OT, weights": lambda spec, model, a, b, data: ot_fusion(model, a, b, spec=spec, progress=False).transported[0],
    "OT, activations": lambda spec, model, a, b, data: ot_fusion(
        model, a, b, data, spec=spec, progress=False
    ).transported[0],
}


@dataclass(frozen=True)
class Alignment:
    """B as one method moved it, and its distance and barrier to A.

    Attributes:
        weights: B moved onto A.
        permutation: the move, where it is one.
        objective: `<A, pi(B)>` over all parameters, each once. distance: `|A - pi(B)|`. cosine: of the two.
        r: agreement of singular vectors (see `singular_alignment`).
        barrier, barrier_repaired: of the loss on the way from A, plain (batch statistics re-estimated) and with
            `repair="repair"`; see `loss_path`.
        midpoint, midpoint_repaired: the loss half way.
        seconds: taken by the method.
    """

    weights: Weights
    permutation: Permutation | None
    objective: float
    distance: float
    cosine: float
    r: float
    barrier: float
    barrier_repaired: float
    midpoint: float
    midpoint_repaired: float
    seconds: float


@dataclass(frozen=True, eq=False)
class AlignmentComparison(Result):
    """The alignments of one pair by method, as a mapping, a data frame (`to_frame`) and a figure (`plot`).

    `skipped` holds the methods that do not go with this architecture, each with its reason; `unit` is that of the loss.
    """

    alignments: dict[str, Alignment]
    split: str
    skipped: dict[str, str] = field(default_factory=dict)
    unit: str = "nats"

    def __getitem__(self, method: str) -> Alignment:
        return self.alignments[method]

    def __iter__(self):
        return iter(self.alignments)

    def __len__(self) -> int:
        return len(self.alignments)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each method: objective, distance, cosine, R, barriers and midpoints on `split`, seconds."""
        pd = require("pandas")

        columns = [name for name in Alignment.__dataclass_fields__ if name not in ("weights", "permutation")]
        rows = {method: [getattr(found, name) for name in columns] for method, found in self.alignments.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(float_format="{:.4g}".format)

    def __repr__(self) -> str:
        best = min(self.alignments, key=lambda method: self.alignments[method].barrier)
        lines = [
            f"AlignmentComparison({len(self)} methods; lowest barrier {self[best].barrier:.4g} on {self.split} by {best!r})",
            f"  {'':20}{'barrier':>9}{'repaired':>9}{'distance':>9}{'cosine':>8}{'R':>7}{'seconds':>9}",
        ]
        for method, found in self.alignments.items():
            measured = f"{found.barrier:9.4g}{found.barrier_repaired:9.4g}{found.distance:9.4g}"
            lines.append(f"  {method:20}{measured}{found.cosine:8.3f}{found.r:7.3f}{found.seconds:9.2f}")
        return "\n".join(lines + [f"  without {name}: {why}" for name, why in self.skipped.items()])


@own_context
def compare(
    spec: PermutationSpec | UnboundSpec,
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    methods: Iterable[str] | Mapping[str, Aligner] | None = None,
    alphas: int = 11,
    gamma: float = 0.3,
    budget: float | None = None,
    device: torch.device | str | None = None,
    executor: Any = None,
    progress: bool = True,
) -> AlignmentComparison:
    """Align B with A by several methods and measure each in the same way.

    Args:
        spec: the symmetries of the architecture.
        model: the architecture; not touched.
        a, b: modules or state dicts; neither is changed.
        data: labelled; methods and REPAIR learn from its training split, barriers are of its test split where it has one.
        methods: names from `lmc.align.METHODS`, or a mapping of names to functions `(spec, model, a, b, data)` that give
            a permutation or the moved weights of B. Default: all in `METHODS`. "naive" leaves B as it is.
        alphas: points on each way.
        gamma: share of the largest singular value from which vectors count for R.
        budget: seconds after which no further method is begun (default: any); those left out are among the skipped.
        device: where to run (default: where the weights are).
        executor: a `concurrent.futures.Executor` or a dask `Client` whose workers take the methods (default: one after the
            other, here).
        progress: show a bar when it takes longer than two seconds, and of a long comparison beforehand how long at least.

    Raises:
        InputError: a name that is not in `METHODS`. What the methods raise; but a method that refuses the architecture
            is skipped unless `methods` names it.
    """
    aligners = _chosen(methods)
    a, b = agreeing([a, b], "ab", model=model)
    chosen = pick_device(device, a)
    a, b = ({name: tensor.to(chosen) for name, tensor in weights.items()} for weights in (a, b))
    spec = spec.bind(a)
    data = reread(data)
    shared = {
        "spec": spec, "model": model, "a": a, "b": b, "data": data, "alphas": alphas, "gamma": gamma, "budget": budget,
        "methods": methods if isinstance(methods, Mapping) else list(aligners),
    }  # fmt: skip
    names = list(aligners)
    found: dict[int, Alignment] = {}
    skipped: dict[int, str] = {}
    split, unit = "data", "nats"
    started = perf_counter()
    with tqdm(total=len(names), desc="compare", unit=" methods", disable=not progress) as bar:
        for i, (judged, result) in spread(executor, _measure, shared, names):
            bar.update()
            if isinstance(result, Alignment):
                if i == 0 and progress and executor is None:
                    way = perf_counter() - started - result.seconds  # which is the same for the others
                    work = (
                        f"compare: the ways of {len(names) - 1} methods more, beside what each takes to find its move"
                    )
                    beforehand(work, way * (len(names) - 1), budget=budget, least=True)
                found[i], (split, unit) = result, judged
            elif isinstance(result, str):
                skipped[i] = result
            elif methods is not None:
                raise result
            else:
                skipped[i] = str(result)  # not asked for by name: the others are still worth having
    reasons = {names[i]: skipped[i] for i in sorted(skipped)}
    return AlignmentComparison({names[i]: found[i] for i in sorted(found)}, split, reasons, unit)


def _measure(
    spec: PermutationSpec,
    model: nn.Module,
    a: Weights,
    b: Weights,
    data: Any,
    alphas: int,
    gamma: float,
    budget: float | None,
    methods: Iterable[str] | Mapping[str, Aligner],
) -> Callable[[str], tuple[tuple[str, str], Alignment | SpecError | str]]:
    """A worker's task for a method: the split, the unit of the loss and the alignment, or why it does not go with the
    architecture, or that there is no time for it.

    Paths are evaluated on the split that barriers are taken on, and no other.
    """
    aligners, clock = _chosen(methods), Budget(budget)
    task = Task.of(data)
    splits = as_splits(data, task.targets)
    last, inputs = splits[-1], some_inputs(splits[0])
    judged = {last.name: next(iter(last.batches)) if last.whole else last.batches}
    task = replace(task.fitted(model, splits[0]), targets=None)  # the splits hold the targets that were made
    known: list[tuple[Weights, tuple[Path, Path]]] = []  # methods often find the same

    def path_to(moved: Weights, repair: Repair) -> Path:
        return loss_path(
            model, a, moved, judged, alphas=alphas, repair=repair, inputs=inputs, loss=task, progress=False
        )  # fmt: skip

    def measure(name: str) -> tuple[tuple[str, str], Alignment | SpecError | str]:
        if clock.over:
            return ("", ""), f"no time left of {clock.seconds:g} s"
        started = perf_counter()
        try:
            result = aligners[name](spec, model, a, b, data)
        except SpecError as error:
            return ("", ""), error
        seconds = perf_counter() - started
        moved = result.apply(b) if isinstance(result, Permutation) else as_weights(result)
        same = (paths for weights, paths in known if all(torch.equal(moved[n], weights[n]) for n in moved))
        if (paths := next(same, None)) is None:
            paths = path_to(moved, "auto"), path_to(moved, "repair")
            known.append((moved, paths))
        path, repaired = paths
        split = path.split
        middle = int(np.argmin(np.abs(path.alphas - 0.5)))
        one, two = matched(spec, a), matched(spec, moved)  # statistics are no weights
        norms = (dot(one, one) * dot(two, two)) ** 0.5
        return (split, path.unit), Alignment(
            weights=moved,
            permutation=result if isinstance(result, Permutation) else None,
            objective=dot(one, two),
            distance=distance(one, two),
            cosine=dot(one, two) / norms if norms else 0.0,
            r=singular_alignment(a, moved, gamma=gamma).r,
            barrier=path.barrier,
            barrier_repaired=repaired.barrier,
            midpoint=float(path.losses[split][middle]),
            midpoint_repaired=float(repaired.losses[split][middle]),
            seconds=seconds,
        )

    return measure


def _chosen(methods: Iterable[str] | Mapping[str, Aligner] | None) -> Mapping[str, Aligner]:
    if isinstance(methods, Mapping):
        return methods
    names = list(METHODS) if methods is None else list(methods)
    for name in names:
        if name not in METHODS:
            raise InputError(f"methods: {name!r} is none of {', '.join(map(repr, METHODS))}")
    return {name: METHODS[name] for name in names}
