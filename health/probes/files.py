"""Small files of the kernel: what cannot be read is empty, for a probe judges nothing. I/O."""

import contextlib
from pathlib import Path


def text(path: Path) -> str:
    """The file's text without the line break at its end; empty where it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""


def entries(folder: Path) -> list[Path]:
    """What lies in the folder, by name; nothing where it cannot be listed."""
    with contextlib.suppress(OSError):
        return sorted(folder.iterdir())
    return []
