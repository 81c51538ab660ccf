"""The little that a parallel build asks of MPI, and the single process that stands in for it."""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from swiftv2.errors import SwiftError

Result = TypeVar("Result")


class Communicator(Protocol):
    """Ranks that build one store together; every call is made by all of them in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    def gather(self, value: Any) -> list[Any] | None:
        """All values, by rank, on rank 0; None elsewhere."""

    def bcast(self, value: Any) -> Any:
        """The value of rank 0, everywhere."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def bcast(self, value: Any) -> Any:
        """The value itself."""
        return value


class MPICommunicator:
    """All ranks of `MPI.COMM_WORLD`; mpi4py is imported here and only here, since under a plain `srun` it may abort."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()

    def gather(self, value: Any) -> list[Any] | None:
        """All values, by rank, on rank 0; None elsewhere."""
        gathered: list[Any] | None = self._world.gather(value, root=0)
        return gathered

    def bcast(self, value: Any) -> Any:
        """The value of rank 0, everywhere."""
        return self._world.bcast(value, root=0)


def together(ranks: Communicator, action: Callable[[], Result]) -> Result:
    """Do something on every rank; where one fails, all raise, so that none is left waiting.

    Raises:
        SwiftError: the first rank's that failed.
    """
    result: Result | None = None
    failure: tuple[type[SwiftError], str] | None = None
    try:
        result = action()
    except SwiftError as error:
        failure = type(error), str(error)
    except Exception as error:
        if ranks.size == 1:
            raise
        failure = SwiftError, f"rank {ranks.rank} failed: {type(error).__name__}: {error}"
    failures = ranks.gather(failure)
    first = ranks.bcast(next((one for one in failures or [] if one is not None), None))
    if first is not None:
        kind, message = first
        raise kind(message)
    return result  # type: ignore[return-value]  # No failure means that the action returned.


def on_first(ranks: Communicator, action: Callable[[], Result]) -> Result:
    """Do something on rank 0 and hand its result to all."""
    result: Result = ranks.bcast(together(ranks, lambda: action() if ranks.rank == 0 else None))
    return result


def each(ranks: Communicator, items: Sequence[Any], action: Callable[[Any], Result]) -> list[Result]:
    """Do something with every item, each on one rank; all results, in the items' order, on rank 0, nothing elsewhere."""
    parts = ranks.gather(together(ranks, lambda: [action(item) for item in items[ranks.rank :: ranks.size]])) or []
    merged: list[Any] = [None] * sum(len(part) for part in parts)
    for rank, part in enumerate(parts):
        merged[rank :: len(parts)] = part
    return merged


def share(sizes: Sequence[int], ranks: Communicator) -> list[int]:
    """This rank's part of items of these sizes: dealt, largest first, to the rank with the least so far."""
    loads = [(0, rank) for rank in range(ranks.size)]
    mine = []
    for item in sorted(range(len(sizes)), key=lambda one: (-sizes[one], one)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[item], rank))
        if rank == ranks.rank:
            mine.append(item)
    return mine
