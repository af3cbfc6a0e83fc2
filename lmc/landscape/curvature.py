"""Curvature of the loss at a network: top eigenvalues of its Hessian by Lanczos iteration, its trace by random probes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Objective
from lmc.landscape.evaluation.measured import Values
from lmc.network.network import derivatives
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, agreeing

if TYPE_CHECKING:
    import pandas as pd

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Curvature(Result):
    """The Hessian of the mean loss with respect to all parameters.

    Attributes:
        eigenvalues: (top,) the largest, in descending order.
        residuals: (top,) `|H v - lambda v|` for each, at least the rounding of the weights' dtype: an eigenvalue of H lies
            about this close to it.
        lowest: the lowest eigenvalue; a negative one says that the network stands on a saddle.
        lowest_residual: the same bound for it.
        trace: the sum of all eigenvalues, estimated.
        trace_error: standard error of the estimate; NaN with a single probe.
        parameters: number of parameters, the size of the Hessian.
    """

    eigenvalues: Values
    residuals: Values
    lowest: float
    lowest_residual: float
    trace: float
    trace_error: float
    parameters: int

    def to_frame(self) -> "pd.DataFrame":
        """A row for each eigenvalue that was found, the lowest last: eigenvalue, residual."""
        values, residuals = [*self.eigenvalues, self.lowest], [*self.residuals, self.lowest_residual]
        return require("pandas").DataFrame({"eigenvalue": values, "residual": residuals})

    def __str__(self) -> str:
        top = ", ".join(f"{value:.4g}" for value in self.eigenvalues)
        return (
            f"Hessian of {self.parameters} parameters: top eigenvalues {top} (within {self.residuals.max():.1g}), "
            f"lowest {self.lowest:.3g} (within {self.lowest_residual:.1g}), "
            f"trace {self.trace:.4g} with standard error {self.trace_error:.2g}"
        )

    __repr__ = __str__


@own_context
def curvature(
    model: nn.Module,
    weights: ModelOrWeights | None,
    data: Any,
    *,
    top: int = 3,
    probes: int = 30,
    tolerance: float = 1e-3,
    steps: int = 100,
    loss: Loss | Task | None = None,
    outputs: Outputs = None,
    batch_size: int = 512,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Curvature:
    """The curvature of the loss at `weights`, without ever forming the Hessian H (Yao et al. 2020, arXiv:1912.07145).

    Top eigenvalues by Lanczos iteration, all vectors kept orthogonal; the trace as the mean of z'Hz over random signs z
    (Hutchinson). Each step and each probe is one product with H, the derivative of a derivative, over all the data. The
    network is in eval mode: batch normalisation uses its running statistics, which for averaged networks should be
    re-estimated first (`recalibrate_batchnorm`). It is the curvature in the parameters as the module has them: where a scale
    of theirs is free, as before a normalisation or under a weight normalisation, it depends on that scale. Nothing of the
    caller's is touched.

    Args:
        model: the architecture.
        weights: a state dict or a module (None: the module's own).
        data: as for `lmc.landscape.evaluate`; of several splits the training split is used.
        top: number of eigenvalues.
        probes: for the trace; its standard error falls with their square root.
        tolerance: Lanczos stops when all residuals are below this share of the largest eigenvalue, or after `steps`.
        steps: most Lanczos steps; each keeps a vector of the size of the network in float64.
        loss, outputs: as for `lmc.landscape.evaluate`.
        batch_size: examples at a time, where the data are given whole.
        seed: of the first vector and the probes.
        device: where to compute (default: where the weights are).
        progress: show a bar.

    Raises:
        MismatchError: weights of another architecture.
        WeightsError: weights that are not finite.
        DataError: unusable data.
        InputError: an unusable argument, or a module with an operator that has no second derivative.
    """
    for name, value, least in (
        ("top", top, 1),
        ("probes", probes, 1),
        ("steps", steps, top),
        ("batch_size", batch_size, 1),
    ):
        if not (isinstance(value, int) and value >= least):
            raise InputError(f"{name}={value!r}; expected a whole number, at least {least}")
    if not (math.isfinite(tolerance) and tolerance > 0.0):
        raise InputError(f"tolerance={tolerance}; expected a positive number")
    state = agreeing([model if weights is None else weights], ["weights"], model=model)[0]
    hessian = Hessian(Objective(model, state, data, loss=loss, outputs=outputs, device=device), batch_size)
    if top > hessian.size:
        raise InputError(f"top={top}; the network has {hessian.size} parameters only")
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=min(steps, hessian.size) + probes, desc="curvature", unit="product", disable=not progress) as bar:

        def product(vector: Tensor) -> Tensor:
            bar.update()
            return hessian(vector)

        values, residuals = lanczos(product, hessian.size, top, min(steps, hessian.size), tolerance, generator)
        samples = hutchinson(product, hessian.size, probes, generator)
    residuals = np.maximum(residuals, hessian.rounding * np.abs(values).max())
    error = float(samples.std(ddof=1)) / math.sqrt(probes) if probes > 1 else math.nan
    return Curvature(
        values[:-1], residuals[:-1], float(values[-1]), float(residuals[-1]), float(samples.mean()), error, hessian.size
    )


class Hessian:
    """Products of the Hessian of the mean loss with flat vectors (P,) of float64 on the CPU, P parameters."""

    def __init__(self, objective: Objective, batch_size: int) -> None:
        self.objective, self.batch_size = objective, batch_size
        named = [(name, p) for name, p in objective.network.module.named_parameters() if p.is_floating_point()]
        self.point = {name: p.detach().clone().requires_grad_() for name, p in named}
        self.sizes = [p.numel() for p in self.point.values()]
        self.size = sum(self.sizes)
        self.weigh = objective.weighing(self.point, batch_size)
        self.rounding = max((torch.finfo(p.dtype).eps for p in self.point.values()), default=0.0)

    def __call__(self, vector: Tensor) -> Tensor:
        leaves = list(self.point.values())
        parts = vector.split(self.sizes)
        along = [part.reshape(p.shape).to(p.device, p.dtype) for part, p in zip(parts, leaves, strict=True)]
        total, weight = torch.zeros(self.size, dtype=torch.float64), 0.0
        for batch in self.objective.split.iterate(self.batch_size):
            if count := 1.0 if self.weigh is None else self.weigh(batch[1]):
                with derivatives(self.objective.network.module, "second"):
                    total += count * self._batch(self.objective(self.point, batch), leaves, along)
                weight += count
        return total if self.weigh is None else total / max(weight, 1.0)

    def _batch(self, loss: Tensor, leaves: list[Tensor], along: list[Tensor]) -> Tensor:
        """`H v` of one batch: the gradient of the slope along v."""
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        slope = torch.stack([(g * v).sum() for g, v in zip(gradients, along, strict=True)]).sum()
        if not slope.requires_grad:  # a loss that is linear in the parameters
            return torch.zeros(self.size, dtype=torch.float64)
        products = torch.autograd.grad(slope, leaves, materialize_grads=True)
        return torch.cat([p.reshape(-1).double().cpu() for p in products])


def lanczos(
    product: Product, size: int, top: int, steps: int, tolerance: float, generator: torch.Generator
) -> tuple[Values, Values]:
    """The `top` largest eigenvalues of a symmetric matrix, in descending order, and its lowest; (top + 1,), with residuals.

    In a basis q_1, q_2, ... of the Krylov space of a random vector the matrix is tridiagonal; the eigenvalues of this
    small matrix approach those at the ends of the spectrum first. Every vector is made orthogonal to all before it, twice,
    or rounding would bring copies of converged eigenvalues. Where the space is exhausted, a fresh vector opens another.
    """
    from scipy.linalg import eigh_tridiagonal  # slow to import

    basis = torch.empty(steps, size, dtype=torch.float64)
    diagonal: list[float] = []
    beside: list[float] = []
    vector = _orthogonal(torch.randn(size, generator=generator, dtype=torch.float64), basis[:0])
    vector /= vector.norm()
    while True:
        known = len(diagonal)
        basis[known] = vector
        image = product(vector)
        diagonal.append(float(image @ vector))
        image = _orthogonal(image, basis[: known + 1])
        length = float(image.norm())
        values, vectors = eigh_tridiagonal(diagonal, beside)
        scale = float(np.abs(values).max())
        exhausted = length <= 1e-10 * scale or known + 1 == size
        residuals = np.zeros(known + 1) if exhausted else length * np.abs(vectors[-1])
        pick = [*range(known, known - top, -1), 0]
        if known + 1 >= top:
            enough = residuals[pick].max() <= tolerance * scale and (not exhausted or known + 1 == size)
            if enough or known + 1 == steps:
                return values[pick], residuals[pick]
        if exhausted:
            image = _orthogonal(torch.randn(size, generator=generator, dtype=torch.float64), basis[: known + 1])
            beside.append(0.0)
        else:
            beside.append(length)
        vector = image / image.norm()


def hutchinson(product: Product, size: int, probes: int, generator: torch.Generator) -> Values:
    """z'Hz for random signs z, (probes,): each has the trace as its expectation."""
    samples = []
    for _ in range(probes):
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2.0 - 1.0
        samples.append(float(signs @ product(signs)))
    return np.array(samples)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """`vector` less its part in the span of the orthonormal rows of `basis`."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector
