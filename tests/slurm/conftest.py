"""The Slurm that these tests share; where none can be, they skip and say what lacks."""

import atexit
import signal
from collections.abc import Iterator
from types import FrameType

import pytest
from cluster import Cluster, of_session, remove
from daemons import lacking


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm of two nodes, ended with the session however that ends."""
    if reason := lacking(install=True):
        pytest.skip(reason)
    slurm = of_session()
    atexit.register(remove, slurm)
    before = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        slurm.up()
        yield slurm
    finally:
        remove(slurm)
        atexit.unregister(remove)
        signal.signal(signal.SIGTERM, before)


def _told_to_end(number: int, _frame: FrameType | None) -> None:
    """End the session with its finalizers, as after Ctrl-C; by default SIGTERM leaves the daemons running."""
    pytest.exit(f"signal {number}", returncode=128 + number)


@pytest.fixture(autouse=True)
def _calm(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test all jobs end and all nodes come back, so that the next one finds an idle cluster."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").calm()
