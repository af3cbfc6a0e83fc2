"""Weight matching: the permutation that brings B's weights closest to A's (Ainsworth, Hayase, Srinivasa 2023)."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.align.weight_matching.algorithm import Descent
from lmc.align.weight_matching.blocks import build_blocks
from lmc.align.weight_matching.gains import comparable
from lmc.align.weight_matching.on_disk import OnDisk
from lmc.core.context import own_context, warn
from lmc.core.progress import Budget, tqdm
from lmc.errors import InputError
from lmc.network.derived import derived_names, gauged
from lmc.symmetry.groups.action import act, identity_indices
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing
from lmc.weights.checkpoint import Checkpoint
from lmc.weights.opening import open_checkpoint
from lmc.weights.state import inexact


@own_context
def weight_matching(
    spec: PermutationSpec | UnboundSpec,
    a: ModelOrWeights | str | Path,
    b: ModelOrWeights | str | Path,
    *,
    seed: int = 0,
    restarts: int = 1,
    max_sweeps: int = 100,
    budget: float | None = None,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Permutation:
    """Maximise `sum <A, pi(B)>` over the permutations pi of all groups by coordinate descent (Git Re-Basin, algorithm 1).

    Biases and norm parameters take part; buffers (running statistics) are permuted but not matched on. Nested groups are
    solved by nested assignment. The result is a local optimum, never below the value at the identity.

    Args:
        spec: the symmetries of the architecture.
        a, b: modules or state dicts on one device; neither is changed. Where both are checkpoints on disk, opened or given
            by their paths, tensors are read as they are needed, and none of the two is held: memory is that for some
            copies of the largest tensor and of the largest group's matrix of gains. Weights under a weight or spectral
            normalisation are loaded.
        seed: decides orders and starting points of the restarts from the third on.
        restarts: runs of which the best is kept. The first grows outwards from what is fixed (each group is first
            matched only against neighbours already matched), the second starts from the identity, the others from random
            permutations, visiting groups in a random order. Sweeps go there and back again.
        max_sweeps: bound on the passes over all groups in one run.
        budget: seconds after which no further sweep and no further run begins (default: any); the first run is at least
            the pass that grows outwards.
        journal: for checkpoints on disk, a file to keep what was found: after an interrupt, which then is passed on, or a
            crash, the same call goes on from there.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        The permutation, with `.objective` (the maximised sum, in float64) and how it was found in `.info`; of checkpoints
        on disk also the memory as planned and the bytes read, in bytes, and for each pass its visits, bytes and seconds.
        An interrupt ends the search with a warning and returns the best permutation of the restarts that had finished.

    Raises:
        MismatchError: `a` and `b` differ in keys, shapes or device.
        SpecError: the spec does not fit the weights.
        WeightsError: NaN or infinity in the weights.
        DataError: a checkpoint or a journal that cannot be read; the file is named.
        InputError: the journal of another matching, or one for weights that are not on disk.

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
    started, clock = time.perf_counter(), Budget(budget)
    a, b = (open_checkpoint(given) if isinstance(given, str | Path) else given for given in (a, b))
    bar = tqdm(unit=" visits", disable=not progress)
    problem = _problem(spec, a, b, journal, {"seed": seed, "restarts": restarts, "max_sweeps": max_sweeps})
    spec, naive = problem.spec, problem.begin({}, bar.update).value()
    candidates: list[tuple[float, dict[str, Tensor]]] = [(naive, {})]
    runs: list[dict[str, Any]] = []
    try:
        for restart in range(restarts):
            if runs and clock.over:
                break
            generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
            bar.set_description(f"weight matching, run {restart + 1} of {restarts}", refresh=False)
            starts = ["random"] if restart > 1 else ["identity"] if restart else ["outwards", "identity"]
            for start in starts:
                value, indices, run = _descend(problem, start, generator, max_sweeps, clock, bar)
                runs.append(run)
                candidates.append((value, indices))
                bar.set_postfix(best=f"{max(candidates, key=_value)[0]:.6g}", refresh=False)
                if value >= naive:
                    break
    except KeyboardInterrupt:
        if journal is not None:
            raise
        warn(f"weight matching interrupted: the best of {len(runs)} finished runs is returned")
    finally:
        bar.close()
        problem.close()
    value, best = max(candidates, key=_value)
    info = {
        "method": "weight_matching",
        "seed": seed,
        "restarts": restarts,
        "objective_at_identity": naive,
        "runs": runs,
        "seconds": time.perf_counter() - started,
        **problem.report(),
    }
    return Permutation(spec, identity_indices(spec) | best, value, info)


class Held:
    """Two weight sets in memory to be matched."""

    def __init__(self, spec: PermutationSpec | UnboundSpec, a: ModelOrWeights, b: ModelOrWeights) -> None:
        a, b = agreeing([a, b], "ab")
        self.spec = spec.bind(a)
        self.fixed, self.moving = matched(self.spec, a), matched(self.spec, b)
        self.blocks = build_blocks(self.spec, self.fixed)

    def begin(self, pi: Mapping[str, Tensor], on_visit: Callable[[], object]) -> Descent:
        """A descent that starts where B is moved by `pi`."""
        state = act(self.spec, pi, self.moving) if pi else self.moving
        return Descent(self.spec, self.blocks, self.fixed, state, pi, on_visit)

    def report(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def _problem(
    spec: PermutationSpec | UnboundSpec,
    a: ModelOrWeights,
    b: ModelOrWeights,
    journal: str | Path | None,
    options: Mapping[str, Any],
) -> Held | OnDisk:
    if isinstance(a, Checkpoint) and isinstance(b, Checkpoint) and not derived_names(a.outline()):
        return OnDisk(spec.bind(a), a, b, None if journal is None else Path(journal), options)
    if journal is not None:
        raise InputError(
            "journal: what is found is kept for checkpoints on disk only, whose weights are not normalised; give two paths, "
            "or leave it out"
        )
    return Held(spec, a, b)


def _value(candidate: tuple[float, Any]) -> float:
    return candidate[0]


def _descend(
    problem: Held | OnDisk, start: str, generator: torch.Generator, max_sweeps: int, clock: Budget, bar: Any
) -> tuple[float, dict[str, Tensor], dict[str, Any]]:
    """One run of coordinate descent: (objective, index vectors of the groups that may have moved, how it went)."""
    pi: dict[str, Tensor] = {}
    order = list(range(len(problem.blocks)))
    if start == "random":
        pi = problem.spec.random(int(torch.randint(2**31, (), generator=generator))).indices
        order = torch.randperm(len(order), generator=generator).tolist()
    descent = problem.begin(pi, bar.update)
    if start == "outwards":
        descent.grow_outwards()
    descent.run(max_sweeps, order, order[::-1], clock=clock)
    value = descent.value()
    return value, descent.pi, {"start": start, **descent.report(), "objective": value}


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
        if inexact(weights[name]):
            found[name] = comparable(weights[name])
    return found


def in_form_of(like: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that `matched` made of one in the form of `like`, or a mixture of such, as it was: complex, in its dtype."""
    return (torch.view_as_complex(tensor.contiguous()) if like.is_complex() else tensor).to(like.dtype)
