"""Loss and accuracy of many weight sets of one module on one data set.

How many weight sets go through the module at once is decided here. On a GPU, where small networks are bound by the
time to start a kernel, as many as the memory budget admits. On a CPU, where evaluating points together only pushes
activations out of the cache, one after the other, unless the network and its batch are tiny (benchmarks/evaluation.py);
what Python does around the outputs of a small network is then shared by several weight sets all the same.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from lmc.errors import DataError, InputError, LmcError
from lmc.landscape.evaluation.scores import IGNORED, Measure, Score, Tally, check_classes, class_last
from lmc.network.batches import HELD_BYTES, Split, as_splits, check_numbers, take, tensors, to_device
from lmc.network.network import Network, activation_bytes, pick_device
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights

PROBE = 8  # examples that are sent through once to see how much memory one takes
MOST_AT_ONCE = 64
TALLIED_BYTES = 128 << 10  # of outputs that are added up in one go: they stay in the cache


@dataclass(frozen=True)
class _Budget:
    """What a device is given to work on at once.

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


def evaluate(
    model: nn.Module,
    weights: ModelOrWeights | None,
    data: Any,
    *,
    loss: Measure | None = None,
    metrics: Mapping[str, Measure] | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Score]:
    """Score `weights` (None: the module's own) in eval mode on every split of `data`: `{"train": ..., "test": ...}`,
    or `{"data": ...}` where the data are a single set. Neither the module nor the weights are touched.

    Args:
        model: the architecture.
        weights: a state dict, or a module of the same architecture.
        data: `(inputs, targets)`, an iterable of such batches, or an object with `.train` and `.test`. Targets are
            classes (N,) for outputs (N, C), or one for each position, (N, T) for (N, T, C) and (N, ...) for (N, C, ...);
            -100 marks positions that do not count. With a `loss` of your own, anything it takes.
        loss: replaces cross-entropy.
        metrics: further measures by name.
        batch_size: examples at a time where the data are given whole.
        device: where to compute (default: where the weights are).

    Raises:
        WeightsError: a tensor that is not finite. MismatchError, DataError, InputError: see `Evaluator`.
    """
    state = agreeing([model if weights is None else weights], ["weights"], model=model)[0]
    evaluator = Evaluator(
        model, data, loss=loss, metrics=metrics, batch_size=batch_size, at_once=1, device=pick_device(device, state)
    )
    return next(evaluator([state]))


class Evaluator:
    """Scores weight sets of one module on one data set: `for score in evaluator(states): score["test"].loss`.

    Args:
        model, data, loss, metrics, batch_size: as for `evaluate`.
        at_once: weight sets that go through the module together (default: chosen for device and network when the
            first one comes; `weight_sets_together` then says how many).
        memory: bytes that their weights and activations may take together (default: a quarter of the GPU's free
            memory; on a CPU a few megabytes, about its cache).
        device: where to compute (default: where the module's weights are).
        predictions: keep the predicted class of each example.

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
        loss: Measure | None = None,
        metrics: Mapping[str, Measure] | None = None,
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
        self.network = Network(model, self.device)
        self.splits = as_splits(data)
        self.measures: dict[str, Measure] = {**({} if loss is None else {"loss": loss}), **(metrics or {})}
        self.batch_size = batch_size
        self.at_once = at_once
        self.weight_sets_together, self._batch = at_once, batch_size or PROBE
        self._fit = 1  # weight sets whose outputs may be kept to be added up together
        self.memory = memory
        self.predictions = predictions
        # Batches that stay on the device, by split: on a CPU views of the data, on a GPU a copy of data that are small.
        self._ready: dict[str, list[tuple[Any, Tensor, int]]] = {}
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
        """Whether one weight set at a time goes through data that all stay in memory."""
        return self.weight_sets_together == 1 and len(self._ready) == len(self.splits)

    def in_turn(self, steps: Iterable[object]) -> Iterator[dict[str, Score]]:
        """One `{split: Score}` for each of `steps`, which has given the network new weights when it comes; the scores of
        a few come together. After an interrupt, the steps that were made are still scored. Only where `one_by_one`."""
        pending: list[list[Tensor]] = []
        together = 0
        try:
            for _ in steps:
                outputs = [self.network(inputs) for batches in self._ready.values() for inputs, _targets, _n in batches]
                size = max(sum(output.nbytes for output in outputs), 1)
                together = together or max(min(self._fit, TALLIED_BYTES // size), 1)
                # A module may put out a view of its weights, which the next step changes.
                pending.append([output.clone() for output in outputs] if together > 1 else outputs)
                if len(pending) == together:
                    scores, pending = self._tally(pending), []
                    yield from scores
        except KeyboardInterrupt:
            yield from self._tally(pending)
            raise
        yield from self._tally(pending)

    def twin(self) -> "Evaluator":
        """An evaluator of the same data with a network of its own, for another thread; this one has scored before."""
        twin = copy.copy(self)
        twin.network = Network(self.network.module, self.device)
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
            inputs, targets = next(split.iterate(PROBE))
            inputs, targets = take(inputs, slice(PROBE)), targets[:PROBE]
            self.network.check_inputs(state, inputs, split.name)
            inputs = to_device(inputs, self.device)
            each = max(each, self._bytes_of(inputs, split.name) / len(targets))
            if split.held:
                logits = class_last(self.network(inputs)[None], targets.to(self.device))
                for batch, goal in split.batches:
                    check_numbers(batch, split.name)
                    if logits is not None:
                        check_classes(goal, logits.shape[-1], split.name)
        weights = sum(tensor.nbytes for tensor in state.values())
        budget = _budget(self.device, weights)
        self._batch = self.batch_size or int(min(max(budget.batch / max(each, 1), 8), budget.examples))
        if self.weight_sets_together is None:
            one = each * max(split.largest(self._batch) for split in self.splits) + weights
            fit = int((self.memory or budget.together) / max(one, 1))
            self.weight_sets_together = min(fit, MOST_AT_ONCE) if fit >= budget.fewest else 1
            self._fit = 1 if self.measures else fit  # a measure of the caller's own is asked point by point
        self._ready = {split.name: list(self._batches(split)) for split in self.splits if split.nbytes <= HELD_BYTES}
        self._checked = True

    def _taken_on(self, states: Iterable[Weights]) -> Iterator[None]:
        for state in states:
            self.network.check(state, "weights")
            self.network.load(state)
            yield

    def _bytes_of(self, inputs: Any, split: str) -> int:
        """What the activations of a first few inputs take; `DataError` where the module fails on them."""
        try:
            return activation_bytes(self.network, inputs)
        except (LmcError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = ", ".join(f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in tensors(inputs))
            name = type(self.network.module).__name__
            raise DataError(f"{split}: the model ({name}) fails on inputs {shapes}: {error}") from error

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

    def _tally(self, pending: list[list[Tensor]]) -> list[dict[str, Score]]:
        """Scores of some weight sets from the outputs (N, ...) that each has for every batch of every split."""
        if not pending:
            return []
        columns, batch = {}, 0
        for split in self.splits:
            tally = Tally(split.name, self.measures, self.predictions)
            for _inputs, targets, counted in self._ready[split.name]:
                outputs = [one[batch] for one in pending]
                tally.add(torch.stack(outputs) if len(outputs) > 1 else outputs[0][None], targets, counted)
                batch += 1
            columns[split.name] = tally.scores()
        return [{name: scores[k] for name, scores in columns.items()} for k in range(len(pending))]

    def _columns(self, group: list[Weights]) -> dict[str, list[Score]]:
        if len(group) == 1:
            self.network.load(group[0])
            return {split.name: self._run(split, lambda inputs: self.network(inputs)[None]) for split in self.splits}
        stacked = self.network.stack(group)
        return {split.name: self._run(split, lambda inputs: self.network.many(stacked, inputs)) for split in self.splits}

    def _run(self, split: Split, outputs_of: Callable[[Any], Tensor]) -> list[Score]:
        """One pass over a split; `outputs_of` gives the outputs (K, N, ...) of a batch."""
        tally = Tally(split.name, self.measures, self.predictions)
        for inputs, targets, counted in self._ready.get(split.name) or self._batches(split):
            tally.add(outputs_of(inputs), targets, counted)
        return tally.scores()

    def _batches(self, split: Split) -> Iterator[tuple[Any, Tensor, int]]:
        """Inputs and targets on the device, and how many targets count."""
        for inputs, targets in split.iterate(self._batch):
            counted = int((targets != IGNORED).sum())
            yield to_device(inputs, self.device), targets.to(self.device), counted
