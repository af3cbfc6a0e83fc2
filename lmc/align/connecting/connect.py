"""Two networks connected as well as can be, within a time: the one call that chooses among all others."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from lmc.align.activations.matching import activation_matching
from lmc.align.connecting.elements import FreeElement, freedoms, names_of
from lmc.align.connecting.judge import ALPHAS, Judge, held_out, inputs_of
from lmc.align.connecting.learned import learn
from lmc.align.connecting.result import Attempt, Connection, SameFunction
from lmc.align.connecting.starts import by_activations, by_weights
from lmc.align.relaxed.sinkhorn import sinkhorn_matching
from lmc.align.relaxed.soft import TaskLoss
from lmc.align.relaxed.straight_through import straight_through_matching
from lmc.align.rotations.folding import NORMS, Probe, fold_norms
from lmc.align.rotations.rotatable import rotatable_groups
from lmc.align.rotations.whole_group import group_matching
from lmc.align.weight_matching.matching import weight_matching
from lmc.core.context import own_context, warn
from lmc.core.progress import Budget, beforehand
from lmc.errors import CertificateError, InputError, LmcError, SpecError
from lmc.landscape.evaluation.evaluation import Repair
from lmc.landscape.path import Path, loss_path
from lmc.network.batches import as_splits, to_device
from lmc.network.batchnorm import has_batchnorm
from lmc.network.derived import derived_names
from lmc.network.inputs import first_of
from lmc.network.network import Network, pick_device
from lmc.network.task import Loss, Task
from lmc.symmetry.continuous import ContinuousSymmetries, continuous_symmetries
from lmc.symmetry.find import permutation_spec
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing

ENOUGH = 1e-3  # a barrier below which nothing is refined any more,
SHARE = 0.02  # or this share of the barrier as they are: what is learned of so little is the examples, not the networks
LITTLE = 0.045  # share of the barrier as they are below which scales are learned more slowly,
SLOWER = 0.3  # by this factor: trained networks fit the examples so well that scales soon do as well
STEPS, STEPS_OF_MATRICES = 1500, 4000  # of learning
RELAXED = 300  # of the relaxation of permutations
BATCH = 128  # examples in a step of learning
POSITIONS = 1024  # targets in a step of learning, where examples have many
POINTS = (25, 11, 5)  # on the paths: the most that take no more than this share of the time
PATHS = 0.1
REPAIRED = "statistics repaired"
MODULO = "matching modulo the group"
LATE = "no time left"
EXACT = 1e-9  # tolerance of a permutation, which rounds nothing
ROUNDINGS = 1e3  # of the stored weights, that any other element may cost,
COARSEST = 0.05  # but no more than this share of the outputs, however coarse the dtype is
RESERVE = 1.5  # times what the first path took is kept for the last, and for the certificate
KEPT = 0.25  # of all the time is kept for the last measurement, at most
COLLECTED = 6  # forward passes that the activations of an example take, at most, of both networks
FEWEST = 64  # examples whose activations are collected, however short the time is
COLLECTING = 0.3  # share of the time left for activations
SOON = 0.5  # of all the time must be left to look for signs and mixings, which straight-through matching does without
PROVEN = 0.05  # share of all the time that finding permutations may have taken, so that they are proven as well
FINDING = 0.3  # share of the time left for what is admitted beyond permutations
BEYOND = 0.2  # share of the time left for matching modulo the whole group
PERMUTING = 0.5  # share of the time left for straight-through matching, where scales are learned behind it


@dataclass
class Candidate:
    """One way to move B, and what was said of it."""

    method: str
    a: Weights
    weights: Weights
    permutation: Permutation | None = None
    barrier: float = math.nan
    note: str = ""
    repaired: bool = False  # judged with the statistics between the ends repaired
    margin: float = 0.0  # by which it must be better than what was not learned from examples

    @property
    def title(self) -> str:
        return f"{self.method}, {REPAIRED}" if self.repaired else self.method


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
    refined by the loss of the line: permutations by straight-through matching and the scales that hidden units admit, or
    rotations, invertible mixings and scales at once (Theus et al. 2025, arXiv:2506.22712, learned matching). Each permutation, and what is refined, is tried with repaired statistics too (Jordan et al. 2023,
    arXiv:2211.08403); where that is best, `path` has them.

    What is best is decided on a fifth of the training data that nothing is learned from; test data are measured on and
    otherwise not touched. Where the budget is not what ends it, the same seed gives the same result.

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
    clock = Budget(budget)
    if steps is not None and steps < 1:
        raise InputError(f"{steps=}: expected at least 1")
    a, b = agreeing([a, b], "ab", model=model)
    chosen = pick_device(device, a)
    a, b = ({name: tensor.to(chosen) for name, tensor in weights.items()} for weights in (a, b))
    search = _Search(model, a, b, data, spec, steps, loss, seed, chosen, clock, progress)
    interrupted = False
    try:
        search.run()
    except KeyboardInterrupt:
        if not search.candidates:
            raise
        interrupted = True
    if interrupted or search.interrupted:
        warn(f"interrupted: the best of {len(search.candidates)} candidates is returned")
    return search.result(interrupted or search.interrupted)


class _Search:
    """The candidates of one pair, made one after the other while there is time."""

    def __init__(
        self,
        model: nn.Module,
        a: Weights,
        b: Weights,
        data: Any,
        spec: PermutationSpec | UnboundSpec | None,
        steps: int | None,
        loss: Loss | Task | None,
        seed: int,
        device: torch.device,
        clock: Budget,
        progress: bool,
    ) -> None:
        self.model, self.a, self.b, self.seed, self.clock, self.device = model, a, b, seed, clock, device
        self.progress, self.steps = progress, steps
        self.data = list(data) if isinstance(data, Iterator) else data  # read several times
        task = Task.of(self.data, loss)
        self.task = task.fitted(model, as_splits(self.data, task.targets)[0])
        self.learn, held, self.count = held_out(self.data, self.task, seed)
        self.made = replace(self.task, targets=None)  # the parts hold the targets that were made
        self.inputs = inputs_of(self.learn)
        first = self.inputs[0] if isinstance(self.inputs, list) else self.inputs
        self.example = to_device(first_of(first, 2), device)
        self.spec = (self._found() if spec is None else spec).bind(a)
        self.judge = Judge(model, a, b, held, self.inputs, self.made, device)
        self.held = held
        self.candidates: list[Candidate] = []
        self.tried: list[Attempt] = []
        self.turned: list[Candidate] = []  # those whose streams and heads were rotated
        self.rotated: dict[str, bool] = {}
        self.folded = (a, b)
        self.interrupted = False
        self.reserve = self.last = self.judging = 0.0  # seconds
        self.points = POINTS[-1]
        self.naive: Path | None = None

    def _found(self) -> PermutationSpec:
        """The permutations of the architecture; proven where that does not take a good part of the time."""
        started = self.clock.spent
        if math.isfinite(self.clock.seconds):
            found = permutation_spec(self.model, self.example, certify=False, progress=False)
            if self.clock.spent - started > PROVEN * self.clock.seconds:
                return found
        return permutation_spec(self.model, self.example, progress=False)

    @property
    def best(self) -> Candidate:
        return min(self.candidates, key=_worth)

    @property
    def plain(self) -> list[Candidate]:
        """Those whose statistics are as they come."""
        return [candidate for candidate in self.candidates if not candidate.repaired]

    def share(self, of: float) -> float:
        """A share of the barrier as they are."""
        naive = self.candidates[0].barrier
        return of * naive if math.isfinite(naive) else 0.0

    def enough(self, share: float) -> bool:
        """Whether the best, its statistics as they come, has next to no barrier, or no more than a share of the first."""
        return min(map(_barrier, self.plain)) < max(ENOUGH, self.share(share))

    @property
    def left(self) -> float:
        """Seconds that may be spent on further candidates; the last measurement takes the rest."""
        return self.clock.left - self.reserve

    # ---- what is tried

    def run(self) -> None:
        self.attempt("as they are", lambda: Candidate("as they are", self.a, self.b, self.spec.identity()))
        if self.progress:
            self._announce()
        self.attempt("weight matching", self._weight_matching)
        started = self.clock.spent
        self.naive = self._naive()
        self.last = self.clock.spent - started
        self.reserve = RESERVE * self.last
        self.attempt("activation matching", self._activation_matching)
        self._repair(self.candidates[1:])
        if not self.enough(SHARE) and self._turns:
            self.attempt("norms folded", self._folded)
        if self.rotated:
            self.attempt("rotations by activations", lambda: self._rotations("activations"))
            self.attempt("rotations by weights", lambda: self._rotations("weights"))
            self.attempt(MODULO, lambda: self._modulo_group(min(self.turned, key=_barrier)))
            self.attempt("learning", lambda: self._learned(min(self.turned, key=_barrier)))
        else:
            self.attempt(MODULO, lambda: self._modulo_group(self._best_permuted()))
            self.attempt("straight-through", self._straight_through)
            self.attempt("Sinkhorn", self._sinkhorn)
            self._repair([candidate for candidate in self.plain[1:] if candidate.permutation is not None])
            self.attempt("learning", lambda: self._learned(min(self.plain, key=_barrier)))
        self._repair([min(self.plain, key=_barrier)])

    def _repair(self, candidates: Sequence[Candidate]) -> None:
        """Each of them with statistics repaired, if that was not tried yet."""
        for candidate in candidates:
            if not any(candidate.weights is each.weights for each in self.candidates if each.repaired):
                self.attempt(REPAIRED, partial(self._repaired, candidate))

    def attempt(self, method: str, make: Callable[[], Candidate | None]) -> None:
        """A candidate, judged, unless there is no time for it or the method refuses the architecture."""
        if self.interrupted:
            return
        refining = {MODULO: SHARE, "straight-through": 0.0, "Sinkhorn": 0.0, "learning": SHARE}
        if method in refining and self.enough(refining[method]):
            self.tried.append(Attempt(method, math.nan, 0.0, "not needed"))
            return
        least = SOON * self.clock.seconds if method == MODULO and math.isfinite(self.clock.seconds) else 0.0
        if len(self.candidates) > 1 and self.left <= least:
            self.tried.append(Attempt(method, math.nan, 0.0, LATE))
            return
        started = self.clock.spent
        try:
            candidate = make()
            if candidate is not None and math.isnan(candidate.barrier):
                judged = self.clock.spent
                candidate.barrier = self.judge(candidate.a, candidate.weights)
                self.judging = self.clock.spent - judged
        except (LmcError, torch.linalg.LinAlgError) as error:  # singular mixings are no reason to end the search
            self.tried.append(Attempt(method, math.nan, self.clock.spent - started, f"not here: {error}"))
            return
        seconds = self.clock.spent - started
        if candidate is None:
            return
        self.candidates.append(candidate)
        self.tried.append(Attempt(candidate.method, candidate.barrier, seconds, candidate.note))

    def _weight_matching(self) -> Candidate:
        pi = weight_matching(self.spec, self.a, self.b, seed=self.seed, budget=self._part(), progress=False)
        return Candidate("weight matching", self.a, pi.apply(self.b), pi)

    def _activation_matching(self) -> Candidate:
        inputs = self._affordable()
        pi = activation_matching(self.spec, self.model, self.a, self.b, inputs, device=self.device, progress=False)
        return Candidate("activation matching", self.a, pi.apply(self.b), pi)

    def _repaired(self, candidate: Candidate) -> Candidate | None:
        """The same move, with every layer between the ends given the statistics that it has in the ends; None with batch
        normalisation, whose statistics are estimated anew in any case, and where there is nothing to lower."""
        if has_batchnorm(self.model) or candidate.barrier < ENOUGH:
            return None
        started = self.clock.spent
        path = self._path(candidate.a, candidate.weights, self.held, ALPHAS, "repair")
        if self.judging > 0:  # the last path may have to be repaired as well
            longer = RESERVE * self.last * (self.clock.spent - started) / self.judging
            self.reserve = max(self.reserve, min(longer, KEPT * self.clock.seconds))
        return replace(candidate, barrier=path.barrier, note=REPAIRED, repaired=True)

    @property
    def _forward(self) -> float:
        """Seconds that one example takes, by how long those held out took to judge."""
        return self.judging / (len(ALPHAS) * max(1, self.count))

    def _affordable(self) -> Any:
        """The inputs whose activations there is time to collect, by how long those held out took to judge."""
        if math.isinf(self.clock.seconds) or not self.judging:
            return self.inputs
        most = max(FEWEST, int(COLLECTING * self.left / max(COLLECTED * self._forward, 1e-9)))
        if not isinstance(self.inputs, list):
            return first_of(self.inputs, most)
        sizes = itertools.accumulate(len(targets) for _, targets in self.learn)
        return self.inputs[: 1 + sum(size < most for size in sizes)]

    @cached_property
    def symmetries(self) -> ContinuousSymmetries:
        """Kinds of the groups beyond permutations; none where there is no time to find them."""
        budget, started = self._part(FINDING), self.clock.spent
        try:
            return continuous_symmetries(
                self.spec, self.model, self.example, seed=self.seed, budget=budget, progress=self.progress
            )
        except InputError:
            seconds = self.clock.spent - started
            if budget is None or seconds < budget:
                raise
            self.tried.append(Attempt("scales and signs", math.nan, seconds, LATE))
            return ContinuousSymmetries({}, EXACT)

    def _part(self, share: float = 1.0) -> float | None:
        """Seconds of the time left, for what takes a budget."""
        return None if math.isinf(self.left) else max(share * self.left, 1e-3)

    def _modulo_group(self, start: Candidate) -> Candidate | None:
        """A start moved by signs and mixings as well, which no other method finds; None where nothing admits them."""
        if derived_names(start.weights):
            return None
        kinds = self.symmetries.kinds.values()
        if not any(kind.signs or kind.mixing != "none" for kind in kinds):
            return None
        found = group_matching(
            replace(self.spec, continuous=self.symmetries), self.model, start.a, start.weights,
            budget=self._part(BEYOND), progress=False,
        )  # fmt: skip
        candidate = Candidate(f"{start.method}, {MODULO}", dict(found.a), dict(found.weights))
        if self.rotated and all(bool((found.a[name].abs() == 1).all()) for name in self._gains()):
            self.turned.append(candidate)
        return candidate

    def _gains(self) -> list[str]:
        """The gains of the normalisations of streams."""
        names = (f"{name}.weight" for name, module in self.model.named_modules() if isinstance(module, NORMS))
        return [name for name in names if name in self.spec.tables_by_tensor]

    @property
    def _turns(self) -> bool:
        """Whether there are heads, or normalisations between which a stream might rotate."""
        return bool(self._gains()) or any(group.within for group in self.spec.groups.values())

    def _folded(self) -> Candidate | None:
        """The best permutation with folded norms; None where that lets nothing rotate."""
        note = ""
        try:
            a, b = (fold_norms(self.spec, self.model, weights, self.example) for weights in (self.a, self.b))
        except SpecError as error:  # what is inside heads may be mixed all the same
            a, b, note = self.a, self.b, f"not folded: {error}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of groups that cannot be verified, and so are not rotated
            self.rotated = dict(
                rotatable_groups(self.spec, self.model, b, self.example, seed=self.seed, budget=self._part(FINDING))
            )
        if not self.rotated:
            return None
        self.folded = (a, b)
        start = self._best_permuted()
        moved = start.permutation.apply(b) if start.permutation is not None else b
        self.turned.append(Candidate(f"{start.method}, norms folded", a, moved, note=note))
        return self.turned[-1]

    def _best_permuted(self) -> Candidate:
        return min((c for c in self.plain if c.permutation is not None), key=_barrier)

    def _rotations(self, by: str) -> Candidate:
        """B rotated onto A, both with folded norms."""
        a, b = self.folded
        if by == "activations":
            moved = by_activations(self.spec, Network(self.model, self.device), a, b, self._affordable(), self.rotated)
        else:
            moved = by_weights(self.spec, a, b, self.rotated)
        self.turned.append(Candidate(f"rotations by {by}", a, moved))
        return self.turned[-1]

    def _straight_through(self) -> Candidate:
        start = min(self.plain, key=_barrier)
        moved = start.permutation is None  # by more than a permutation: from there on, by permutations
        a, b = (start.a, start.weights) if moved else (self.a, self.b)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an interrupt is told once, at the end
            pi = straight_through_matching(
                self.spec, self.model, a, b, self.learn, start=start.permutation or self.spec.identity(), loss=self.made,
                budget=self._part(PERMUTING), seed=self.seed,
                device=self.device, progress=self.progress,
            )  # fmt: skip
        self.interrupted = pi.info["interrupted"]
        return Candidate(f"{start.method}, straight-through", a, pi.apply(b), None if moved else pi)

    def _sinkhorn(self) -> Candidate:
        """The best permutation, followed by what its relaxation finds from there."""
        start = self._best_permuted()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an interrupt is told once, at the end
            pi = sinkhorn_matching(
                self.spec, self.model, self.a, start.weights, self.learn, loss=self.made, budget=self._part(PERMUTING),
                steps=min(self.steps or RELAXED, RELAXED), seed=self.seed, device=self.device, progress=self.progress,
            )  # fmt: skip
        self.interrupted = pi.info.get("interrupted", False)
        whole = pi if start.permutation is None else pi.compose(start.permutation)
        return Candidate(f"{start.method}, Sinkhorn", self.a, whole.apply(self.b), whole)

    def _learned(self, start: Candidate) -> Candidate | None:
        """All but permutations of the whole group, learned from a candidate."""
        if derived_names(start.weights):
            return None  # of normalised weights, which are scaled by other tensors than those in use
        free = freedoms(self.spec, self.rotated, self.symmetries)
        if not free:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        element = FreeElement(self.spec, free, start.weights)
        task = TaskLoss(self.model, start.a, self.learn, self.made, self._batch_size(), self.device)
        budget = Budget(self._part())
        judge = partial(self.judge, start.a)
        steps = self.steps or (STEPS if not element.parameters["rotation"] else STEPS_OF_MATRICES)
        little = min(map(_barrier, self.candidates)) < self.share(LITTLE)
        found = learn(
            task, start.a, element, judge, steps=steps, pace=SLOWER if little else 1.0, budget=budget,
            generator=generator, progress=self.progress,
        )  # fmt: skip
        self.interrupted = found.interrupted
        note = f"{found.steps} steps" + (", interrupted" if found.interrupted else "")
        method = f"{start.method}, then {names_of(free)} learned"
        return Candidate(method, start.a, found.weights, None, found.barrier, note, margin=self.share(SHARE))

    def _batch_size(self) -> int:
        """Examples in a step of learning: fewer where each has many targets."""
        targets = (self.learn if isinstance(self.learn, tuple) else self.learn[0])[1]
        return max(8, min(BATCH, POSITIONS // max(1, targets[0].numel())))

    # ---- what is measured

    def _naive(self) -> Path:
        """The path to B as it is, of the points for which there is time; where that is short, the one that shows it."""
        self.points = POINTS[0]
        if math.isinf(self.clock.seconds):
            return self._path(self.a, self.b, self.data, self.points)
        started, fewest = self.clock.spent, POINTS[-1]
        path = self._path(self.a, self.b, self.data, fewest)
        one = (self.clock.spent - started) / fewest
        self.points = next((count for count in POINTS if count * one < PATHS * self.clock.seconds), fewest)
        return path if self.points == fewest else self._path(self.a, self.b, self.data, self.points)

    def _path(self, a: Weights, b: Weights, data: Any, points: int | Sequence[float], repair: Repair = "auto") -> Path:
        return loss_path(
            self.model, a, b, data, alphas=points, repair=repair, inputs=self.judge.inputs if data is self.held else None,
            loss=self.made if data is self.held else self.task, device=self.device, progress=False,
        )  # fmt: skip

    def _announce(self) -> None:
        """Say about how long it will take: nearly all are steps of learning, forward and about twice as long backward."""
        steps = self.steps or (STEPS_OF_MATRICES if self._turns else STEPS)
        work = f"connect: {'permutations, rotations' if self._turns else 'permutations'} and at most {steps} steps of learning"
        beforehand(work, steps * 3 * self._batch_size() * self._forward, budget=self.clock.seconds)

    def result(self, interrupted: bool) -> Connection:
        certificate, best = self._certified()
        naive = self.naive or self._path(self.a, self.b, self.data, self.points)
        path = self._path(best.a, best.weights, self.data, self.points, "repair" if best.repaired else "auto")
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
            budget=None if math.isinf(self.clock.seconds) else self.clock.seconds,
            seconds=self.clock.spent,
            interrupted=interrupted,
            unit=self.judge.unit,
        )

    def _certified(self) -> tuple[SameFunction, Candidate]:
        """The check that B moved computes what B computes; of the best candidate that passes it."""
        probe = Probe(self.model, self.b, self.inputs, torch.Generator().manual_seed(self.seed))
        power = probe.error(self.a)
        for candidate in sorted(self.candidates, key=_worth):
            rounding = max(torch.finfo(x.dtype).eps for x in self.b.values() if x.is_floating_point())
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
        lower = min((other.barrier for other in others if other.margin), default=math.inf)
        text = f"its barrier of {best.barrier:.3f} {self.judge.unit} on the held-out examples is the lowest".replace(
            "  ", " "
        )
        if lower < best.barrier:
            text += (
                f" but for {lower:.3f} by learning, which gains too little to be more than the examples learned from"
            )
        elif others:
            second = min(others, key=_barrier)
            text += f"; next is {second.title} with {second.barrier:.3f}"
        late = [each.method for each in self.tried if each.note == LATE]
        return text + (f". There was no time for {', '.join(late)}: the budget was too small" if late else "")


def _barrier(candidate: Candidate) -> float:
    return candidate.barrier


def _worth(candidate: Candidate) -> float:
    return candidate.barrier + candidate.margin
