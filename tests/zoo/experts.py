"""Mixtures of experts: soft, sparse by scatter, sparse by gather, and experts as separate modules."""

import torch
from torch import Tensor, nn

from .entry import Entry, S, vectors


class Experts(nn.Module):
    """Residual mixture of experts with stacked weights `(experts, dim, hidden)`."""

    def __init__(self, dim: int, hidden: int, experts: int, top: int, route: str) -> None:
        super().__init__()
        self.stem, self.norm, self.router = nn.Linear(6, dim), nn.LayerNorm(dim), nn.Linear(dim, experts)
        self.up = nn.Parameter(torch.randn(experts, dim, hidden) / 3)
        self.bias = nn.Parameter(torch.randn(experts, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, dim) / 3)
        self.head = nn.Linear(dim, 3)
        self.top, self.route = top, route

    def dense(self, x: Tensor, weights: Tensor) -> Tensor:
        h = torch.relu(torch.einsum("bd,edf->bef", x, self.up) + self.bias)
        return torch.einsum("be,bef,efd->bd", weights, h, self.down)

    def gathered(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        h = torch.relu(torch.einsum("bd,bkdf->bkf", x, self.up[chosen]) + self.bias[chosen])
        return torch.einsum("bk,bkf,bkfd->bd", weights, h, self.down[chosen])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        logits = self.router(y)
        if self.route == "soft":
            return self.head(x + self.dense(y, logits.softmax(-1)))
        best, chosen = logits.topk(self.top, dim=-1)
        weights = best.softmax(-1)
        if self.route == "gather":
            return self.head(x + self.gathered(y, weights, chosen))
        return self.head(x + self.dense(y, torch.zeros_like(logits).scatter(1, chosen, weights)))


class ModuleExperts(nn.Module):
    """Experts are separate modules. Exchanging two of them exchanges tensors, which no permutation of axes does."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.stem, self.router = nn.Linear(6, dim), nn.Linear(dim, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) for _ in range(experts)
        )
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights = self.router(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.head(x + (weights[:, :, None] * outputs).sum(1))


class Codebook(nn.Module):
    """Hard assignment to the nearest of k codes (argmin), then a read-out of the code: codes may be relabelled."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.encode, self.codes = nn.Linear(6, dim), nn.Parameter(torch.randn(codes, dim))
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        nearest = (z[:, None] - self.codes).square().sum(-1).argmin(-1)
        return self.head(self.codes[nearest])


WHOLE = S(10) + S(4) + 4 * S(7)  # stream, experts, hidden units of each expert
LARGER, STILL = vectors(5, 6), ("head.bias",)

ENTRIES = [
    Entry("experts_soft", lambda: Experts(10, 7, 4, 2, "soft"), vectors(3, 6), WHOLE, larger=LARGER, still=STILL),
    Entry(
        "experts_top_k_scatter",
        lambda: Experts(10, 7, 4, 2, "scatter"),
        vectors(3, 6),
        WHOLE,
        larger=LARGER,
        still=STILL,
    ),
    Entry(
        "experts_top_k_gather", lambda: Experts(10, 7, 4, 2, "gather"), vectors(3, 6), WHOLE, larger=LARGER, still=STILL
    ),
    Entry(
        "experts_modules",
        lambda: ModuleExperts(10, 7, 3),
        vectors(3, 6),
        S(10) + 3 * S(7),
        larger=LARGER,
        still=("router.bias", "head.bias"),
    ),
    Entry("codebook", lambda: Codebook(8, 5), vectors(3, 6), S(8) + S(5), larger=LARGER, still=STILL),
]
