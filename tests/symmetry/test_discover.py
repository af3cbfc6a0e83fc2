"""Symmetries of small modules, derived by hand: what is found, what must not be found, and how it is told."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmc
from lmc.errors import InputError, LmcError, TraceError
from lmc.symmetry.discovery.discover import Discovery, discover
from lmc.symmetry.discovery.interpret import gather_facts
from lmc.symmetry.tracing.capture import capture


class Net(nn.Module):
    """Parts by name, and a forward pass as a function of them."""

    def __init__(self, forward, **parts: nn.Module | nn.Parameter | Tensor):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))))


def found(model: nn.Module, inputs, outputs=None) -> list[int]:
    """Sizes of the groups found, in order, after a check of the whole result by numbers."""
    spec = lmc.permutation_spec(model, inputs, outputs=outputs)
    assert spec.certify(model, inputs, trials=2, seed=3, outputs=outputs).max_error < 1e-9
    return [group.size for group in spec.groups.values()]


def test_mlp() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 2))
    result = discover(model, torch.randn(2, 3))
    assert list(result.groups) == ["0", "2"]
    assert {k: [t.dims for t in v] for k, v in result.groups["0"].tables.items()} == {
        "0.weight": [(0,)], "0.bias": [(0,)], "2.weight": [(1,)],
    }  # fmt: skip
    assert result.groups["2"].tables["2.bias"][0].rows.tolist() == [[i] for i in range(5)]
    assert set(result.frozen) == {("0.weight", 1), ("4.weight", 0), ("4.bias", 0)}


def test_convolution_norm_flatten() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 4), nn.Tanh(), nn.Linear(4, 2)
    )
    result = discover(model, torch.randn(2, 3, 4, 4))
    assert [g.size for g in result.groups.values()] == [6, 4]
    assert result.groups["0"].tables["4.weight"][0].rows.tolist() == [list(range(4 * c, 4 * c + 4)) for c in range(6)]
    assert result.buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert "1.running_var" in result.groups["0"].tables
    assert result.frozen["0.weight", 2].startswith("kernel position")
    assert result.frozen["0.weight", 1].startswith("input")
    assert found(model, torch.randn(2, 3, 4, 4)) == [6, 4]


def test_patch_merging() -> None:
    """Four slices of the same channels side by side: equal units, different values."""
    merge = lambda m, x: m.out(torch.cat([m.a(x)[:, i::4] for i in range(4)], -1))  # noqa: E731
    model = Net(merge, a=nn.Linear(3, 6), out=nn.Linear(24, 2))
    assert found(model, torch.randn(2, 8, 3)) == [6]


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_sum_with_a_shifted_self(shift: int) -> None:
    """x + roll(x) keeps only what commutes with the shift; what is claimed must hold."""
    model = Net(lambda m, x: m.out((lambda h: h + h.roll(shift, -1))(m.a(x))), a=nn.Linear(3, 6), out=nn.Linear(6, 2))
    assert math.prod(found(model, torch.randn(2, 3))) <= 6


def test_sum_with_a_mirrored_self() -> None:
    model = Net(lambda m, x: m.out((lambda h: h + h.flip(-1))(m.a(x))), a=nn.Linear(3, 6), out=nn.Linear(6, 2))
    assert found(model, torch.randn(2, 3)) == [3]


def test_correlated_coordinates_in_a_reduction() -> None:
    """A sum over d of h[k, d] * v[d]: the units d of all k are tied by v."""
    forward = lambda m, x: m.out((m.a(x).unflatten(-1, (4, 3)) * m.v).sum(-1))  # noqa: E731
    model = Net(forward, a=nn.Linear(5, 12), v=parameter(3), out=nn.Linear(4, 2))
    assert sorted(found(model, torch.randn(2, 5))) == [3, 4]


def test_rows_that_are_not_used_are_no_group() -> None:
    forward = lambda m, x: m.out(torch.relu(m.a(x) + m.position(torch.arange(x.shape[1]))))  # noqa: E731
    model = Net(forward, a=nn.Linear(3, 6), position=nn.Embedding(9, 6), spare=nn.Linear(4, 4), out=nn.Linear(6, 2))
    result = discover(model, torch.randn(2, 4, 3))
    assert [g.size for g in result.groups.values()] == [6]
    assert result.frozen["spare.weight", 0] == "unused for these inputs"


def grouped_query(m: Net, x: Tensor) -> Tensor:
    q = m.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
    k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2).repeat_interleave(2, 1) for f in (m.k, m.v))
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_grouped_queries() -> None:
    """Two key heads, two query heads for each, query/key units and value units in each key head."""
    model = Net(grouped_query, q=nn.Linear(5, 12), k=nn.Linear(5, 6), v=nn.Linear(5, 6), out=nn.Linear(12, 2))
    assert sorted(found(model, torch.randn(2, 4, 5))) == sorted([2, 2, 2, 3, 3, 3, 3])


def test_grouped_convolution() -> None:
    """Groups move as wholes; channels on both sides move within them."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    assert sorted(found(model, torch.randn(2, 3, 4, 4))) == sorted([2, 3, 3, 4, 4])


def test_grouped_convolution_in_a_residual_stream() -> None:
    """The same units on both axes that depend on each other: one table after the other."""
    forward = lambda m, x: m.out((lambda h: h + m.g(h))(m.a(x)))  # noqa: E731
    model = Net(forward, a=nn.Conv1d(3, 6, 1), g=nn.Conv1d(6, 6, 3, padding=1, groups=2), out=nn.Conv1d(6, 2, 1))
    assert sorted(found(model, torch.randn(2, 3, 5))) == [2, 3, 3]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (lambda pieces: pieces.sort(-1).values, 3),
        (lambda pieces: pieces.topk(2, -1)[0], 2),
        (lambda pieces: pieces.max(-1, keepdim=True)[0], 1),
        (lambda pieces: pieces.median(-1, keepdim=True).values, 1),
        (lambda pieces: pieces.kthvalue(2, -1, keepdim=True).values, 1),
    ],
)
def test_values_in_order_do_not_say_where_they_were(values, kept: int) -> None:
    """Four pieces of three units, each sorted by itself: pieces move, and units inside of each, unless places are asked for."""
    forward = lambda m, x: m.out(values(m.a(x).unflatten(-1, (4, 3))).flatten(1))  # noqa: E731
    model = Net(forward, a=nn.Linear(5, 12), out=nn.Linear(4 * kept, 2))
    assert sorted(found(model, torch.randn(2, 5))) == [3, 3, 3, 3, 4]
    placed = lambda m, x: (lambda p: forward(m, x) + p.argmax(-1).sum(-1, keepdim=True))(m.a(x).unflatten(-1, (4, 3)))  # noqa: E731
    model.function = placed
    assert found(model, torch.randn(2, 5)) == [4]


def test_units_with_two_owners() -> None:
    """Pairs i < j of one group feed a layer: exchanging i and j has no image for ordered pairs."""
    rows, columns = torch.triu_indices(5, 5, 1)
    forward = lambda m, x: m.out((lambda h: h[:, rows] * h[:, columns])(m.a(x)))  # noqa: E731
    model = Net(forward, a=nn.Linear(3, 5), out=nn.Linear(10, 2))
    assert math.prod(found(model, torch.randn(2, 3))) <= 2


def test_attention_and_its_names() -> None:
    model = nn.Sequential(
        nn.Embedding(11, 12), nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), nn.Linear(12, 4)
    )
    tokens = torch.randint(0, 11, (2, 5))
    assert sorted(found(model, tokens)) == sorted([12, 3, *[4] * 6, 20])
    result = discover(model, tokens)
    families = {group.family: group for group in result.groups.values()}
    assert list(families) == [
        "stream",
        "1.self_attn.heads",
        "1.self_attn.in_proj.qk",
        "1.self_attn.in_proj.v",
        "1.linear1",
    ]
    value = result.groups["1.self_attn.in_proj.v[2]"]
    assert value.within == (("1.self_attn.heads", 2),)
    assert value.tables["1.self_attn.out_proj.weight"][0].rows.tolist() == [[8], [9], [10], [11]]
    assert "index chosen by data" in result.frozen["0.weight", 0]


def test_queries_and_keys_are_told_from_values_where_a_norm_follows() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.bn, self.out = nn.Linear(5, 24), nn.BatchNorm1d(24), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.bn(self.qkv(x).transpose(1, 2)).transpose(1, 2).chunk(3, -1)
            q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (q, k, v))
            return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    groups = discover(Normed(), torch.randn(2, 7, 5)).groups
    for name, input_of_out in (("qkv.qk[1]", False), ("qkv.v[1]", True)):
        assert ("out.weight" in groups[name].tables) == input_of_out and groups[name].size == 4


def test_siblings_are_carried_onto_each_other() -> None:
    result = discover(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), torch.randn(2, 5, 12))
    heads = result.groups["self_attn.heads"]
    for family in ("self_attn.in_proj.qk", "self_attn.in_proj.v"):
        first = result.groups[f"{family}[0]"]
        for unit in (1, 2):
            for name, tables in result.groups[f"{family}[{unit}]"].tables.items():
                (outer,), (here,) = heads.tables[name], first.tables[name]
                carried = dict(zip(outer.rows[0].tolist(), outer.rows[unit].tolist(), strict=True))
                assert [[carried[p] for p in row] for row in here.rows.tolist()] == tables[0].rows.tolist()


def mirrored(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    twice = h.repeat(1, 2).tanh()
    return net.b(h + 0.5 * h.flip(1)) + net.c(twice + 0.5 * twice.flip(1))


def test_copies_within_mirrored_pairs() -> None:
    """Groups in the units of another are numbered alike, whichever way their members were met."""
    layers = {"a": nn.Linear(5, 4), "b": nn.Linear(4, 2), "c": nn.Linear(8, 2)}
    assert 2 in found(Net(mirrored, **layers), torch.randn(2, 5))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_nothing_but_scalars(shape: tuple[int, ...]) -> None:
    model = Net(lambda net, x: net.q * (net.p * x).acos(), p=parameter(*shape), q=parameter(*shape))
    result = discover(model, torch.rand(shape))
    assert not result.groups and not result.frozen


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent(layer: type[nn.Module]) -> None:
    model = Net(lambda m, x: m.out(m.cell(x)[0][:, -1]), cell=layer(3, 5, batch_first=True), out=nn.Linear(5, 2))
    assert found(model, torch.randn(2, 3, 3)) == [5]


def test_last_state_of_stacked_layers() -> None:
    """The states of all layers are stacked, one is read: the layers' units stay apart."""
    cell = nn.LSTM(3, 5, num_layers=2, batch_first=True)
    model = Net(lambda m, x: m.out(m.cell(x)[1][0][-1]), cell=cell, out=nn.Linear(5, 2))
    assert found(model, torch.randn(2, 3, 3)) == [5, 5]


def test_pieces_of_a_concatenation() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        both = torch.cat([m.a(x), m.b(x)], 1)
        return m.out(both[:, 1:4].relu()) + m.out(both[:, 4:7].sin())

    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(3, 5), out=nn.Linear(3, 2))
    assert found(model, torch.randn(2, 3)) == [3]


def routed(m: Net, x: Tensor) -> Tensor:
    """Two of four experts for each token, their outputs gathered."""
    weights, chosen = m.router(x).softmax(-1).topk(2)
    hidden = torch.relu(torch.einsum("td,edf->tef", x, m.first))
    out = torch.einsum("tef,efd->ted", hidden, m.second)
    return (out.gather(1, chosen[..., None].expand(-1, -1, x.shape[1])) * weights[..., None]).sum(1)


def test_sparse_experts_computed_densely() -> None:
    model = Net(routed, router=nn.Linear(3, 4), first=parameter(4, 3, 5), second=parameter(4, 5, 3))
    assert sorted(found(model, torch.randn(7, 3))) == [4, 5, 5, 5, 5]


def picked(m: Net, x: Tensor) -> Tensor:
    """Two of four experts for each token, only their weights read."""
    weights, chosen = m.router(x).softmax(-1).topk(2)
    up, gate = torch.einsum("td,tkdf->tkf", x, m.first[chosen]).chunk(2, -1)
    hidden = F.silu(gate + m.bias[chosen]) * up
    return torch.einsum("tk,tkf,tkfd->td", weights, hidden, m.second[chosen])


def test_sparse_experts_whose_weights_are_picked() -> None:
    parts = {"first": parameter(4, 3, 10), "bias": parameter(4, 5), "second": parameter(4, 5, 3)}
    model = Net(picked, router=nn.Linear(3, 4), **parts)
    assert sorted(found(model, torch.randn(7, 3))) == [4, 5, 5, 5, 5]
    result = discover(model, torch.randn(7, 3))
    assert [g.within for g in result.groups.values() if g.size == 5] == [(("experts", e),) for e in range(4)]


class Grouped(nn.Module):
    """Rows sorted by expert, multiplied with their experts' matrices, the bias rows looked up by the sorted numbers."""

    def __init__(self, sort: bool) -> None:
        super().__init__()
        self.lift, self.router, self.head = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.up, self.bias, self.down = parameter(3, 8, 16), parameter(3, 16), parameter(3, 16, 8)
        self.sort = sort

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        chosen = self.router(x).argmax(-1)
        rows, order = chosen.sort() if self.sort else (chosen, torch.arange(len(x)))
        ends = torch.histc(rows.float(), bins=3, min=0, max=2).cumsum(0).int()
        hidden = torch._grouped_mm(x[order], self.up, offs=ends) + self.bias[rows]
        back = torch.empty_like(order).index_put((order,), torch.arange(len(x)))
        return self.head(x + torch._grouped_mm(hidden.relu(), self.down, offs=ends)[back])


@pytest.mark.parametrize("sort, sizes", [(True, [8, 16, 16, 16]), (False, [8, 16])])
def test_biases_of_grouped_experts(sort: bool, sizes: list[int]) -> None:
    """Hidden units of each expert move by themselves, if the rows are known to be sorted by the same numbers."""
    result = discover(Grouped(sort).bfloat16(), torch.randn(8, 4).bfloat16())
    assert [group.size for group in result.groups.values()] == sizes


def test_choice_used_as_a_number_stays() -> None:
    model = Net(
        lambda m, x: m.out(m.router(x).argmax(-1, keepdim=True).float()), router=nn.Linear(3, 4), out=nn.Linear(1, 2)
    )
    assert found(model, torch.randn(5, 3)) == []


def test_choice_among_values_that_may_tie_stays() -> None:
    """The six units of a looked-up row among two rows must tie; so do rectified values."""

    def forward(m: Net, x: Tensor) -> Tensor:
        rows = m.a(x).unsqueeze(1).expand(3, 2, 6).argmax(1)
        return m.out(m.reader[m.table[rows][..., 0].argmax(1)])

    model = Net(forward, a=nn.Linear(4, 6), table=parameter(2, 1), reader=parameter(6, 3), out=nn.Linear(3, 2))
    assert 6 not in found(model, torch.randn(3, 4))
    rectified = Net(lambda m, x: m.table[m.a(x).relu().argmax(-1)], a=nn.Linear(4, 6), table=parameter(6, 2))
    assert found(rectified, torch.randn(3, 4)) == []
    differing = Net(lambda m, x: m.table[m.a(x).argmax(-1)], a=nn.Linear(4, 6), table=parameter(6, 2))
    assert found(differing, torch.randn(3, 4)) == [6]


def test_tied_weights_have_one_table_under_both_names() -> None:
    embed, out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    out.weight = embed.weight
    result = discover(Net(lambda m, x: m.out(m.embed(x).tanh()), embed=embed, out=out), torch.randint(0, 9, (2, 3)))
    (group,) = result.groups.values()
    assert group.tables["embed.weight"] == group.tables["out.weight"]
    assert result.aliases["out.weight"] == "embed.weight"


def test_two_outputs_and_one() -> None:
    model = Net(lambda m, x: {"h": m.a(x), "y": m.out(m.a(x))}, a=nn.Linear(3, 5), out=nn.Linear(5, 2))
    assert found(model, torch.randn(2, 3)) == []
    for choice in ("y", 1, lambda result: result["y"]):
        assert found(model, torch.randn(2, 3), outputs=choice) == [5]
    with pytest.raises(InputError, match="'z'"):
        discover(model, torch.randn(2, 3), "z")


def test_keyword_inputs() -> None:
    model = Net(lambda m, x, scale: m.out(m.a(x) * scale), a=nn.Linear(3, 5), out=nn.Linear(5, 2))
    assert found(model, {"x": torch.randn(2, 3), "scale": torch.randn(2, 1)}) == [5]
    assert found(model, (torch.randn(2, 3), torch.randn(2, 1))) == [5]


def test_no_weights_needed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 11008), nn.SiLU(), nn.Linear(11008, 4096))
    result = discover(model, torch.randn(2, 4096))
    assert [g.size for g in result.groups.values()] == [11008]


def test_half_precision_and_shared_module() -> None:
    layer = nn.Linear(4, 4).half()
    result = discover(
        Net(lambda m, x: m.out(m.a(m.a(x))), a=layer, out=nn.Linear(4, 2).half()), torch.randn(2, 4).half()
    )
    assert result.groups == {} and result.frozen["a.weight", 0]


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 2))
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    assert [g.size for g in discover(model, torch.randn(2, 3)).groups.values()] == [5]
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_module_paths_that_are_python_keywords() -> None:
    model = Net(
        lambda m, x: m.parts["in"](x).relu() @ m.w, parts=nn.ModuleDict({"in": nn.Linear(3, 5)}), w=parameter(5, 2)
    )
    assert list(discover(model, torch.randn(2, 3)).groups) == ["parts.in"]


def test_groups_are_named_after_what_makes_their_units() -> None:
    """By the order of use, whatever the alphabet says."""
    model = nn.Sequential(
        OrderedDict(zebra=nn.Linear(4, 5), act=nn.Tanh(), bear=nn.Linear(5, 6), relu=nn.ReLU(), ant=nn.Linear(6, 2))
    )
    assert list(discover(model, torch.randn(2, 4)).groups) == ["zebra", "bear"]


def test_same_result_twice() -> None:
    def run() -> Discovery:
        model = Net(grouped_query, q=nn.Linear(5, 12), k=nn.Linear(5, 6), v=nn.Linear(5, 6), out=nn.Linear(12, 2))
        return discover(model, torch.randn(2, 4, 5))

    one, two = run(), run()
    assert one.groups == two.groups and one.frozen == two.frozen


def test_wrong_inputs_tell_the_model_s_own_error() -> None:
    with pytest.raises(TraceError, match=r"cannot trace Sequential\(float32\[2, 4\]\)") as caught:
        discover(nn.Sequential(nn.Linear(3, 5)), torch.randn(2, 4))
    assert isinstance(caught.value, LmcError) and caught.value.__cause__ is not None


def test_messages_tell_shapes_not_numbers() -> None:
    model = Net(lambda net, batch: net.a(torch.stack(batch["rows"])), a=nn.Linear(3, 2))
    with pytest.raises(TraceError) as caught:
        discover(model, {"batch": {"rows": [torch.full((2, 5), 0.123)] * 6, "kind": "x", "other": {1.5}}})
    assert "batch={'rows': [float32[2, 5], float32[2, 5], float32[2, 5], float32[2, 5], ... 6 in all]" in str(
        caught.value
    )
    assert "0.12" not in str(caught.value) and "1.5" not in str(caught.value)


class BiasedAttention(nn.Module):
    """A bias for each two tokens of each head, looked up by their distance."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        at = torch.arange(tokens)
        self.register_buffer("distance", (at[:, None] - at).abs(), persistent=False)
        self.bias = nn.Parameter(torch.randn(2, tokens))
        self.embed, self.qkv, self.out = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weight = (q @ k.mT + self.bias[:, self.distance]).softmax(-1)
        return self.out((weight @ v).transpose(1, 2).flatten(2))


def test_no_units_for_each_two_tokens():
    """Distances are decided by two positions that do not move: time and memory must not go with the square of these."""
    tokens = 60
    model = BiasedAttention(tokens)
    units = gather_facts(capture(model, torch.randn(2, tokens, 3)), progress=False).units
    assert units.total < tokens**2
    spec = lmc.permutation_spec(model, torch.randn(2, tokens, 3))
    assert sorted(group.size for group in spec.groups.values()) == [2, 4, 4, 4, 4, 8]
    assert ("bias", 1) in spec.frozen


def test_what_is_put_out_stays_for_that_reason() -> None:
    frozen = discover(nn.Linear(2, 3), (torch.randn(2, 2),), None).frozen
    assert frozen == {("weight", 0): "output", ("bias", 0): "output", ("weight", 1): "input 0 (linear)"}
