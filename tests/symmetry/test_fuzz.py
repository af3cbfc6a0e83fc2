"""No unsound group in any of several hundred random programs."""

import os
from collections import Counter

import pytest
from fuzz.check import outcomes
from fuzz.generate import random_program

from lmc.symmetry.rules import RULES

BATCHES, EACH = 30, 20  # 600 programs, traced 20 at a time; by default one batch
FEW = [pytest.param(n, marks=[pytest.mark.thorough] if n else []) for n in range(BATCHES)]
REGRESSIONS = (
    1624,  # the argmax over an axis on which all values are equal
    10794,  # group norm over copies of one channel that lie in two groups
    11480,  # group norm over padding that lies in two groups
)


@pytest.mark.parametrize("batch", FEW)
def test_random_programs_are_sound(batch: int) -> None:
    results = outcomes([random_program(seed) for seed in range(batch * EACH, (batch + 1) * EACH)])
    unsound = [str(o) for o in results if not o.sound]
    untraced = [o.untraced for o in results if o.untraced]
    print(f"{len(results)} programs, {sum(len(o.groups) for o in results)} groups, {len(untraced)} not traced")
    assert not unsound, "\n".join(unsound)
    assert len(untraced) <= EACH // 10, untraced


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_programs_that_once_were_unsound(seed: int) -> None:
    (result,) = outcomes([random_program(seed)])
    assert result.sound, str(result)


def test_programs_differ_and_cover_the_operators() -> None:
    sources = [random_program(seed).source for seed in range(BATCHES * EACH)]
    assert len(set(sources)) == len(sources)
    words = Counter(word for word in OPERATORS for source in sources if word in source)
    assert all(words[word] >= 2 for word in OPERATORS), words


def test_same_seed_same_program() -> None:
    assert random_program(3).source == random_program(3).source
    assert random_program(3).inputs().equal(random_program(3).inputs())


OPERATORS = (
    "F.linear", "einsum", "tensordot", "softmax", "layer_norm", "group_norm", "instance_norm", "batch_norm",
    "conv1d", "conv2d",
    "conv_transpose", "torch.cat", "torch.stack", ".chunk(", ".split(", ".flip(", ".roll(", ".permute(",
    ".unflatten(", ".flatten(",
    ".reshape(", ".repeat(", "repeat_interleave", ".expand(", "index_select", "argmax", "gather", "scatter", "topk",
    "sort", "cumsum",
    "F.pad", "masked_fill", ".clone()", "diagonal", ".unfold(", "unsqueeze(-2)", "nn.LSTM", "nn.GRU",
    "nn.MultiheadAttention",
    "scaled_dot_product_attention", "torch.where", "F.glu", ".t()", "max_pool", "logsumexp", "fft",
)  # fmt: skip


# Rules that no program is drawn for, and why.
NOT_DRAWN = {
    "contractions.attention": "torch.export takes attention apart: see tests/symmetry/test_rules.py",
    "contractions.convolution": "what convolutions become in recorded runs: see tests/symmetry/test_operators.py",
    "indexing.grouped_mm": "needs rows sorted by expert: see tests/symmetry/test_discover.py",
    "contractions.trilinear": "what bilinear layers become on some devices: see tests/symmetry/test_operators.py",
    "moves.as_strided": "torch.export issues it for no program: see tests/symmetry/test_operators.py",
}


def test_programs_for_every_rule_are_sound() -> None:
    """Statements for rarely needed rules, and copies that are mirrored, tiled, interleaved and paired."""
    count = 120 if os.environ.get("LMC_THOROUGH") else EACH
    forms: Counter[tuple[str, str]] = Counter()
    programs = [random_program(seed, every_rule=True) for seed in range(count)]
    results = [o for k in range(0, count, EACH) for o in outcomes(programs[k : k + EACH], met=forms)]
    met = {name for name, _ in forms}
    print(f"{len(met)} rules in {len(forms)} forms of arguments; {sum(bool(o.groups) for o in results)} with groups")
    unsound = [str(o) for o in results if not o.sound]
    assert not unsound, "\n".join(unsound)
    rules = {f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}" for rule in RULES.values()}
    print("not drawn:", sorted(rules - met - set(NOT_DRAWN)))
    assert not os.environ.get("LMC_THOROUGH") or len(rules - met - set(NOT_DRAWN)) <= 8
