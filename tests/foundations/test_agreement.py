"""What fits what: prefixes, buffers, ties, vocabularies, heads and dtypes, named in both directions, on every path."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lmc
from lmc.errors import InputError, MismatchError, WeightsError
from lmc.weights import agreeing, fitted

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def ways(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Every kind of function that takes two weight sets."""
    model = net(0)
    return {
        "lerp": lambda: lmc.weights.lerp(a, b, 0.5),
        "mean": lambda: lmc.weights.mean([a, b]),
        "distance": lambda: lmc.weights.distance(a, b),
        "average": lambda: lmc.merge.average([a, b]),
        "task vectors": lambda: lmc.merge.task_arithmetic([a], base=b),
        "path": lambda: lmc.loss_path(model, a, b, (X, Y), alphas=3, progress=False),
        "dot": lambda: lmc.weights.dot(a, b),
        "soup": lambda: lmc.merge.greedy_soup(model, [a, b], (X, Y), progress=False),
        "matching": lambda: lmc.weight_matching(
            lmc.permutation_spec(model, X[:2], progress=False), a, b, progress=False
        ),
    }


WAYS = list(ways({}, {}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_prefix_is_named(way: str, prefix: str, swapped: bool):
    pair = net(0).state_dict(), {f"{prefix}{name}": t for name, t in net(1).state_dict().items()}
    with pytest.raises(lmc.LmcError, match=f"prefix '{prefix}'"):
        ways(*(pair[::-1] if swapped else pair))[way]()


def old(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}


@pytest.mark.filterwarnings("ignore:.*num_batches_tracked")
@pytest.mark.parametrize("way", WAYS)
def test_counters_of_batches_may_be_missing_on_either_side(way: str):
    a, b = net(0).state_dict(), net(1).state_dict()
    for pair in ((a, old(b)), (old(a), b), (old(a), old(b))):
        ways(*pair)[way]()


def test_optional_buffers_are_kept_and_named():
    a, b = net(0).state_dict(), net(1).state_dict()
    ids = {"embeddings.position_ids": torch.arange(5)}
    with pytest.warns(UserWarning, match=r"embeddings.position_ids: in models\[0\], not in models\[1\]; taken from"):
        merged = lmc.merge.average([{**a, **ids}, b])
    assert torch.equal(merged["embeddings.position_ids"], torch.arange(5))
    with pytest.warns(UserWarning, match=r"in models\[1\], not in models\[0\]; left out"):
        assert set(lmc.merge.average([a, {**b, **ids}])) == set(a)


def test_a_causal_mask_is_optional_and_a_bias_is_not():
    mask = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        agreeing([{"w": torch.zeros(2), **mask}, {"w": torch.zeros(2)}])
    with pytest.raises(MismatchError, match=r"attn\.bias"):
        agreeing([{"w": torch.zeros(2), "h.0.attn.bias": torch.zeros(4)}, {"w": torch.zeros(2)}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"3.weight": torch.zeros(4, 8)}), r"3\.weight: shape \(3, 8\) in a, \(4, 8\) in b"),
        (lambda s: s.pop("1.running_mean"), r"1\.running_mean: .*a buffer of batch normalisation"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(2, 2)}), r"lm_head\.weight: in b .*the heads differ"),
        (lambda s: s.update({"x": torch.zeros(2)}), r"x: in b \(2,\) float32, missing in a: different architectures"),
    ],
)
def test_what_differs_is_named(change, message: str):
    b = dict(net(1).state_dict())
    change(b)
    with pytest.raises(MismatchError, match=message):
        agreeing([net(0), b], "ab")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embed_tokens.weight", "vocabularies of 10 and 11 entries"),
        ("classifier.weight", "heads with 10 and 11 outputs"),
    ],
)
def test_other_sizes_of_vocabularies_and_heads_are_named(name: str, message: str):
    for sizes in ((10, 11), (11, 10)):
        with pytest.raises(MismatchError, match=message.replace("10 and 11", "{} and {}".format(*sizes))):
            agreeing([{name: torch.zeros(n, 3)} for n in sizes])


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(3, 6), nn.Linear(6, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@pytest.mark.parametrize("left", ["embed.weight", "head.weight"])
def test_a_name_that_the_module_ties_need_not_be_there(left: str):
    short = [{n: t for n, t in Tied(seed).state_dict().items() if n != left} for seed in (0, 1)]
    full = fitted(Tied(2), short[0])
    assert list(full) == ["embed.weight", "head.weight"] and full["head.weight"] is full["embed.weight"]
    path = lmc.loss_path(Tied(2), *short, (X, Y), alphas=3, progress=False)
    whole = lmc.loss_path(Tied(2), Tied(0), Tied(1), (X, Y), alphas=3, progress=False)
    assert path.barrier == whole.barrier
    soup = lmc.merge.greedy_soup(Tied(2), short, (X, Y), progress=False)
    assert set(soup) == set(full)
    # Without the module, the other weight set tells of the tie.
    for pair in ((Tied(0), short[1]), (short[0], Tied(1))):
        merged = lmc.merge.average(list(pair))
        assert torch.equal(next(iter(merged.values())), lmc.merge.average([Tied(0), Tied(1)])["embed.weight"])


@pytest.mark.parametrize("way", ["lerp", "mean", "average", "task vectors", "path", "matching"])
def test_dtypes_may_differ(way: str):
    a, b = (
        net(0).state_dict(),
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in net(1).state_dict().items()},
    )
    same = {n: t.float() if t.is_floating_point() else t for n, t in b.items()}
    found, expected = ways(a, b)[way](), ways(a, same)[way]()
    if isinstance(found, dict):
        assert all(torch.equal(found[n], expected[n]) and found[n].dtype == t.dtype for n, t in a.items())
    elif way == "path":
        assert found.barrier == expected.barrier  # type: ignore[attr-defined]
    narrow = lmc.merge.average([b, a])
    assert narrow["0.weight"].dtype == torch.bfloat16
    exact = (same["0.weight"] + (a["0.weight"] - same["0.weight"]) * 0.5).bfloat16()
    assert torch.equal(narrow["0.weight"], exact)


def test_float8_is_computed_in_float32_and_cast_back():
    a, b = ({"w": torch.tensor(v).to(torch.float8_e4m3fn)} for v in ([1.0, 2.0], [3.0, 2.0]))
    for found in (lmc.merge.average([a, b]), lmc.weights.mean([a, b]), lmc.weights.lerp(a, b, 0.5)):
        assert found["w"].dtype == torch.float8_e4m3fn and found["w"].float().tolist() == [2.0, 2.0]
    assert lmc.weights.distance(a, b) == 2.0
    assert lmc.merge.inspect([a, b], progress=False).total.size == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_what_leaves_the_range_of_a_dtype_is_named(dtype: torch.dtype, tmp_path):
    top = torch.finfo(dtype).max
    big, zero = ({"w": torch.full((2,), value).to(dtype)} for value in (0.9 * top, 0.0))
    with pytest.raises(WeightsError, match=r"w: the result leaves the range of float"):
        lmc.merge.task_arithmetic([big, big], base=zero)
    with pytest.raises(WeightsError, match="w: the result leaves the range"):
        lmc.weights.lerp(zero, big, 2.0)
    with pytest.raises(WeightsError, match="w: the result leaves the range"):
        lmc.merge.write(lmc.merge.task_arithmetic, [big, big], tmp_path / "out", base=zero, progress=False)
    wide = lmc.merge.write(
        lmc.merge.task_arithmetic, [big, big], tmp_path / "wide", base=zero, dtype="float32", progress=False
    )
    assert wide["w"].dtype == torch.float32 and wide["w"][0] == 2 * big["w"].float()[0]
    with pytest.raises(InputError, match="dtype='int8': expected one of float64"):
        lmc.merge.plan(lmc.merge.average, [big], tmp_path / "x", dtype="int8")


def test_complex_weights_are_a_linear_space_like_others(tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b, base = ({"w": torch.randn(3, 4, generator=generator, dtype=torch.cfloat)} for _ in range(3))
    real = [{"w": torch.view_as_real(s["w"])} for s in (a, b, base)]
    assert lmc.weights.distance(a, b) == pytest.approx(lmc.weights.distance(*real[:2]))
    assert lmc.weights.dot(a, b) == pytest.approx(lmc.weights.dot(*real[:2]))
    assert torch.allclose(lmc.weights.lerp(a, b, 0.25)["w"], 0.75 * a["w"] + 0.25 * b["w"])
    for method, options in (
        (lmc.merge.average, {}),
        (lmc.merge.task_arithmetic, {"base": base, "scale": 0.3}),
        (lmc.merge.ties, {"base": base}),
    ):
        merged = method([a, b], **options)["w"]
        plain = options | ({"base": real[2]} if options else {})
        assert merged.dtype == torch.cfloat
        assert torch.equal(torch.view_as_real(merged), method(real[:2], **plain)["w"])
        stored = lmc.merge.write(method, [a, b], tmp_path / method.__name__, progress=False, **options)
        assert torch.equal(stored["w"], merged)
    with pytest.raises(MismatchError, match="not the same kind of numbers"):
        lmc.weights.lerp(a, {"w": a["w"].real}, 0.5)
    with pytest.raises(WeightsError, match="w of a: 1 of 12 values are NaN"):
        agreeing([{"w": a["w"] / (torch.arange(12).view(3, 4) != 5)}], ["a"])


class TiedOrNot(nn.Module):
    def __init__(self, seed: int, tie: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.embedding(ids)))


def test_a_model_that_ties_what_weights_keep_apart_is_refused():
    ids = torch.arange(20) % 10
    tied, apart, data = TiedOrNot(0, True), TiedOrNot(1, False), (ids, (ids + 1) % 10)
    with pytest.raises(MismatchError, match="head.weight: the model ties it to embedding.weight, in b they differ"):
        lmc.loss_path(tied, tied, apart, data, alphas=3, progress=False)
    path = lmc.loss_path(apart, tied, apart, data, alphas=3, progress=False)
    own = [nn.functional.cross_entropy(module(ids), data[1]).item() for module in (tied, apart)]
    assert path.values["data"]["loss"][[0, -1]] == pytest.approx(own, abs=1e-5)
    assert fitted(tied, {name: tensor.clone() for name, tensor in tied.state_dict().items()}).keys()


class Untied(nn.Module):
    def __init__(self, seed: int, tie: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.body, self.lm_head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.relu(self.body(self.embed(ids))))


def test_an_output_matrix_that_one_file_leaves_out_and_another_has_apart():
    ids = torch.arange(20) % 10
    short, apart, data = Untied(0, True).state_dict(), Untied(1), (ids, (ids + 1) % 10)
    del short["lm_head.weight"]
    own = [nn.functional.cross_entropy(m(ids), data[1]).item() for m in (Untied(0, True), apart)]
    with pytest.warns(UserWarning, match="lm_head.weight: not in a, .*tied to embed.weight"):
        path = lmc.loss_path(apart, short, apart, data, alphas=3, progress=False)
    assert path.values["data"]["loss"][[0, -1]] == pytest.approx(own, abs=1e-5)
    with pytest.warns(UserWarning, match="not in models.1., .*tied to embed.weight"):
        mean = lmc.merge.average([apart, short])
    assert torch.allclose(mean["lm_head.weight"], (apart.lm_head.weight + short["embed.weight"]).detach() / 2)
    with pytest.raises(MismatchError, match="tied to embed.weight.*put models.1. first"):
        lmc.merge.average([short, apart])


def test_a_matrix_stored_twice_is_the_one_that_another_file_stores_once(tmp_path):
    short, twice = Untied(0, True).state_dict(), {n: t.clone() for n, t in Untied(1, True).state_dict().items()}
    del short["lm_head.weight"]
    for name, state in (("short", short), ("twice", twice)):
        torch.save(state, tmp_path / f"{name}.pt")
    expected = (short["embed.weight"] + twice["embed.weight"]) / 2
    files = [tmp_path / "short.pt", tmp_path / "twice.pt"]
    for models in ([short, twice], files):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = lmc.merge.average(models), lmc.merge.average(models[::-1])
        assert "lm_head.weight" not in first
        for found in (first["embed.weight"], second["embed.weight"], second["lm_head.weight"]):
            assert torch.allclose(found, expected)


def test_tensors_inside_transforms_are_refused():
    states = {name: torch.stack([tensor, tensor]) for name, tensor in Untied(0).state_dict().items()}
    with pytest.raises(WeightsError, match="embed.weight: a tensor inside torch.vmap"):
        torch.vmap(lambda state: lmc.merge.average([state, state]))(states)


@pytest.mark.parametrize(
    "converted", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, lambda w: torch.nested.nested_tensor([w, w[:2]])]
)
def test_weights_of_other_layouts_are_refused_by_name(converted):
    dense = {"w": torch.eye(3), "b": torch.ones(3)}
    with pytest.raises(lmc.WeightsError, match="^w: a tensor of layout (sparse_co|sparse_csr|nested).*to_dense"):
        lmc.weights.lerp(dense | {"w": converted(dense["w"])}, dense, 0.5)
    with pytest.raises(lmc.WeightsError, match="w: a tensor of layout"):
        lmc.merge.average([dense | {"w": converted(dense["w"])}, dense])
