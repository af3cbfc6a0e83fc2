"""Writing files so that a reader never sees half of one."""

import os
import secrets
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write `text` beside `path` and rename: an interrupt or a full disk leaves the old file as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # with the permissions of any new file
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
