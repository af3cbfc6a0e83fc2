"""CAT Merging: from each task vector the directions are taken in which it disturbs what other tasks' layers answer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.merge.engine.aligning import alignable
from lmc.merge.engine.assembly import assemble
from lmc.merge.with_data.regmean import LayerInputs, layer_inputs
from lmc.network.layers import as_matrix, as_weight
from lmc.weights import ModelOrWeights, StateDict, as_weights


@own_context
@alignable
def cat_merging(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    inputs: Sequence[Any],
    *,
    base: ModelOrWeights,
    scale: float = 1.0,
    directions: int = 2,
    keep: float = 1.0,
    samples: int = 256,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> StateDict:
    """CAT Merging (Sun et al. 2025, 2505.06977): `theta_0 + scale sum_t P_t tau_t`, linear layer by linear layer.

    For task k the output directions in which the others' task vectors disturb it most are the leading eigenvectors B_k of
    `sum_{i != k} tau_i (G_k - keep G_i) tau_i^T`, with `G_k` the Gram matrix of the layer's inputs in model k on its task:
    `keep` weighs what a task vector does for its own task. P_t projects off the span of all B_k with k != t. All B are
    taken from the task vectors as they are, so that the order of models does not matter; the published code could only be
    read in a port, which goes through tasks one after the other. All other tensors are added as task vectors are.

    Args:
        model: the architecture; its weights are not used and not touched.
        models: the fine-tuned models.
        inputs: for each model unlabelled inputs of its task, as for `regmean`.
        base: what the models were fine-tuned from.
        scale: of the sum.
        directions: how many are taken away for each task; 0 is task arithmetic.
        keep: lambda in the paper.
        samples: examples per task.
        batch_size: examples at a time.
        device: where to compute activations (default: where the weights are).
        progress: show a bar if it takes longer than two seconds.

    Raises:
        InputError: a negative number of directions.
    """
    if directions < 0:
        raise InputError(f"directions must not be negative, got {directions}")
    job = layer_inputs(model, models, inputs, 1.0, samples, batch_size, device, base)
    grams: list[dict[str, Tensor]] = []
    for t in tqdm(range(len(job.sets)), desc="CAT", disable=not progress or not directions):
        job.network.load(as_weights(job.sets.states[t]))
        grams.append(job.grams(t, list(job.layers)) if directions else {})

    def merged(name: str) -> Tensor:
        origin = job.sets.base_tensor(name)
        if not all(name in own for own in grams):
            return origin + scale * job.sets.deltas(name).sum(0)
        total = _trimmed(job, name, [own[name] for own in grams], directions, keep)
        like = job.sets.states[0][name]
        return origin + scale * as_weight(job.layers[name], total.T, like.shape).to(origin)

    def shares(name: str) -> tuple[list[float], float]:
        return [1.0 / len(job.sets)] * len(job.sets), 0.0

    return StateDict(dict(assemble(job.sets, merged, shares)), like=job.sets.states[0])


def _trimmed(job: LayerInputs, name: str, grams: Sequence[Tensor], directions: int, keep: float) -> Tensor:
    """`(outputs, inputs)`: the sum of the projected task vectors."""
    base = as_matrix(job.layers[name], job.sets.base_tensor(name).double().cpu())
    tasks = [(job.matrix(name, t) - base).T for t in range(len(grams))]
    disturbing = []
    for k, own in enumerate(grams):
        conflict = sum(
            (tau @ (own - keep * grams[i]) @ tau.T for i, tau in enumerate(tasks) if i != k),
            torch.zeros(len(tasks[0]), len(tasks[0]), dtype=torch.float64),
        )
        values, vectors = torch.linalg.eigh((conflict + conflict.T) / 2)
        worst = vectors[:, -directions:] if directions else vectors[:, :0]
        disturbing.append(worst[:, values[len(values) - worst.shape[1] :] > 0.0])
    total = torch.zeros_like(tasks[0])
    for t, tau in enumerate(tasks):
        others = torch.cat([frame for k, frame in enumerate(disturbing) if k != t] or [tau[:, :0]], 1)
        frame = torch.linalg.qr(others).Q if others.shape[1] else others
        total += tau - frame @ (frame.T @ tau)
    return total
