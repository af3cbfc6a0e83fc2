"""`lmc.connect`: planted elements of the group are found again, budgets are kept, interrupts keep the best so far."""

import itertools
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import lmc
from lmc.align.connecting import connect as connecting
from lmc.align.connecting import judge, learned, methods, paths
from lmc.align.connecting.elements import Freedom, FreeElement, freedoms
from lmc.align.connecting.judge import Judge, held_out, mixed
from lmc.align.connecting.learned import Learned
from lmc.align.rotations.folding import Probe
from lmc.core import progress as budgets
from lmc.errors import InputError
from lmc.models.mlp import mlp
from lmc.models.transformers import vit
from lmc.network.task import Task
from lmc.symmetry import find

QUIET = {"progress": False, "budget": None}


@cache
def digits(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], lmc.data.Dataset]:
    """A stored pair, and few of its data."""
    pair = lmc.data.checkpoint(name)
    return pair.model(), pair[0], pair[1], few(lmc.data.digits(flat="mlp" in name))


def few(data, train: int = 240, test: int = 100):
    return {"train": tuple(x[:train] for x in data.train), "test": tuple(x[:test] for x in data.test)}


def own_labels(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs with the classes that the model gives them, so that it has a small loss."""
    with torch.no_grad():
        return inputs, model(inputs).argmax(1)


def seeded(make, seed: int = 0, **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**options).eval()


def convolutional() -> nn.Module:
    """With batch normalisation whose statistics are those of the inputs."""
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10)]
    model = seeded(lambda: nn.Sequential(*layers))
    images = lmc.data.digits(flat=False).train[0][:256]
    model.load_state_dict(lmc.recalibrate_batchnorm(model, None, images))
    return model


@pytest.mark.parametrize("name", ["mlp", "convolutional"])
def test_a_planted_permutation_is_taken_back(name):
    model = seeded(lambda: mlp(64, [12, 9], 10)) if name == "mlp" else convolutional()
    data = own_labels(model, lmc.data.digits(flat=name == "mlp").train[0][:200])
    a = lmc.weights.as_weights(model)
    spec = lmc.permutation_spec(model, data[0][:2])
    planted = spec.random(seed=3)
    found = lmc.connect(model, a, planted.apply(a), data, **QUIET)
    assert found.naive.barrier > 0.01 > 1e-6 > found.barrier
    assert found.permutation == planted.inverse() and found.certificate.max_error < 1e-12
    assert all(torch.equal(found.weights[key], a[key]) for key in a)


def test_planted_rotations_of_a_transformer_are_taken_back():
    model = seeded(lambda: vit(dim=8, depth=1, heads=2, hidden=12))
    data = own_labels(model, lmc.data.digits(flat=False).train[0][:200])
    a = lmc.weights.as_weights(model)
    spec = lmc.permutation_spec(model, data[0][:2])
    b = moved_at_random(model, spec, a, data[0][:8], seed=5)
    found = lmc.connect(model, a, b, data, spec=spec, **QUIET)
    assert found.naive.barrier > 1e-3 > 1e-5 > found.barrier
    assert "rotations" in found.method and found.permutation is None
    assert found.certificate.max_error < found.certificate.tolerance < 1e-3


def element_of(model: nn.Module, spec, weights, inputs: Tensor, *, fold: bool, seed: int) -> FreeElement:
    """An element with random parameters."""
    weights = dict(lmc.align.fold_norms(spec, model, weights, inputs)) if fold else weights
    rotated = dict(lmc.align.rotatable_groups(spec, model, weights, inputs)) if fold else {}
    symmetries = lmc.continuous_symmetries(spec, model, inputs[:2], progress=False)
    free = freedoms(spec, rotated, symmetries)
    generator = torch.Generator().manual_seed(seed)
    element = FreeElement(spec, free, weights)
    for kind, parameters in element.parameters.items():
        for parameter in parameters:
            size = {"rotation": 0.4, "scale": 0.3}[kind]
            with torch.no_grad():
                parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return element


def moved_at_random(model, spec, weights, inputs, seed):
    weights = spec.random(seed=seed).apply(weights)
    return element_of(model, spec, weights, inputs, fold=True, seed=seed).exact()


@pytest.mark.parametrize("name", ["mlp", "convolutional", "vit"])
def test_elements_keep_the_function(name):
    make = {"mlp": lambda: seeded(lambda: mlp(64, [12, 9], 10)), "convolutional": convolutional}
    make["vit"] = lambda: seeded(lambda: vit(dim=8, depth=1, heads=2, hidden=12))
    model = make[name]().double()
    inputs = lmc.data.digits(flat=name == "mlp").train[0][:8].double()
    spec = lmc.permutation_spec(model, inputs[:2])
    a = lmc.weights.as_weights(model)
    element = element_of(model, spec, a, inputs, fold=name == "vit", seed=1)
    kinds = {freedom.kind for freedom in element.free.values()}
    assert ("general linear" in kinds) == ("orthogonal fixing 1" in kinds) == (name == "vit")
    assert all(element.parameters[kind] for kind in (["scale"] + ["rotation"] * (name == "vit")))
    moved = element.exact()
    probe = Probe(model, a, inputs, torch.Generator().manual_seed(0))
    assert probe.error(moved) < 1e-9 < 1e-3 < lmc.weights.distance(a, moved)
    for key, tensor in element().items():
        torch.testing.assert_close(tensor.detach(), moved[key], rtol=1e-4, atol=1e-5)


def test_batch_statistics_need_not_follow():
    """No scale is learned under which running statistics would have to change: they are estimated anew."""
    model = convolutional()
    inputs = lmc.data.digits(flat=False).train[0][:8]
    spec = lmc.permutation_spec(model, inputs[:2])
    element = element_of(model, spec, lmc.weights.as_weights(model), inputs, fold=False, seed=1)
    places = {place for freedom in element.free.values() for scale in freedom.scales for place in scale}
    assert places and not any("running" in place for place in places)


def test_a_trained_pair_is_connected_better_than_by_weights_and_says_how(tmp_path):
    model, a, b, data = digits("digits-mlp32")
    found = lmc.connect(model, a, b, data, steps=300, **QUIET)
    pi = lmc.weight_matching(lmc.permutation_spec(model, data["train"][0][:2]), a, b, progress=False)
    by_weights = lmc.loss_path(model, a, pi.apply(b), data, progress=False)
    assert found.barrier < 0.5 * by_weights.barrier < by_weights.barrier < found.naive.barrier
    outputs = [torch.func.functional_call(model, w, (data["test"][0],)) for w in (b, found.weights)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    methods = [each.method for each in found.tried]
    assert methods[:3] == ["as they are", "weight matching", "activation matching"] and found.method in methods
    assert found.method in str(found) and "held out" in str(found) and f"{found.barrier:.3f}" in str(found)
    assert list(found.to_frame().method) == methods
    again = lmc.Connection.load(found.save(tmp_path / "connection.safetensors"))
    assert str(again) == str(found) and torch.equal(again.weights["fc1.weight"], found.weights["fc1.weight"])
    assert len(found.plot().data) >= 2
    assert "connected" in found.save_html(tmp_path / "page.html").read_text()


def test_nothing_is_chosen_on_test_data():
    model, a, b, data = digits("digits-mlp32")
    other = {"train": data["train"], "test": (data["test"][0].flip(1), data["test"][1].roll(1))}
    one, two = (lmc.connect(model, a, b, part, steps=50, **QUIET) for part in (data, other))
    assert one.method == two.method and one.barrier != two.barrier
    assert all(torch.equal(one.weights[key], two.weights[key]) for key in a)


class Clock:
    """Each look at it takes a while."""

    def __init__(self, step: float) -> None:
        self.ticks = itertools.count()
        self.step = step

    def __call__(self) -> float:
        return self.step * next(self.ticks)


@pytest.mark.parametrize(
    ("step", "budget", "expected"),
    [pytest.param(0.01, 12.0, "24 s", marks=pytest.mark.thorough), (0.08, 99.0, "3 minutes")],
)
def test_the_budget_is_kept(step, budget, expected, monkeypatch, capsys):
    model, a, b, data = digits("digits-mlp32")
    monkeypatch.setattr(budgets, "clock", Clock(step))
    monkeypatch.delenv("TQDM_DISABLE")
    found = lmc.connect(model, a, b, data, budget=budget, progress=True)
    assert found.seconds <= budget
    assert found.budget == budget and not found.interrupted
    assert f"at most 1500 steps of learning: about {expected}, budget {budget:.0f} s" in capsys.readouterr().err
    learned = next(each for each in found.tried if each.method.endswith("learned"))
    assert learned.note.endswith("steps") and 0 < int(learned.note.split()[0]) < 1500


def test_time_for_a_repaired_last_path_is_kept(monkeypatch):
    model, a, b, data = digits("digits-mlp32")
    clock = Clock(0.1)

    def longer(*args, **options):
        for _ in range(50 if options["repair"] == "repair" else 0):
            clock()
        return lmc.loss_path(*args, **options)

    def until_the_end(task, a, element, *, budget, **_):
        while not budget.over:
            pass
        return Learned({name: x * math.inf for name, x in element.exact().items()}, 1, False)

    def refuse(*_, **__):
        raise InputError("not here")

    for measuring in (judge, paths):
        monkeypatch.setattr(measuring, "loss_path", longer)
    monkeypatch.setattr(methods, "learn", until_the_end)
    monkeypatch.setattr(methods, "straight_through_matching", refuse)
    monkeypatch.setattr(methods, "sinkhorn_matching", refuse)
    monkeypatch.setattr(connecting, "FINDING", 1.0)
    monkeypatch.setattr(budgets, "clock", clock)
    found = lmc.connect(model, a, b, data, budget=80.0, progress=False)
    assert found.repaired and found.tried[-1].barrier == math.inf and found.seconds <= 80.0


def test_activations_are_collected_of_as_many_examples_as_there_is_time_for(monkeypatch):
    model, a, b, data = digits("digits-mlp32")
    seen = []

    def refuse(*args, **_):
        seen.append(len(args[4]))
        raise InputError("not here")

    monkeypatch.setattr(methods, "activation_matching", refuse)
    monkeypatch.setattr(connecting, "pass_straight_through", lambda *_, **__: None)
    monkeypatch.setattr(connecting, "relax", lambda *_, **__: None)
    monkeypatch.setattr(connecting, "learn_elements", lambda *_, **__: None)
    monkeypatch.setattr(connecting, "COLLECTED", 60)  # passes, each as long as the clock says
    for budget in (None, 1000.0, 60.0):
        monkeypatch.setattr(budgets, "clock", Clock(0.5))
        lmc.connect(model, a, b, data, budget=budget, progress=False)
    assert seen[0] == seen[1] == 192 > seen[2] >= connecting.FEWEST


def test_signs_are_matched():
    model = seeded(lambda: mlp(64, [12, 9], 10, activation="tanh"))
    data = own_labels(model, lmc.data.digits(flat=True).train[0][:200])
    spec = lmc.permutation_spec(model, data[0][:2], continuous=True, progress=False)
    planted = lmc.Element.random(spec, 3).apply(model)
    found = lmc.connect(model, model, planted, data, steps=1, **QUIET)
    assert found.naive.barrier > 0.01 > 1e-6 > found.barrier
    assert connecting.MODULO in found.method and found.permutation is None


def test_weight_matching_ends_its_sweeps_with_the_budget(monkeypatch):
    model, a, b, data = digits("digits-mlp32")
    spec = lmc.permutation_spec(model, data["test"][0][:2], progress=False)
    whole = lmc.weight_matching(spec, a, b, progress=False)
    assert lmc.weight_matching(spec, a, b, budget=1e6, progress=False) == whole and whole.info["runs"][0]["sweeps"] > 1
    monkeypatch.setattr(budgets, "clock", Clock(1.0))
    short = lmc.weight_matching(spec, a, b, budget=1.5, restarts=3, progress=False)
    (run,) = short.info["runs"]
    assert run["sweeps"] == 1 and not run["converged"]
    assert short.info["objective_at_identity"] < short.objective <= whole.objective


def test_a_path_that_the_budget_leaves_few_points_is_measured_once(monkeypatch):
    model, a, b, data = digits("digits-mlp32")
    measured = []
    monkeypatch.setattr(
        paths,
        "loss_path",
        lambda *args, **options: measured.append(options["alphas"]) or lmc.loss_path(*args, **options),
    )
    monkeypatch.setattr(budgets, "clock", Clock(1.0))
    found = lmc.connect(model, a, b, data, budget=0.5, progress=False)
    assert measured == [5, 5] and len(found.naive.alphas) == 5


def test_a_budget_too_small_for_all_does_the_cheapest_and_says_so(monkeypatch):
    model, a, b, data = digits("digits-mlp32")
    monkeypatch.setattr(budgets, "clock", Clock(1.0))
    found = lmc.connect(model, a, b, data, budget=0.5, progress=False)
    assert found.method == "weight matching" and found.barrier < found.naive.barrier
    assert "too small" in str(found) and found.tried[-1].note == connecting.LATE


@pytest.mark.parametrize(("budget", "proven"), [(10.0, [False]), (100.0, [False, "proven"])])
def test_finding_symmetries_is_a_part_of_the_budget(budget, proven, monkeypatch):
    """What takes long to find is not proven as well, nor looked for beyond its share; what there was no time for is said."""
    model, a, b, data = digits("digits-mlp32")
    now, proofs = [0.0], []

    def slow(*args, **options):
        proofs.append(options["certify"])
        now[0] += 1.0
        return lmc.permutation_spec(*args, **options)

    def prove(*args, **options):
        proofs.append("proven")
        return find.proven(*args, **options)

    def endless(*args, budget, **options):
        now[0] += budget
        return lmc.continuous_symmetries(*args, budget=1e-9, **options)

    def refuse(*_, **__):
        raise InputError("not here")

    monkeypatch.setattr(budgets, "clock", lambda: now.append(now.pop() + 1e-3) or now[0])
    monkeypatch.setattr(connecting, "permutation_spec", slow)
    monkeypatch.setattr(connecting, "proven", prove)
    monkeypatch.setattr(connecting, "continuous_symmetries", endless)
    for method in ("straight_through_matching", "sinkhorn_matching"):
        monkeypatch.setattr(methods, method, refuse)
    found = lmc.connect(model, a, b, data, budget=budget, progress=False)
    assert proofs == proven and found.seconds < 0.5 * budget
    assert "no time for scales and signs" in str(found) and found.method.endswith("matching")


def test_what_networks_were_trained_on_is_judged_between_the_examples():
    """On the examples themselves networks that fit them are equal; between them they are not."""
    inputs, targets = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    generator = torch.Generator().manual_seed(1)
    (part, others), left = mixed((inputs, targets), generator, 0.25), inputs.clone()
    assert others is targets and torch.equal(inputs, left) and not torch.equal(part, inputs)
    drawn = ((part - 0.75 * inputs) / 0.25)[:, None] - inputs
    assert drawn.norm(dim=-1).amin(1).max() < 1e-5  # what is mixed in is an example
    (batch,) = mixed([(inputs, targets)], torch.Generator().manual_seed(1), 0.25)
    assert torch.equal(batch[0], part)
    tokens = (targets, targets)
    assert mixed(tokens, generator) is tokens  # there is nothing between two of them
    model = mlp(4, [5], 3)
    a, b = (lmc.weights.as_weights(seeded(lambda: mlp(4, [5], 3), seed)) for seed in (0, 1))
    found = Judge(model, a, b, (inputs, targets), inputs, Task(), torch.device("cpu"))(a, b)
    other, plain = (
        lmc.loss_path(model, a, b, data, alphas=judge.ALPHAS, progress=False).barrier
        for data in (mixed((inputs, targets), torch.Generator().manual_seed(judge.SEED)), (inputs, targets))
    )
    assert found == pytest.approx(other, abs=1e-6) and abs(found - plain) > 1e-4


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_scales_stay_where_the_loss_says_next_to_nothing(decay, monkeypatch):
    """Adam goes as far along a faint slope as along a steep one; the decay bounds how far."""
    model = seeded(lambda: mlp(64, [12], 10))
    b, spec = lmc.weights.as_weights(model), lmc.permutation_spec(model, torch.zeros(2, 64), certify=False)
    free = {"fc1": Freedom(scales=({"fc1.weight": 1.0, "fc1.bias": 1.0, "head.weight": -1.0},))}

    class Faint:
        def __call__(self, weights, batch):
            return -1e-3 * weights["fc1.weight"].abs().log().mean()

        def epochs(self, generator):
            return itertools.repeat(None)

    monkeypatch.setitem(learned.DECAYS, "scale", decay)
    monkeypatch.setitem(learned.RATES, "scale", 0.1)
    found = learned.learn(
        Faint(), b, FreeElement(spec, free, b), steps=150, budget=budgets.Budget(None), generator=torch.Generator(), progress=False
    )  # fmt: skip
    moved = (found.weights["fc1.weight"] / b["fc1.weight"]).log().abs().mean()
    assert (moved < 3.4) == (decay > 0.0) and found.steps == 150


@pytest.mark.parametrize(("kept", "turns"), [(0.5, 4), (0.95, 2)])
def test_permutations_are_looked_for_again_while_that_gains_something(kept, turns, monkeypatch):
    """From both that were matched first, and then from the best."""
    model, a, b, data = digits("digits-mlp32")
    seeds, starts = [], []

    def search(pair, start, seconds, **_):
        seeds.append(pair.seed)
        starts.append(start.method)
        return replace(start, weights=dict(start.weights), barrier=start.barrier * kept**0.5)

    monkeypatch.setattr(connecting, "pass_straight_through", search)
    monkeypatch.setattr(connecting, "relax", search)
    monkeypatch.setattr(connecting._Search, "_repair", lambda search, candidates: None)
    monkeypatch.setattr(connecting, "learn_elements", lambda *_, **__: None)
    monkeypatch.setattr(connecting, "ENOUGH", 0.0)
    lmc.connect(model, a, b, data, seed=3, **QUIET)
    assert seeds == [3 + turn for turn in (0, *range(turns)) for _ in range(2)]
    assert {*starts[:4]} == {"weight matching", "activation matching"}


@pytest.mark.parametrize("where", ["activation_matching", "straight_through_matching", "learn"])
def test_an_interrupt_gives_the_best_so_far(where, monkeypatch):
    model, a, b, data = digits("digits-mlp32")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, where, interrupted)
    with pytest.warns(UserWarning, match="interrupted"):
        found = lmc.connect(model, a, b, data, **QUIET)
    assert found.interrupted and found.barrier < found.naive.barrier
    assert "learned" not in found.method


def test_an_interrupt_within_a_method_ends_all(monkeypatch):
    model, a, b, data = digits("digits-mlp32")
    moves, calls = FreeElement.__call__, itertools.count()

    def moved(self):
        if next(calls) == 40:
            raise KeyboardInterrupt
        return moves(self)

    monkeypatch.setattr(FreeElement, "__call__", moved)
    with pytest.warns(UserWarning, match="interrupted"):
        found = lmc.connect(model, a, b, data, **QUIET)
    assert found.interrupted and found.tried[-1].note == "40 steps, interrupted"


def test_a_network_in_which_nothing_may_move():
    model = seeded(lambda: nn.Linear(64, 10))
    data = few(lmc.data.digits())
    found = lmc.connect(model, model, seeded(lambda: nn.Linear(64, 10), 1), data, **QUIET)
    assert found.method == "as they are"


def test_bad_input():
    model, a, b, data = digits("digits-mlp32")
    with pytest.raises(InputError, match="budget=0"):
        lmc.connect(model, a, b, data, budget=0)
    with pytest.raises(InputError, match="steps=0"):
        lmc.connect(model, a, b, data, steps=0)


def test_a_part_is_held_out():
    inputs, targets = torch.arange(50.0)[:, None], torch.arange(50)
    learn, held, count = held_out((inputs, targets), Task(), seed=0)
    assert count == len(held[1]) == 10 and sorted([*learn[1].tolist(), *held[1].tolist()]) == list(range(50))
    assert torch.equal(held[0][:, 0].long(), held[1])
    many = [(inputs[i : i + 5], targets[i : i + 5]) for i in range(0, 50, 5)]
    learn, held, count = held_out(many, Task(), seed=0)
    assert len(learn) == 8 and len(held) == 2 and count == 10
    learn, held, count = held_out([(inputs, targets), (inputs[:3], targets[:3])], Task(), seed=0)
    assert [len(x[1]) for x in learn] == [40, 3] and [len(x[1]) for x in held] == [10, 3]


def test_the_unit_is_that_of_the_loss():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    models = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(2)]
    data = lmc.Task.regression().on((x, x[:, :1]))
    found = lmc.connect(models[0], *models, data, budget=1, progress=False)
    assert found.unit == "squared error" and "nats" not in str(found)


def test_splits_that_are_read_once():
    stored = lmc.data.checkpoint("digits-mlp32")
    data = lmc.data.digits()

    def batches(split):
        inputs, targets = split[0][:200], split[1][:200]
        return zip(inputs.split(40), targets.split(40), strict=True)

    once = {"train": batches(data.train), "test": batches(data.test)}
    found = lmc.connect(stored.model(), *stored.weights, once, budget=3, steps=1, progress=False)
    assert found.path.barrier < found.naive.barrier


def test_a_decoder_gets_its_inputs_of_the_labels():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    a, b = (transformers.T5ForConditionalGeneration(config).eval() for _ in range(2))
    data = {"input_ids": torch.randint(1, 20, (12, 6)), "labels": torch.randint(1, 20, (12, 5))}
    found = lmc.connect(a, a, b, data, budget=10, steps=1, progress=False)
    assert not any(each.note.startswith("not here") for each in found.tried if "activation" in each.method)
    assert found.certificate.max_error < 1e-4
