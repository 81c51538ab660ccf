"""Small files that are either whole or not there."""

import json
import os
from pathlib import Path
from typing import Any

from swiftv2.errors import SwiftError


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a text file: temporary file beside it, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


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
