"""Weights & Biases: offline files in the run directory, or the hosted service where it is asked for."""

import os
import struct
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from swiftv2.engine.trackers.tracker import Order, Tracker

_BLOCK, _HEAD = 32768, 7
_READ_BACK = 20_000_000
"""Bytes up to which a file is read back at the end: more would take longer than a run waits for its trackers."""
_FIRST, _LAST = (1, 2), (1, 4)
"""Kinds of pieces that begin a record and that end one: whole, first, middle, last are 1 to 4."""


class _Wandb:
    def __init__(self, order: Order) -> None:
        os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        os.chdir(order.folder)
        import wandb

        self._run = wandb.init(
            mode="online" if order.mode == "online" else "offline",
            project=order.project,
            id=order.identity,
            name=order.identity,
            resume="allow",
            # It makes a folder `wandb` there, which is the order's.
            dir=str(Path(order.folder).parent),
            config=dict(order.settings),
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                save_code=False,
                silent=True,
                host="",
                username="",
                program="swiftv2",
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        # W&B's own step only rises; ours goes back where steps are done again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

        self._file = None if order.mode == "online" else Path(self._run.dir).parent / f"run-{order.identity}.wandb"
        self._lines = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})
        self._lines += 1

    def close(self) -> None:
        """Raises OSError where its service, which tells nobody of a full disk, has not written all lines."""
        self._run.finish()
        # Only the end of its service completes the file.
        import_module("wandb").teardown()
        if self._file is not None and (not self._file.exists() or self._file.stat().st_size <= _READ_BACK):
            lost = self._lines - sum(1 for _ in read_lines(self._file))
            if lost > 0:
                raise OSError(f"{lost} of {self._lines} lines are not in {self._file.name}: is the disk full?")


def read_lines(path: Path) -> Iterator[dict[str, str]]:
    """Lines that were logged to a `.wandb` file, by key as JSON; of a file that breaks off, those before.

    The file is LevelDB's log: after 7 bytes, blocks of 32 KiB with pieces of records, each a protocol buffer `Record`.
    """
    record_type = import_module("wandb.proto.wandb_internal_pb2").Record
    for data in _records(path.read_bytes()):
        record = record_type.FromString(data)
        if record.HasField("history"):
            yield {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}


def _records(data: bytes) -> Iterator[bytes]:
    at, pieces = _HEAD, [b""]
    while at + _HEAD <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + _HEAD : at + _HEAD + length]
        if not 1 <= kind <= 4 or len(piece) < length:
            return
        pieces = [piece] if kind in _FIRST else [*pieces, piece]
        if kind in _LAST:
            yield b"".join(pieces)
        at += _HEAD + length


def begin(order: Order) -> Tracker:
    """Open a run; offline it is a folder `wandb/offline-run-<time>-<id>` of this attempt."""
    return _Wandb(order)
