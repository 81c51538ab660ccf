"""Ranks that share a command: who they are, and what ends them."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from swiftv2.engine.place import find_place
from swiftv2.errors import SwiftError, UsageError

if TYPE_CHECKING:
    from swiftv2.data.ranks import Communicator

Trained = TypeVar("Trained")
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_STEP_ID")
STOPPED_EARLY = 75
SILENT_SECONDS = 15.0
STOPPED = "stopped by SIGTERM; what is done is kept: run the same command again to go on"


def training(train: Callable[[], Trained]) -> Trained:
    """Call what trains, on every rank; what the other ranks' end does to this one is told in one line.

    Raises:
        SwiftError: a rank was lost.
    """
    # Before the first step, and after the last, nothing is lost by ending at once; in between the loop hears them itself.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: os._exit(STOPPED_EARLY))
    try:
        return train()
    except RuntimeError as error:
        from swiftv2.engine.loss import after_loss, lost_each_other

        if not lost_each_other(error):
            raise
        raise after_loss(error) from error


class Terminated(BaseException):
    """SIGTERM came in a command whose work can go on later."""


def own_rank() -> int:
    """Number of this process among its launcher's, 0 where there is no launcher; from the environment alone."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if os.environ.get(name, "").isdecimal()), 0)


def complain(text: str, *, alone: bool = False) -> None:
    """Say what is wrong, in one line; `alone`: on this rank, and maybe on no other."""
    if own_rank() > 0 and not alone:
        # The first rank says the same. When it has left, the launcher ends this one, and the line stands there once.
        time.sleep(SILENT_SECONDS)
    line = " ".join(text.splitlines())
    print(f"swiftv2{f' (rank {own_rank()})' if own_rank() else ''}: {line}", file=sys.stderr)


def communicator(command: str) -> "Communicator":
    """The ranks that share a command: those of MPI where a launcher started several, else this process alone."""
    from swiftv2.data.ranks import Alone, MPICommunicator

    if not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return Alone()
    place = find_place(os.environ)
    if place.size == 1:
        return Alone()
    if place.launcher == "torchrun":
        raise UsageError(
            f"{command} shares its runs between ranks of mpirun or srun, not of torchrun: start it by those, or alone"
        )
    try:
        ranks = MPICommunicator()
    except (ImportError, RuntimeError) as error:
        raise SwiftError(f"started by {place.launcher}, but mpi4py cannot be imported ({error}): install it") from error
    if ranks.size != place.size:
        raise SwiftError(
            f"{place.launcher} started {place.size} ranks, but mpi4py sees {ranks.size}: it was built for another MPI; "
            "use that one's mpirun, or srun with a fitting --mpi"
        )
    return ranks


@contextlib.contextmanager
def termination(ranks: "Communicator") -> Iterator[None]:
    """Let SIGTERM end a command that can go on later with its own exit status."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        if ranks.size > 1:
            # Leaving by the front door would wait for the other ranks; the launcher ends them when this one is gone.
            if ranks.rank == 0:
                complain(STOPPED)
            os._exit(STOPPED_EARLY)
        raise Terminated

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
