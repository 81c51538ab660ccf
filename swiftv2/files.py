"""Files that are either whole or not there, and their digests."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swiftv2.errors import SwiftError


def write_file(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all: beside it first, to the disk, then in its place.

    Args:
        path: the file; an older one is replaced.
        content: text (as UTF-8) or bytes.
        mode: permissions.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    beside.unlink(missing_ok=True)
    try:
        with named(path), os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of writing to an open file name it, as those of opening it do."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SwiftError: it cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SwiftError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise SwiftError(f"{path}: not valid JSON: the file is damaged") from error
    if not isinstance(value, dict):
        raise SwiftError(f"{path}: expected a JSON object: the file is damaged")
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
