"""Packages that only some functions need, asked for when such a function is called."""

import importlib
from typing import Any

from lmc.errors import MissingPackageError

INSTALLED_AS = {"PIL": "Pillow", "ot": "POT", "yaml": "PyYAML"}  # where the package to install has another name


def require(package: str, extra: str = "notebooks") -> Any:
    """The module `package`, or a module inside a package.

    Raises:
        MissingPackageError: it is not installed; says how to get it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        name = INSTALLED_AS.get(top, top)
        raise MissingPackageError(
            f"this needs the package {name}, which is not installed or fails to load ({error}): "
            f"pip install {name}, or everything at once with the extra '{extra}', pip install 'lmc-lab[{extra}]'"
        ) from error
