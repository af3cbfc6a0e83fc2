"""Matchings carried out step by step: partial permutations, similarities, receptive fields, and the explorer of them."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import traitlets
from support import embedded
from torch import nn

import lmc
from lmc.align.study.inspect import inspect_matching, partial, placed, receptive_fields
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.path import loss_path
from lmc.views.widgets.explorer import FOLDER
from lmc.views.widgets.matching import state

SIZE = 10


def random_weights(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}


MODEL = nn.Sequential(nn.Linear(16, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, 3))
INPUTS = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
SPEC = lmc.permutation_spec(MODEL, INPUTS[:2])
A = random_weights(MODEL, 2)
DATA = INPUTS, torch.func.functional_call(MODEL, A, (INPUTS,)).argmax(1)
HIDDEN = SPEC.random(seed=3)
B = HIDDEN.apply(A)  # a permuted copy: the planted truth is the inverse
TRUTH = HIDDEN.inverse()
FIRST, SECOND = SPEC.groups


@pytest.fixture(scope="module")
def matching():
    return inspect_matching(TRUTH, A, B, model=MODEL, data=DATA, steps=5, alphas=5)


@pytest.mark.parametrize("seed", range(4))
def test_swaps_carry_out_a_permutation(seed):
    generator = torch.Generator().manual_seed(seed)
    index, order = (torch.randperm(9, generator=generator) for _ in range(2))
    assert torch.equal(partial(index, order, 0), torch.arange(9))
    assert torch.equal(partial(index, order, 9), index)
    for count in range(10):
        now = partial(index, order, count)
        assert sorted(now.tolist()) == list(range(9))
        assert torch.equal(now[order[:count]], index[order[:count]])
    changed = [int((partial(index, order, k) != partial(index, order, k + 1)).sum()) for k in range(9)]
    assert set(changed) <= {0, 2}


def test_b_is_the_same_function_at_every_step():
    orders = {name: torch.arange(SIZE) for name in SPEC.groups}
    expected = torch.func.functional_call(MODEL, B, (INPUTS,))
    for share in (0.0, 0.3, 0.7, 1.0):
        moved = placed(TRUTH, orders, share).apply(B)
        torch.testing.assert_close(torch.func.functional_call(MODEL, moved, (INPUTS,)), expected)
    assert placed(TRUTH, orders, 1.0) == TRUTH and placed(TRUTH, orders, 0.0).is_identity()


def test_a_planted_permutation_is_carried_out_to_the_end(matching):
    assert matching.shares.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    for name, group in matching.groups.items():
        np.testing.assert_array_equal(group.index, TRUTH[name].numpy())
        np.testing.assert_allclose(group.similarity[-1].diagonal(), 1.0, atol=1e-6)
        assert group.agreement[-1] == pytest.approx(1.0) and group.agreement[0] < 0.5
    assert matching.objective[-1] == pytest.approx(lmc.weights.dot(A, A))
    assert (np.diff(matching.objective) > -1e-6).all() and matching.objective[0] < 0.5 * matching.objective[-1]
    assert matching.barriers[-1] == pytest.approx(0.0, abs=1e-5) and matching.barriers[0] > 0.5
    text = str(matching)
    assert FIRST in text and "0.000 (data loss)" in text


def test_the_first_step_is_b_as_it_is(matching):
    group = matching.groups[FIRST]
    ours, theirs = (torch.cat([w["0.weight"], w["0.bias"][:, None], w["2.weight"].T], 1).double() for w in (A, B))
    expected = nn.functional.normalize(ours, dim=1) @ nn.functional.normalize(theirs, dim=1).T
    np.testing.assert_allclose(group.similarity[0], expected, atol=1e-6)
    line = loss_path(MODEL, A, B, DATA, alphas=5)
    np.testing.assert_allclose(matching.paths[0].losses["data"], line.losses["data"], rtol=1e-6)
    end = [path.losses["data"][-1] for path in matching.paths]  # the same function
    np.testing.assert_allclose(end, end[0], rtol=1e-5)


def test_receptive_fields_are_those_of_the_first_layer(matching):
    ours, theirs = matching.groups[FIRST].fields
    np.testing.assert_array_equal(ours, A["0.weight"].reshape(SIZE, 4, 4))
    np.testing.assert_array_equal(theirs[TRUTH[FIRST]], ours)
    assert matching.groups[SECOND].fields is None
    assert receptive_fields(SPEC, FIRST, A, (1, 2, 8)) is None and receptive_fields(SPEC, FIRST, A, (2, 2, 4)) is None
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 2))
    spec = lmc.permutation_spec(net, torch.randn(1, 3, 4, 4))
    (group,) = spec.groups
    kernels = receptive_fields(spec, group, net.state_dict(), None)
    np.testing.assert_allclose(kernels, net[0].weight.detach().mean(1), rtol=1e-6)


def test_a_wide_group_is_shown_in_part():
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    spec = lmc.permutation_spec(model, torch.randn(1, 4))
    hidden = spec.random(seed=0)
    a = random_weights(model, 0)
    made = inspect_matching(hidden.inverse(), a, hidden.apply(a), steps=2)
    (group,) = made.groups.values()
    assert group.similarity.shape == (3, 64, 64) and group.size == 100 and made.paths == ()
    assert np.isnan(made.barriers).all() and group.agreement[-1] == pytest.approx(1.0)
    json.dumps(state(made, group.name), allow_nan=False)


def test_an_interrupt_keeps_the_steps_that_are_done(monkeypatch):
    plain, calls = Evaluator.__call__, []

    def breaks(self, states):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, states)

    monkeypatch.setattr(Evaluator, "__call__", breaks)
    with pytest.warns(UserWarning, match=r"interrupted: \d of 6 steps"):
        made = inspect_matching(TRUTH, A, B, model=MODEL, data=DATA, steps=5, alphas=5)
    assert 2 <= len(made.shares) < 6 and made.shares[0] == 0.0 and made.shares[-1] == 1.0
    assert len(made.paths) == len(made.shares) == len(made.groups[FIRST].similarity)


def test_unusable_arguments_are_named():
    cases = [
        ("steps=0", {"steps": 0}),
        ("model and data", {"model": MODEL}),
        ("no group 'x'", {"groups": ["x"]}),
        ("at least one", {"groups": []}),
    ]
    for message, options in cases:
        with pytest.raises(InputError, match=message):
            inspect_matching(TRUTH, A, B, **options)


def test_frame_and_figure(matching):
    frame = matching.to_frame()
    assert list(frame.columns) == ["placed", "objective", f"agreement of {FIRST}", f"agreement of {SECOND}", "barrier"]
    np.testing.assert_array_equal(frame["barrier"], matching.barriers)
    before, after, course = matching.plot(SECOND).data
    np.testing.assert_array_equal(before.z, matching.groups[SECOND].similarity[0])
    np.testing.assert_array_equal(after.z, matching.groups[SECOND].similarity[-1])
    np.testing.assert_array_equal(course.y, matching.barriers)
    with pytest.raises(InputError, match="group='x'"):
        matching.plot("x")


def test_the_widgets_of_one_matching_stay_in_step(matching):
    first, second = matching.explore(), matching.explore(SECOND)
    first.placed = 0.4
    assert second.placed == 0.4 and second.group == first.group
    with pytest.raises(traitlets.TraitError, match="expected one of"):
        first.group = "x"
    with pytest.raises(traitlets.TraitError):
        first.placed = 1.5
    assert repr(first) == f"MatchingExplorer({FIRST}, {SECOND}; 6 steps)"
    bundle = first._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert embedded(data["text/html"])["placed"] == 0.4


def test_the_page_stands_alone_and_holds_the_matching(matching, tmp_path):
    matching.save_html(tmp_path / "page.html", SECOND)
    document = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', document)
    assert set(re.findall(r"https?://[^\s\"']+", document)) <= {"http://www.w3.org/2000/svg"}
    content = embedded(document)
    assert content["group"] == SECOND and content["placed"] == 0.0
    group = content["data"]["groups"][0]
    pixels = np.frombuffer(base64.b64decode(group["similarity"]), np.uint8).reshape(6, SIZE, SIZE)
    assert (pixels[-1].diagonal() == 255).all()
    fields = np.frombuffer(base64.b64decode(group["fields"]["a"]), np.int8).reshape(SIZE, 16)
    assert (np.abs(fields).max(1) == 127).all()
    np.testing.assert_allclose(content["data"]["barriers"], matching.barriers, atol=1e-5)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; the browser tests run this code too")
def test_the_browser_swaps_as_python_does():
    generator = torch.Generator().manual_seed(0)
    index, order = (torch.randperm(9, generator=generator) for _ in range(2))
    script = """
    import { placing, positions } from "MODULE";
    const [index, order] = GIVEN;
    console.log(JSON.stringify([
      Array.from({ length: 10 }, (_, k) => placing(index, order, k).now),
      positions(index, order, 1), positions(index, order, 0.5 / 9),
    ]));
    """
    module = base64.b64encode((FOLDER / "js" / "matching_steps.js").read_bytes()).decode()
    script = script.replace("MODULE", f"data:text/javascript;base64,{module}")
    script = script.replace("GIVEN", json.dumps([index.tolist(), order.tolist()]))
    output = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    steps, end, between = json.loads(output.stdout)
    assert steps == [partial(index, order, k).tolist() for k in range(10)]
    assert end == torch.argsort(index).tolist()
    half = (torch.arange(9) + torch.argsort(torch.tensor(steps[1]))) / 2  # each unit half of its way
    assert between == half.tolist()
