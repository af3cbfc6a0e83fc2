"""Recurrent networks: the gates of a unit are blocks of one axis and move together."""

import torch
from torch import Tensor, nn

from .entry import Entry, S, tokens, vectors


class TokenRecurrent(nn.Module):
    """Embedding, a recurrent network, a linear read-out of the last step."""

    def __init__(
        self, cell: type[nn.RNNBase], embedding: int, hidden: int, layers: int, bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, embedding)
        options = {"batch_first": True, "bidirectional": bidirectional}
        self.net = cell(embedding, hidden, layers, **options)  # type: ignore[call-arg]
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), 4)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.net(self.embedding(ids))
        return self.head(states[:, -1])


class LastStates(nn.Module):
    """The last states of both directions, taken from the stacked states of all layers."""

    def __init__(self, cell: type[nn.RNNBase], layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.net = cell(6, 7, layers, batch_first=True, bidirectional=True)  # type: ignore[call-arg]
        self.head = nn.Linear(14, 4)

    def forward(self, ids: Tensor) -> Tensor:
        _, states = self.net(self.embedding(ids))
        last = states[0] if isinstance(states, tuple) else states
        return self.head(torch.cat([last[-2], last[-1]], dim=1))


class LearnedStart(nn.Module):
    """A GRU cell unrolled by hand from a learned start, its states averaged with learned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.start, self.head = nn.GRUCell(5, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.start.expand(x.shape[0], -1)
        total = torch.zeros_like(state)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            total = total + state / (t + 1)
        return self.head(total)


class StateSpace(nn.Module):
    """Diagonal linear recurrence with a gated read-out, the core of selective state space models (Gu and Dao 2023)."""

    def __init__(self, inner: int, state: int) -> None:
        super().__init__()
        self.inp, self.gate = nn.Linear(6, inner), nn.Linear(6, inner)
        self.to_b, self.to_c = nn.Linear(inner, state), nn.Linear(inner, state)
        self.step, self.log_a = nn.Linear(inner, inner), nn.Parameter(torch.randn(inner, state))
        self.out = nn.Linear(inner, 3)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.tanh(self.inp(x))
        delta, b, c = torch.sigmoid(self.step(u)), self.to_b(u), self.to_c(u)
        state = u.new_zeros(u.shape[0], u.shape[2], self.log_a.shape[1])
        ys = []
        for t in range(x.shape[1]):
            decay = torch.exp(-delta[:, t, :, None] * torch.exp(self.log_a))
            state = decay * state + (delta[:, t] * u[:, t])[:, :, None] * b[:, t, None, :]
            ys.append(torch.einsum("bis,bs->bi", state, c[:, t]))
        return self.out(torch.stack(ys, dim=1) * torch.sigmoid(self.gate(x)))


STILL, LARGER = ("head.bias",), tokens(3, 5, 13)

ENTRIES = [
    Entry(
        "lstm", lambda: TokenRecurrent(nn.LSTM, 6, 8, 2), tokens(2, 3, 13), S(6) + 2 * S(8), larger=LARGER, still=STILL
    ),
    Entry(
        "gru_bidirectional",
        lambda: TokenRecurrent(nn.GRU, 6, 7, 2, bidirectional=True),
        tokens(2, 3, 13),
        S(6) + 2 * (2 * S(7)),
        larger=LARGER,
        still=STILL,
    ),
    Entry("rnn", lambda: TokenRecurrent(nn.RNN, 6, 9, 1), tokens(2, 3, 13), S(6) + S(9), larger=LARGER, still=STILL),
    Entry(
        "lstm_last_states",
        lambda: LastStates(nn.LSTM, 1),
        tokens(2, 3, 13),
        S(6) + 2 * S(7),
        larger=LARGER,
        still=STILL,
    ),
    Entry(
        "gru_last_states_deep",
        lambda: LastStates(nn.GRU, 2),
        tokens(2, 3, 13),
        S(6) + 4 * S(7),
        larger=LARGER,
        still=STILL,
    ),
    Entry("gru_cell_learned_start", LearnedStart, vectors(2, 3, 5), S(8), larger=vectors(3, 4, 5), still=STILL),
    Entry(
        "state_space",
        lambda: StateSpace(9, 5),
        vectors(2, 3, 6),
        S(9) + S(5),
        larger=vectors(3, 4, 6),
        still=("out.bias",),
    ),
]
