"""No unsound group in any of several hundred random programs."""

from collections import Counter

import pytest
from fuzz.check import outcomes
from fuzz.generate import random_program

BATCHES, EACH, TOGETHER = 20, 30, 6  # 600 programs, traced 6 at a time
REGRESSIONS = (
    1624,  # the argmax over an axis on which all values are equal
    10794,  # group norm over copies of one channel that lie in two groups
    11480,  # group norm over padding that lies in two groups
)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_programs_are_sound(batch: int) -> None:
    programs = [random_program(seed) for seed in range(batch * EACH, (batch + 1) * EACH)]
    results = [o for k in range(0, EACH, TOGETHER) for o in outcomes(programs[k : k + TOGETHER])]
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
