"""Training batches on the device, for the loop: copied while the former one is computed, with a record of each epoch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from swiftv2.data.batch import Batch
from swiftv2.data.batches import BatchReader, Fault
from swiftv2.data.order import Exclusion
from swiftv2.errors import SwiftError


class DeviceStream:
    """Micro-batches of a reader on the device.

    Args:
        reader: this rank's micro-batches, in pinned memory where the device is a GPU.
        device: where they are wanted.
        limit: largest share of the clips that may be left out because they cannot be used.
        begin_epoch: told the number of an epoch whose first micro-batch is about to be handed over.
    """

    def __init__(
        self, reader: BatchReader, device: torch.device, limit: float, begin_epoch: Callable[[int], None] = lambda _: None
    ) -> None:
        self._reader, self._device, self._limit, self._begin_epoch = reader, device, limit, begin_epoch
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ahead: Batch | None = None
        self._faults: list[Fault] = []
        self._epoch = -1
        # What this rank has found meanwhile is in the order already; here stands what all have agreed on.
        self._agreed: dict[int, int] = dict(reader.order.exclusions)
        self._allowed = len(self._agreed) + int(limit * reader.order.clips)

    @property
    def exclusions(self) -> list[tuple[int, int]]:
        """All clips that are left out by agreement, with the position from which on they are."""
        return sorted(self._agreed.items())

    def __next__(self) -> Batch:
        """The next micro-batch on the device."""
        batch = self._copy(next(self._reader)) if self._ahead is None else self._ahead
        self._ahead = None
        if self._copies is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._copies)
            for field in dataclasses.fields(batch):
                tensor = getattr(batch, field.name)
                if tensor is not None:
                    tensor.record_stream(here)
            if self._reader.ready():
                self._ahead = self._copy(next(self._reader))
        return batch

    def _copy(self, batch: Batch) -> Batch:
        epoch = int(batch.sample[0]) // self._reader.order.clips
        if epoch != self._epoch:
            self._epoch = epoch
            self._begin_epoch(epoch)
        if self._copies is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._copies):
            return batch.to(self._device, non_blocking=True)

    def faulty(self) -> bool:
        """Whether clips were found unusable since `faults` was last asked."""
        self._faults += self._reader.faults()
        return bool(self._faults)

    def faults(self) -> list[dict[str, Any]]:
        """Unusable clips: id, position from which on they are left out, run key, frames, reason."""
        found, self._faults = [*self._faults, *self._reader.faults()], []
        return [fault._asdict() for fault in found]

    def exclude(self, exclusions: Sequence[tuple[int, int]]) -> None:
        """Leave clips out from now on.

        Raises:
            SwiftError: more than the limit are left out by now.
        """
        for clip, position in exclusions:
            self._agreed[clip] = min(position, self._agreed.get(clip, position))
        self._reader.exclude(Exclusion(*one) for one in exclusions)
        if len(self._agreed) > self._allowed:
            raise SwiftError(
                f"{len(self._agreed)} of {self._reader.order.clips} clips are left out, more than "
                f"data.quarantine_limit={self._limit:g} allows: `swiftv2 store verify` tells what is damaged"
            )

    def close(self) -> None:
        """End the threads that read ahead."""
        self._reader.close()
