"""Random programs by seed."""

import random
from collections.abc import Callable

import torch

from .computations import COMPUTATIONS
from .moves import MOVES
from .program import Draft, Program, source_of
from .rare import RARE

INPUTS = ((2, 3), (3, 4), (2, 3, 4), (2, 4, 3), (2, 3, 4, 4), (2, 4, 3, 3))


def swarm(choices: random.Random, every_rule: bool) -> list[Callable[[Draft], str]]:
    """The kinds of statements one program draws from: a few, so that programs differ more than their average would.

    (Swarm testing: Groce et al. 2012, leaving features out finds more faults than using all of them everywhere.)
    """
    kinds = choices.sample(MOVES, choices.randint(2, 8)) + choices.sample(COMPUTATIONS, choices.randint(2, 7))
    return kinds + 2 * choices.sample(RARE, choices.randint(2, 6)) if every_rule else kinds


def close(d: Draft) -> str:
    """The result: the last value and up to two that nothing has read, through a parameter over most axes, or summed."""
    names = list(d.values)
    loose = [n for n in names if n not in d.used and n != names[-1]]
    parts = []
    for name in [*loose[-2:], names[-1]]:
        shape = d.shape(name)
        read = [k for k in range(1, len(shape)) if d.random.random() < 0.75] or [len(shape) - 1]
        if not shape or d.random.random() < 0.08:
            parts.append(f"{name}.flatten()")
        elif d.random.random() < 0.15 and len(shape) > 1:
            parts.append(f"torch.tanh({name}).sum({d.axis(name)}).flatten()")
        elif d.random.random() < 0.1 and len(shape) > 1:
            parts.append(f"(torch.tanh({name}) * {d.parameter(*shape[1:])}).flatten()")
        else:
            weight = d.parameter(*(shape[k] for k in read), d.size())
            parts.append(
                f"torch.tensordot(torch.sin({name}), {weight}, dims=({read}, {list(range(len(read)))})).flatten()"
            )
    return f"torch.cat([{', '.join(parts)}])"


def lift(d: Draft) -> None:
    """One or two computations on the input, so that there are units to move."""
    for _ in range(d.random.choice([1, 2])):
        x, m = "x", d.size()
        if len(d.shape(x)) == 4 and d.random.random() < 0.7:
            d.emit(f"torch.tanh(F.conv2d({x}, {d.parameter(m, d.shape(x)[1], 2, 2)}, {d.parameter(m)}))")
        else:
            d.emit(f"torch.tanh(F.linear({x}, {d.parameter(m, d.shape(x)[-1])}, {d.parameter(m)}))")


def random_program(
    seed: int,
    steps: tuple[int, int] = (3, 12),
    sizes: tuple[int, ...] = (2, 3, 4, 6),
    inputs: tuple[tuple[int, ...], ...] = INPUTS,
    limit: int = 3000,
    every_rule: bool = False,
) -> Program:
    """The program of a seed: `steps` (at least, at most) random statements between the input and the result.

    `every_rule`: also from the statements for rules that are rarely needed.
    Statements that do not fit the values at hand (wrong shape, too large, not finite) are drawn again.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        d = Draft(random.Random(seed), sizes=sizes, limit=limit)
        shape = d.random.choice(inputs)
        d.values["x"] = torch.randn(shape)
        lift(d)
        del d.values["x"]  # the input is read again only through what was made of it
        kinds = swarm(d.random, every_rule)
        wanted = len(d.lines) + d.random.randint(*steps)
        for _ in range(20 * wanted):
            if len(d.lines) >= wanted:
                break
            statement = d.random.choice(kinds)
            try:
                statement(d)
            except (LookupError, ValueError, RuntimeError, IndexError, ZeroDivisionError):
                continue  # does not fit
        return Program(seed, source_of(d, close(d)), shape)
