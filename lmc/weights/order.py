"""Orders that do not depend on how weights were stored: natural order of names."""

import re


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key to sort names by, numbers by their value: "layers.2" before "layers.10"."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))
