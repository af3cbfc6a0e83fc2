"""Weight matching: planted truth, algebraic identities, small problems solved by brute force, and bad input."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import handwritten
import numpy as np
import pytest
import small_models
import torch
from safetensors.torch import save_file
from support import same
from torch import Tensor, nn

import lmc
from lmc import models
from lmc.align.weight_matching import algorithm as descent_module
from lmc.align.weight_matching import gains
from lmc.align.weight_matching.blocks import _relative, build_blocks, sub_tensor
from lmc.align.weight_matching.gains import assign, prices_of, separate_pairs
from lmc.symmetry.groups.group import Table

# By name: the package has a function that is called like this module.
MODULE = importlib.import_module("lmc.align.weight_matching.matching")

CASES = {
    "mlp": (lambda: models.mlp(12, [16, 24, 16], 4), handwritten.mlp(3), {}),
    "cnn with norms, flattened": (
        lambda: models.vgg(1 / 16, config="vgg11", image=(1, 8, 8)),
        handwritten.vgg(8),
        {},
    ),
    "resnet": (lambda: models.resnet20(1, in_channels=1), handwritten.resnet20(), {}),
    "one group on both axes": (small_models.ResidualMLP, small_models.RESIDUAL, {}),
    "units in heads": (small_models.Attention, handwritten.ATTENTION, {"head": 4}),
    "grouped queries": (
        lambda: small_models.Attention(heads=6, kv=3, bias=False),
        handwritten.GROUPED_QUERY,
        {"kv": 3, "rep": 2},
    ),
    "stacked experts": (small_models.Experts, handwritten.EXPERTS, {}),
    "grouped convolution": (small_models.GroupedConvolution, small_models.GROUPED, {"g": 2}),
    "concatenation": (small_models.Branches, small_models.BRANCHES, {}),
}


def case(name: str, seed: int = 0) -> tuple[lmc.PermutationSpec, dict[str, Tensor]]:
    """The bound spec of a case, and weights without ties: every parameter and statistic drawn anew."""
    make, patterns, sizes = CASES[name]
    module = make()
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel() if tensor.ndim > 1 else 1) ** 0.5
        if tensor.is_floating_point()
        else tensor.clone()
        for key, tensor in module.state_dict().items()
    }
    return lmc.PermutationSpec.from_patterns(patterns, module, **sizes), weights


def matching(spec, a, b, **options) -> lmc.Permutation:
    return lmc.weight_matching(spec, a, b, **({"progress": False} | options))


def parameters(spec: lmc.PermutationSpec, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name not in spec.buffers}


@pytest.fixture(params=CASES)
def problem(request):
    return case(request.param)


class TestPlantedTruth:
    def test_is_found_exactly(self, problem):
        spec, a = problem
        for seed in range(3):
            rho = spec.random(seed)
            pi = matching(spec, a, rho.apply(a))
            assert pi == rho.inverse()
            moved = pi.apply(rho.apply(a))
            assert all(torch.equal(moved[name], tensor) for name, tensor in a.items())

    def test_is_found_under_noise(self, problem):
        spec, a = problem
        rho = spec.random(1)
        generator = torch.Generator().manual_seed(2)
        noisy = {
            name: t + 0.1 * t.std() * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
            for name, t in rho.apply(a).items()
            if t.numel() > 1
        }
        b = rho.apply(a) | noisy
        assert matching(spec, a, b, restarts=3) == rho.inverse()

    def test_is_not_found_in_the_wrong_direction(self):
        spec, a = case("mlp")
        rho = spec.random(0)
        wrong = rho.apply(rho.apply(a))  # what an implementation that confuses p with its inverse gives
        assert any(not torch.equal(wrong[name], tensor) for name, tensor in a.items())
        assert matching(spec, a, rho.apply(a)) != rho

    def test_the_same_network_stays_where_it_is(self, problem):
        spec, a = problem
        assert matching(spec, a, a).is_identity()


class TestObjective:
    def test_is_the_inner_product_with_the_moved_parameters(self, problem):
        spec, a = problem
        b = unrelated(a, 7)
        pi = matching(spec, a, b)
        moved = parameters(spec, pi.apply(b))
        assert pi.objective == pytest.approx(lmc.weights.dot(parameters(spec, a), moved), rel=1e-9)

    def test_is_never_below_the_start(self, problem):
        spec, a = problem
        for seed in range(5):
            b = unrelated(a, seed)
            pi = matching(spec, a, b)
            assert pi.objective >= pi.info["objective_at_identity"]
            assert pi.objective >= lmc.weights.dot(parameters(spec, a), parameters(spec, b)) - 1e-9

    def test_grows_with_every_visit(self, problem, monkeypatch):
        spec, a = problem
        b = unrelated(a, 3)
        visit, checked = descent_module.Descent.visit, []

        def watched(self, i, only=None):
            before = descent_module.inner_product(self.fixed, self.state)
            visit(self, i, only)
            if only is None:
                checked.append(i)
                assert descent_module.inner_product(self.fixed, self.state) >= before - 1e-6 * abs(before)

        monkeypatch.setattr(descent_module.Descent, "visit", watched)
        matching(spec, a, b, restarts=3)
        assert checked

    def test_no_single_group_can_be_improved_at_the_end(self):
        """The gains that are updated by what moved are those that a fresh product gives."""
        for name in ("mlp", "resnet", "cnn with norms, flattened", "concatenation"):
            spec, a = case(name)
            b = unrelated(a, 11)
            pi = matching(spec, a, b)
            fixed, moved = parameters(spec, a), parameters(spec, pi.apply(b))
            for block in build_blocks(spec, fixed):
                gain = sum(
                    place.features(fixed[place.tensor]).double() @ place.features(moved[place.tensor]).double().T
                    for place in block.places
                )
                _, improvement = assign(gain)
                assert improvement <= 1e-5 * pi.objective, block.name

    def test_a_group_on_both_axes_of_a_tensor_cannot_be_improved_by_its_linearisation(self):
        spec, a = case("one group on both axes")
        moves = 0
        for seed in range(12):
            b = unrelated(a, seed)
            b["mix.weight"] *= 4  # the part whose gain depends on the group itself
            pi = matching(spec, a, b)
            moved = pi.apply(b)
            (block,) = build_blocks(spec, a)
            gain = sum(
                place.features(a[place.tensor]) @ place.features(moved[place.tensor]).T for place in block.places
            )
            further = lmc.Permutation(spec, {"d": assign(gain)[0]}).apply(moved)
            assert lmc.weights.dot(a, further) <= pi.objective * (1 + 1e-5)
            moves += not pi.is_identity()
        assert moves > 6

    def test_what_was_matched_on_half_its_evidence_is_looked_at_again(self):
        """x follows w1 at first; the larger w2, whose other axis y stays where it is, speaks against that."""
        a = {
            "w1": torch.tensor([[1.0], [0.0]]),
            "w2": torch.diag(torch.tensor([10.0, 20.0])),
            "b2": torch.tensor([100.0, 0.0]),
            "apart": torch.tensor([[100.0], [0.0]]),
        }
        b = a | {"w1": a["w1"].flip(0), "apart": a["apart"].flip(0)}
        spec = lmc.PermutationSpec.from_patterns({"w1": "x .", "w2": "y x", "b2": "y", "apart": "z ."}, a)
        pi = matching(spec, a, b)
        assert {name: index.tolist() for name, index in pi.items()} == {"x": [0, 1], "y": [0, 1], "z": [1, 0]}

    def test_more_restarts_are_never_worse(self, problem):
        spec, a = problem
        b = unrelated(a, 5)
        found = [matching(spec, a, b, restarts=k, seed=2).objective for k in (1, 2, 4)]
        assert found == sorted(found)


class TestIdentities:
    @pytest.mark.parametrize("name", ["mlp", "resnet", "units in heads", "stacked experts"])
    def test_units_of_b_may_come_in_any_order(self, name):
        """Moving B by rho first changes the answer by its inverse only, where the optimum found is the same."""
        spec, a = case(name)
        b = related(a, 0.3)
        rho = spec.random(9)
        pi, after = matching(spec, a, b), matching(spec, a, rho.apply(b))
        assert after.compose(rho) == pi
        assert after.objective == pytest.approx(pi.objective, rel=1e-9)

    @pytest.mark.parametrize("name", ["mlp", "resnet", "units in heads", "grouped queries"])
    def test_exchanging_the_networks_inverts_the_answer(self, name):
        spec, a = case(name)
        b = spec.random(4).apply(related(a, 0.3))
        there, back = matching(spec, a, b), matching(spec, b, a)
        assert back == there.inverse()
        assert back.objective == pytest.approx(there.objective, rel=1e-9)

    def test_the_order_of_the_keys_does_not_matter(self, problem):
        spec, a = problem
        b = unrelated(a, 6)
        first = matching(spec, a, b, restarts=3)
        shuffled = [dict(reversed(list(w.items()))) for w in (a, b)]
        assert matching(spec, *shuffled, restarts=3) == first

    def test_the_seed_decides(self):
        spec, a = case("mlp")
        b = unrelated(a, 8)
        state = torch.random.get_rng_state()
        assert matching(spec, a, b, restarts=4, seed=1) == matching(spec, a, b, restarts=4, seed=1)
        objectives = {
            seed: [run["objective"] for run in matching(spec, a, b, restarts=5, seed=seed).info["runs"]]
            for seed in (1, 2)
        }
        assert objectives[1][:2] == objectives[2][:2] and objectives[1][2:] != objectives[2][2:]
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_the_weights_are_left_alone(self, problem):
        spec, a = problem
        b = unrelated(a, 1)
        before = [{name: t.clone() for name, t in w.items()} for w in (a, b)]
        matching(spec, a, b, restarts=3)
        for w, copy in zip((a, b), before, strict=True):
            assert all(torch.equal(w[name], copy[name]) for name in copy)

    def test_modules_are_taken_and_left_alone(self):
        module, other = models.resnet20(1, in_channels=1), models.resnet20(1, in_channels=1)
        module.train()
        before = {name: t.clone() for name, t in other.state_dict().items()}
        matching(lmc.PermutationSpec.from_patterns(handwritten.resnet20()), module, other)
        assert module.training and all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


class TestSmallProblems:
    @pytest.mark.parametrize("restarts", [1, 2, 6])
    def test_two_hidden_units_in_two_layers(self, restarts):
        """Git Re-Basin's appendix: matching the first layer by itself keeps the identity, yet both layers must swap."""
        eps = 0.1
        first = torch.tensor([[1.0], [1.0 + eps]])
        a = {
            "fc1.weight": first,
            "fc2.weight": torch.tensor([[1.0, 0.0], [0.0, eps]]),
            "head.weight": torch.tensor([[1.0, 0.0]]),
        }
        b = {
            "fc1.weight": first,
            "fc2.weight": torch.tensor([[0.0, 0.0], [0.0, 1.0]]),
            "head.weight": torch.tensor([[0.0, 1.0]]),
        }
        spec = lmc.PermutationSpec.from_patterns({"fc1.weight": "x .", "fc2.weight": "y x", "head.weight": ". y"}, a)
        pi = matching(spec, a, b, restarts=restarts)
        assert pi["x"].tolist() == [1, 0] and pi["y"].tolist() == [1, 0]

    def test_against_brute_force(self):
        """Unrelated networks with hidden widths 3 and 3: never above the best of all 36, and mostly there."""
        patterns = {"w1": "x .", "b1": "x", "w2": "y x", "b2": "y", "w3": ". y"}
        shapes = {"w1": (3, 4), "b1": (3,), "w2": (3, 3), "b2": (3,), "w3": (2, 3)}
        reached = {1: 0, 10: 0}
        trials = 40
        for seed in range(trials):
            generator = torch.Generator().manual_seed(seed)
            a, b = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(2))
            spec = lmc.PermutationSpec.from_patterns(patterns, a)
            orders = [torch.tensor(p) for p in itertools.permutations(range(3))]
            best = max(
                lmc.weights.dot(a, lmc.Permutation(spec, {"x": p, "y": q}).apply(b)) for p in orders for q in orders
            )
            for restarts in reached:
                value = matching(spec, a, b, restarts=restarts, seed=seed).objective
                assert value <= best + 1e-5
                reached[restarts] += value >= best - 1e-5
        assert reached[1] >= 0.65 * trials and reached[10] >= 0.95 * trials

    def test_layers_of_one_unit(self):
        a, b = (
            {name: torch.randn(t.shape) for name, t in models.mlp(3, [1, 4, 1], 2).state_dict().items()} for _ in "ab"
        )
        spec = lmc.PermutationSpec.from_patterns(handwritten.mlp(3), a)
        assert set(matching(spec, a, b)) == {"h2"}
        nothing = lmc.PermutationSpec.from_patterns({}, a)
        assert matching(nothing, a, b).objective == pytest.approx(lmc.weights.dot(a, b))

    def test_twins_may_go_either_way(self):
        spec, a = case("mlp")
        a["fc1.weight"][1], a["fc1.bias"][1], a["fc2.weight"][:, 1] = (
            a["fc1.weight"][0],
            a["fc1.bias"][0],
            a["fc2.weight"][:, 0],
        )
        rho = spec.random(0)
        pi = matching(spec, a, rho.apply(a))
        assert pi.objective == pytest.approx(lmc.weights.dot(a, a), rel=1e-9)
        moved = pi.apply(rho.apply(a))
        assert all(torch.equal(moved[name], tensor) for name, tensor in a.items())

    def test_nothing_but_zeros(self):
        spec, a = case("resnet")
        zeros = {name: torch.zeros_like(tensor) for name, tensor in a.items()}
        assert matching(spec, zeros, zeros).is_identity()

    def test_prices_do_not_change_an_assignment(self):
        generator = torch.Generator().manual_seed(0)
        gain = torch.randn(40, 40, generator=generator)
        index, improvement = assign(gain)
        prices = prices_of(gain, index)
        again, same = assign(gain, prices)
        assert torch.equal(index, again) and improvement == pytest.approx(same)
        assert torch.equal(assign(gain, torch.randn(40, generator=generator) * 3)[0], index)

    def test_prices_of_a_solved_assignment_are_found_again(self):
        """Dual variables: each row likes its own column best at these prices, which one more pass leaves as they are."""
        generator = torch.Generator().manual_seed(0)
        prices, wishes = torch.randn(2, 30, generator=generator, dtype=torch.float64)
        index = torch.randperm(30, generator=generator)
        gain = wishes[:, None] + prices - torch.rand(30, 30, generator=generator, dtype=torch.float64)
        gain[torch.arange(30), index] = wishes + prices[index]
        assert torch.equal(assign(gain)[0], index)
        assert torch.allclose(prices_of(gain, index, prices), prices)


class TestWhatIsMatched:
    def test_statistics_move_but_have_no_say(self):
        spec, a = case("resnet")
        b = unrelated(a, 1)
        pi = matching(spec, a, b)
        loud = {
            name: 100 * torch.randn(t.shape) if name in spec.buffers and t.is_floating_point() else t
            for name, t in b.items()
        }
        again = matching(spec, a, loud)
        assert again == pi and again.objective == pi.objective
        index = pi["s1"]
        assert torch.equal(pi.apply(loud)["norm1.running_mean"], loud["norm1.running_mean"][index])
        assert not torch.equal(index, torch.arange(len(index)))

    def test_biases_have_a_say(self):
        a = {
            name: torch.zeros(shape)
            for name, shape in {"fc1.weight": (4, 2), "fc1.bias": (4,), "head.weight": (2, 4)}.items()
        }
        a["fc1.bias"] = torch.tensor([4.0, 3.0, 2.0, 1.0])
        b = a | {"fc1.bias": torch.tensor([1.0, 4.0, 2.0, 3.0])}
        spec = lmc.PermutationSpec.from_patterns(handwritten.mlp(1), a)
        assert matching(spec, a, b)["h1"].tolist() == [1, 3, 2, 0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype, problem):
        spec, a = problem
        a = {name: t.to(dtype) if t.is_floating_point() else t for name, t in a.items()}
        rho = spec.random(3)
        pi = matching(spec, a, rho.apply(a))
        moved = pi.apply(rho.apply(a))
        assert all(torch.equal(moved[name], t) and moved[name].dtype == t.dtype for name, t in a.items())


class TestBadInput:
    @pytest.mark.parametrize("spec", [{"fc1.weight": "h1 ."}, None])
    def test_something_else_than_a_spec(self, spec):
        a = models.mlp(12, [16, 16], 4)
        with pytest.raises(lmc.InputError, match="spec: expected a PermutationSpec, got .*from_patterns"):
            matching(spec, a, a)

    def test_another_architecture(self):
        a, b = models.mlp(12, [16, 16], 4), models.mlp(12, [16, 20], 4)
        with pytest.raises(lmc.MismatchError, match=r"fc2\.weight: shape \(16, 16\) in a, \(20, 16\) in b"):
            matching(lmc.PermutationSpec.from_patterns(handwritten.mlp(2)), a, b)
        with pytest.raises(lmc.MismatchError, match=r"fc3\.weight: in b .* missing in a"):
            matching(lmc.PermutationSpec.from_patterns(handwritten.mlp(2)), a, models.mlp(12, [16, 16, 16], 4))

    def test_a_spec_of_something_else(self):
        spec, _ = case("mlp")
        other = models.mlp(12, [16, 20, 16], 4)
        with pytest.raises(lmc.SpecError, match=r"fc2\.weight.*\(24, 16\).*\(20, 16\)"):
            matching(spec, other, other)

    def test_values_that_are_not_finite(self):
        spec, a = case("mlp")
        b = {name: tensor.clone() for name, tensor in a.items()}
        b["fc2.weight"][3, 5] = float("nan")
        with pytest.raises(lmc.WeightsError, match=r"fc2\.weight of b: 1 of 384 values.*\(3, 5\)"):
            matching(spec, a, b)
        b["fc2.weight"][3, 5], b["fc2.weight"][3, 6] = float("inf"), -float("inf")
        with pytest.raises(lmc.WeightsError, match=r"fc2\.weight of a: 2 of 384"):
            matching(spec, b, a)

    def test_different_precision(self):
        spec, a = case("mlp")
        moved = spec.random(4).apply({name: tensor.half() for name, tensor in a.items()})
        assert matching(spec, a, moved) == spec.random(4).inverse()  # both in the wider of the two

    @pytest.mark.parametrize("options", [{"restarts": 0}, {"max_sweeps": 0}])
    def test_options(self, options):
        spec, a = case("mlp")
        with pytest.raises(lmc.InputError, match=f"{next(iter(options))}=0"):
            matching(spec, a, a, **options)


class TestInterrupt:
    def test_returns_the_best_finished_run(self, monkeypatch):
        spec, a = case("mlp")
        b = unrelated(a, 4)
        whole = matching(spec, a, b, restarts=2)
        descend, calls = MODULE._descend, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) > 2:
                raise KeyboardInterrupt
            return descend(*args)

        monkeypatch.setattr(MODULE, "_descend", interrupted)
        with pytest.warns(UserWarning, match="2 finished runs"):
            pi = matching(spec, a, b, restarts=8)
        assert pi == whole and pi.objective == whole.objective

    def test_before_the_first_run_ends_nothing_moves(self, monkeypatch):
        spec, a = case("mlp")
        b = unrelated(a, 4)

        def stop(self, i, only=None):
            raise KeyboardInterrupt

        monkeypatch.setattr(descent_module.Descent, "visit", stop)
        with pytest.warns(UserWarning, match="0 finished runs"):
            pi = matching(spec, a, b)
        assert pi.is_identity() and pi.objective == pi.info["objective_at_identity"]


ON_DISK = importlib.import_module("lmc.align.weight_matching.on_disk")


def stored(folder: Path, weights: dict[str, Tensor], shards: int = 3) -> Path:
    """The weights in a folder of several files with an index."""
    folder.mkdir()
    names = list(weights)
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: weights[n].contiguous() for n in names if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


class TestOnDisk:
    def test_as_in_memory_bit_for_bit(self, problem, tmp_path):
        spec, a = problem
        b = unrelated(a, 5)
        files = stored(tmp_path / "a", a), stored(tmp_path / "b", b, shards=2)
        held, found = matching(spec, a, b, restarts=3), matching(spec, *files, restarts=3)
        assert found == held and found.objective == held.objective
        assert found.info["objective_at_identity"] == held.info["objective_at_identity"]
        for mine, its in zip(held.info["runs"], found.info["runs"], strict=True):
            assert sum(p["visits"] for p in its.pop("passes")) == its["visits"] and its == mine
        opened = lmc.open_checkpoint(files[1])
        assert same(found.apply(opened).load(), held.apply(b), ordered=False)
        written = lmc.merge.write(lmc.merge.average, [found.apply(opened)], tmp_path / "out", progress=False)
        assert same(written, found.apply(opened)) and matching(spec, files[0], written).is_identity()

    def test_each_tensor_is_read_once_for_each_visit(self, tmp_path):
        spec, a = case("mlp")
        found = matching(spec, stored(tmp_path / "a", a), stored(tmp_path / "b", spec.random(0).apply(a)))
        (run,) = found.info["runs"]
        visited = [found.info["bytes_read"], *(-p["bytes_read"] for p in run["passes"])]
        sizes = {name: 2 * tensor.nbytes for name, tensor in a.items()}
        assert sum(visited) == 2 * sum(sizes.values())  # the objective, before and after
        assert run["passes"][0]["visits"] == 3 and run["passes"][0]["bytes_read"] <= 2 * sum(sizes.values())

    def test_patterns_that_have_not_met_weights(self, tmp_path):
        spec, a = case("mlp")
        unbound = lmc.PermutationSpec.from_patterns(handwritten.mlp(3))
        b = stored(tmp_path / "b", spec.random(3).apply(a))
        assert matching(unbound, stored(tmp_path / "a", a), lmc.open_checkpoint(b)) == spec.random(3).inverse()

    @pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float16)])
    def test_other_precisions(self, dtypes, tmp_path):
        spec, a = case("cnn with norms, flattened")
        pair = [
            {n: t.to(d) if t.is_floating_point() else t for n, t in weights.items()}
            for weights, d in zip((a, related(spec.random(2).apply(a), 0.2)), dtypes, strict=True)
        ]
        held = matching(spec, *pair)
        found = matching(spec, stored(tmp_path / "a", pair[0]), stored(tmp_path / "b", pair[1]))
        assert found == held and found.objective == held.objective and not held.is_identity()

    def test_in_parts(self, problem, tmp_path, monkeypatch):
        spec, a = problem
        b = related(spec.random(1).apply(a), 0.3)
        files = stored(tmp_path / "a", a), stored(tmp_path / "b", b)
        monkeypatch.setattr(ON_DISK, "PART", 5)
        assert matching(spec, *files) == matching(spec, a, b)

    def test_ties_and_chunks(self, tmp_path):
        spec, a = case("mlp")
        (tmp_path / "tied").mkdir()
        weights = {"w": torch.randn(6, 4), "far": torch.randn(5, 6)}
        save_file(weights, tmp_path / "tied" / "model.safetensors", metadata={"again": "w", "apart": "w"})
        opened = lmc.open_checkpoint(tmp_path / "tied")
        patterns = {"w": "h .", "again": "h .", "apart": ". .", "far": ". h"}
        spec = lmc.PermutationSpec.from_patterns(patterns, opened)
        moved, expected = spec.random(0).apply(opened), spec.random(0).apply(opened.load())
        assert same(moved.load(), expected, ordered=False) and moved.ties == {"again": "w"}
        for name, tensor in expected.items():
            chunks = [moved.read(name, slice(i, min(i + 7, tensor.numel()))) for i in range(0, tensor.numel(), 7)]
            assert torch.equal(torch.cat(chunks), tensor.flatten())

    @pytest.mark.parametrize("name", ["mlp", "one group on both axes", "grouped queries"])
    def test_goes_on_after_an_interrupt_at_every_visit(self, name, tmp_path, monkeypatch):
        spec, a = case(name)
        files = stored(tmp_path / "a", a), stored(tmp_path / "b", unrelated(a, 3))
        whole, journal = matching(spec, *files, restarts=2), tmp_path / "kept" / "journal"
        step, left = ON_DISK.DescentOnDisk._step, [0]

        def interrupted(self, i, only):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return step(self, i, only)

        monkeypatch.setattr(ON_DISK.DescentOnDisk, "_step", interrupted)
        visits = 0
        while True:
            try:
                found = matching(spec, *files, restarts=2, journal=journal)
                break
            except KeyboardInterrupt:
                visits, left[0] = visits + 1, 1
                with open(journal, "ab") as file:  # killed while it wrote
                    file.write(b'["torn')
        assert found == whole and found.objective == whole.objective
        assert visits == sum(run["visits"] for run in whole.info["runs"])
        again = matching(spec, *files, restarts=2, journal=journal)
        assert again == whole and again.info["bytes_read"] == 0 and again.info["found_in_journal"] > visits

    def test_journals_of_others(self, tmp_path):
        spec, a = case("mlp")
        files, journal = (stored(tmp_path / "a", a), stored(tmp_path / "b", unrelated(a, 3))), tmp_path / "journal"
        matching(spec, *files, journal=journal)
        for other, options, differs in (
            (spec, {"restarts": 2}, "restarts"),
            (spec, {"seed": 1}, "seed"),
            (spec.without("h1"), {}, "spec"),
        ):
            with pytest.raises(lmc.InputError, match=f"journal: the journal of another .* differs in {differs};"):
                matching(other, *files, journal=journal, **options)
        with pytest.raises(lmc.InputError, match="differs in a, b;"):
            matching(spec, *reversed(files), journal=journal)
        journal.write_text("notes\nof mine\n")
        with pytest.raises(lmc.DataError, match="journal: not a journal"):
            matching(spec, *files, journal=journal)
        with pytest.raises(lmc.InputError, match="journal: what is found is kept for checkpoints on disk"):
            matching(spec, a, a, journal=journal)

    def test_bad_weights(self, tmp_path):
        spec, a = case("mlp")
        good = stored(tmp_path / "good", a)
        bad = a | {"fc2.weight": torch.full_like(a["fc2.weight"], float("nan"))}
        with pytest.raises(lmc.WeightsError, match=r"fc2.weight of b: .* NaN"):
            matching(spec, good, stored(tmp_path / "nan", bad))
        with pytest.raises(lmc.MismatchError, match=r"fc1.bias: shape"):
            matching(spec, good, stored(tmp_path / "shape", a | {"fc1.bias": torch.zeros(3)}))
        with pytest.raises(lmc.MismatchError, match=r"fc1.bias: in a .* missing in b"):
            matching(spec, good, stored(tmp_path / "less", {n: t for n, t in a.items() if n != "fc1.bias"}))
        with pytest.raises(lmc.SpecError, match="the spec moves conv1.weight"):
            matching(case("resnet")[0], good, good)
        with pytest.raises(lmc.DataError, match="nowhere: no such file or folder"):
            matching(spec, good, tmp_path / "nowhere")

    def test_normalised_weights_are_loaded(self, tmp_path):
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        torch.nn.utils.parametrizations.weight_norm(model[0])
        a = {n: torch.randn(t.shape) for n, t in model.state_dict().items()}
        spec = lmc.permutation_spec(model, torch.randn(2, 4), progress=False)
        b = spec.random(0).apply(a)
        files = stored(tmp_path / "a", a), stored(tmp_path / "b", dict(b))
        assert matching(spec, *files) == matching(spec, a, b) == spec.random(0).inverse()

    @pytest.mark.thorough
    @pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process as Linux tells it")
    def test_memory_stays_within_the_plan(self, tmp_path):
        depth, width = 64, 512
        patterns = {f"{i}.weight": f"h{i + 1} h{i}" if i else "h1 ." for i in range(depth)}
        generator = torch.Generator().manual_seed(0)
        a = {name: torch.randn(width, width, generator=generator) for name in patterns}
        spec = lmc.PermutationSpec.from_patterns(patterns, a)
        stored(tmp_path / "a", a), stored(tmp_path / "b", dict(spec.random(0).apply(a)))
        spec.save(tmp_path / "spec.json")
        # Freed memory goes back to the system at once, so that the peak is that of what is in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", MEASURE, str(tmp_path)]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        grown, planned, right = map(int, printed.split())
        size = 4 * depth * width**2
        assert 1e6 < grown < planned + 4e6 and planned < 0.6 * size and right  # of one model


MEASURE = """
import re, sys
from pathlib import Path
import lmc, scipy.optimize

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder = Path(sys.argv[1])
spec = lmc.PermutationSpec.load(folder / "spec.json")
Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
before = memory("VmRSS")
pi = lmc.weight_matching(spec, folder / "a", folder / "b", progress=False)
print(memory("VmHWM") - before, pi.info["memory"], int(pi == spec.random(0).inverse()))
"""


def unrelated(like: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Unrelated weights of the same shapes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: torch.randn(t.shape, generator=generator) / max(1, t[0].numel() if t.ndim > 1 else 1) ** 0.5
        if t.is_floating_point()
        else t.clone()
        for name, t in like.items()
    }


def related(a: dict[str, Tensor], amount: float) -> dict[str, Tensor]:
    """A network near `a`, so that every run finds the same optimum."""
    other = unrelated(a, 50)
    return {name: t + amount * other[name] if t.is_floating_point() else t for name, t in a.items()}


def test_long_products_are_summed_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(gains, "CHUNK", 3)
    x, y = torch.arange(8.0), torch.arange(8.0).flip(0)
    assert gains.dot(x, y) == float(x @ y) == gains.inner_product({"w": x.view(2, 4)}, {"w": y.view(2, 4)})


def test_gains_of_pairs_are_summed_in_double_precision():
    """Terms that cancel leave what single precision loses."""
    torch.manual_seed(0)
    model = small_models.Attention()
    spec = lmc.PermutationSpec.from_patterns(handwritten.ATTENTION, model, head=4)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    (block,) = [block for block in build_blocks(spec, weights) if block.inner]
    place = block.places[0]
    slices = place.slices(weights[place.tensor])
    mine = {"a": 1e4 * slices, "b": 1e4 * slices, "c": slices}
    theirs = {"a": slices, "b": -slices, "c": slices}
    gain, _ = separate_pairs(replace(block, inner=()), mine, theirs)
    flat = slices.flatten(1)
    assert torch.allclose(gain, (flat @ flat.T).double(), atol=1e-9)
    exact = 1.0 + 1e-12
    by_pairs, _ = gains._pairs(block, mine, theirs, lambda *_: ({}, exact))
    assert bool((by_pairs == exact).all())


def test_groups_that_read_tensors_of_two_dtypes_are_matched():
    class Head(nn.Module):
        """With its last layer in double precision."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4).double()

        def forward(self, x):
            return self.head(self.body(x).relu().double())

    torch.manual_seed(0)
    model = Head()
    spec = lmc.permutation_spec(model, torch.randn(2, 6), progress=False)
    planted = spec.random(1)
    found = lmc.weight_matching(spec, model, planted.apply(model), progress=False)
    back = found.apply(planted.apply(model))
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_all_places_of_a_nested_group_in_one_tensor_are_seen_from_its_head():
    """Queries and keys of two heads in one tensor: units of a head have two places in its slice."""
    heads = Table((0,), np.array([[0, 1, 4, 5], [2, 3, 6, 7]]))
    units = (Table((0,), np.array([[0], [1]])), Table((0,), np.array([[4], [5]])), Table((0,), np.array([[2], [3]])))
    found = _relative({"qk": units, "other": units}, [("qk", heads)], {"qk": (8, 3), "other": (8, 3)})
    assert [(table.dims, table.rows.tolist()) for table in found[sub_tensor(0)]] == [
        ((0,), [[0], [1]]),
        ((0,), [[2], [3]]),
    ]
    assert list(found) == [sub_tensor(0)]
