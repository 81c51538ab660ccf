"""A store that cannot be reached is not a damaged one: how the two are told apart."""

import errno
import json
from pathlib import Path
from typing import Any

from swiftv2.errors import SwiftError

AWAY = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO),
        *(errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
        *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.EPROTO),
    }
)
"""What a file system answers that is gone, or on its way back: the files behind it may be whole."""


class AwayError(SwiftError, OSError):
    """The store cannot be reached now; the same call may succeed once it is back. `strerror` says why."""

    def __init__(self, told: str, reason: str | None = None) -> None:
        super().__init__(told)
        self.strerror = reason


def look(folder: Path, store_id: str, version: int, fingerprint: str) -> None:
    """Make sure that a store is there, and is the one that was opened, or a later version of it.

    Args:
        folder: of the store.
        store_id: id of the store that was opened.
        version: its version.
        fingerprint: that version's.

    Raises:
        OSError: it cannot be reached.
        SwiftError: another one is in its place, or its metadata are damaged.
    """
    data = (folder / "zarr.json").read_bytes()
    try:
        now: dict[str, Any] = json.loads(data)["attributes"]["swiftv2"]
        known = {int(one["version"]): one["runs_sha256"] for one in now["history"]}
        same = now["store_id"] == store_id and known.get(version) == fingerprint
    except (ValueError, KeyError, TypeError) as error:
        raise SwiftError(f"store {folder} has damaged metadata (zarr.json): restore it from a copy") from error
    if not same:
        raise SwiftError(f"store {folder}: another store is in its place now: put the former one back and start again")
