"""Two networks connected as well as can be, within a time: the one call that chooses among all others."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from lmc.align.connecting.elements import freedoms
from lmc.align.connecting.judge import ALPHAS, Judge, held_out, inputs_of
from lmc.align.connecting.methods import (
    MODULO,
    Candidate,
    Folded,
    Pair,
    fold,
    learn_elements,
    match_activations,
    match_modulo_group,
    match_weights,
    pass_straight_through,
    relax,
    rotate_by_activations,
    rotate_by_weights,
)
from lmc.align.connecting.paths import Paths, Time
from lmc.align.connecting.result import Attempt, Connection, SameFunction
from lmc.align.rotations.folding import Probe
from lmc.core.context import own_context, warn
from lmc.core.progress import Budget, beforehand
from lmc.errors import CertificateError, InputError, LmcError
from lmc.network.batches import as_splits, reread, to_device
from lmc.network.batchnorm import has_batchnorm
from lmc.network.derived import derived_names
from lmc.network.inputs import first_of
from lmc.network.network import pick_device
from lmc.network.task import Loss, Task
from lmc.symmetry.continuous import ContinuousSymmetries, continuous_symmetries
from lmc.symmetry.find import permutation_spec, proven
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, agreeing

ENOUGH = 1e-3  # a barrier below which nothing is refined any more,
SHARE = 0.02  # or this share of the barrier as they are: what is learned of so little is the examples, not the networks
STEPS, STEPS_OF_MATRICES = 1500, 4000  # of learning
RELAXED = 300  # of the relaxation of permutations
TURNS = 4  # of straight-through matching and relaxation, at most,
GAIN = 0.9  # of the barrier is left at most, where there is another turn
REPAIRED = "statistics repaired"
LATE = "no time left"
EXACT = 1e-9  # tolerance of a permutation, which rounds nothing
ROUNDINGS = 1e3  # of the stored weights, that any other element may cost,
COARSEST = 0.05  # but no more than this share of the outputs, however coarse the dtype is
COLLECTED = 6  # forward passes that the activations of an example take, at most, of both networks
FEWEST = 64  # examples whose activations are collected, however short the time is
COLLECTING = 0.3  # share of the time left for activations
SOON = 0.5  # of all the time must be left to look for signs and mixings, which straight-through matching does without
PROVEN = 0.05  # share of all the time that finding permutations may have taken, so that they are proven as well
FINDING = 0.3  # share of the time left for what is admitted beyond permutations
BEYOND = 0.2  # share of the time left for matching modulo the whole group
PERMUTING = 0.3  # share of the time left for straight-through matching or relaxation, as scales are learned behind them


@own_context
def connect(
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    spec: PermutationSpec | UnboundSpec | None = None,
    budget: float | None = 120.0,
    steps: int | None = None,
    loss: Loss | Task | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Connection:
    """Move B onto A by whatever connects the two best, and measure the way between them before and after.

    The symmetries are found, weight matching and activation matching tried, rotations with folded norms where the units of
    a stream or inside heads may be mixed, and `lmc.align.group_matching` where units have signs or mixings. The best is
    refined by the loss of the line: permutations by straight-through and Sinkhorn matching by turns, and then the scales
    that hidden units admit; or rotations, invertible mixings and scales at once (Theus et al. 2025, arXiv:2506.22712, learned
    matching). Each permutation, and what is refined, is tried with repaired statistics too (Jordan et al. 2023,
    arXiv:2211.08403); where that is best, `path` has them.

    What is best is decided on a fifth of the training data that nothing is learned from, where they are real numbers with
    a fifth of another input mixed into each: the networks know the examples themselves by heart. Test data are
    measured on and otherwise not touched. Where the budget is not what ends it, the same seed gives the same result.

    Args:
        model: the architecture; not touched.
        a, b: modules or state dicts; neither is changed.
        data: labelled, as for `lmc.loss_path`.
        spec: the symmetries of the architecture (default: found on the first two examples).
        budget: seconds that it may take; None: as long as the methods need. Where it is too short for all, the cheaper
            methods are what was tried; weight matching always is, its first pass at least. Activations are collected of as
            many examples as there is time for. Finding the permutations is not interrupted in its middle, and is left
            unproven where it takes long (B moved is certified in any case); what is admitted beyond them is looked for
            as long as a part of the time lasts.
        steps: of learning, at most (default: 1500, and 4000 where rotations or mixings are learned).
        loss: of outputs and targets, or an `lmc.Task` (default: cross-entropy).
        seed: decides which examples are held out, and all that is random in the methods.
        device: where to run (default: where the weights are).
        progress: say what is about to be done, and show bars when it takes longer than two seconds.

    Returns:
        Both networks, the paths, the method and why it was chosen, the certificate, and all that was tried. An interrupt
        ends the search with a warning and returns the best so far.

    Raises:
        MismatchError: `a` and `b` differ in keys, shapes or device, or are not of this architecture.
        SpecError: the spec does not fit them.
        TraceError: the symmetries cannot be found; pass `spec`.
        DataError: no labelled data, or losses that are no numbers.
        WeightsError: weights that are not finite.
        InputError: a budget that is no positive number of seconds, or fewer than one step.

    Example:
        >>> import lmc
        >>> data, model = lmc.data.digits(), lmc.data.checkpoint("digits-mlp64").model()
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> b = spec.random(seed=0).apply(model)  # the same network, its units in another order
        >>> found = lmc.connect(model, model, b, data, budget=None, progress=False)
        >>> print(str(found).splitlines()[0])
        Connection by weight matching: test barrier 1.444 before, 0.000 nats after
    """
    time = Time(budget)
    if steps is not None and steps < 1:
        raise InputError(f"{steps=}: expected at least 1")
    a, b = agreeing([a, b], "ab", model=model)
    chosen = pick_device(device, a)
    a, b = ({name: tensor.to(chosen) for name, tensor in weights.items()} for weights in (a, b))
    data = reread(data)
    task = Task.of(data, loss)
    task = task.fitted(model, as_splits(data, task.targets)[0])
    learn, held, count = held_out(data, task, seed)
    made = replace(task, targets=None)  # the parts hold the targets that were made
    inputs = inputs_of(model, learn)
    example = to_device(first_of(inputs[0] if isinstance(inputs, list) else inputs, 2), chosen)
    spec = (_found(model, example, time) if spec is None else spec).bind(a)
    pair = Pair(model, a, b, spec, learn, example, made, chosen, seed, progress)
    search = _Search(
        pair, Judge(model, a, b, held, inputs, made, chosen), count, Paths(pair, data, task, time), time, steps
    )
    try:
        search.run()
    except KeyboardInterrupt:
        if not search.candidates:
            raise
        search.interrupted = True
    if search.interrupted:
        warn(f"interrupted: the best of {len(search.candidates)} candidates is returned")
    return search.result()


def _found(model: nn.Module, example: Any, time: Time) -> PermutationSpec:
    """The permutations of the architecture; proven where finding them took no good part of the time."""
    started = time.spent
    spec = permutation_spec(model, example, certify=False, progress=False)
    return spec if time.spent - started > PROVEN * time.seconds else proven(spec, model, example, trials=2)


class _Search:
    """The candidates of one pair, made one after the other while there is time.

    Args:
        count: examples that the judge has.
        steps: of learning, at most; None: as many as are usual.
    """

    def __init__(self, pair: Pair, judge: Judge, count: int, paths: Paths, time: Time, steps: int | None) -> None:
        self.pair, self.judge, self.count, self.paths, self.time, self.steps = pair, judge, count, paths, time, steps
        self.candidates: list[Candidate] = []
        self.tried: list[Attempt] = []
        self.turned: list[Candidate] = []  # those whose streams and heads were rotated
        self.folded: Folded | None = None
        self.interrupted = False
        self.judging = 0.0  # seconds

    # ---- what is tried

    def run(self) -> None:
        pair = self.pair
        self.attempt("as they are", lambda: Candidate("as they are", pair.a, pair.b, pair.spec.identity()))
        self._announce()
        self.attempt("weight matching", lambda: match_weights(pair, self.time.part()))
        _ = self.paths.naive  # from here on it is known how long the last path will take
        self.attempt("activation matching", lambda: match_activations(pair, self._affordable()))
        self._repair(self.candidates[1:])
        if pair.turns and not self.enough(SHARE):
            self.attempt("norms folded", self._folded)
        if self.folded:
            folded = self.folded
            found = [
                self.attempt(
                    "rotations by activations", lambda: rotate_by_activations(pair, folded, self._affordable())
                ),
                self.attempt("rotations by weights", lambda: rotate_by_weights(pair, folded)),
            ]
            self.turned += [candidate for candidate in found if candidate]
            self._modulo_group(lambda: _lowest(self.turned))
            self._learn(lambda: _lowest(self.turned))
        else:
            self._modulo_group(self._best_permuted)
            self._permute()
            self._repair([candidate for candidate in self.plain[1:] if candidate.permutation is not None])
            self._learn(lambda: _lowest(self.plain))
        self._repair([_lowest(self.plain)])

    def attempt(
        self, method: str, make: Callable[[], Candidate | None], *, unless: float | None = None, later: float = 0.0
    ) -> Candidate | None:
        """A candidate, judged; None if the method refuses the architecture or no more than `later` seconds are free.

        unless: share of the first barrier below which the method is not needed.
        """
        if self.interrupted:
            return None
        if unless is not None and self.enough(unless):
            self.tried.append(Attempt(method, math.nan, 0.0, "not needed"))
            return None
        if len(self.candidates) > 1 and self.time.free <= later:
            self.tried.append(Attempt(method, math.nan, 0.0, LATE))
            return None
        started = self.time.spent
        try:
            candidate = make()
            if candidate is not None and math.isnan(candidate.barrier):
                judged = self.time.spent
                candidate.barrier = self.judge(candidate.a, candidate.weights)
                self.judging = self.time.spent - judged
        except (LmcError, torch.linalg.LinAlgError) as error:  # singular mixings are no reason to end the search
            self.tried.append(Attempt(method, math.nan, self.time.spent - started, f"not here: {error}"))
            return None
        if candidate is None:
            return None
        self.interrupted = candidate.interrupted
        self.candidates.append(candidate)
        self.tried.append(Attempt(candidate.method, candidate.barrier, self.time.spent - started, candidate.note))
        return candidate

    def _repair(self, candidates: Sequence[Candidate]) -> None:
        """Each of them with statistics repaired, if that was not tried yet.

        With batch normalisation statistics are estimated anew in any case."""
        if has_batchnorm(self.pair.model):
            return
        for candidate in candidates:
            tried = any(candidate.weights is each.weights for each in self.candidates if each.repaired)
            if not tried and candidate.barrier >= ENOUGH:
                self.attempt(REPAIRED, partial(self._repaired, candidate))

    def _repaired(self, candidate: Candidate) -> Candidate:
        started = self.time.spent
        barrier = self.judge.repaired(candidate.a, candidate.weights)
        if self.judging > 0:  # the last path may have to be repaired as well
            self.paths.may_be_longer((self.time.spent - started) / self.judging)
        return replace(candidate, barrier=barrier, note=REPAIRED, repaired=True)

    def _folded(self) -> Candidate | None:
        """The best permutation with folded norms; None where that lets nothing rotate."""
        self.folded = fold(self.pair, self.time.part(FINDING))
        if self.folded is None:
            return None
        start, b = self._best_permuted(), self.folded.b
        moved = start.permutation.apply(b) if start.permutation is not None else b
        candidate = Candidate(f"{start.method}, norms folded", self.folded.a, moved, note=self.folded.note)
        self.turned.append(candidate)
        return candidate

    def _modulo_group(self, start: Callable[[], Candidate]) -> None:
        """A start moved by signs and mixings as well, which no other method finds."""

        def moved() -> Candidate | None:
            found = start()
            if derived_names(found.weights):
                return None
            return match_modulo_group(self.pair, found, self.symmetries, self.time.part(BEYOND))

        later = SOON * self.time.seconds if self.time.limited else 0.0
        found = self.attempt(MODULO, moved, unless=SHARE, later=later)
        if found and self.folded and all(bool((found.a[name].abs() == 1).all()) for name in self.pair.gains):
            self.turned.append(found)

    def _permute(self) -> None:
        """Straight-through matching and relaxation by turns: from all that was matched, the best first, and then from the best
        so far, as long as that gains something."""
        for number, start in enumerate(sorted(self.plain[1:], key=_barrier)):
            self._turn(start, 0, first=number == 0)
        for turn in range(1, TURNS):
            before = _lowest(self.plain)
            self._turn(before, turn)
            if _lowest(self.plain).barrier > GAIN * before.barrier:
                break

    def _turn(self, start: Candidate, turn: int, *, first: bool = False) -> None:
        """Both, one after the other; where it is not the first turn, only as long as there is much time."""
        later = SOON * self.time.seconds if self.time.limited and not first else 0.0
        pair, steps = replace(self.pair, seed=self.pair.seed + turn), min(self.steps or RELAXED, RELAXED)
        for method, search in ("straight-through", pass_straight_through), ("Sinkhorn", partial(relax, steps=steps)):
            make = partial(self._permuted, partial(search, pair, start))
            found = self.attempt(method, make, unless=0.0, later=later)
            start = start if found is None else _lowest([start, found])

    def _permuted(self, search: Callable[..., Candidate]) -> Candidate:
        return search(seconds=self.time.part(PERMUTING))

    def _learn(self, start: Callable[[], Candidate]) -> None:
        self.attempt("learning", lambda: self._learned(start()), unless=SHARE)

    def _learned(self, start: Candidate) -> Candidate | None:
        if derived_names(start.weights):
            return None  # of normalised weights, which are scaled by other tensors than those in use
        free = freedoms(self.pair.spec, self.folded.rotated if self.folded else {}, self.symmetries)
        if not free:
            return None
        mixed = any(freedom.kind != "none" for freedom in free.values())
        steps = self.steps or (STEPS_OF_MATRICES if mixed else STEPS)
        return learn_elements(self.pair, start, free, steps=steps, budget=Budget(self.time.part()))

    # ---- what is known of it

    @property
    def plain(self) -> list[Candidate]:
        """Those whose statistics are as they come."""
        return [candidate for candidate in self.candidates if not candidate.repaired]

    def _best_permuted(self) -> Candidate:
        return _lowest([candidate for candidate in self.plain if candidate.permutation is not None])

    def share(self, of: float) -> float:
        """A share of the barrier as they are."""
        naive = self.candidates[0].barrier
        return of * naive if math.isfinite(naive) else 0.0

    def enough(self, share: float) -> bool:
        """Whether the best, its statistics as they come, has next to no barrier, or no more than a share of the first."""
        return _lowest(self.plain).barrier < max(ENOUGH, self.share(share))

    @cached_property
    def symmetries(self) -> ContinuousSymmetries:
        """Kinds of the groups beyond permutations; none where there is no time to find them."""
        seconds, started = self.time.part(FINDING), self.time.spent
        try:
            return continuous_symmetries(
                self.pair.spec, self.pair.model, self.pair.example, seed=self.pair.seed, budget=seconds,
                progress=self.pair.progress,
            )  # fmt: skip
        except InputError:
            taken = self.time.spent - started
            if seconds is None or taken < seconds:
                raise
            self.tried.append(Attempt("scales and signs", math.nan, taken, LATE))
            return ContinuousSymmetries({}, EXACT)

    @property
    def _forward(self) -> float:
        """Seconds that one example takes, by how long those held out took to judge."""
        return self.judging / (len(ALPHAS) * max(1, self.count))

    def _affordable(self) -> Any:
        """The inputs whose activations there is time to collect."""
        inputs = self.pair.inputs
        if not self.time.limited or not self.judging:
            return inputs
        most = max(FEWEST, int(COLLECTING * self.time.free / max(COLLECTED * self._forward, 1e-9)))
        if not isinstance(inputs, list):
            return first_of(inputs, most)
        sizes = itertools.accumulate(len(targets) for _, targets in self.pair.learn)
        return inputs[: 1 + sum(size < most for size in sizes)]

    def _announce(self) -> None:
        """Say about how long it will take: nearly all are steps of learning, forward and about twice as long backward."""
        if not self.pair.progress:
            return
        turns = self.pair.turns
        steps = self.steps or (STEPS_OF_MATRICES if turns else STEPS)
        work = (
            f"connect: {'permutations, rotations' if turns else 'permutations'} and at most {steps} steps of learning"
        )
        beforehand(work, steps * 3 * self.pair.batch_size * self._forward, budget=self.time.seconds)

    # ---- what is returned

    def result(self) -> Connection:
        certificate, best = self._certified()
        naive, path = self.paths.naive, self.paths.last(best)
        return Connection(
            a=best.a,
            weights=best.weights,
            path=path,
            naive=naive,
            method=best.method,
            reason=self._reason(best),
            certificate=certificate,
            tried=tuple(self.tried),
            repaired=best.repaired,
            permutation=best.permutation,
            held_out=self.count,
            budget=self.time.seconds if self.time.limited else None,
            seconds=self.time.spent,
            interrupted=self.interrupted,
            unit=self.judge.unit,
        )

    def _certified(self) -> tuple[SameFunction, Candidate]:
        """The check that B moved computes what B computes; of the best candidate that passes it."""
        a, b = self.pair.a, self.pair.b
        probe = Probe(self.pair.model, b, self.pair.inputs, torch.Generator().manual_seed(self.pair.seed))
        power = probe.error(a)
        for candidate in sorted(self.candidates, key=_barrier):
            rounding = max(torch.finfo(x.dtype).eps for x in b.values() if x.is_floating_point())
            tolerance = EXACT if candidate.permutation is not None else min(ROUNDINGS * rounding, COARSEST)
            error = probe.error(candidate.weights)
            if error <= tolerance:
                return SameFunction(error, tolerance, power), candidate
            warn(
                f"{candidate.method}: outputs change by {error:.0e} of their size (tolerance {tolerance:.0e}); left out"
            )
        raise CertificateError(
            f"even B as it is gives outputs that differ by more than {EXACT:.0e} from run to run; make the module "
            "deterministic in eval mode"
        )

    def _reason(self, best: Candidate) -> str:
        others = [candidate for candidate in self.candidates if candidate is not best]
        unit = f" {self.judge.unit}".rstrip()
        text = f"its barrier of {best.barrier:.3f}{unit} on the held-out examples is the lowest"
        if others:
            second = _lowest(others)
            title = f"{second.method}, {REPAIRED}" if second.repaired else second.method
            text += f"; next is {title} with {second.barrier:.3f}"
        late = [each.method for each in self.tried if each.note == LATE]
        return text + (f". There was no time for {', '.join(late)}: the budget was too small" if late else "")


def _barrier(candidate: Candidate) -> float:
    return candidate.barrier


def _lowest(candidates: Sequence[Candidate]) -> Candidate:
    return min(candidates, key=_barrier)
