"""Advice from the numbers of an inspection, in words. Rules of thumb, each with the number it rests on."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lmc.merge.study.survey import Difference, LayerReport

FAR = 0.5  # a task vector longer than this share of the base is no usual fine-tuning
RELATIVES, STRANGERS = 0.9, 0.5  # cosines of weights: above, one origin; below, separate ones
TWINS = 0.9999
AGREE = 0.3  # mean cosine of task vectors from which they point the same way
LONGER = 3.0  # one task vector this much longer than another decides the merge alone
FLAT = 0.1  # a barrier below this many nats is small beside what fine-tuning gains


def advice(
    names: Sequence[str],
    differences: Sequence[Difference],
    faults: Mapping[str, str],
    unusable: Mapping[str, str],
    matrices: LayerReport,
    based: bool,
    barriers: np.ndarray | None,
) -> tuple[str, ...]:
    """One sentence for each thing that a person should know before merging."""
    if unusable:
        return tuple(f"{who}: {why}." for who, why in unusable.items())
    said = [
        *_fit(differences),
        *(f"{who} is not finite, first in {name}: leave it out." for who, name in faults.items()),
    ]
    if len(names) < 2:
        return (*said, "One model alone: there is nothing to merge.")
    said += _task_vectors(names, matrices) if based else _weights(matrices)
    if barriers is not None:
        said.append(_basin(names, barriers))
    return tuple(said)


def _fit(differences: Sequence[Difference]) -> list[str]:
    kinds = Counter(d.kind for d in differences)
    said = []
    if wrong := kinds["missing"] + kinds["shape"]:
        example = next(d for d in differences if d.kind in ("missing", "shape"))
        said.append(
            f"Not one architecture: {wrong} tensors are missing or of another shape somewhere, first {example.name} "
            f"({'; '.join(example.found)}). Make them equal first (cut or pad the rows of a resized vocabulary); "
            "what follows is about the tensors that all share."
        )
    if kinds["dtype"]:
        said.append(
            f"{kinds['dtype']} tensors differ in dtype: sums are made in the widest, and the result has the first model's."
        )
    if kinds["tie"]:
        said.append(f"{kinds['tie']} tensors are tied in one model and not in another: untie or tie them first.")
    return said


def _task_vectors(names: Sequence[str], matrices: LayerReport) -> list[str]:
    norms, base = matrices.norms, matrices.base_norm
    said = []
    for name, norm in zip(names, norms, strict=True):
        if norm == 0.0:
            said.append(f"{name} equals the base: it adds nothing.")
        elif norm > FAR * base:
            said.append(
                f"{name} is {norm / base:.2g} times the base's norm away from it: was it really fine-tuned from this "
                "base? If not, use align= and no task vectors."
            )
    if not norms.all():
        return said
    cosines = matrices.cosines[np.triu_indices(len(names), 1)]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    twins = [(names[i], names[j]) for i, j in pairs if matrices.cosines[i, j] > TWINS]
    said += [f"{a} and {b} are (nearly) the same task vector: drop one." for a, b in twins]
    if (ratio := norms.max() / norms.min()) > LONGER:
        said.append(
            f"The task vector of {names[int(norms.argmax())]} is {ratio:.1f} times as long as that of "
            f"{names[int(norms.argmin())]} and will decide the merge: balance them with weights=."
        )
    mean = float(cosines.mean())
    if mean > AGREE:
        said.append(
            f"Task vectors agree (mean cosine {mean:.2f}), as runs on one task do: average, greedy_soup, model_stock."
        )
    else:
        said.append(
            f"Task vectors share little (mean cosine {mean:.2f}), as different tasks do: task_arithmetic with a scale "
            f"chosen on validation data, from {1 / len(names):.2g} up."
        )
        chance = 1.0 - 2.0 ** (1 - len(names))  # of signs drawn at random
        if matrices.conflict > 0.8 * chance:
            said.append(
                f"Signs conflict in {matrices.conflict:.0%} of the values (chance: {chance:.0%}): try ties, pcb or "
                "consensus, which settle conflicts, beside it."
            )
    return said


def _weights(matrices: LayerReport) -> list[str]:
    if not matrices.size:
        return []
    values = matrices.cosines[np.triu_indices(len(matrices.norms), 1)]
    if np.isnan(values).all():
        return ["All weights are zero."]
    low = float(np.nanmin(values))
    if low > RELATIVES:
        return [
            f"Weights are close (cosine at least {low:.2f}), as of models with one origin: average or greedy_soup; pass "
            "that origin as base= to compare task vectors."
        ]
    if low < STRANGERS:
        return [
            f"Weights are far apart (cosine down to {low:.2f}), as of networks trained from different initialisations: "
            "bring them into one order first, align=lmc.permutation_spec(model, inputs)."
        ]
    return [
        f"Weights are related (cosine down to {low:.2f}) but far apart: pass the common origin as base= if there is one."
    ]


def _basin(names: Sequence[str], barriers: np.ndarray) -> str:
    i, j = np.unravel_index(int(barriers.argmax()), barriers.shape)
    top = float(barriers[i, j])
    if top < FLAT:
        return f"The highest barrier between two models is {top:.2g} nats: they share a basin, where averages are safe."
    return (
        f"The line between {names[int(j)]} and {names[int(i)]} has a barrier of {top:.2g} nats: their plain average is "
        "worse than both; align= them, or merge others."
    )
