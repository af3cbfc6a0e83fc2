"""What every merging method has in common: roles of tensors, ties, dtypes, options per name, methods of one's own."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from support import close, same
from torch import Tensor, nn

import lmc.merge as merge
from lmc.errors import InputError, MismatchError, WeightsError
from lmc.merge.engine import quantiles
from lmc.merge.engine.call import Uniform, _at
from lmc.merge.engine.tensors import on_base, weight_sets
from lmc.weights.adapter import Adapter

# every method of one shape, with the options under which a lone model is given back
WHOLE = {
    "average": {},
    "karcher_mean": {},
    "variance_corrected": {},
    "model_stock": {},
    "wise_ft": {"alpha": 1.0},
    "task_arithmetic": {},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0},
    "lines": {"beta": 0.0, "blocks": ["embed", "hidden"]},
    "consensus": {"agree": 1},
}
ON_BASE = ["task_arithmetic", "ties", "dare", "della", "breadcrumbs", "pcb", "lines", "consensus"]
NAMES = [*WHOLE, "pcb"]
DEFAULTS = {"lines": {"blocks": ["embed", "hidden"]}}


class Tied(nn.Module):
    """Embedding tied to the output, a normalisation with statistics, an integer and a masking buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 11)
        self.out.weight = self.embed.weight
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("offset", torch.ones(2))
        with torch.no_grad():
            for tensor in [*self.parameters(), self.norm.running_mean, self.offset]:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
            self.norm.running_var += torch.rand(8, generator=generator)
            self.norm.num_batches_tracked += seed

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(torch.relu(self.hidden(self.embed(tokens)))))


@pytest.fixture(scope="module")
def models() -> list[Tied]:
    torch.manual_seed(0)
    base = Tied(0)
    others = []
    for seed in (1, 2, 3):
        model = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in [*model.parameters(), model.norm.running_mean, model.offset]:
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
            model.norm.running_var *= 1 + torch.rand(8, generator=generator)
            model.norm.num_batches_tracked += seed
        others.append(model)
    return [base, *others]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", WHOLE)
def test_one_model_is_given_back_bit_for_bit(name: str, dtype: torch.dtype, models: list[Tied]) -> None:
    base, model = (copy.deepcopy(m).to(dtype) for m in models[:2])
    with torch.no_grad():  # model - base + base would lose this one's last bits
        model.hidden.weight[0, 0] = 1e-9
    result = getattr(merge, name)([model], base=base, **WHOLE[name])
    assert same(result, model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_untouched_and_the_result_shares_nothing_with_them(name: str, models: list[Tied]) -> None:
    before = [copy.deepcopy(m.state_dict()) for m in models]
    result = getattr(merge, name)(models[1:], base=models[0], **DEFAULTS.get(name, {}))
    for tensor in result.values():
        tensor.zero_()
    assert all(same(a, m.state_dict()) for a, m in zip(before, models, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_ties_statistics_and_integers(name: str, models: list[Tied]) -> None:
    result = getattr(merge, name)(models[1:], base=models[0], **DEFAULTS.get(name, {}))
    states = [m.state_dict() for m in models]
    assert list(result) == list(states[0])
    assert result["out.weight"] is result["embed.weight"]
    assert torch.equal(result["norm.num_batches_tracked"], states[1]["norm.num_batches_tracked"])
    assert torch.equal(result["mask"], states[0]["mask"])
    for buffer in ("norm.running_var", "norm.running_mean", "offset"):
        stack = torch.stack([s[buffer] for s in (states[:2] if name == "wise_ft" else states)])
        if name != "wise_ft":
            assert torch.allclose(result[buffer], stack[1:].mean(0), atol=1e-6)  # sum of weights * scale is at least 1
    loaded = copy.deepcopy(models[0])
    loaded.load_state_dict(result)
    assert torch.isfinite(loaded.eval()(torch.arange(11))).all()


@pytest.mark.parametrize("name", ON_BASE)
def test_scale_zero_is_the_base_with_its_statistics(name: str, models: list[Tied]) -> None:
    result = getattr(merge, name)(models[1:], base=models[0], scale=0.0, **DEFAULTS.get(name, {}))
    expected = models[0].state_dict() | {"norm.num_batches_tracked": models[1].norm.num_batches_tracked}
    assert same(result, expected)


def test_statistics_do_not_enter_thresholds(models: list[Tied]) -> None:
    loud = [copy.deepcopy(m) for m in models]
    for i, model in enumerate(loud):
        model.norm.running_mean.mul_(1e6 * (i + 1))
        model.offset.mul_(1e6 * (i + 1))
    for method in (merge.ties, merge.pcb):
        quiet, noisy = (method(m[1:], base=m[0], density=0.3) for m in (models, loud))
        assert all(torch.equal(quiet[k], noisy[k]) for k in ("embed.weight", "hidden.weight", "out.bias"))


def test_tied_tensors_count_once_in_thresholds(models: list[Tied]) -> None:
    left_out = ("out.weight", "offset")  # of a plain state dict only BatchNorm's buffers are known by name
    untied = [{k: v.clone() for k, v in m.state_dict().items() if k not in left_out} for m in models]
    a = merge.ties(models[1:], base=models[0], density=0.3)
    b = merge.ties(untied[1:], base=untied[0], density=0.3)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_tie_that_one_model_broke_is_not_a_tie(models: list[Tied]) -> None:
    broken = {k: v.clone() for k, v in models[2].state_dict().items()}
    equal = merge.average([models[1], broken])
    assert equal["out.weight"] is equal["embed.weight"]  # still equal in value
    broken["out.weight"] = broken["out.weight"] + 1.0
    result = merge.average([models[1], broken])
    assert torch.allclose(result["out.weight"], result["embed.weight"] + 0.5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("dare", "della")])
def test_bfloat16_equals_the_float32_result_cast(name: str, models: list[Tied]) -> None:
    half = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in m.state_dict().items()} for m in models]
    single = [{k: v.float() if v.is_floating_point() else v for k, v in m.items()} for m in half]
    options = DEFAULTS.get(name, {})
    a = getattr(merge, name)(half[1:], base=half[0], **options)
    b = getattr(merge, name)(single[1:], base=single[0], **options)
    assert same(a, {k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()})


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("dare", "della")])
def test_the_order_of_models_does_not_matter(name: str, models: list[Tied]) -> None:
    base, a, b, c = models
    options = DEFAULTS.get(name, {})
    first = getattr(merge, name)([a, b, c], base=base, **options)
    second = getattr(merge, name)([a, c, b], base=base, **options)
    assert close(first, second, 2e-6)


@pytest.mark.parametrize("name", ["dare", "della"])
def test_random_methods_depend_on_seed_and_name_not_on_key_order(name: str, models: list[Tied]) -> None:
    method = getattr(merge, name)
    base, a, b, _ = ({k: v.clone() for k, v in m.state_dict().items()} for m in models)
    state = torch.get_rng_state()
    forward = method([a, b], base=base)
    backward = method([dict(reversed(a.items())), dict(reversed(b.items()))], base=dict(reversed(base.items())))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(forward[k], backward[k]) for k in forward)
    assert not torch.equal(forward["hidden.weight"], method([a, b], base=base, seed=1)["hidden.weight"])


def test_scale_and_weights_per_pattern(models: list[Tied]) -> None:
    base, a, b, _ = (m.state_dict() for m in models)
    result = merge.task_arithmetic([a, b], base=base, scale={"*": 1.0, "hidden": 0.25, "hidden.bias": 0.0})
    plain = merge.task_arithmetic([a, b], base=base)
    assert torch.equal(result["embed.weight"], plain["embed.weight"])
    quarter = merge.task_arithmetic([a, b], base=base, scale=0.25)
    assert torch.equal(result["hidden.weight"], quarter["hidden.weight"])
    assert torch.equal(result["hidden.bias"], base["hidden.bias"])
    mixed = merge.average([a, b], weights={"hidden.*": [1.0, 0.0]})
    assert torch.equal(mixed["hidden.weight"], a["hidden.weight"])
    assert torch.equal(mixed["embed.weight"], merge.average([a, b])["embed.weight"])
    whole = merge.dare([a, b], base=base, density={"*": 0.5, "embed": 1.0}, scale=0.5)
    assert torch.allclose(whole["embed.weight"], merge.average([a, b])["embed.weight"], atol=1e-7)
    with pytest.raises(InputError, match=r"scale: no tensor fits the pattern 'hiden'"):
        merge.task_arithmetic([a, b], base=base, scale={"hiden": 0.5})


def test_a_method_of_ones_own_in_a_few_lines(models: list[Tied]) -> None:
    @merge.on_tensors
    def median(tensors: Tensor) -> Tensor:
        return tensors.median(0).values

    @merge.on_task_vectors
    def largest(deltas: Tensor, *, power: float = 1.0) -> Tensor:
        return deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0] * power

    @merge.linear
    def last(count: int) -> list[float]:
        return [0.0] * (count - 1) + [1.0]

    base, a, b, c = models
    middle = median([a, b, c])
    expected = torch.stack([m.hidden.weight.detach() for m in (a, b, c)]).median(0).values
    assert torch.equal(middle["hidden.weight"], expected) and middle["out.weight"] is middle["embed.weight"]
    assert same(last([a, b, c]), c.state_dict() | {"norm.num_batches_tracked": a.norm.num_batches_tracked})
    assert same(largest([a], base=base), a.state_dict())
    # and it goes where the built-in ones go
    half = merge.lines([a, b], base=base, method=largest, power=2.0, alpha=0.5, beta=0.0, blocks=["embed", "hidden"])
    assert close(half, largest([a, b], base=base))


class Lazy(Mapping[str, Tensor]):
    """Weights that are read when asked for, as from a file."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name].clone()

    def __iter__(self):
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@pytest.mark.parametrize("name", NAMES)
def test_weights_read_lazily_give_the_same(name: str, models: list[Tied]) -> None:
    states = [{k: v for k, v in m.state_dict().items() if k not in ("mask", "out.weight")} for m in models]
    options = DEFAULTS.get(name, {})
    a = getattr(merge, name)(states[1:], base=states[0], **options)
    lazy = [Lazy(s) for s in states]
    assert same(a, getattr(merge, name)(lazy[1:], base=lazy[0], **options))
    stream = getattr(merge, name).method.stream(weight_sets(lazy[1:], lazy[0]), **options)
    assert all(key == k and torch.equal(tensor, a[k]) for (key, tensor), k in zip(stream, a, strict=True))


def test_lazily_read_weights_are_compared_too(models: list[Tied]) -> None:
    a, b = (dict(m.state_dict()) for m in models[:2])
    with pytest.raises(MismatchError, match=r"hidden.bias.*missing in models\[1\]"):
        merge.average([Lazy(a), Lazy({k: v for k, v in b.items() if k != "hidden.bias"})])
    with pytest.raises(MismatchError, match="hidden.bias: shape"):
        merge.average([a, Lazy(b | {"hidden.bias": torch.zeros(9)})])


def test_bad_input_is_named(models: list[Tied]) -> None:
    base, a, b, _ = (m.state_dict() for m in models)
    with pytest.raises(InputError, match="models is empty"):
        merge.average([])
    with pytest.raises(InputError, match=r"write \[model\]"):
        merge.average(models[0])  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=r"hidden.weight.*missing in models\[1\]"):
        merge.average([a, {k: v for k, v in b.items() if k != "hidden.weight"}])
    with pytest.raises(MismatchError, match=r"hidden.bias: shape \(8,\) in models\[0\], \(9,\) in base"):
        merge.ties([a], base=base | {"hidden.bias": torch.zeros(9)})
    spoiled = b["hidden.weight"].clone()
    spoiled[2, 3] = float("nan")
    with pytest.raises(WeightsError, match=r"hidden.weight of models\[1\]: 1 of 64 values .* first at \(2, 3\)"):
        merge.average([a, b | {"hidden.weight": spoiled}])
    with pytest.raises(WeightsError, match="hidden.weight of base"):
        merge.ties([a, b], base=base | {"hidden.weight": spoiled})
    with pytest.raises(WeightsError, match="w: on the meta device"):
        merge.average([{"w": torch.zeros(2, device="meta"), "v": torch.zeros(2, device="meta")}] * 2)
    with pytest.raises(InputError, match=r"ties: missing .*base.*call it as ties\(models, \*, base, "):
        merge.ties([a, b])
    with pytest.raises(InputError, match=r"average: too many positional arguments"):
        merge.average(models[0], [a, b])
    with pytest.raises(InputError, match="pass base="):
        merge.ties([a, b], base=None)
    with pytest.raises(InputError, match="desnity"):
        merge.ties([a, b], base=base, desnity=0.1)
    for method in (merge.ties, merge.dare, merge.breadcrumbs, merge.pcb):
        with pytest.raises(InputError, match="density"):
            method([a, b], base=base, density=0.0)
    with pytest.raises(InputError, match="2 values for 1 models"):
        merge.task_arithmetic([a], base=base, weights=[1.0, 2.0])
    with pytest.raises(InputError, match="sum to 0"):
        merge.average([a, b], weights=[1.0, -1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample", [40, 1 << 17])
def test_kth_smallest_is_exact(sample: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiles, "SAMPLE", sample)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(3, 5001, generator=generator, dtype=dtype)
    values = values * 10.0 ** torch.randint(-20, 20, (3, 5001), generator=generator)
    values[0, :2000] = 0.0  # many equal ones, and a zero of the other sign
    values[0, 1000] = -0.0
    values[1] = values[1].sort().values  # in order
    values[2] = values[2].abs().log()
    parts = values.split([1000, 4000, 1], dim=1)
    for rank in (1, 2, 17, 1250, 2501, 4000, 4990, 5001):
        ranks = [rank, 5002 - rank, rank]
        found = quantiles.kth_smallest(lambda: iter(parts), ranks, 5001)
        assert found.tolist() == [float(v.sort().values[r - 1]) for v, r in zip(values, ranks, strict=True)]


def test_kth_smallest_survives_a_misleading_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiles, "SAMPLE", 1000)
    values = torch.arange(10_000.0)
    values[::10] = -1.0  # all that a stride of ten sees
    for rank in (1, 1000, 1001, 5000, 10_000):
        found = quantiles.kth_smallest(lambda: iter([values[None]]), [rank], 10_000)
        assert float(found) == float(values.sort().values[rank - 1])


def test_paths_of_checkpoints_are_models_too(tmp_path) -> None:
    from safetensors.torch import save_file

    states = [{"w": torch.randn(3, 2), "n": torch.tensor(i)} for i in range(3)]
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"m{i}.safetensors")
    paths = [tmp_path / "m0.safetensors", str(tmp_path / "m1.safetensors")]
    base = tmp_path / "m2.safetensors"
    for found, expected in (
        (merge.average(paths), merge.average(states[:2])),
        (merge.ties(paths, base=base), merge.ties(states[:2], base=states[2])),
    ):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(InputError, match=r"write \[model\]"):
        merge.average(paths[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": math.nan}, "scale=nan: expected a finite number"),
        ({"scale": {"gradient": [0.0, math.inf]}}, "scale=inf: expected a finite number"),
        ({"density": "half"}, "density='half': expected a number"),
        ({"density": {"*": "half"}}, "density='half': expected a number"),
        ({"weights": ["a", 1]}, "weights: .*expected numbers, one per model"),
    ],
)
def test_options_that_are_no_numbers_are_named(options, message):
    models = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 5.0])}]
    with pytest.raises(InputError, match=message):
        merge.ties(models, base={"w": torch.zeros(2)}, **options)


def test_seeds_are_whole_numbers():
    models = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 5.0])}]
    with pytest.raises(InputError, match="seed='a': expected a whole number"):
        merge.dare(models, base={"w": torch.zeros(2)}, seed="a")
    with pytest.raises(InputError, match="seed=0.5: expected a whole number"):
        merge.dare(models, base={"w": torch.zeros(2)}, seed=0.5)


def test_options_that_there_are_not_are_named(tmp_path) -> None:
    a, base = ({"w": torch.full((3, 2), value)} for value in (1.0, 2.0))
    calls = (
        lambda: merge.ties([a], base=base, densty=0.3),
        lambda: merge.consensus([a], base=base, method=merge.ties, densty=0.3),
        lambda: merge.plan(merge.ties, [a], tmp_path / "out", base=base, densty=0.3),
        lambda: merge.extract([a], tmp_path / "out", base=base, densty=0.3),
    )
    for call in calls:
        with pytest.raises(InputError, match="densty"):
            call()
    with pytest.raises(InputError, match="base"):
        merge.plan(merge.ties, [a], tmp_path / "out")


def test_gradients_over_depth_are_straight_between_neighbouring_points() -> None:
    points = {"gradient": [0.0, 1.0, 0.2, 0.6]}
    found = [_at(points, depth, "weight") for depth in (0.0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1.0)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2, 0.4, 0.6])
    assert _at([points, 2], 0.5, "weight") == pytest.approx([0.6, 2])
    assert _at({"gradient": [0.3]}, 0.7, "weight") == 0.3
    with pytest.raises(InputError, match="^scale: an empty gradient"):
        tuned, base = ({f"a.{k}.w": torch.full((2,), x) for k in range(2)} for x in (1.0, 0.0))
        merge.task_arithmetic([tuned], base=base, scale={"gradient": []})


def test_random_numbers_do_not_depend_on_the_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.merge.engine.call.BLOCK", 4)
    like = torch.zeros(2, 7)
    expected = Uniform(3, "w")(like)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Uniform(3, "w")(like), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_derived_tensors_of_an_average_are_settled_with_those_of_the_first_model() -> None:
    """Of weight normalisation the effective weights are averaged, whatever the free scale of v is."""

    def normed(seed: int, scale: float) -> nn.Module:
        torch.manual_seed(seed)
        module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        module.parametrizations.weight.original1.data *= scale
        return module

    a, b = normed(0, 1.0), normed(1, 50.0)
    result = normed(2, 1.0)
    result.load_state_dict(merge.average([a, b]))
    assert torch.allclose(result.weight, (a.weight + b.weight) / 2, atol=1e-6)


def test_methods_say_where_they_are_from() -> None:
    assert merge.ties.__module__.startswith("lmc.merge.rules.") and merge.ties.__name__ == "ties"


def test_a_model_is_one_of_an_adapter_only_where_there_is_a_base() -> None:
    class Factors(Adapter):
        def __init__(self) -> None:
            pass

        def on(self, base):
            return {name: tensor + 1 for name, tensor in base.items()}

    base, other = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    first, second, third = on_base([Factors(), other], base)
    assert torch.equal(first["w"], torch.ones(2)) and second is other and third is base
    assert on_base([other], None) == [other]


def test_a_gradient_runs_over_the_depth_of_the_blocks() -> None:
    base = {f"layers.{k}.w": torch.zeros(2) for k in range(3)}
    tuned = {name: torch.ones(2) for name in base}
    found = merge.task_arithmetic([tuned], base=base, scale={"gradient": [0.0, 1.0]})
    assert [float(found[f"layers.{k}.w"][0]) for k in range(3)] == [0.0, 0.5, 1.0]
    found = merge.task_arithmetic([tuned], base=base, scale={"*": 2.0, "*.1.*": 0.25})
    assert [float(found[f"layers.{k}.w"][0]) for k in range(3)] == [2.0, 0.25, 2.0]
