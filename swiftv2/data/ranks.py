"""The little that a parallel build asks of MPI, and the single process that stands in for it."""

from typing import Any, Protocol


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
