"""All that can go wrong, as one small hierarchy: catch `LmcError` to catch everything of ours.

Each message names the tensor (or operator), the axis where there is one, what was expected, what was
found, and what to do next.
"""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint in words at the name that was meant; empty where none is near."""
    found = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


class LmcError(Exception):
    """Base class of every error that `lmc` raises on purpose."""


class WeightsError(LmcError, ValueError):
    """Weights that cannot be used: not finite, empty, of an unusable dtype or device."""


class MismatchError(WeightsError):
    """Two weight sets of different architectures: keys, shapes, dtypes or devices differ."""


class SpecError(LmcError, ValueError):
    """A permutation specification that is malformed, or does not fit the weights."""


class TraceError(LmcError, RuntimeError):
    """A module whose operator graph cannot be captured, so that its symmetries cannot be derived."""


class CertificateError(LmcError, RuntimeError):
    """A permutation that was claimed to keep the function does not keep it."""


class DataError(LmcError, ValueError):
    """Data that is empty, malformed, missing, or failed its checksum."""


class InputError(LmcError, ValueError):
    """An argument outside the values it may take."""


class MissingPackageError(LmcError, ImportError):
    """A package beyond the core's that a function needs and that is not installed."""


class WorkerError(LmcError, RuntimeError):
    """Workers of an executor that died, are gone, or have another version of this package."""
