"""Training batches on the device, for the loop: copied while the former one is computed, with a record of each epoch."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.batches import BatchReader, Fault
from swiftv2.data.samples.order import Exclusion as OrderExclusion
from swiftv2.engine.clock import Clock
from swiftv2.engine.stream import Exclusion
from swiftv2.errors import SwiftError


class _Taken(NamedTuple):
    """A micro-batch on its way to the device, or why there is none, and what was of no use in it."""

    batch: Batch | None
    samples: Tensor | None
    """(B,) positions, on the host."""
    clips: Tensor | None
    """(B,) clip ids, on the host."""
    faults: list[Fault]
    error: SwiftError | None = None


class DeviceStream:
    """Micro-batches of a reader on the device.

    Args:
        reader: this rank's micro-batches, in pinned memory where the device is a GPU.
        device: where they are wanted.
        limit: largest share of the clips that may be left out because they cannot be used.
        withdrawn: clips that are left out because their data were withdrawn; the limit does not count them.
        begin_epoch: told the number of each epoch whose first samples are about to be handed over.
        noted: told all that is left out, at the beginning and whenever that changes; by all ranks alike.
        remembered: micro-batches of which `recent` can tell.
        clock: told while a step waits for a copy; what is copied beside the computing costs no time.
    """

    def __init__(
        self,
        reader: BatchReader,
        device: torch.device,
        limit: float,
        withdrawn: Collection[int] = (),
        begin_epoch: Callable[[int], None] = lambda _: None,
        noted: Callable[[list[Exclusion]], None] = lambda _: None,
        remembered: int = 1024,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock
        self._reader, self._device, self._limit, self._begin_epoch = reader, device, limit, begin_epoch
        self._withdrawn, self._noted = frozenset(withdrawn), noted
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ahead: _Taken | None = None
        self._faults: list[Fault] = []
        self._epoch: int | None = None
        self._handed: deque[tuple[Tensor, Tensor]] = deque(maxlen=remembered)
        # What this rank has found meanwhile is in the order already; here stands what all have agreed on.
        self._agreed = {one.clip: _as_agreed(one) for one in reader.order.exclusions}
        noted(self.exclusions)

    @property
    def exclusions(self) -> list[Exclusion]:
        """All clips that are left out by agreement, by their ids."""
        return [self._agreed[clip] for clip in sorted(self._agreed)]

    def __next__(self) -> Batch:
        """The next micro-batch on the device.

        Raises:
            SwiftError: it cannot be read.
        """
        taken, self._ahead = self._ahead or self._take(), None
        if taken.error is not None:
            raise taken.error
        if taken.batch is None or taken.samples is None or taken.clips is None:
            raise StopIteration
        self._faults += taken.faults
        self._handed.append((taken.samples, taken.clips))
        self._tell_epochs(int(taken.samples[0]) // self._reader.order.clips)
        if self._copies is not None:
            here = torch.cuda.current_stream(self._device)
            with self._copying():
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
            return _Taken(None, None, None, [])
        except SwiftError as error:
            return _Taken(None, None, None, [], error)
        known = batch.sample, batch.clip, self._reader.faults()
        if self._copies is None:
            with self._copying():
                return _Taken(batch.to(self._device), *known)
        with torch.cuda.stream(self._copies):
            return _Taken(batch.to(self._device, non_blocking=True), *known)

    def _copying(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._clock is None else self._clock.part("copy")

    def _tell_epochs(self, epoch: int) -> None:
        for one in range(epoch if self._epoch is None else self._epoch + 1, epoch + 1):
            self._begin_epoch(one)
        self._epoch = epoch

    def recent(self, micro_batches: int) -> list[dict[str, Any]]:
        """Samples of the last so many micro-batches that were handed over; the device is not waited for.

        Args:
            micro_batches: at most as many as are remembered.

        Returns:
            For each sample `micro_batch` (the last is `micro_batches` - 1), `clip`, `position`, and where it lies: `run`
            (pseudonymous key), `first` and `last` (frames).
        """
        if micro_batches > (self._handed.maxlen or 0):
            raise ValueError(f"{micro_batches} micro-batches are asked for and {self._handed.maxlen} remembered")
        handed = list(self._handed)[max(len(self._handed) - micro_batches, 0) :]
        return [
            {"micro_batch": number, "clip": clip, "position": position, **self._reader.stretch(clip)._asdict()}
            for number, (samples, clips) in enumerate(handed, start=micro_batches - len(handed))
            for position, clip in zip(samples.tolist(), clips.tolist(), strict=True)
        ]

    def faulty(self) -> bool:
        """Whether clips were found unusable since `faults` was last asked."""
        return bool(self._faults)

    def faults(self) -> list[dict[str, Any]]:
        """Unusable clips: id, position from which on they are left out, run key, frames, reason."""
        found, self._faults = self._faults, []
        return [fault._asdict() for fault in found]

    def exclude(self, exclusions: Sequence[Exclusion]) -> None:
        """Leave clips out from now on; of two exclusions of one clip the earlier holds.

        What was read ahead stays: clips whose bytes are of use need a new stream to be left out of that too.

        Raises:
            SwiftError: of more than the limit the data are of no use by now.
        """
        before = dict(self._agreed)
        for one in exclusions:
            clip, position, *_ = one
            if clip not in self._agreed or position < self._agreed[clip].position:
                self._agreed[clip] = _as_agreed(one)
        self._reader.exclude(OrderExclusion(*one) for one in exclusions)
        if self._agreed != before:
            self._noted(self.exclusions)
        unusable = sum(one.cause == "unusable" for clip, one in self._agreed.items() if clip not in self._withdrawn)
        if unusable > int(self._limit * self._reader.order.clips):
            raise SwiftError(
                f"{unusable} of {self._reader.order.clips} clips are left out as of no use, more than "
                f"data.quarantine_limit={self._limit:g} allows: `swiftv2 store verify` tells what is damaged"
            )

    def close(self) -> None:
        """End the threads that read ahead."""
        self._reader.close()


def _as_agreed(values: Sequence[Any]) -> Exclusion:
    """An exclusion of its two or three values."""
    return Exclusion(*values)
