"""Several results in one picture."""

from collections.abc import Mapping
from typing import TypeVar

from lmc.errors import InputError

Shown = TypeVar("Shown")


def labelled(result: Shown, label: str, others: Mapping[str, Shown]) -> dict[str, Shown]:
    """The results by name, `result` last, on top.

    Raises:
        InputError: others of another kind, or that have the same name.
    """
    for name, other in others.items():
        if not isinstance(other, type(result)):
            raise InputError(f"{name}: expected a {type(result).__name__}, got {type(other).__name__}")
    if label in others:
        raise InputError(f"two results are called {label!r}; pass label=")
    return {**others, label: result}


def labelled_paths(path: Shown, label: str | None, others: Mapping[str, Shown]) -> dict[str, Shown]:
    """As `labelled`; without a label, a path is "aligned" beside a "naive" one, else "path"."""
    return labelled(
        path, label or ("aligned" if "naive" in others else "naive" if "aligned" in others else "path"), others
    )


def measure_title(measure: str, unit: str) -> str:
    """A measure with its unit: "loss (nats)", "accuracy (%)"; that of the loss is `unit`, and may be empty."""
    known = {"loss": unit, "accuracy": "%"}.get(measure)
    return f"{measure} ({known})" if known else measure
