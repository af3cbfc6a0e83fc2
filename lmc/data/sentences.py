"""Sentences of a toy grammar: text for character-level language models, made on the spot."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lmc.errors import InputError

ALPHABET = " .abcdefghijklmnopqrstuvwxyz"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ADJECTIVES = ("small", "old", "red", "quiet")
NOUNS = ("cat", "dog", "bird", "cow", "horse", "frog")
VERBS = ("see", "hear", "follow", "greet")


@dataclass(frozen=True, repr=False, eq=False)
class Text:
    """Windows of running text; `train` and `test` are pairs `(inputs, targets)`, both `(N, context)` int64.

    Numbers count characters of `alphabet`; the target at each position is the next character. `provenance` says how the
    text came about.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    alphabet: str
    provenance: str

    def to(self, device: torch.device | str) -> "Text":
        """The same data on another device."""
        train, test = (tuple(part.to(device) for part in split) for split in (self.train, self.test))
        return replace(self, train=train, test=test)

    def encode(self, text: str) -> Tensor:
        """`(T,)` numbers of the characters; `InputError` for one that is not in the alphabet."""
        if unknown := sorted(set(text) - set(self.alphabet)):
            raise InputError(f"{unknown[0]!r} is not in the alphabet {self.alphabet!r}")
        return torch.tensor([self.alphabet.index(character) for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of `(T,)` numbers."""
        return "".join(self.alphabet[int(token)] for token in tokens)

    def __repr__(self) -> str:
        windows, context = self.train[0].shape
        return (
            f"Text({self.name}: {windows} train and {len(self.test[0])} test windows of {context} characters, "
            f"alphabet of {len(self.alphabet)})"
        )


def toy_text(seed: int = 0, *, context: int = 32, train: int = 2000, test: int = 500) -> Text:
    """Windows of `context` characters from a stream of toy sentences; no download.

    Every second sentence, on average, is a sum ("three plus four is seven."), the others have a subject and an object
    whose number decides the endings ("two small dogs follow an old cat."). Much of a sentence follows from its
    beginning, the rest is chance. `seed` decides the text; train and test windows come from different stretches.
    """
    for argument, size in (("context", context), ("train", train), ("test", test)):
        if size < 1:
            raise InputError(f"{argument}={size}: expected a positive number")
    random = np.random.RandomState(seed)  # its stream is frozen across versions of numpy
    text = ""
    while len(text) < (train + test) * context + 1:
        text += _sum(random) if random.randint(2) else _statement(random)
    tokens = torch.tensor([ALPHABET.index(character) for character in text])
    inputs, targets = (tokens[i : i + (train + test) * context].reshape(-1, context) for i in (0, 1))
    splits = (inputs[:train], targets[:train]), (inputs[train:], targets[train:])
    return Text("toy text", *splits, ALPHABET, f"sentences of a toy grammar drawn with seed {seed}")


def _sum(random: np.random.RandomState) -> str:
    left = random.randint(11)
    right = random.randint(11 - left)
    return f"{NUMBERS[left]} plus {NUMBERS[right]} is {NUMBERS[left + right]}. "


def _statement(random: np.random.RandomState) -> str:
    count = 1 + random.randint(4)
    verb = VERBS[random.randint(len(VERBS))] + ("s" if count == 1 else "")
    return f"{_things(count, random)} {verb} {_things(1 + random.randint(4), random)}. "


def _things(count: int, random: np.random.RandomState) -> str:
    words = [NOUNS[random.randint(len(NOUNS))] + ("s" if count > 1 else "")]
    if random.randint(2):
        words.insert(0, ADJECTIVES[random.randint(len(ADJECTIVES))])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article if count == 1 else NUMBERS[count], *words])
