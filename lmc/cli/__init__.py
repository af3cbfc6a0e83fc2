"""The command `lmc`: `lmc inspect`, `lmc merge`, `lmc align`, `lmc connect`, `lmc barrier`, each the call of the same name in Python."""

from lmc.cli.command import main

__all__ = ["main"]
