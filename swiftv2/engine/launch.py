"""Who am I among the ranks: started alone, by torchrun, by mpirun or by srun."""

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from swiftv2.config.engine import EngineConfig
from swiftv2.engine.place import Launcher, Place, find_place
from swiftv2.errors import SwiftError

STORE_PATIENCE = timedelta(seconds=10)
"""How long a call to the store between ranks may take: its server dies, or is stopped, with the rank that holds it."""
COLLECTIVE_PATIENCE = timedelta(minutes=30)
"""How long a collective, or the meeting of all ranks, may take: hangs in training are found sooner, and named."""
RECORDED_COLLECTIVES = "2000"
"""Last collectives that NCCL's flight recorder keeps for a diagnosis."""
LETTING_GO_SECONDS = 0.1
"""How long gloo's threads get for letting go of what was reduced last."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    launcher: Launcher = "alone"
    control: dist.ProcessGroup | None = None
    """Group in which ranks agree, on the host even where the device is a GPU, so that it waits for no kernel; None alone."""
    meeting: tuple[str, int] | None = None
    """Host and port of the store through which the ranks met; None alone."""

    def connect(self) -> Store:
        """A connection of its own to the store between ranks: a call on it may wait for long, so none is for the main thread.

        Raises:
            RuntimeError: the store does not answer; it dies, or is stopped, with the process that keeps it.
        """
        if self.meeting is None:
            return HashStore()
        return PrefixStore("swiftv2", TCPStore(*self.meeting, is_master=False, timeout=STORE_PATIENCE))


def start(config: EngineConfig) -> World:
    """Find this process's place and join the process group (gloo on CPU, NCCL on CUDA).

    Raises:
        SwiftError: the launcher's environment is incomplete, or the device is not there.
    """
    place = own_place()
    device = choose_device(config.device, place)
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed asks for it
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # the second before PyTorch 2.9
            os.environ.setdefault(name, RECORDED_COLLECTIVES)
    else:
        # Spares DeepSpeed, imported later, the search for an accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if place.size == 1:
        store = HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.size)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = str(place.address), str(place.port)
        try:
            dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=COLLECTIVE_PATIENCE)
        except (dist.DistError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise SwiftError(
                f"rank {place.rank} of {place.size} could not join the others at {place.address}:{place.port}: {reason}"
            ) from error
    ranks = (place.rank, place.size, place.local_rank, place.local_size)
    if place.size == 1:
        return World(*ranks, device, place.launcher)
    control = dist.new_group(backend="gloo", timeout=COLLECTIVE_PATIENCE)
    return World(*ranks, device, place.launcher, control, (str(place.address), int(str(place.port))))


def stop() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        several = dist.get_world_size() > 1
        dist.destroy_process_group()
        if several:
            # A thread of gloo that waits for the interpreter, to drop the tensors of a collective that has ended, aborts the
            # process (SIGABRT) where the interpreter comes to its end first. Nothing tells of such a thread: let it pass.
            time.sleep(LETTING_GO_SECONDS)


def own_place() -> Place:
    """This process among the ranks, with a meeting point where there are several.

    Raises:
        SwiftError: the launcher's environment is incomplete.
    """
    place = find_place(os.environ)
    return _agree_by_mpi(place) if place.launcher == "mpirun" and place.size > 1 and place.address is None else place


def _agree_by_mpi(place: Place) -> Place:
    """Let rank 0 choose the meeting point and tell the others through MPI."""
    try:
        # Imported only here: some MPI builds abort the process when no MPI launcher is there.
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SwiftError(
            f"started by mpirun, but mpi4py cannot be imported ({error}): install it, or set MASTER_ADDR and MASTER_PORT"
        ) from error
    communicator: Any = MPI.COMM_WORLD
    if communicator.Get_size() != place.size:
        raise SwiftError(
            f"mpirun started {place.size} ranks but mpi4py sees {communicator.Get_size()}: "
            "mpi4py was built against another MPI than this mpirun"
        )
    one_host = len(set(communicator.allgather(socket.gethostname()))) == 1
    meeting = None
    if place.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            meeting = ("127.0.0.1" if one_host else socket.gethostname(), probe.getsockname()[1])
    address, port = communicator.bcast(meeting, root=0)
    local = communicator.Split_type(MPI.COMM_TYPE_SHARED)
    return Place("mpirun", place.rank, place.size, local.Get_rank(), local.Get_size(), address, port)


def choose_device(wanted: str, place: Place) -> torch.device:
    """The device of a process: its local rank's GPU, or the CPU.

    Raises:
        SwiftError: it is not there.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SwiftError("engine.device=cuda, but PyTorch finds no GPU: say engine.device=cpu or install a CUDA build of torch")
    count = torch.cuda.device_count()
    # A launcher that binds one GPU to each task shows every task its own as number 0.
    index = 0 if count == 1 else place.local_rank
    if index >= count:
        raise SwiftError(
            f"local rank {place.local_rank} has no GPU of its own: {place.local_size} ranks for {count} GPUs on "
            f"{socket.gethostname()}; start at most one rank a GPU"
        )
    return torch.device("cuda", index)
