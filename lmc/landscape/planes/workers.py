"""Points of a plane scored by several threads, each with a network of its own.

On a CPU, threads that each take points gained on one thread where threads inside each operator lost: the operators of
small networks are too short to be shared (measured for one small MLP on a busy machine, benchmarks/RESULTS.md). Data and
products of the first layer are shared, activations are not.

The weights of a point are `origin + u U + v V`, and so is what the first layer makes of the raw inputs: its products with
origin, U and V are made once and mixed at every further point. The result is the same up to rounding.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmc.core.context import callers_dtype
from lmc.core.workers import crew
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.evaluation.scores import Score
from lmc.landscape.planes.span import PlaneSpan
from lmc.network.batches import tensors
from lmc.network.batchnorm import Recalibrator
from lmc.network.copies import fresh_copy
from lmc.network.network import Network
from lmc.weights import Weights

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FEWEST_INPUTS = 16  # to one output; with fewer, mixing three products takes as long as making one
PRODUCT_BYTES = 512 << 20
MOST = 8  # threads that take points; with more of them, Python between the operators is what all wait for
Place = Callable[[int], tuple[float, float]]
Scoring = Callable[[Sequence[int]], Iterator[tuple[int, dict[str, Score]]]]


class Products:
    """Products of the first layer with the data, at the origin of a plane and along its directions; threads share them.

    Args:
        layer: it has the name `name` in the network.
        inputs: the data that the network is evaluated on; they stay where they are as long as this lives.
    """

    def __init__(self, span: PlaneSpan, name: str, layer: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.name = name
        self._layer = fresh_copy(layer)
        self._parts = [
            {key: part.get(f"{name}.{key}", torch.zeros_like(slot)) for key, slot in layer.state_dict().items()}
            for part in span.parts()
        ]
        for key in layer.state_dict():
            self._parts[0][key] = span.origin[f"{name}.{key}"]
        self._data = {tensor.data_ptr(): tensor for tensor in inputs}
        self._known: dict[Any, list[Tensor]] = {}
        self._left = PRODUCT_BYTES
        self._lock = threading.Lock()

    def of(self, inputs: Tensor) -> list[Tensor] | None:
        """The three products, made at the first call; None where `inputs` are no view of the data, or memory ends."""
        key = (inputs.data_ptr(), inputs.shape, inputs.stride())
        if key not in self._known and inputs.data_ptr() in self._data:
            with self._lock:
                if key not in self._known and self._left > 0:
                    products = [functional_call(self._layer, part, (inputs,)) for part in self._parts]
                    self._left -= sum(product.nbytes for product in products)
                    self._known[key] = products
        return self._known.get(key)


class FirstLayer:
    """Takes the place of `forward` in the first layer of one network, and mixes products where it can.

    Attributes:
        place: (u, v) of the point whose weights the network has; None for weights off the plane.
    """

    def __init__(self, network: Network, products: Products) -> None:
        layer = network.module.get_submodule(products.name)
        self.place: tuple[float, float] | None = None
        self._products = products
        self._forward = layer.forward
        layer.forward = self

    def __call__(self, inputs: Tensor) -> Tensor:
        products = None if self.place is None else self._products.of(inputs)
        if products is None or self.place is None:
            return self._forward(inputs)
        base, along_u, along_v = products
        return torch.add(base, along_u, alpha=self.place[0]).add_(along_v, alpha=self.place[1])


@contextmanager
def scoring(
    evaluation: Evaluation, span: PlaneSpan, places: Sequence[tuple[float, float]], executor: Any
) -> Iterator[Scoring]:
    """`score(order)` gives `(i, scores)` of the points with these indices in `places`, as they are done: by threads here, or
    by the workers of an executor, to which all that they need is sent once."""
    if executor is None:
        yield Workers(evaluation, span, places.__getitem__)
        return
    shared = {"again": evaluation.again, "span": span, "places": places, "first": len(evaluation.states) - 1}
    with crew(executor, _elsewhere, shared) as work:

        def score(order: Sequence[int]) -> Iterator[tuple[int, dict[str, Score]]]:
            for _, found in work(evaluation.evaluator.chunks(order)):
                yield from found

        yield score


def _elsewhere(
    again: Callable[[], Evaluation], span: PlaneSpan, places: Sequence[tuple[float, float]], first: int
) -> Callable[[Sequence[int]], list[tuple[int, dict[str, Score]]]]:
    """A worker's task for some points."""
    evaluation = again()
    next(evaluation.evaluator([evaluation.states[first]]))
    workers = Workers(evaluation, span, places.__getitem__)
    return lambda order: list(workers(order))


def find_first_layer(network: Network, inputs: Any) -> str | None:
    """The name of the layer that sees the raw inputs, or a view of them, once in a forward pass; None where there is no
    such layer, or mixing its products would not pay."""
    raw = {leaf.data_ptr() for leaf in tensors(inputs)}
    layers = {name: module for name, module in network.module.named_modules() if type(module) in LAYERS}
    calls: list[tuple[str, bool]] = []

    def watch(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            calls.append((name, len(args) == 1 and isinstance(args[0], Tensor) and args[0].data_ptr() in raw))

        return note

    plain = {n: m for n, m in layers.items() if not m._forward_hooks and not m._forward_pre_hooks}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in plain.items()]
    try:
        network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    name = next((name for name, sees in calls if sees), None)
    if name is None or [called for called, _ in calls].count(name) > 1:
        return None
    weight = network.module.get_parameter(f"{name}.weight")
    wide = weight.dtype in (torch.float32, torch.float64)
    return name if wide and weight[0].numel() >= FEWEST_INPUTS else None


class Workers:
    """Scores points of a span: `for i, score in workers(order)`, as they are done.

    Args:
        evaluation: one that has scored a weight set before, so that it knows its batches.
        place: (u, v) of the point with a certain index.
    """

    def __init__(self, evaluation: Evaluation, span: PlaneSpan, place: Place) -> None:
        evaluator, prepare = evaluation.evaluator, evaluation.prepare
        self.place = place
        self.span = span
        products = _products(evaluator, prepare, span)
        twins = [evaluator.twin() for _ in range(_threads(evaluator) - 1)]
        self._workers = [_Worker(evaluator, prepare, products)]
        self._workers += [_Worker(twin, prepare and prepare.on(twin.network), products) for twin in twins]

    def seconds_each(self) -> float:
        """Seconds that a point takes with all threads at work, judged by the one with index 0."""
        with _intra_op_threads(torch.get_num_threads() // len(self._workers)):
            list(self._work(self._workers[0], iter([0])))  # makes the products of the first layer
            start = time.perf_counter()
            list(self._work(self._workers[0], iter([0])))
        return (time.perf_counter() - start) / len(self._workers)

    def __call__(self, order: Sequence[int]) -> Iterator[tuple[int, dict[str, Score]]]:
        pending = iter(order)  # shared: taking the next item of a list's iterator is atomic
        if len(self._workers) == 1:
            yield from self._work(self._workers[0], pending)
            return
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()

        def work(worker: "_Worker") -> None:
            try:
                for found in self._work(worker, pending, stop):
                    done.put(found)
            except BaseException as error:  # noqa: BLE001 (raised again by the thread that waits)
                done.put(error)
            done.put(None)

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in self._workers]
        with _intra_op_threads(torch.get_num_threads() // len(threads)):
            for thread in threads:
                thread.start()
            try:
                yield from _until_ended(done, len(threads))
            finally:
                stop.set()
                for thread in threads:
                    thread.join()

    def _work(
        self, worker: "_Worker", pending: Iterator[int], stop: threading.Event | None = None
    ) -> Iterator[tuple[int, dict[str, Score]]]:
        taken: list[int] = []

        def places() -> Iterator[tuple[float, float]]:
            for i in pending:
                if stop is not None and stop.is_set():
                    return
                taken.append(i)
                yield self.place(i)

        try:
            for i, score in enumerate(worker.scores(self.span, places())):
                yield taken[i], score
        finally:
            worker.leave()


class _Worker:
    """The evaluator and the first layer of one thread."""

    def __init__(self, evaluator: Evaluator, prepare: Recalibrator | None, products: Products | None) -> None:
        self.evaluator = evaluator
        self.prepare = prepare
        self.first = None if products is None else FirstLayer(evaluator.network, products)

    def scores(self, span: PlaneSpan, places: Iterable[tuple[float, float]]) -> Iterator[dict[str, Score]]:
        network = self.evaluator.network
        plain = self.evaluator.one_by_one and self.prepare is None and not network.buffers() and network.by_reference
        traveller = span.traveller() if plain else None
        if traveller is None:
            return self.evaluator(self._state(span, u, v) for u, v in places)
        weights, go = traveller
        network.load(weights)  # once: all further points are written where these are
        return self.evaluator.in_turn(self._go(go, u, v) for u, v in places)

    def _state(self, span: PlaneSpan, u: float, v: float) -> Weights:
        """The weights at (u, v), to be scored before the next are asked for."""
        if self.first is not None:
            self.first.place = (u, v)
        weights = span(u, v)
        return weights if self.prepare is None else self.prepare(weights)

    def _go(self, go: Callable[[float, float], object], u: float, v: float) -> None:
        """Take the network's own weights to (u, v)."""
        if self.first is not None:
            self.first.place = (u, v)
        go(u, v)

    def leave(self) -> None:
        """Leave the span: the next weights are no point of it."""
        if self.first is not None:
            self.first.place = None


def _products(evaluator: Evaluator, prepare: Recalibrator | None, span: PlaneSpan) -> Products | None:
    """Products of the first layer, where one weight set at a time goes through data that are held."""
    batches = evaluator.held_inputs()
    if evaluator.weight_sets_together != 1 or not batches:
        return None
    name = find_first_layer(evaluator.network, batches[0])
    if name is None:
        return None
    leaves = [leaf for batch in [*batches, *(prepare.batches if prepare else [])] for leaf in tensors(batch)]
    return Products(span, name, evaluator.network.module.get_submodule(name), leaves)


def _threads(evaluator: Evaluator) -> int:
    """The number of threads that take points. One where the caller's own code would run in them, or data come from an iterator."""
    # The default dtype is one for all threads, and modules are run under the caller's.
    if callers_dtype() != torch.float32:
        return 1
    if evaluator.device.type != "cpu" or not evaluator.plain or not evaluator.held_inputs():
        return 1
    return max(min(torch.get_num_threads(), MOST), 1)


@contextmanager
def _intra_op_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _until_ended(done: "queue.SimpleQueue[Any]", threads: int) -> Iterator[tuple[int, dict[str, Score]]]:
    """The entries of the queue until every thread has said that it ended; an error is raised."""
    while threads:
        found = done.get()
        if found is None:
            threads -= 1
        elif isinstance(found, BaseException):
            raise found
        else:
            yield found
