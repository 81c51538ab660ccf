"""Training batches on the device, for the loop: copied while the former one is computed, with a record of each epoch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.batches import BatchReader, Fault
from swiftv2.data.samples.order import Exclusion
from swiftv2.errors import SwiftError


class _Taken(NamedTuple):
    """A micro-batch on its way to the device, or why there is none, and what was of no use in it."""

    batch: Batch | None
    first: int
    """Position of its first sample."""
    faults: list[Fault]
    error: SwiftError | None = None


class DeviceStream:
    """Micro-batches of a reader on the device.

    Args:
        reader: this rank's micro-batches, in pinned memory where the device is a GPU.
        device: where they are wanted.
        limit: largest share of the clips that may be left out because they cannot be used.
        withdrawn: clips that are left out from the beginning because their data were withdrawn.
        begin_epoch: told the number of each epoch whose first samples are about to be handed over.
    """

    def __init__(
        self,
        reader: BatchReader,
        device: torch.device,
        limit: float,
        withdrawn: int = 0,
        begin_epoch: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._reader, self._device, self._limit, self._begin_epoch = reader, device, limit, begin_epoch
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ahead: _Taken | None = None
        self._faults: list[Fault] = []
        self._epoch: int | None = None
        # What this rank has found meanwhile is in the order already; here stands what all have agreed on.
        self._agreed: dict[int, int] = dict(reader.order.exclusions)
        self._allowed = withdrawn + int(limit * reader.order.clips)

    @property
    def exclusions(self) -> list[tuple[int, int]]:
        """All clips that are left out by agreement, with the position from which on they are."""
        return sorted(self._agreed.items())

    def __next__(self) -> Batch:
        """The next micro-batch on the device.

        Raises:
            SwiftError: it cannot be read.
        """
        taken, self._ahead = self._ahead or self._take(), None
        if taken.error is not None:
            raise taken.error
        if taken.batch is None:
            raise StopIteration
        self._faults += taken.faults
        self._tell_epochs(taken.first // self._reader.order.clips)
        if self._copies is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._copies)
            for field in dataclasses.fields(taken.batch):
                tensor = getattr(taken.batch, field.name)
                if tensor is not None:
                    tensor.record_stream(here)
            if self._reader.ready():
                self._ahead = self._take()
        return taken.batch

    def _take(self) -> _Taken:
        """Begin to copy the reader's next micro-batch; what is wrong with it counts when it is its turn."""
        try:
            batch = next(self._reader)
        except StopIteration:
            return _Taken(None, 0, [])
        except SwiftError as error:
            return _Taken(None, 0, [], error)
        first, faults = int(batch.sample[0]), self._reader.faults()
        if self._copies is None:
            return _Taken(batch.to(self._device), first, faults)
        with torch.cuda.stream(self._copies):
            return _Taken(batch.to(self._device, non_blocking=True), first, faults)

    def _tell_epochs(self, epoch: int) -> None:
        for one in range(epoch if self._epoch is None else self._epoch + 1, epoch + 1):
            self._begin_epoch(one)
        self._epoch = epoch

    def faulty(self) -> bool:
        """Whether clips were found unusable since `faults` was last asked."""
        return bool(self._faults)

    def faults(self) -> list[dict[str, Any]]:
        """Unusable clips: id, position from which on they are left out, run key, frames, reason."""
        found, self._faults = self._faults, []
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
