"""Packages that only some functions need, asked for when such a function is called."""

import importlib
from typing import Any

from lmc.errors import MissingPackageError


def require(package: str, extra: str = "notebooks") -> Any:
    """The module `package`.

    Raises:
        MissingPackageError: it is not installed; says how to get it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"this needs the package {package}, which is not installed or fails to load ({error}): "
            f"pip install {package}, or everything at once with the extra '{extra}', pip install 'lmc-lab[{extra}]'"
        ) from error
