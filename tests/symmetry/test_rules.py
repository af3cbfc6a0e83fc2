"""Every rule against the operator itself: move the operands by a symmetry of the facts the rule records, and the real
operator's result must move as the rule's tag says (I2), equal tags must carry equal values (I1), and as much must be
free as the operator allows."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc.symmetry.discovery.discover import parameter_units
from lmc.symmetry.discovery.interpret import interpret_nodes
from lmc.symmetry.discovery.solve import solve
from lmc.symmetry.discovery.tables import Places
from lmc.symmetry.tracing.capture import capture


class Operator(nn.Module):
    """An operator whose operands are parameters."""

    def __init__(self, function: Callable[..., Tensor], shapes: list[tuple[int, ...]]):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = function
        self.operands = nn.ParameterList(torch.rand(s, generator=generator, dtype=torch.float64) + 0.5 for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.operands)


A, B = (4, 6), (6, 5)
INDEX, MASK = torch.tensor([2, 0, 1, 2]), torch.tensor([[1, 0, 1, 1, 0, 0]]).bool()
I1, I2 = (4, 6, 3), (2, 6, 8, 8)

CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], list[int]]] = {
    # moves
    "view split": (lambda a: a.view(4, 2, 3), [A], [4, 6]),
    "view merge": (lambda a: a.view(24), [A], [4, 6]),
    "permute": (lambda a: a.permute(2, 0, 1), [I1], [4, *[6] * 4, *[3] * 4]),
    "transpose": (lambda a: a.t(), [A], [4, 6]),
    "expand": (lambda a: a[None].expand(3, 4, 6), [A], [4, 6]),
    "slice": (lambda a: a[:, :2], [A], [4, 2, 4]),
    "narrow": (lambda a: a.narrow(1, 2, 3), [A], [4, 3, 3]),
    "narrow from the end": (lambda a: a.narrow(1, -3, 2), [A], [4, 2, 4]),
    "narrow from a known tensor": (lambda a: torch.narrow(a, 1, torch.tensor(1), 2), [A], [4, 2, 4]),
    "windows of rows": (lambda a: a.as_strided((3, 2, 6), (6, 6, 1)), [A], [2, 2, 6]),
    "windows of columns": (lambda a: a.t().as_strided((4, 3, 2), (6, 2, 1)), [A], [4, 6]),
    "windows from the second row on": (lambda a: a[1:].as_strided((2, 2, 6), (6, 6, 1), 6), [A], [2, 6]),
    "windows beyond a part": (lambda a: a[1:].as_strided((2, 2, 6), (6, 6, 1), 0), [A], []),
    "every other column": (lambda a: a.as_strided((4, 3), (6, 2)), [A], [4, 3]),
    "select": (lambda a: a[:, 1], [A], [4, 5]),
    "flip": (lambda a: a.flip(1), [A], [4, 6]),
    "roll": (lambda a: a.roll(2, 1), [A], [4, 6]),
    "cat": (lambda a, b: torch.cat([a, b], 1), [A, (4, 3)], [4, 6, 3]),
    "cat with itself": (lambda a: torch.cat([a, a], 1), [A], [4, 6]),
    "stack": (lambda a, b: torch.stack([a, b]), [A, A], [4, 6]),
    "pad": (lambda a: F.pad(a, (1, 2)), [A], [4, 6]),
    "crop and pad": (lambda a: F.pad(a, (2, -1)), [A], [4, 5]),
    "shift by padding": (lambda a: F.pad(a, (0, 0, 1, -1)), [A], [3, 6]),
    "repeat": (lambda a: a.repeat(2, 1), [A], [4, 6]),
    "repeat_interleave": (lambda a: a.repeat_interleave(2, 1), [A], [4, 6]),
    "unfold": (lambda a: a.unfold(1, 2, 2), [A], [4, 6]),
    "chunk and multiply": (lambda a: torch.mul(*a.chunk(2, 1)), [A], [4, 3]),
    "unbind": (lambda a: a.unbind(1)[0], [A], [4, 5]),
    "slice assigned": (lambda a, b: a.slice_scatter(b, 1, 1, 4), [A, (4, 3)], [4, 3, 3, 3]),
    "select assigned": (lambda a, b: a.select_scatter(b, 1, 2), [A, (4,)], [4, 5]),
    "patches of a padded image": (lambda a: F.unfold(a, 2, padding=1), [(2, 6, 3, 3)], [2, 6]),
    "image from patches": (lambda a: F.fold(a, (4, 4), 2, stride=2), [(2, 24, 4)], [2, 6]),
    "dropout": (lambda a: F.dropout(a, training=False), [A], [4, 6]),
    "diagonal": (lambda a: a.diagonal(), [(5, 5)], [5]),
    # pointwise
    "add": (lambda a, b: a + b, [A, (6,)], [4, 6]),
    "exp": (lambda a: a.exp(), [A], [4, 6]),
    "where": (lambda a, b: torch.where(a > b, a, b), [A, A], [4, 6]),
    "known mask": (lambda a: a.masked_fill(MASK, 0.0), [A], [4, 3, 3]),
    "itself flipped": (lambda a: a + a.flip(1), [A], [4, 3]),
    "outer": (lambda a, b: a[:, None] * b[None], [(4,), (5,)], [4, 5]),
    "floor_divide": (lambda a, b: torch.floor_divide(a, b), [A, (6,)], [4, 6]),
    "glu": (lambda a: F.glu(a, 1), [A], [4, 3]),
    "prelu": (lambda a, w: F.prelu(a, w), [A, (6,)], [4, 6]),
    "rrelu": (lambda a: F.rrelu(a, training=False), [A], [4, 6]),
    # reductions
    "sum": (lambda a: a.sum(1), [A], [4, 6]),
    "sum over heads": (lambda a: a.view(4, 2, 3).sum(2), [A], [4, 2, 3, 3]),
    "var": (lambda a: a.var(1), [A], [4, 6]),
    "logsumexp": (lambda a: a.logsumexp(1), [A], [4, 6]),
    "norm": (lambda a: a.norm(dim=0), [A], [4, 6]),
    "max": (lambda a: a.max(1).values, [A], [4, 6]),
    "third smallest": (lambda a: a.kthvalue(3, 1).values, [A], [4, 6]),
    "most frequent": (lambda a: a.mode(1).values, [A], [4, 6]),
    "median": (lambda a: a.nanmedian(0).values, [A], [4, 6]),
    "sorted values": (lambda a: a.sort(1).values, [A], [4, 6]),
    "top values": (lambda a: a.topk(2, 1).values, [A], [4, 6]),
    "correlated": (lambda a, b: (a.view(4, 2, 3) * b).sum(2), [A, (3,)], [4, 2, 3]),
    # order
    "cumsum": (lambda a: a.cumsum(1), [A], [4]),
    "max_pool": (lambda a: F.max_pool2d(a, 2), [I2], [2, 6]),
    "interpolate": (lambda a: F.interpolate(a, scale_factor=2), [I2], [2, 6]),
    "pool along one axis": (lambda a: F.avg_pool2d(a, (1, 2)), [I2], [2, 6, 8]),
    "pool to the same size": (lambda a: F.adaptive_avg_pool2d(a, (None, 2)), [I2], [2, 6, 8]),
    "antialiased": (lambda a: F.interpolate(a, (5, 5), mode="bicubic", antialias=True), [I2], [2, 6]),
    "grid sample": (lambda a, b: F.grid_sample(a, b, align_corners=False), [I2, (2, 3, 4, 2)], [2, 6, 3, 4]),
    "circular padding": (lambda a: F.pad(a, (1, 1), mode="circular"), [(1, 6, 3)], [6]),
    "reflected padding": (lambda a: F.pad(a, (1, 1), mode="reflect"), [(4, 6, 5)], [4, 6]),
    "fft": (lambda a: torch.fft.rfft(a, dim=0).real, [A], [6]),
    # contractions
    "mm": (lambda a, b: a @ b, [A, B], [4, 6, 5]),
    "bmm": (lambda a, b: a @ b, [(3, 4, 5), (3, 5, 2)], [3, *[4] * 3, *[5] * 3, *[2] * 3]),
    "linear": (F.linear, [A, (5, 6), (5,)], [4, 6, 5]),
    "einsum": (lambda a, b: torch.einsum("...i,ij->...j", a, b), [A, B], [4, 6, 5]),
    "tensordot": (lambda a, b: torch.tensordot(a, b, ([1], [0])), [A, B], [4, 6, 5]),
    "distances": (lambda a, b: torch.cdist(a, b, p=1.0), [A, (5, 6)], [4, 6, 5]),
    "distances of many": (lambda a, b: torch.cdist(a, b), [(30, 6), (5, 6)], [30, 6, 5]),
    "nearest": (lambda a, b, c: c[torch.cdist(a, b).argmin(1)], [A, (5, 6), (5, 3)], [4, 6, 5, 3]),
    "bilinear": (F.bilinear, [A, (4, 5), (3, 6, 5), (3,)], [4, 3]),
    "conv": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [I2, (5, 6, 3, 3), (5,)], [2, 6, 5]),
    "grouped conv": (lambda x, w: F.conv2d(x, w, groups=2), [I2, (4, 3, 3, 3)], [2, 2, 3, 3, 2, 2]),
    "depthwise conv": (lambda x, w: F.conv2d(x, w, groups=6), [I2, (6, 1, 3, 3)], [2, 6]),
    "pixels apart": (lambda x, w, b: F.conv1d(x, w, b), [(2, 6, 4), (5, 6, 1), (5,)], [2, 6, 5, 4]),
    "pixels apart in steps": (lambda x, w: F.conv1d(x, w, stride=2), [(2, 6, 4), (5, 6, 1)], [2, 6, 5]),
    "pixels apart, padded": (lambda x, w: F.conv1d(x, w, padding=1), [(2, 6, 4), (5, 6, 1)], [2, 6, 5]),
    "a row of pixels": (lambda x, w: F.conv2d(x, w, padding="same"), [(2, 6, 3, 4), (5, 6, 1, 3)], [2, 6, 5, 3]),
    "transposed conv": (lambda x, w: F.conv_transpose2d(x, w), [I2, (6, 5, 3, 3)], [2, 6, 5]),
    # normalisation
    "softmax": (lambda a: a.softmax(1), [A], [4, 6]),
    "layer_norm": (lambda a, w, b: F.layer_norm(a, (6,), w, b), [A, (6,), (6,)], [4, 6]),
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), [A, (4, 1)], [4, 6]),
    "rms_norm": (lambda a, w: F.rms_norm(a, (6,), w), [A, (6,)], [4, 6]),
    "batch_norm": (lambda x, m, v: F.batch_norm(x, m, v), [I2, (6,), (6,)], [2, 6]),
    "instance_norm": (lambda x: F.instance_norm(x), [I2], [2, 6]),
    "group_norm": (lambda x: F.group_norm(x, 2), [I2], [2, 2, 3, 3]),
    # attention
    "attention": (
        F.scaled_dot_product_attention,
        [(2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7)],
        [2, 3, 4, 5, 6, 7],
    ),
    # indexing
    "known index": (lambda a: a[INDEX], [A], [6, 2]),
    "known gather": (lambda a: a.gather(1, INDEX.expand(4, 4)), [A], [4, 2, 3]),
    "argmax, gathered": (lambda a, b: b[a.argmax(1)], [A, B], [4, 6, 5]),
    "top-k weights scattered": (lambda a: torch.zeros(4, 6).double().scatter(1, *reversed(a.topk(2, 1))), [A], [4, 6]),
    "one-hot of argmax": (lambda a: F.one_hot(a.argmax(1), 6).double(), [A], [4, 6]),
    "index_fill": (lambda a, b: a.index_fill(0, INDEX, b), [A, ()], [6]),
    "addbmm": (lambda a, b, c: torch.addbmm(c, a, b), [(3, 4, 6), (3, 6, 5), (4, 5)], [3, 4, 5, *[6] * 3]),
    "smallest and largest": (lambda a: torch.aminmax(a, dim=1).max, [A], [4, 6]),
    "index_add": (lambda a, b: a.index_add(0, INDEX, b), [A, A], [6]),
    "a lone number as index": (lambda a: a.index_select(1, torch.tensor(2)), [I1], [4, 5, 3]),
    "a row found by a number": (lambda a, b: b[a.sum(1).argmax().item()], [A, (4, 3)], [6]),
    # two results of one operator are two tensors
    "variance and mean": (lambda a: torch.cat(torch.var_mean(a, 0)), [A], [4, 6]),
    "least and most": (lambda a: torch.cat(torch.aminmax(a, dim=1)), [A], [4, 6]),
    "fraction and exponent": (lambda a: torch.cat([x.double() for x in torch.frexp(a)]), [A], [4, 6]),
    "pixels and half of them": (
        lambda a: torch.cat([a, F.avg_pool2d(a, 1, divisor_override=2)], 1), [(2, 3, 2, 4)], [2, 3, 2, 4]
    ),
    # pixels and channels that are told apart by one coordinate
    "patches of a vector": (lambda a: F.unfold(a.cumsum(1).view(2, 3, 4, 4), 2), [(2, 48)], [2]),
    # nothing at all
    "no part": (lambda a: a + torch.cat([a[:0], a[:0]]).sum(), [A], [4, 6]),
    "an empty part": (lambda a, b: torch.cat([a @ b, a[:0] @ b]), [A, B], [4, 6, 5]),
    # heads that are broadcast
    "one query head": (
        F.scaled_dot_product_attention, [(2, 1, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7)], [2, 3, 4, 5, 6, 7]
    ),
    "one value head": (
        F.scaled_dot_product_attention, [(2, 3, 4, 5), (2, 3, 6, 5), (2, 1, 6, 7)], [2, 3, 4, 5, 6, 7]
    ),
    # choices among values that may be equal, and numbers of units that are no longer told apart
    "argmax of whole numbers": (lambda a, b: b[(4 * a).long().argmax(1)], [A, B], [4, 5]),
    "argmax of steps": (lambda a, b: b[torch.div(a, 0.25, rounding_mode="floor").argmax(1)], [A, B], [4, 5]),
    "argmax of rows times a vector": (
        lambda a, v, b: b.index_select(0, torch.matmul(a.floor(), v).argmax(0, keepdim=True)),
        [(8, 2), (2,), (8, 3)], [2, 3],
    ),
    "whether the second": (lambda a: a * (a.argmax(1) == torch.tensor(True))[:, None], [(4, 2)], [4]),
    "whether not the first": (lambda a, b: b[a.argmax(1).bool().long()], [A, B], [4, 5]),
}  # fmt: skip

PIXELS = {2: 2, 8: 0}


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    function, shapes, free = CASES[name]
    model = Operator(function, shapes)
    graph = capture(model, torch.zeros(2))
    facts, known = interpret_nodes(graph, progress=False)
    tag = known[graph.outputs[0]]
    solution = solve(facts.units, parameter_units(facts))
    places = Places(facts.tags, facts.units.total)
    before = {k: p.detach() for k, p in model.named_parameters()}
    result = function(*before.values())
    check_equal_tuples_equal_values(tag.coords, result)
    sizes = []
    for number, fibre in enumerate(solution.fibres):
        tables = places.tables(fibre.units)
        if not tables:
            continue
        sizes.append(fibre.roots.size)
        order = np.random.default_rng(number).permutation(fibre.roots.size)
        g = np.arange(facts.units.total)
        g[fibre.units[order]] = fibre.units
        after = dict(before)
        for tensor, found in tables.items():
            for table in found:
                after[tensor] = moved(after[tensor], table.dims, table.rows, order)
        check_moved(tag.coords, g, result, function(*after.values()))
    assert Counter(free) <= Counter(sizes), (free, sizes)


def moved(x: Tensor, dims: tuple[int, ...], rows: np.ndarray, order: np.ndarray) -> Tensor:
    """Row i of the result is row order[i] of x."""
    others = [d for d in range(x.ndim) if d not in dims]
    front = x.permute(*dims, *others)
    flat = front.reshape(int(np.prod([x.shape[d] for d in dims])), -1).clone()
    flat[torch.from_numpy(rows)] = flat[torch.from_numpy(rows[order])]
    return flat.reshape(front.shape).permute(*np.argsort([*dims, *others]))


def tuples(coords: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The coordinates of each position, (positions, coordinates)."""
    full = [np.broadcast_to(c, shape).ravel() for c in coords]
    return np.stack(full, axis=1) if full else np.zeros((int(np.prod(shape)), 1), np.int64)


def check_equal_tuples_equal_values(coords: tuple[np.ndarray, ...], result: Tensor) -> None:
    values: dict[tuple[int, ...], float] = {}
    for key, value in zip(
        map(tuple, tuples(coords, tuple(result.shape)).tolist()), result.flatten().tolist(), strict=True
    ):
        assert values.setdefault(key, value) == pytest.approx(value, abs=1e-12)


def check_moved(coords: tuple[np.ndarray, ...], g: np.ndarray, old: Tensor, new: Tensor) -> None:
    here = tuples(coords, tuple(old.shape))
    there = {tuple(key): value for key, value in zip(here.tolist(), new.flatten().tolist(), strict=True)}
    images = map(tuple, g[here].tolist()) if coords else map(tuple, here.tolist())
    for image, value in zip(images, old.flatten().tolist(), strict=True):
        assert there[image] == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize(
    "function", [torch.linalg.inv, F.dropout, torch.bernoulli], ids=["inv", "dropout", "bernoulli"]
)
def test_unknown_and_random_operators_freeze_everything(function: Callable[[Tensor], Tensor]) -> None:
    graph = capture(Operator(function, [(3, 3)]), torch.zeros(2))
    facts, known = interpret_nodes(graph, progress=False)
    assert not solve(facts.units, parameter_units(facts)).fibres
