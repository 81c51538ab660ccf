"""What devices tell of themselves: energy and utilisation, read beside the steps."""

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from swiftv2.engine.launch import World

T = TypeVar("T")
POWERCAP = Path("/sys/class/powercap")
SAMPLE_SECONDS = 1.0
_FAILED_READINGS = 60
"""In a row, from which on the energy counts as unknown."""


class Package:
    """A processor's own energy counter (RAPL), which begins again at 0 when it is full."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._read()
        self._spent = 0

    def joules(self) -> float:
        """Spent since the beginning; to be asked before the counter has gone round, which takes minutes at least."""
        now = self._read()
        self._spent += now - self._last if now >= self._last else now + self._range - self._last
        self._last = now
        return self._spent / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())


def find_packages(root: Path = POWERCAP) -> list[Package]:
    """Processors of this machine whose counter may be read: mostly root's alone; parts of a package are not counted twice."""
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") == 1:
            with contextlib.suppress(OSError, ValueError):
                found.append(Package(folder))
    return found


class Gpu:
    """This rank's GPU by NVML.

    Raises:
        Exception: NVML or the GPU does not answer, with an error of that library's own.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self._nvml: Any = pynvml
        self._nvml.nvmlInit()
        identity = str(torch.cuda.get_device_properties(device).uuid)
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}".encode())
        self._first = self._millijoules()

    def joules(self) -> float:
        """Spent since the beginning, by the GPU's own counter."""
        return (self._millijoules() - self._first) / 1e3

    def utilisation(self) -> float:
        """Share of the last sampling period in which any kernel ran."""
        return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100

    def _millijoules(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


class DeviceReadings:
    """Reads counters of this rank's devices in a thread of its own; a context manager.

    The first rank of a node answers for its processors, every rank for its GPU. Where a counter cannot be read there is no
    figure: never a guess.

    Attributes:
        sources: what the energy is that of: `gpu`, `cpu`, both, or nothing.
    """

    def __init__(self, world: World, root: Path = POWERCAP) -> None:
        self._gpu = _try(lambda: Gpu(world.device)) if world.device.type == "cuda" else None
        self._packages = find_packages(root) if world.local_rank == 0 else []
        self.sources = [name for name, there in (("gpu", self._gpu), ("cpu", self._packages)) if there]
        # Ranks beside the first have no processors to answer for; a GPU that tells nothing makes the sum of all unknown.
        known = self._gpu is not None or (world.device.type == "cpu" and (self._packages or world.local_rank > 0))
        self._joules = 0.0 if known else math.nan
        self._told = 0.0
        self._used: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="readings", daemon=True)

    def __enter__(self) -> Self:
        if self.sources:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * SAMPLE_SECONDS)

    def spent(self) -> float:
        """Joules since this was last asked, as of the last sample; NaN where they cannot be read."""
        now = self._joules
        spent, self._told = now - self._told, now
        return spent

    def utilisation(self) -> float | None:
        """Mean share of the time in which the GPU did anything, since `begin`; None where that is not known.

        Between samples, the last one stands.
        """
        used = self._used[:]
        return sum(used) / len(used) if used else None

    def begin(self) -> None:
        """Average anew from here on."""
        self._used = self._used[-1:]

    def _sample(self) -> None:
        failed = 0
        while True:
            read = _try(self._read)
            # Counters go on by themselves: the next reading makes up for one that failed.
            failed = 0 if read is not None else failed + 1
            if read is not None or failed >= _FAILED_READINGS:
                self._joules = math.nan if read is None else read
            if self._gpu is not None:
                share = _try(self._gpu.utilisation)
                if share is not None:
                    self._used.append(share)
            if self._ended.wait(SAMPLE_SECONDS):
                return

    def _read(self) -> float:
        gpu = 0.0 if self._gpu is None else self._gpu.joules()
        return gpu + sum(package.joules() for package in self._packages)


def _try(read: Callable[[], T]) -> T | None:
    """What is read, or None: a counter that does not answer must not end a run, and NVML's errors are of its own kind."""
    try:
        return read()
    except Exception:  # noqa: BLE001
        return None
