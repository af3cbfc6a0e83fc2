"""Star models: identities, planted sources, digits networks held out."""

import warnings

import numpy as np
import pytest
import torch
from alignment_cases import CASES, digits
from torch import Tensor, nn

import lmc
from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.merge.with_training.star import Star, star_model
from lmc.weights import Weights


def close(a: Weights, b: Weights, atol: float = 0.0) -> None:
    torch.testing.assert_close(dict(a), dict(b), rtol=0, atol=atol)


class Point(nn.Module):
    """A network that is its weights: the outputs are the parameter, whatever the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.at.expand(len(inputs), 2)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1)


def test_the_star_of_permuted_copies_is_their_common_network():
    case = CASES["mlp"]()
    a = case.other(3)
    copies = [a, *(case.spec.random(seed=seed).apply(a) for seed in range(3))]
    star = star_model(case.model, copies, (case.inputs, case.targets), spec=case.spec, epochs=0)
    close(star, a, atol=1e-6)
    for source in star.sources:
        close(source, a, atol=1e-6)
    found = star.paths((case.inputs, case.targets), held_out=[case.spec.random(seed=9).apply(a)], progress=False)
    assert all(values.max() < 1e-4 for values in found.barriers.values())
    assert {kind: len(values) for kind, values in found.barriers.items()} == {"regular": 4, "source": 4, "held out": 1}


def test_the_centre_of_a_quadratic_is_where_the_lines_are_lowest():
    """For |x - y|² and targets y, the mean over t and sources of the loss at (1 - t) c + t s is least in closed form."""
    inputs, goal = torch.zeros(64, 1), torch.tensor([0.5, -1.0])
    sources = [{"at": torch.tensor([2.0, 1.0])}, {"at": torch.tensor([1.0, 3.0])}]
    star = star_model(
        Point(),
        sources,
        (inputs, goal.expand(64, 2)),
        loss=squares,
        epochs=1500,
        lr=0.02,
        batch_size=64,
        progress=False,
    )
    # E (1-t)² (c - y) + E t (1-t) mean(s - y) = 0, that is 1/3 (c - y) = -1/6 mean(s - y).
    centre = goal - 0.5 * (torch.tensor([1.5, 2.0]) - goal)
    torch.testing.assert_close(star["at"], centre, rtol=0, atol=0.1)


def test_with_t_fixed_to_zero_it_is_ordinary_training():
    inputs, goal = torch.zeros(64, 1), torch.tensor([0.5, -1.0])
    star = star_model(
        Point(), [{"at": torch.tensor([2.0, 1.0])}], (inputs, goal.expand(64, 2)), span=(0.0, 0.0), loss=squares,
        epochs=800, lr=0.02, batch_size=64, progress=False,
    )  # fmt: skip
    torch.testing.assert_close(star["at"], goal, rtol=0, atol=1e-3)


def test_with_t_fixed_to_one_nothing_is_learned():
    case = CASES["mlp"]()
    sources = [case.other(3), case.other(4)]
    star = star_model(case.model, sources, (case.inputs, case.targets), span=(1.0, 1.0), epochs=2, progress=False)
    close(star, lmc.weights.mean(sources), atol=1e-6)


def test_held_out_networks_are_closer_to_the_star_than_to_each_other():
    trained = digits()
    a, b, unseen = trained.weights
    star = star_model(trained.model, [a, b], trained.data, spec=trained.spec, epochs=25, batch_size=128, progress=False)
    found = star.paths(trained.data.test, held_out=[unseen], alphas=7, progress=False)
    means = {kind: values.mean() for kind, values in found.barriers.items()}
    assert means["source"] < 0.5 * means["regular"]
    assert means["held out"] < means["regular"]
    naive = trained.barrier(a, b)
    assert means["regular"] < 0.3 * naive
    assert star.losses[-1] < star.losses[0]
    assert "2 sources, matched by weights" in str(star) and "held out" in str(found)
    frame = found.to_frame()
    assert list(frame["kind"]) == ["regular", "regular", "source", "source", "held out"]
    np.testing.assert_allclose(frame["barrier"], np.concatenate(list(found.barriers.values())))
    figure = found.plot()
    assert len(figure.data) == 5 and sum(bool(trace.showlegend) for trace in figure.data) == 3


def test_batch_statistics_of_the_centre_are_its_own():
    case = CASES["vgg-bn"]()
    sources = [case.other(3), case.other(4)]
    data = (case.inputs, case.targets)
    star = star_model(case.model, sources, data, spec=case.spec, epochs=1, progress=False)
    again = lmc.recalibrate_batchnorm(case.model, star, case.inputs)
    close({k: x.float() for k, x in star.items()}, {k: x.float() for k, x in again.items()}, atol=1e-5)


def test_the_same_seed_gives_the_same_star_and_nothing_given_is_changed():
    case = CASES["mlp"]()
    sources = [case.other(3), case.other(4)]
    kept = [{name: x.clone() for name, x in source.items()} for source in sources]
    case.model.train()
    state = torch.random.get_rng_state()
    data = (case.inputs, case.targets)
    stars = [star_model(case.model, sources, data, spec=case.spec, epochs=2, seed=s, progress=False) for s in (1, 1, 2)]
    assert torch.equal(state, torch.random.get_rng_state()) and case.model.training
    close(stars[0], stars[1])
    assert not torch.equal(stars[0]["fc1.weight"], stars[2]["fc1.weight"])
    for source, before in zip(sources, kept, strict=True):
        close(source, before)


def test_an_interrupt_keeps_what_is_done():
    case = CASES["mlp"]()
    calls = 0

    def stop(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)

    data = (case.inputs, case.targets)
    with pytest.warns(UserWarning, match="the star was trained for 2 epochs"):
        star = star_model(case.model, [case.other(3)], data, loss=stop, epochs=9, batch_size=100, progress=False)
    assert star.interrupted and len(star.losses) == 2


def test_it_starts_where_it_is_told():
    case = CASES["mlp"]()
    begin = case.other(8)
    star = star_model(case.model, [case.other(3)], (case.inputs, case.targets), start=begin, epochs=0)
    close(star, begin)
    assert isinstance(star, Star) and len(star) == len(begin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lmc.weights.distance(star, begin) == 0.0


def test_bad_input_is_refused():
    case = CASES["mlp"]()
    a, data = case.other(3), (case.inputs, case.targets)
    with pytest.raises(InputError, match="at least one"):
        star_model(case.model, [], data)
    with pytest.raises(InputError, match="expected a list of models"):
        star_model(case.model, a, data)
    with pytest.raises(InputError, match="span"):
        star_model(case.model, [a], data, span=(0.5, 0.2))
    with pytest.raises(MismatchError, match=r"fc1.weight.*models\[1\]"):
        star_model(case.model, [a, a | {"fc1.weight": torch.zeros(2, 2)}], data)
    with pytest.raises(WeightsError, match=r"fc1.weight of models\[0\]"):
        star_model(case.model, [a | {"fc1.weight": torch.full((16, 12), torch.nan)}], data)
    with pytest.raises(DataError):
        star_model(case.model, [a], (case.inputs[:0], case.targets[:0]))
    star = star_model(case.model, [a], data, epochs=0)
    with pytest.raises(InputError, match="held_out: expected a list"):
        star.paths(data, held_out=case.model)
