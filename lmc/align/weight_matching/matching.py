"""Weight matching: the permutation that brings B's weights closest to A's (Ainsworth, Hayase, Srinivasa 2023)."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmc.align.weight_matching.algorithm import Descent
from lmc.align.weight_matching.blocks import UnitBlock, build_blocks
from lmc.align.weight_matching.gains import inner_product
from lmc.core.context import own_context, warn
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.network.derived import derived_names, gauged
from lmc.symmetry.groups.symmetries import act, identity_indices
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing


@own_context
def weight_matching(
    spec: PermutationSpec | UnboundSpec,
    a: ModelOrWeights,
    b: ModelOrWeights,
    *,
    seed: int = 0,
    restarts: int = 1,
    max_sweeps: int = 100,
    progress: bool = True,
) -> Permutation:
    """Maximise `sum <A, pi(B)>` over the permutations pi of all groups by coordinate descent (Git Re-Basin, algorithm 1).

    Biases and norm parameters take part; buffers (running statistics) are permuted but not matched on. Nested groups are
    solved by nested assignment. The result is a local optimum, never below the value at the identity.

    Args:
        spec: the symmetries of the architecture.
        a, b: modules or state dicts on one device; neither is changed.
        seed: decides orders and starting points of the restarts from the third on.
        restarts: runs of which the best is kept. The first grows outwards from what is fixed (each group is first
            matched only against neighbours already matched), the second starts from the identity, the others from random
            permutations, visiting groups in a random order. Sweeps go there and back again.
        max_sweeps: bound on the passes over all groups in one run.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        The permutation, with `.objective` (the maximised sum, in float64) and how it was found in `.info`. An interrupt
        ends the search with a warning and returns the best permutation of the restarts that had finished.

    Raises:
        MismatchError: `a` and `b` differ in keys, shapes or device.
        SpecError: the spec does not fit the weights.
        WeightsError: NaN or infinity in the weights.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> pi = lmc.weight_matching(spec, a, b)
        >>> before, after = (lmc.loss_path(model, a, end, data.test).barrier for end in (b, pi.apply(b)))
        >>> print(f"barrier {before:.1f} nats, then {after:.1f}")
        barrier 1.5 nats, then 0.1
    """
    if restarts < 1 or max_sweeps < 1:
        raise InputError(f"restarts={restarts}, max_sweeps={max_sweeps}: both must be at least 1")
    if not isinstance(spec, PermutationSpec | UnboundSpec):
        raise InputError(
            f"spec: expected a PermutationSpec, got {type(spec).__name__}; make one with lmc.permutation_spec(model, "
            "inputs), or from patterns with lmc.PermutationSpec.from_patterns({...})"
        )
    started = time.perf_counter()
    a, b = agreeing([a, b], "ab")
    spec = spec.bind(a)
    fixed, moving = matched(spec, a), matched(spec, b)
    naive = inner_product(fixed, moving)
    candidates: list[tuple[float, dict[str, Tensor]]] = [(naive, {})]
    runs: list[dict[str, Any]] = []
    bar = tqdm(unit=" visits", disable=not progress)
    try:
        blocks = build_blocks(spec, fixed)
        for restart in range(restarts):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
            bar.set_description(f"weight matching, run {restart + 1} of {restarts}", refresh=False)
            starts = ["random"] if restart > 1 else ["identity"] if restart else ["outwards", "identity"]
            for start in starts:
                value, indices, run = _descend(spec, blocks, fixed, moving, start, generator, max_sweeps, bar)
                runs.append(run)
                candidates.append((value, indices))
                bar.set_postfix(best=f"{max(candidates, key=_value)[0]:.6g}", refresh=False)
                if value >= naive:
                    break
    except KeyboardInterrupt:
        warn(f"weight matching interrupted: the best of {len(runs)} finished runs is returned")
    finally:
        bar.close()
    value, best = max(candidates, key=_value)
    info = {
        "method": "weight_matching",
        "seed": seed,
        "restarts": restarts,
        "objective_at_identity": naive,
        "runs": runs,
        "seconds": time.perf_counter() - started,
    }
    return Permutation(spec, identity_indices(spec) | best, value, info)


def _value(candidate: tuple[float, Any]) -> float:
    return candidate[0]


def _descend(
    spec: PermutationSpec,
    blocks: list[UnitBlock],
    fixed: Weights,
    moving: Weights,
    start: str,
    generator: torch.Generator,
    max_sweeps: int,
    bar: Any,
) -> tuple[float, dict[str, Tensor], dict[str, Any]]:
    """One run of coordinate descent: (objective, index vectors of the groups that may have moved, how it went)."""
    pi: dict[str, Tensor] = {}
    order = list(range(len(blocks)))
    if start == "random":
        pi = spec.random(int(torch.randint(2**31, (), generator=generator))).indices
        order = torch.randperm(len(blocks), generator=generator).tolist()
    state = act(spec, pi, moving) if pi else moving
    descent = Descent(spec, blocks, fixed, state, pi, on_visit=bar.update)
    if start == "outwards":
        descent.grow_outwards()
    descent.run(max_sweeps, order, order[::-1])
    value = inner_product(fixed, descent.state)
    run = {"start": start, "sweeps": descent.sweeps, "visits": descent.visits, "converged": not descent.dirty}
    return value, descent.pi, run | {"objective": value}


def matched(spec: PermutationSpec, weights: Mapping[str, Tensor]) -> Weights:
    """The parameters (tied ones once), in float32 at least, in the order of their names.

    Buffers are no part of them, and of normalised or pruned weights it is the weight in use that is compared, under the
    name of the tensor that has its shape (`lmc.network.derived`). Complex ones are seen as real, with a last axis for the real and the imaginary part:
    `Re <x, y>` is then the inner product. Their order decides how sums round, so it is not left to the caller's files.
    """
    found: Weights = {}
    derived = derived_names(weights)
    weights = gauged(dict(weights)) if derived else weights
    for name in sorted(weights.keys() - spec.buffers - spec.aliases.keys() - derived):
        tensor = weights[name]
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        if tensor.is_floating_point():
            found[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return found


def in_form_of(like: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that `matched` made of one in the form of `like`, or a mixture of such, as it was: complex, in its dtype."""
    return (torch.view_as_complex(tensor.contiguous()) if like.is_complex() else tensor).to(like.dtype)
