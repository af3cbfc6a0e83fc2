"""The evaluation of points of a landscape, made where a public function is called and handed on as it is; and the loss as a
differentiable function of weights."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lmc.core.context import warn
from lmc.core.progress import beforehand, tqdm
from lmc.errors import InputError, WorkerError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.evaluation.scores import Score, Weighing, weighing
from lmc.network.batches import Batch, Split, as_splits, check_numbers, cuttable, head, take, to_device
from lmc.network.batchnorm import Calls, Recalibrator, calls_in, equal_batches, has_batchnorm
from lmc.network.derived import derived_in, derived_names, gauged, warn_of_lagging
from lmc.network.network import Network, pick_device
from lmc.network.repair import Method, Renormalizer
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, Weights, agreeing
from lmc.weights.arithmetic import mixture

Repair: TypeAlias = Literal["auto", "repair", "closed_form"] | None

STATISTICS_EXAMPLES = 2048  # inputs that statistics are estimated from at every point
STATISTICS_BATCH = 256

REPAIRS: dict[str, Method] = {"repair": "passes", "closed_form": "closed_form"}


class Evaluation:
    """Given models of one architecture, and how their mixtures and neighbours are evaluated.

    Args:
        model: the architecture.
        models, names: its weight sets, and how messages call them.
        data, loss, metrics, outputs, batch_size, device: as for `lmc.landscape.evaluate`.
        repair: what is done about statistics of averaged weights, as for `lmc.loss_path`; None warns where there are any.
        inputs: from which they are estimated (default: of the first split).
        repairs: whether the statistics of all layers may be repaired, which is possible for mixtures of the models only.
        predictions: keep predicted classes.

    Attributes:
        given, states: the weights of the models, as they came and where they are evaluated.
        evaluator: scores weights.
        repaired: "repair" or "closed_form" where the statistics of all layers of mixtures are repaired, else None.
        prepare: re-estimates statistics and computes derived tensors (`lmc.network.derived`); None where there are none.
        again: makes an equal evaluation, which shares nothing with this one but the models and data that were given.

    Raises:
        MismatchError: models of several architectures, dtypes or devices.
        WeightsError: weights that are not finite.
        DataError: unusable data.
        InputError: an unusable argument.
    """

    def __init__(
        self,
        model: nn.Module,
        models: Sequence[ModelOrWeights],
        data: Any,
        *,
        names: Sequence[str] | None = None,
        repair: Repair = "auto",
        inputs: Any = None,
        loss: Loss | Task | None = None,
        metrics: Mapping[str, Loss] | None = None,
        outputs: Outputs = None,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        repairs: bool = False,
        predictions: bool = False,
    ) -> None:
        if repair not in ("auto", None, *(REPAIRS if repairs else ())):
            known = ['"auto"', *(f'"{name}"' for name in (REPAIRS if repairs else ()))]
            raise InputError(f"repair={repair!r}; expected {', '.join(known)} or None")
        self.given = agreeing(models, names, model=model)
        self.progress = progress
        judged: dict[str, Any] = {"loss": loss, "metrics": metrics, "outputs": outputs, "batch_size": batch_size}
        judged |= {"device": pick_device(device, self.given[0]), "predictions": predictions}
        self.evaluator = Evaluator(model, data, **judged)
        buffers = [name for name, _ in model.named_buffers()]
        warn_of_lagging(self.given, buffers, derived=derived_names(self.given[0], model))
        # Averages are made where a spectral or weight normalisation has one form only.
        placed = [{name: x.to(self.evaluator.device) for name, x in state.items()} for state in self.given]
        self.states: list[Weights] = [gauged(state, model) for state in placed]
        self.again = partial(
            Evaluation,
            model,
            self.given,
            data,
            repair=repair,
            inputs=inputs,
            progress=progress,
            repairs=repairs,
            **judged,
        )
        self.repaired = repair if repair in REPAIRS else None
        self.prepare: Recalibrator | None = None
        self._renormalize: Renormalizer | None = None
        network = self.evaluator.network
        if self.repaired is not None:
            calls = equal_batches(self._statistics_inputs(inputs), STATISTICS_BATCH)
            self._renormalize = Renormalizer(
                network, self.states, calls, REPAIRS[self.repaired], batch_size=None, progress=progress
            )
        elif has_batchnorm(network.module) and repair is None:
            warn(
                "this model has batch normalisation and repair=None: averaged running statistics fit neither network, and "
                "the barrier mostly looks higher than it is; leave repair='auto' to re-estimate them"
            )
        elif has_batchnorm(network.module):
            self.prepare = Recalibrator(
                network, self._statistics_inputs(inputs), STATISTICS_BATCH, mixed=self.states[0]
            )
        if self.prepare is None and derived_in(self.states[0]):
            self.prepare = Recalibrator(network, None, mixed=self.states[0])

    @property
    def recalibrated(self) -> bool:
        """Batch statistics are re-estimated at every point."""
        return self.prepare is not None and bool(self.prepare.norms)

    @property
    def parameters(self) -> list[str]:
        """The tensors that distances are measured over: each parameter once, no buffers."""
        return [name for name, _ in self.evaluator.network.module.named_parameters()]

    def mixed(self, shares: Sequence[float]) -> Weights:
        """The mixture `sum_i s_i theta_i` of the models, ready to be evaluated."""
        if self._renormalize is not None:
            return self._renormalize(shares)
        return self.ready(mixture(self.states, shares))

    def ready(self, weights: Weights) -> Weights:
        """Weights of a point, with statistics of their own where there are any."""
        return weights if self.prepare is None else self.prepare(weights)

    def own(self) -> list[dict[str, Score]]:
        """The scores of the models as they were given."""
        return list(self.evaluator(self.states))

    def run(
        self, points: Iterable[Weights], order: Sequence[int], name: str, fewest: int = 1
    ) -> dict[int, dict[str, Score]]:
        """The scores of `points` by the indices in `order`; fewer, with a warning, where an interrupt came first.

        Args:
            points: weights that are ready to be evaluated.
            name: of what is evaluated, for the bar.
            fewest: an interrupt before so many points are done is passed on.
        """
        return self.collect(zip(order, self.evaluator(points), strict=True), len(order), name, fewest)

    def collect(
        self, scored: Iterable[tuple[int, dict[str, Score]]], count: int, name: str, fewest: int = 1
    ) -> dict[int, dict[str, Score]]:
        """The values that `run` returns, of `count` points that are scored wherever it may be; so does one that loses its workers."""
        scores: dict[int, dict[str, Score]] = {}
        with tqdm(total=count, desc=name, unit="point", disable=not self.progress) as bar:
            try:
                for i, score in scored:
                    scores[i] = score
                    bar.update()
            except (KeyboardInterrupt, WorkerError) as error:
                if len(scores) < fewest:
                    raise
                why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
                warn(f"{why}: {len(scores)} of {count} points were evaluated, the others are NaN")
        return scores

    def tell(self, name: str, points: int, seconds_each: Callable[[], float], most: str = "") -> None:
        """Write what a long evaluation will cost, judged by one point, unless progress is not shown."""
        if not self.progress or not points:
            return
        each = seconds_each()
        where = f" ({1e3 * each:.1f} ms each, on {self.evaluator.device}); an interrupt keeps those that are done"
        beforehand(f"{name}: {most}{points} points to evaluate", points * each, more=where)

    def seconds_for(self, point: Callable[[], Weights]) -> float:
        """Seconds that it takes to make and score the weights of a point."""
        start = time.perf_counter()
        next(self.evaluator([point()]))
        return time.perf_counter() - start

    def _statistics_inputs(self, given: Any) -> Any:
        if given is None:
            return some_inputs(self.evaluator.splits[0])
        return calls_in(self.evaluator.network.module, given, STATISTICS_BATCH)


def some_inputs(split: Split) -> Calls:
    """Evenly spaced inputs of a split given whole, else its first batches: about `STATISTICS_EXAMPLES` of them."""
    if split.whole:
        inputs, targets = next(iter(split.batches))
        chosen = take(inputs, slice(None, None, -(-len(targets) // STATISTICS_EXAMPLES)))
        return Calls(equal_batches(chosen, STATISTICS_BATCH))
    found, count = Calls(), 0
    for inputs, targets in split.batches:
        if len(targets) > 1:  # a loader's last batch may be one example, which has no variance
            found.append(inputs)
        count += len(targets)
        if count >= STATISTICS_EXAMPLES:
            break
    return found


class Objective:
    """The mean loss of a batch at any weights, `objective(weights, batch)`, where autograd follows it.

    Args:
        model: the architecture; not touched.
        weights: what the data are tried on before a step is made.
        data: as for `lmc.landscape.evaluate`; of several splits the first, which is the training split.
        loss, outputs, device: as for `lmc.landscape.evaluate`.
        name: how messages call the weights.

    Attributes:
        network: a private copy of the module, in eval mode.
        split, task: the data, without examples in which no target counts, and how they are judged.

    Raises:
        MismatchError: weights of another architecture.
        DataError: data that are unusable or do not fit the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        data: Any,
        *,
        loss: Loss | Task | None = None,
        outputs: Outputs = None,
        device: torch.device | str | None = None,
        name: str = "weights",
    ) -> None:
        task = Task.of(data, loss, outputs=outputs)
        self.split = as_splits(data, task.targets)[0]
        for held, _ in self.split.batches if self.split.held else []:
            check_numbers(held, self.split.name)
        self.task = task.fitted(model, self.split)
        self.split = self.split.counting(self.task.weight)
        self.network = Network(model, pick_device(device, weights), self.task.read)
        self.network.check(weights, name)
        self.network.load(weights)
        inputs, targets = head(next(self.split.iterate(8)), 8)
        self.network.check_inputs(weights, inputs, self.split.name)
        call, targets = self._call((inputs, targets))
        self.task.check(self.split, self.network(call), targets)

    def __call__(self, weights: Weights, batch: Batch) -> Tensor:
        """The mean loss of one batch; a tensor that is not among `weights` keeps what the network has."""
        call, targets = self._call(batch)
        return self.task.mean_loss(self.network.outputs(weights, call), targets, call)

    def weighing(self, weights: Weights, batch_size: int) -> Weighing | None:
        """The weight of the mean over a batch among others, None for a sum, judged by the first batch."""
        (batch, *others) = islice(self.split.iterate(batch_size), 2)
        call, targets = self._call(batch)
        if not others or not cuttable(call, targets) or (self.task.loss is None and self.task.labels is None):
            return self.task.weight

        def value_of(part: Any, goal: Tensor) -> Tensor:
            return self.task.mean_loss(self.network.outputs(weights, part), goal, part)

        with torch.no_grad():
            return weighing(self.task, "loss", value_of, call, targets, self.split.name)

    def _call(self, batch: Batch) -> tuple[Any, Tensor]:
        inputs, targets = to_device(batch[0], self.network.device), batch[1].to(self.network.device)
        return self.task.call(inputs, targets), targets
