"""Tasks: descriptions of how a module is called on a batch, which of its outputs count, and how they are judged."""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc.core.context import warn
from lmc.errors import DataError, InputError
from lmc.network.batches import IGNORED, LABELS, Split, TargetsOf, TaskData, tensors

# Of the outputs and targets of a batch, and of its inputs where it asks for a third argument.
Loss: TypeAlias = Callable[..., Tensor]
Outputs: TypeAlias = None | str | int | Callable[[Any], Any]

# Of torch's losses, as functions and as modules.
UNITS = {
    **dict.fromkeys(("cross_entropy", "nll_loss", "kl_div", "poisson_nll_loss", "gaussian_nll_loss"), "nats"),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits"), "nats"),
    **dict.fromkeys(("CrossEntropyLoss", "NLLLoss", "BCELoss", "BCEWithLogitsLoss"), "nats"),
    **dict.fromkeys(("mse_loss", "MSELoss"), "squared error"),
    **dict.fromkeys(("l1_loss", "L1Loss"), "absolute error"),
}

# Of torch's losses, those that compare outputs and targets entry by entry, and would spread (N, 1) and (N,) to (N, N).
ENTRYWISE = {
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "poisson_nll_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "soft_margin_loss", "hinge_embedding_loss"),
    *("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "KLDivLoss", "PoissonNLLLoss"),
    *("BCELoss", "BCEWithLogitsLoss", "SoftMarginLoss", "HingeEmbeddingLoss"),
}

# Of torch's losses, those of classes, which stand along axis 1 of the outputs and are int64.
OF_CLASSES = {
    *("cross_entropy", "nll_loss", "multi_margin_loss"),
    *("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss"),
}

# Of torch's losses, those whose third argument is not the inputs.
OF_THREE = {
    *("gaussian_nll_loss", "cosine_embedding_loss", "margin_ranking_loss", "triplet_margin_loss", "ctc_loss"),
    *("GaussianNLLLoss", "CosineEmbeddingLoss", "MarginRankingLoss", "TripletMarginLoss", "CTCLoss"),
    *("triplet_margin_with_distance_loss", "TripletMarginWithDistanceLoss"),
}


@dataclass(frozen=True)
class Task:
    """A description of how a module is called and judged, given as `loss=`, or with the data: `task.on(data)`.

    The default is classification: cross-entropy and accuracy of outputs (N, C), (N, ..., C) or (N, C, ...) against
    integer targets (N,) or (N, ...). `Task.regression()` and its kin are ready-made.

    A loss or metric is called with outputs and targets, and with the inputs where it asks for a third argument; torch's own
    that compare them entry by entry get both in one shape, a last axis of length 1 aside. It gives
    one value for each example, one for each target, or their mean. Up to 256 MiB of outputs it is called once, on all
    the examples of a split, so that its value does not depend on how they are batched. Beyond, it is called batch by
    batch: the means of batches are weighted by the targets that count, and a warning is given where a batch has another
    value than its halves have together.

    Attributes:
        loss: None for the cross-entropy of classes.
        metrics: further measures by name.
        outputs: what the loss is given of the module's result: a function of it, a key or attribute, or a position.
            Default: the tensor, or `.logits`; where there is neither, a loss of one's own is given all of it.
        ignore: the target that does not count (default: the `ignore_index` of the loss, else -100).
        axis: 1 or -1, where the classes are in outputs whose shape admits both, (N, 5, 5) for targets (N, 5). Default: 1
            for torch's losses and for maps (N, C, H, W), the last for sequences, with a warning unless a loss says it.
        targets: makes targets of `(inputs, targets or None)`, for tasks whose targets are in the inputs.
        labels: the argument by which the module takes targets and computes a loss of its own (Hugging Face: "labels"),
            which is used: `.loss` of the result, its entry "loss", or the scalar in a tuple. To inputs that are no
            mapping the targets are added as last argument.
        unit: of the loss, for labels of plots.
        higher: measures of which higher values are better.
        derived: further values as functions of the mean loss, for example {"perplexity": math.exp}.

    Example:
        >>> import lmc, torch
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(20, 3)
        >>> task = lmc.Task.regression()
        >>> lmc.landscape.evaluate(model, None, (x, model(x).detach()), loss=task)["data"].loss < 1e-9
        True
    """

    loss: Loss | None = None
    metrics: Mapping[str, Loss] = field(default_factory=dict)
    outputs: Outputs = None
    ignore: int = IGNORED
    axis: int | None = None
    targets: TargetsOf | None = None
    labels: str | None = None
    unit: str = "nats"
    higher: Collection[str] = ("accuracy",)
    derived: Mapping[str, Callable[[float], float]] = field(default_factory=dict)

    # ---- ready-made tasks

    @classmethod
    def classes(cls, ignore: int = IGNORED, **others: Any) -> "Task":
        """Classification, of images, tokens or pixels, with a target that does not count."""
        return cls(ignore=ignore, **others)

    @classmethod
    def segmentation(cls, ignore: int = 255, **others: Any) -> "Task":
        """Classes of pixels: outputs (N, C, H, W), or a result with entry "out", and targets (N, H, W)."""
        return cls(ignore=ignore, **{"axis": 1, **others})

    @classmethod
    def regression(cls, **others: Any) -> "Task":
        """Mean squared error of outputs and targets of one shape, a last axis of length 1 aside."""
        return cls(loss=_squared_error, unit="squared error", **others)

    @classmethod
    def binary(cls, **others: Any) -> "Task":
        """Binary or multi-label classification: a logit for each target 0 or 1; accuracy over labels."""
        metrics = {"accuracy": _right_labels, **others.pop("metrics", {})}
        return cls(loss=_binary_cross_entropy, metrics=metrics, unit="nats", **others)

    @classmethod
    def language(cls, unit: str = "nats", **others: Any) -> "Task":
        """Next tokens: outputs (N, T, V) for token ids (N, T), alone or as "input_ids" of a mapping; no targets needed.

        Where there are "labels" they are the tokens themselves, -100 where they do not count, as in Hugging Face's data.
        Padding, by "attention_mask", does not count.

        Args:
            unit: "nats" or "bits", per token; "perplexity" is given too.
        """
        if unit not in ("nats", "bits"):
            raise InputError(f'unit={unit!r}; expected "nats" or "bits"')
        per = {"nats": 1.0, "bits": math.log(2.0)}[unit]
        derived = {"perplexity": lambda loss: math.exp(min(per * loss, 700.0))}
        loss = None if unit == "nats" else functools.partial(_cross_entropy_in, per=per)
        return cls(loss=loss, axis=-1, targets=_next_tokens, unit=f"{unit} per token", derived=derived, **others)

    @classmethod
    def reconstruction(cls, **others: Any) -> "Task":
        """Mean squared error between the outputs and the inputs themselves, a tensor; no targets needed."""
        return cls(loss=_squared_error, targets=_inputs_themselves, unit="squared error", **others)

    @classmethod
    def own_loss(cls, labels: str = "labels", unit: str = "", **others: Any) -> "Task":
        """The loss that the module computes itself when it is called with targets (Hugging Face models)."""
        own = None if labels in LABELS else functools.partial(_entry, name=labels)
        return cls(labels=labels, unit=unit, **{"targets": own, **others})

    # ---- at the door of a function

    @classmethod
    def of(
        cls,
        data: Any,
        loss: "Loss | Task | None" = None,
        metrics: Mapping[str, Loss] | None = None,
        outputs: Outputs = None,
    ) -> "Task":
        """The task that keyword arguments and data describe: `loss`, if it is a task, before that of `task.on(data)`."""
        task = loss if isinstance(loss, Task) else data.task if isinstance(data, TaskData) else cls()
        if loss is not None and not isinstance(loss, Task):
            if not callable(loss) or isinstance(loss, type):
                made = f": make one, {loss.__name__}()" if isinstance(loss, type) else ""
                raise InputError(f"loss={loss!r}; expected a function of outputs and targets, or an lmc.Task{made}")
        if not isinstance(metrics, Mapping | None):
            raise InputError(f"metrics: expected a mapping of names to functions, got {type(metrics).__name__}")
        if loss is not None and not isinstance(loss, Task):
            task = replace(task, loss=loss, labels=None, unit=_unit(loss), derived={})
            task = replace(task, ignore=_ignored_by(loss, task.ignore))
            if _name(loss) in OF_CLASSES:
                task = replace(task, axis=1)
            if _name(loss) in OF_THREE:
                raise InputError(
                    f"loss={_name(loss)} takes three arguments of its own, a loss here outputs, targets and inputs: write a "
                    "function of these that calls it, for example lambda outputs, targets: ..."
                )
        if metrics:
            task = replace(task, metrics={**task.metrics, **metrics})
        return task if outputs is None else replace(task, outputs=outputs)

    def fitted(self, model: nn.Module, split: Split) -> "Task":
        """The task for a module and its data: targets that came as "labels" of a mapping, and that the module asks for,
        mean its own loss, unless a loss was given."""
        plain = self.loss is None and self.labels is None and self.targets is None and self.outputs is None
        if plain and split.labels is not None and split.labels in signature(model.forward).parameters:
            return replace(self, labels=split.labels, unit="")
        return self

    @property
    def is_binary(self) -> bool:
        """Whether outputs are logits of independent yes-or-no answers."""
        function = self.loss.func if isinstance(self.loss, functools.partial) else self.loss
        return isinstance(function, nn.BCEWithLogitsLoss) or function in BINARY

    def on(self, data: Any) -> TaskData:
        """`data` with this task, for functions that take labelled data but no `loss`."""
        return TaskData(data, self)

    # ---- what a batch is made of

    def call(self, inputs: Any, targets: Tensor) -> Any:
        """The arguments that the module is called with."""
        if self.labels is None:
            return inputs
        if isinstance(inputs, Mapping):
            return {**inputs, self.labels: targets}
        return (*tensors(inputs), targets)

    def relabelled(self, call: Any, targets: Tensor) -> Any:
        """A call of the module with other targets."""
        return self.call(call if self.labels is None or isinstance(call, Mapping) else call[:-1], targets)

    def read(self, result: Any) -> Any:
        """The part of the module's result that is judged: a tensor (N, ...), or what a loss of one's own takes.

        Raises:
            InputError: a result without the outputs asked for, or, for classes, of which none is known to be the logits.
        """
        if self.labels is not None:
            return result
        if self.outputs is not None:
            return chosen(result, self.outputs)
        found = _logits(result)
        if found is None and self.loss is None and isinstance(result, Mapping):
            found = result.get("out")  # segmentation networks of torchvision
        if found is None and self.loss is None:
            raise InputError(
                f"the model returned {_describe(result)}; expected a tensor or an object with .logits: say which outputs "
                "count, with outputs= or lmc.Task(outputs=...).on(data), a function of the result, a key or a position"
            )
        return result if found is None else found

    def logits(self, outputs: Any, targets: Tensor) -> Tensor | None:
        """Outputs that are read as logits (targets, C) where the targets are classes; else None."""
        found = _logits(outputs) if self.labels is not None else outputs
        if not isinstance(found, Tensor) or (self.labels is not None and targets.ndim > 1):
            return None  # the module itself may shift the targets of sequences
        rows = class_last(found[None], targets, self.axis)
        return None if rows is None else rows[0]

    def counted(self, targets: Tensor) -> int:
        """The number of targets that count."""
        return int((targets != self.ignore).sum()) if _are_classes(targets) else targets.numel()

    def mean_loss(self, outputs: Any, targets: Tensor, inputs: Any = None) -> Tensor:
        """The mean loss of a batch, where autograd follows it.

        Raises:
            DataError: targets that are no classes of the outputs, where the task is to classify.
        """
        if self.labels is not None:
            return own_loss(outputs)
        if self.loss is None:
            rows = self.logits(outputs, targets)
            if rows is None:
                raise no_classes(outputs, targets, "data")
            return F.cross_entropy(rows, targets.reshape(-1).long(), ignore_index=self.ignore)
        value = measured(self.loss, "loss", outputs, targets, inputs)
        if value.shape == targets.shape and _are_classes(targets) and value.ndim:
            return value[targets != self.ignore].mean()
        return value.mean()

    def weight(self, targets: Tensor) -> int:
        """By how much the mean loss of a batch counts among others: its targets that count, or its examples."""
        return self.counted(targets) if _are_classes(targets) else len(targets)

    def check(self, split: Split, outputs: Any, targets: Tensor) -> None:
        """Raise `DataError` for targets of a split that are no classes of the outputs, where the task is to classify.

        A warning is given where the shapes leave open along which axis the classes are.

        Args:
            outputs, targets: of a few examples.
        """
        if self.axis is None and isinstance(outputs, Tensor) and all(_fitting(outputs.shape, targets)):
            warn(
                f"{split.name}: the classes of outputs {tuple(outputs.shape)} may stand along axis 1 or along the last, as both "
                f"have the length of the targets' {tuple(targets.shape)}; taken is {'1' if outputs.ndim > 3 else 'the last'}. "
                "Say which: loss=lmc.Task.classes(axis=1), or axis=-1"
            )
        if self.loss is not None or self.labels is not None:
            return
        rows = self.logits(outputs, targets)
        if rows is None:
            raise no_classes(outputs, targets, split.name)
        for _inputs, goal in split.batches if split.held else []:
            check_classes(goal, rows.shape[-1], split.name, self.ignore)


def chosen(result: Any, outputs: Outputs) -> Any:
    """The part of a module's result that a selector names.

    Raises:
        InputError: a result without it.
    """
    if callable(outputs):
        return outputs(result)
    if isinstance(outputs, int):
        with suppress(IndexError, TypeError, KeyError):
            return (tuple(result.values()) if isinstance(result, Mapping) else result)[outputs]
    elif isinstance(result, Mapping) and outputs in result:
        return result[outputs]
    elif isinstance(outputs, str) and hasattr(result, outputs):
        return getattr(result, outputs)
    raise InputError(f"outputs={outputs!r}: the module's result ({_describe(result)}) has no such entry")


def tensor_of(result: Any) -> Tensor:
    """A result that is a tensor, or its `.logits`.

    Raises:
        InputError: any other result.
    """
    return Task().read(result)


def own_loss(result: Any) -> Tensor:
    """The loss in the result of a module that was called with targets."""
    entries = list(result.values()) if isinstance(result, Mapping) else result
    named = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if named is None and isinstance(entries, tuple | list):
        named = next((x for x in entries if isinstance(x, Tensor) and x.ndim == 0 and x.is_floating_point()), None)
    if isinstance(result, Tensor) and result.ndim == 0:
        named = result
    if not isinstance(named, Tensor):
        raise InputError(f"the model, called with targets, returned {_describe(result)}, in which there is no loss")
    return named.mean()


def measured(measure: Loss, name: str, outputs: Any, targets: Tensor, inputs: Any) -> Tensor:
    """The value of a loss or metric: one number, or one for each example or target.

    Raises:
        InputError: a value of any other shape.
    """
    if _name(measure) in ENTRYWISE and isinstance(outputs, Tensor):
        found = measure(*_one_form(outputs, targets))
    elif _name(measure) in OF_CLASSES and _are_classes(targets):
        found = measure(outputs, targets.long())
    else:
        found = measure(*(outputs, targets, inputs)[: _arity(measure)])
    try:
        value = torch.as_tensor(found, device=targets.device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{name} returned {_describe(found)}; expected one value, or one for each example") from error
    if value.numel() == 1 and len(targets) != 1:
        return value.reshape(())
    if value.numel() != 1 and (value.ndim == 0 or len(value) != len(targets)):
        raise InputError(
            f"{name} returned shape {tuple(value.shape)}; expected one value, or one for each of {len(targets)} examples"
        )
    return value


def takes_numbers(loss: Loss, outputs: Any, targets: Tensor, inputs: Any) -> bool:
    """Whether a loss of one's own reads integer targets as numbers (quantiles of counts), not as classes: it changes
    steadily with them, where a loss of classes refuses fractions, cuts them off or finds nothing equal to them."""
    try:
        at, near, far = (
            measured(loss, "loss", outputs, targets.to(torch.get_default_dtype()) + shift, inputs).double().sum()
            for shift in (0.0, 1 / 64, 1 / 4)
        )
    except Exception:  # whatever the caller's code raises for numbers
        return False
    return bool(0 < (near - at).abs() < (far - at).abs() / 4)


def class_weights(loss: Loss | None) -> Tensor | None:
    """The weights (C,) that a loss of torch gives to classes, by which its means are taken."""
    if loss is None or _name(loss) not in OF_CLASSES:
        return None
    found = loss.keywords.get("weight") if isinstance(loss, functools.partial) else getattr(loss, "weight", None)
    return found if isinstance(found, Tensor) else None


def class_last(outputs: Tensor, targets: Tensor, axis: int | None = None) -> Tensor | None:
    """Outputs (K, N, ..., C) or (K, N, C, ...) as logits (K, targets, C) where the targets are classes, else None.

    Targets may have a further axis of length 1, the last or that of channels.

    Args:
        axis: as for `Task`, of the outputs of one weight set.
    """
    found = class_axis(outputs.shape[1:], targets, axis)
    if found is None:
        return None
    outputs = outputs.movedim(2, -1) if found == 1 else outputs
    return outputs.reshape(len(outputs), targets.numel(), outputs.shape[-1])


def class_axis(shape: Sequence[int], targets: Tensor, axis: int | None = None) -> int | None:
    """The axis of the classes in outputs of a shape, 1 or -1; None where the targets are no classes of theirs.

    Args:
        axis: as for `Task`.
    """
    last, first = _fitting(shape, targets)
    if first and (not last or axis == 1 or (axis is None and len(shape) > 3)):
        return 1
    return -1 if last else None


def _fitting(shape: Sequence[int], targets: Tensor) -> tuple[bool, bool]:
    """Whether targets are classes along the last axis of outputs of a shape, and whether along axis 1, where that is another."""
    goal = tuple(targets.shape)
    if len(goal) == len(shape) > 1 and 1 in (goal[1], goal[-1]):
        goal = (goal[0], *goal[2:]) if goal[1] == 1 else goal[:-1]
    if not _are_classes(targets) or len(shape) != len(goal) + 1:
        return False, False
    return tuple(shape[:-1]) == goal, len(shape) > 2 and (shape[0], *shape[2:]) == goal


def check_classes(targets: Tensor, classes: int, split: str, ignore: int = IGNORED) -> None:
    """Raise `DataError` for a target that is no class: on a GPU it would end the whole process."""
    counted = targets[targets != ignore]
    low, high = torch.stack([counted.min(), counted.max()]).tolist() if counted.numel() else (0, 0)
    if counted.numel() and not 0 <= low <= high < classes:
        raise DataError(
            f"{split}: targets from {int(low)} to {int(high)}, but the model has {classes} classes "
            f"(0 to {classes - 1}); a target that does not count is set by loss=lmc.Task.classes(ignore=255)"
        )


def no_classes(outputs: Any, targets: Tensor, split: str) -> DataError:
    """The error for outputs and targets that are no classification, where no loss says what they are."""
    return DataError(
        f"{split}: outputs {_describe(outputs)} and targets {targets.dtype} {tuple(targets.shape)} are no classification; "
        "expected integer targets (N,) for outputs (N, C), or (N, T) for (N, T, C). For anything else say what is judged: "
        "loss=, or lmc.Task.regression().on(data) and its kin"
    )


def _are_classes(targets: Tensor) -> bool:
    return not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)


def _logits(result: Any) -> Tensor | None:
    if isinstance(result, Mapping):
        result = result.get("logits")
    result = getattr(result, "logits", result)
    return result if isinstance(result, Tensor) else None


def _describe(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _unit(loss: Loss) -> str:
    """The unit of a loss of torch; empty for any other."""
    return UNITS.get(_name(loss), "")


def _name(loss: Loss) -> str:
    function = loss.func if isinstance(loss, functools.partial) else loss
    if isinstance(function, nn.Module):
        return type(function).__name__
    return getattr(function, "__name__", "") if getattr(F, getattr(function, "__name__", ""), None) is function else ""


def _ignored_by(loss: Loss, otherwise: int) -> int:
    """The target that a loss leaves out."""
    keywords = loss.keywords if isinstance(loss, functools.partial) else {}
    return keywords.get("ignore_index", getattr(loss, "ignore_index", otherwise))


def _arity(measure: Loss) -> int:
    """3 for a function that cannot be called without a third argument, else 2."""
    try:
        parameters = signature(measure.forward if isinstance(measure, nn.Module) else measure).parameters.values()
    except (TypeError, ValueError):
        return 2
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return 3 if sum(p.kind in positional and p.default is p.empty for p in parameters) == 3 else 2


def _one_form(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one shape, where they differ by a last axis of length 1: (N, 1) and (N,) would be broadcast to (N, N)."""
    if outputs.shape == (*targets.shape, 1):
        outputs = outputs[..., 0]
    elif targets.shape == (*outputs.shape, 1):
        targets = targets[..., 0]
    return outputs, targets if targets.is_floating_point() or targets.is_complex() else targets.to(outputs.dtype)


def _alike(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    outputs, targets = _one_form(outputs, targets)
    if outputs.shape != targets.shape:
        raise DataError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}; expected the same shape")
    return outputs, targets.to(outputs.dtype)


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs, targets = _alike(outputs, targets)
    return (outputs - targets).square().reshape(len(outputs), -1).mean(1)


def _binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs, targets = _alike(outputs, targets)
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").reshape(len(outputs), -1).mean(1)


def _right_labels(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs, targets = _alike(outputs, targets)
    return ((outputs > 0) == (targets > 0.5)).to(outputs.dtype).reshape(len(outputs), -1).mean(1)


def _cross_entropy_in(outputs: Tensor, targets: Tensor, *, per: float) -> Tensor:
    """The cross-entropy at each position, in units of `per` nats."""
    rows = class_last(outputs[None], targets, -1)
    if rows is None:
        raise no_classes(outputs, targets, "data")
    return (
        F.cross_entropy(rows[0], targets.reshape(-1).long(), reduction="none", ignore_index=IGNORED).view(targets.shape)
        / per
    )


def _next_tokens(inputs: Any, targets: Tensor | None) -> Tensor:
    """At each position the token behind it; the last, and padding, do not count."""
    ids = tensors(inputs)[0] if targets is None else targets
    if targets is None and isinstance(inputs, Mapping):
        ids = inputs.get("input_ids", ids)
        if isinstance(mask := inputs.get("attention_mask"), Tensor) and mask.shape == ids.shape:
            ids = ids.masked_fill(mask == 0, IGNORED)
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else tensors(inputs)[0]
    if targets is not None and isinstance(tokens, Tensor) and tokens.shape == ids.shape and _are_classes(tokens):
        if bool(((ids != tokens.to(ids.device)) & (ids != IGNORED)).any()):
            raise DataError(
                "a language task takes the tokens themselves as labels, and shifts them; these labels are others: targets that "
                "are the next tokens already go with lmc.Task.classes(), a mask goes as attention_mask into a mapping with input_ids"
            )
    if ids.ndim < 2:
        raise DataError(f"a language task needs tokens (N, T), got {tuple(ids.shape)}")
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)


def _entry(inputs: Any, targets: Tensor | None, name: str) -> Tensor:
    """The targets, or, where there are none, what a mapping has under a name that is not everywhere that of targets."""
    found = inputs.get(name) if targets is None and isinstance(inputs, Mapping) else targets
    if not isinstance(found, Tensor):
        raise DataError(f"own_loss(labels={name!r}) needs targets, or mappings with an entry {name!r}")
    return found


def _inputs_themselves(inputs: Any, _targets: Tensor | None) -> Tensor:
    return tensors(inputs)[0]


BINARY = (_binary_cross_entropy, F.binary_cross_entropy_with_logits)
