"""Loss and accuracy of many weight sets of one module on one data set.

How many weight sets go through the module at once is decided here. On a GPU, where small networks are bound by the
time to start a kernel, as many as the memory budget admits. On a CPU, where evaluating points together only pushes
activations out of the cache, one after the other, unless the network and its batch are tiny (benchmarks/evaluation.py);
what Python does around the outputs of a small network is then shared by several weight sets all the same.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.errors import DataError, InputError
from lmc.landscape.evaluation.scores import Judging, Score, Tally, measures_of, weighing
from lmc.network.batches import HELD_BYTES, Split, as_splits, check_numbers, cuttable, head, tensors, to_device
from lmc.network.network import Network, activation_bytes, pick_device
from lmc.network.task import Loss, Outputs, Task, check_classes, measured, takes_numbers
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights

PROBE = 8  # examples that are sent through once to see how much memory one takes
MOST_AT_ONCE = 64
MOST_CHUNKS = 256  # that points are cut into for workers: each takes long beside what sending it costs
TALLIED_BYTES = 128 << 10  # of outputs that are added up in one go: they stay in the cache
MEASURED_BYTES = 256 << 20  # of outputs that are kept so that a measure of the caller's own sees all of a split at once


@dataclass(frozen=True)
class _Budget:
    """Limits of what a device works on at once.

    Attributes:
        batch: bytes of activations in one batch.
        examples: most examples in a batch.
        together: bytes of weights and activations of the weight sets that go through together.
        fewest: fewer weight sets than this are not faster together than one after the other.
    """

    batch: int
    examples: int
    together: int
    fewest: int


def _budget(device: torch.device, weights: int) -> _Budget:
    """For weights of so many bytes."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return _Budget(batch=free // 16, examples=8192, together=free // 4, fewest=2)
    # Activations of short batches stay in the cache; weights are read once a batch, so the larger they are, the longer it.
    batch = min(max(16 << 20, 4 * weights), 256 << 20)
    return _Budget(batch=batch, examples=2048, together=4 << 20, fewest=24)


@own_context
def evaluate(
    model: nn.Module,
    weights: ModelOrWeights | None,
    data: Any,
    *,
    loss: Loss | Task | None = None,
    metrics: Mapping[str, Loss] | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Score]:
    """Score `weights` (None: the module's own) in eval mode on every split of `data`: `{"train": ..., "test": ...}`,
    or `{"data": ...}` where the data are a single set. Neither the module nor the weights are touched.

    Args:
        model: the architecture.
        weights: a state dict, or a module of the same architecture.
        data: `(inputs, targets)`, a `Dataset`, a `DataLoader` or any iterable of batches (pairs, mappings with "labels",
            data objects), an object with `.train` and `.test`, or `{"train": ..., "test": ...}`. Targets are classes (N,)
            for outputs (N, C), or one for each position, (N, T) for (N, T, C) and (N, ...) for (N, C, ...); -100 marks
            positions that do not count. With a `loss` of your own, anything it takes.
        loss: replaces cross-entropy: a function of outputs and targets, and of the inputs where it asks for a third
            argument, that gives one value for each example or target, or their mean; or a whole `lmc.Task`, such as
            `lmc.Task.regression()`.
        metrics: further measures by name.
        outputs: what the loss is given of the module's result: a function of it, a key or a position (default: the tensor,
            or `.logits`; else, with a `loss` of your own, all of it).
        batch_size: examples at a time where the data are given whole. The scores do not depend on it; a warning is given
            where a loss of your own makes them.
        device: where to compute (default: where the weights are).

    Raises:
        WeightsError: a tensor that is not finite.
        MismatchError: weights of another architecture.
        DataError: unusable data.
        InputError: an unusable argument.
    """
    state = agreeing([model if weights is None else weights], ["weights"], model=model)[0]
    evaluator = Evaluator(
        model,
        data,
        loss=loss,
        metrics=metrics,
        outputs=outputs,
        batch_size=batch_size,
        at_once=1,
        device=pick_device(device, state),
    )
    return next(evaluator([state]))


class Evaluator:
    """Scores weight sets of one module on one data set: `for score in evaluator(states): score["test"].loss`.

    Args:
        model, data, loss, metrics, outputs, batch_size: as for `evaluate`.
        at_once: weight sets that go through the module together (default: chosen for device and network when the
            first one comes; `weight_sets_together` then says how many).
        memory: bytes that their weights and activations may take together (default: a quarter of the GPU's free
            memory; on a CPU a few megabytes, about its cache).
        device: where to compute (default: where the module's weights are).
        predictions: keep the predicted class of each example.

    Attributes:
        task: how outputs are judged.
        splits: the data.
        weight_sets_together: how many weight sets go through the module at once, None until the first one came.

    Raises:
        DataError: data that are empty or malformed, targets that do not fit the outputs, inputs of another dtype
            than the weights.
        MismatchError: a weight set of another architecture.
        InputError: an unusable argument.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        loss: Loss | Task | None = None,
        metrics: Mapping[str, Loss] | None = None,
        outputs: Outputs = None,
        batch_size: int | None = None,
        at_once: int | None = None,
        memory: int | None = None,
        device: torch.device | str | None = None,
        predictions: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("at_once", at_once), ("memory", memory)):
            if value is not None and value < 1:
                raise InputError(f"{name}={value}; expected at least 1")
        self.device = pick_device(device, as_weights(model))
        task = Task.of(data, loss, metrics, outputs)
        self.splits = as_splits(data, task.targets)
        self.task = task.fitted(model, self.splits[0])
        self.network = Network(model, self.device, self.task.read)
        self.batch_size = batch_size
        self.at_once = at_once
        self.weight_sets_together, self._batch = at_once, batch_size or PROBE
        self._fit = 1  # weight sets whose outputs may be kept to be added up together
        self.memory = memory
        self.predictions = predictions
        # Batches that stay on the device, by split: on a CPU views of the data, on a GPU a copy of data that are small.
        self._ready: dict[str, list[tuple[Any, Tensor, int]]] = {}
        self._judgings: dict[str, Judging] = {}
        self._kept = 0.0  # bytes of outputs of a weight set that are kept until all of a split is measured
        self._checked = False

    def __call__(self, states: Iterable[Weights]) -> Iterator[dict[str, Score]]:
        """One `{split: Score}` for each weight set, in order, as soon as it is known."""
        states = iter(states)
        for first in states:
            self.network.check(first, "weights")
            if not self._checked:
                self._prepare(first)
            if self.one_by_one:
                yield from self.in_turn(self._taken_on(chain([first], states)))
                return
            others = list(islice(states, (self.weight_sets_together or 1) - 1))
            for state in others:
                self.network.check(state, "weights")
            yield from self._score([first, *others])

    @property
    def one_by_one(self) -> bool:
        """True where one weight set at a time goes through data that all stay in memory."""
        return self.weight_sets_together == 1 and len(self._ready) == len(self.splits)

    def in_turn(self, steps: Iterable[object]) -> Iterator[dict[str, Score]]:
        """One `{split: Score}` for each of `steps`, which has given the network new weights when it comes; the scores of
        a few come together. After an interrupt, the steps that were made are still scored. Only where `one_by_one`."""
        pending: list[list[Any]] = []
        together = 0
        try:
            for _ in steps:
                outputs = [self.network(inputs) for batches in self._ready.values() for inputs, _targets, _n in batches]
                if not together:
                    size = sum(tensor.nbytes for output in outputs for tensor in tensors(output))
                    together = max(min(self._fit, TALLIED_BYTES // max(size, 1)), 1)
                # A module may put out a view of its weights, which the next step changes.
                pending.append([output.clone() for output in outputs] if together > 1 else outputs)
                if len(pending) == together:
                    scores, pending = self._tally(pending), []
                    yield from scores
        except KeyboardInterrupt:
            yield from self._tally(pending)
            raise
        yield from self._tally(pending)

    def chunks(self, order: Sequence[int]) -> list[list[int]]:
        """Points in parts for several workers, each of whole groups that go through the module together, so that they go
        through it as they would here. Only after a weight set was scored."""
        group = self.weight_sets_together or 1
        size = group * max(-(-len(order) // (MOST_CHUNKS * group)), 1)
        return [list(order[start : start + size]) for start in range(0, len(order), size)]

    def twin(self) -> "Evaluator":
        """An evaluator of the same data with a network of its own, for another thread; this one has scored before."""
        twin = copy.copy(self)
        twin.network = self.network.twin()
        return twin

    def held_inputs(self) -> list[Any]:
        """The inputs of every batch, where they all stay in memory from one weight set to the next; else none."""
        if len(self._ready) < len(self.splits):
            return []
        return [inputs for batches in self._ready.values() for inputs, _targets, _counted in batches]

    def _prepare(self, state: Weights) -> None:
        """Check the data, set the batch size and how many weight sets go through together, all from a few examples."""
        self.network.load(state)
        each = 0.0
        for split in self.splits:
            first = next(split.iterate(PROBE))
            inputs, targets = head(first, PROBE)
            self.network.check_inputs(state, inputs, split.name)
            for batch, _goal in split.batches if split.held else []:
                check_numbers(batch, split.name)
            inputs, targets = to_device(inputs, self.device), targets.to(self.device)
            call = self.task.call(inputs, targets)
            each = max(each, self._bytes_of(call, split.name) / len(targets))
            outputs = self.network(call)
            if not isinstance(outputs, Tensor):
                self.weight_sets_together = 1
            self._judgings[split.name] = self._judging(split, call, outputs, targets)
        weights = sum(tensor.nbytes for tensor in state.values())
        budget = _budget(self.device, weights)
        self._batch = self.batch_size or int(min(max(budget.batch / max(each, 1), 8), budget.examples))
        if self.weight_sets_together is None:
            one = each * max(split.largest(self._batch) for split in self.splits) + weights
            fit = int(min((self.memory or budget.together) / max(one, 1), MEASURED_BYTES / max(self._kept, 1)))
            self.weight_sets_together = min(fit, MOST_AT_ONCE) if fit >= budget.fewest else 1
            self._fit = fit if self.plain else 1  # a measure of the caller's own is asked point by point
        self._ready = {split.name: list(self._batches(split)) for split in self.splits if split.nbytes <= HELD_BYTES}
        self._judgings = {split.name: self._weighed(split) for split in self.splits}
        self._checked = True

    @property
    def plain(self) -> bool:
        """Nothing but cross-entropy and accuracy is measured, so that no code of the caller's runs beside the module."""
        return not measures_of(self.task) and not callable(self.task.outputs)

    def _judging(self, split: Split, call: Any, outputs: Any, targets: Tensor) -> Judging:
        """The judging of a split, from the outputs of a few examples.

        Raises:
            DataError: targets that are no classes of the outputs, where nothing says what else they are.
        """
        self.task.check(split, outputs, targets)
        own = bool(measures_of(self.task))
        logits = self.task.logits(outputs, targets)
        classes = logits is not None and "accuracy" not in self.task.metrics and (not own or logits.shape[-1] > 1)
        if own and classes and logits is not None:  # a loss of one's own may take targets that are no classes
            try:
                for _inputs, goal in split.batches if split.held else [(None, targets)]:
                    check_classes(goal, logits.shape[-1], split.name, self.task.ignore)
            except DataError:
                classes = False
            if self.task.loss is not None and takes_numbers(self.task.loss, outputs, targets, call):
                classes = False
        known = split.held and self.task.labels is None
        size = sum(tensor.nbytes for tensor in tensors(outputs)) / len(targets) if known else 0.0
        count = sum(len(goal) for _inputs, goal in split.batches) if known else 0
        at_once = known and size * count <= MEASURED_BYTES
        self._kept += size * count if own and at_once else 0.0
        return Judging(split.name, self.task, classes, at_once)

    def _weighed(self, split: Split) -> Judging:
        """The judging of a split whose batches are measured one by one, with weights for their means."""
        judging = self._judgings[split.name]
        if judging.at_once or not judging.measures:
            return judging
        (call, targets, _counted), *others = islice(self._batches(split), 2)
        if not others or not cuttable(call, targets):
            return judging
        found = {}
        for name, measure in judging.measures.items():

            def value_of(part: Any, goal: Tensor, name: str = name, measure: Loss = measure) -> Tensor:
                return measured(measure, name, self.network(part), goal, part)

            found[name] = weighing(self.task, name, value_of, call, targets, split.name)
        return replace(judging, weighings=found)

    def _taken_on(self, states: Iterable[Weights]) -> Iterator[None]:
        for state in states:
            self.network.check(state, "weights")
            self.network.load(state)
            yield

    def _bytes_of(self, inputs: Any, split: str) -> int:
        """Bytes of the activations of a first few inputs; `DataError` where the module fails on them."""
        try:
            return activation_bytes(self.network, inputs)
        except DataError as error:
            raise DataError(f"{split}: {error}") from error

    def _score(self, group: list[Weights]) -> list[dict[str, Score]]:
        """Scores of the weight sets of one group, together if there are several."""
        try:
            columns = self._columns(group)
        except (RuntimeError, ValueError) as error:
            if len(group) == 1 or self.at_once is not None or isinstance(error, (DataError, InputError)):
                raise
            # Out of memory, or an operator that cannot be batched over weights: half as many, in the end a loop.
            size = self.weight_sets_together = len(group) // 2 if isinstance(error, torch.cuda.OutOfMemoryError) else 1
            parts = [group[start : start + size] for start in range(0, len(group), size)]
            return [score for part in parts for score in self._score(part)]
        return [{name: scores[k] for name, scores in columns.items()} for k in range(len(group))]

    def _tally(self, pending: list[list[Any]]) -> list[dict[str, Score]]:
        """Scores of some weight sets from the outputs (N, ...) that each has for every batch of every split."""
        if not pending:
            return []
        columns, batch = {}, 0
        for split in self.splits:
            tally = Tally(self._judgings[split.name], self.predictions)
            for inputs, targets, counted in self._ready[split.name]:
                outputs = [one[batch] for one in pending]
                tally.add(_stacked(outputs), inputs, targets, counted)
                batch += 1
            columns[split.name] = tally.scores()
        return [{name: scores[k] for name, scores in columns.items()} for k in range(len(pending))]

    def _columns(self, group: list[Weights]) -> dict[str, list[Score]]:
        if len(group) == 1:
            self.network.load(group[0])
            return {split.name: self._run(split, lambda call: _stacked([self.network(call)])) for split in self.splits}
        stacked = self.network.stack(group)
        return {
            split.name: self._run(split, lambda inputs: self.network.many(stacked, inputs)) for split in self.splits
        }

    def _run(self, split: Split, outputs_of: Callable[[Any], Any]) -> list[Score]:
        """One pass over a split; `outputs_of` gives the outputs (K, N, ...) of a batch, or K results of another form."""
        tally = Tally(self._judgings[split.name], self.predictions)
        for inputs, targets, counted in self._ready.get(split.name) or self._batches(split):
            tally.add(outputs_of(inputs), inputs, targets, counted)
        return tally.scores()

    def _batches(self, split: Split) -> Iterator[tuple[Any, Tensor, int]]:
        """Calls of the module and targets on the device, and how many targets count."""
        for inputs, targets in split.iterate(self._batch):
            inputs, goal = to_device(inputs, self.device), targets.to(self.device)
            yield self.task.call(inputs, goal), goal, self.task.counted(targets)


def _stacked(outputs: list[Any]) -> Any:
    """Outputs of K weight sets with a new first axis; other results as they are."""
    if not all(isinstance(output, Tensor) for output in outputs):
        return outputs
    return torch.stack(outputs) if len(outputs) > 1 else outputs[0][None]
