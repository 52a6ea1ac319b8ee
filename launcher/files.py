"""The one way we write and read documents on disk: temp-then-rename, bounded, typed."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from launcher.errors import StateError

DOCUMENT_MAX_BYTES = 8 * 1024 * 1024
T = TypeVar("T", bound=BaseModel)


def make_private(folder: Path) -> Path:
    """Make a folder that only its owner can enter; an existing one must be ours."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A link in its place (in /tmp) may be another user's, who wants our files elsewhere.
        me = os.getuid()
        if folder.stat().st_uid != me or folder.lstat().st_uid not in (me, 0):
            raise StateError(
                "belongs to another user",
                where=str(folder),
                hint="Set LAUNCHER_STATE_DIR to a folder of your own.",
            )
        folder.chmod(0o700)
    except OSError as error:
        raise StateError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    return folder


def write_text(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace a file whole or not at all. Raises StateError (full disk, no right)."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise StateError(
            f"cannot be written: {error.strerror}", where=str(path), hint="Is the disk full?"
        ) from error


def write_document(path: Path, document: BaseModel) -> None:
    write_text(path, document.model_dump_json(indent=1) + "\n")


def read_document(path: Path, kind: type[T]) -> T | None:
    """The document, or None where there is no file. Raises StateError when it is not one."""
    try:
        with path.open("rb") as file:
            raw = file.read(DOCUMENT_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return parse_document(raw, kind, str(path))


def parse_document(raw: bytes, kind: type[T], where: str) -> T:
    """A document from its bytes. Raises StateError that names the first wrong key."""
    if len(raw) > DOCUMENT_MAX_BYTES:
        raise StateError(f"is larger than {DOCUMENT_MAX_BYTES} bytes", where=where)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise StateError(f"is not a {kind.__name__}: {key} {first['msg']}", where=where) from error


def append_line(path: Path, line: str) -> None:
    """Add one line to a log or journal; O_APPEND keeps lines whole on a local disk."""
    try:
        with open_log(path) as handle:
            os.write(handle, (line + "\n").encode())
            os.fsync(handle)
    except OSError as error:
        raise StateError(f"cannot be written: {error.strerror}", where=str(path)) from error


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[int]:
    """A log that several processes append to, as a handle for a child. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)


def read_tail(path: Path, limit_bytes: int = 16_384) -> str:
    """The end of a log, never more than limit_bytes; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - limit_bytes))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
