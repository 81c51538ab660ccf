"""Who am I among the ranks: started alone, by torchrun, by mpirun or by srun."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from swiftv2.config.engine import EngineConfig
from swiftv2.errors import SwiftError

Launcher = Literal["alone", "torchrun", "mpirun", "srun"]

# Step ids from here on are Slurm's own (batch script, interactive shell): no task of ours.
_SLURM_SPECIAL_STEPS = 4_294_967_290


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    launcher: Launcher = "alone"


@dataclass(frozen=True)
class Place:
    """Ranks and meeting point as the launcher gives them; `address` is None where it still has to be agreed."""

    launcher: Launcher
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    port: int | None = None


def start(config: EngineConfig) -> World:
    """Find this process's place and join the process group (gloo on CPU, NCCL on CUDA).

    Raises:
        SwiftError: the launcher's environment is incomplete, or the device is not there.
    """
    place = find_place(os.environ)
    if place.launcher == "mpirun" and place.size > 1 and place.address is None:
        place = _agree_by_mpi(place)
    device = _choose_device(config.device, place)
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed asks for it
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Spares DeepSpeed, imported later, the search for an accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if place.size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.size)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = str(place.address), str(place.port)
        try:
            dist.init_process_group(backend, rank=place.rank, world_size=place.size)
        except (dist.DistError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise SwiftError(
                f"rank {place.rank} of {place.size} could not join the others at {place.address}:{place.port}: {reason}"
            ) from error
    return World(place.rank, place.size, place.local_rank, place.local_size, device, place.launcher)


def stop() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def find_place(environment: Mapping[str, str]) -> Place:
    """Read ranks from a launcher's environment variables.

    torchrun is asked first (it may run inside mpirun or srun), then MPI, then Slurm; Slurm's variables count only
    inside a step of `srun`, since a batch script and an interactive shell carry them too.

    Raises:
        SwiftError: a launcher is recognised but its variables are incomplete or contradict each other.
    """
    env = environment
    if "RANK" in env or ("WORLD_SIZE" in env and "LOCAL_RANK" in env):
        return _from_torchrun(env)
    if "OMPI_COMM_WORLD_RANK" in env:
        names = (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
        return _checked("mpirun", env, *(_number(env, name, "mpirun (Open MPI)") for name in names))
    in_step = _in_slurm_step(env)
    if "PMI_RANK" in env and not (in_step and _same_in_slurm(env)):
        rank, size = _number(env, "PMI_RANK", "mpiexec (MPICH)"), _number(env, "PMI_SIZE", "mpiexec (MPICH)")
        local = [int(env[n]) if n in env else rest for n, rest in (("MPI_LOCALRANKID", rank), ("MPI_LOCALNRANKS", size))]
        return _checked("mpirun", env, rank, size, *local)
    if in_step:
        return _from_srun(env)
    return Place("alone")


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `nid[001003-001006,001010],login` gives `nid001003`."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def _from_torchrun(env: Mapping[str, str]) -> Place:
    rank, size, local = (_number(env, name, "torchrun") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = _checked("torchrun", env, rank, size, local, int(env.get("LOCAL_WORLD_SIZE", size)))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and name not in env:
            raise SwiftError(f"RANK={rank} and WORLD_SIZE={size} are set but {name} is not: start with torchrun, or set it")
    return place


def _from_srun(env: Mapping[str, str]) -> Place:
    rank, local = (_number(env, name, "srun") for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    size = _slurm_tasks(env)
    per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", str(size))))
    place = _checked("srun", env, rank, size, local, max(local + 1, int(per_node.group()) if per_node else size))
    if size == 1:
        return place
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if place.address is None and not nodes:
        raise SwiftError("started by srun, but neither SLURM_STEP_NODELIST nor MASTER_ADDR is set: set MASTER_ADDR")
    job, step = _number(env, "SLURM_JOB_ID", "srun"), int(env["SLURM_STEP_ID"])
    # The same for all ranks without a message, below the ephemeral ports, and another one for the job's next step.
    port = place.port or 20_000 + (job + 97 * step) % 12_000
    return Place("srun", rank, size, local, place.local_size, place.address or first_host(nodes or ""), port)


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    step = env.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _SLURM_SPECIAL_STEPS and "SLURM_PROCID" in env


def _slurm_tasks(env: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return _number(env, name, "srun")


def _same_in_slurm(env: Mapping[str, str]) -> bool:
    """Whether PMI and Slurm tell the same: then srun started the ranks itself and no MPI is needed."""
    return env.get("PMI_RANK") == env["SLURM_PROCID"] and env.get("PMI_SIZE") == str(_slurm_tasks(env))


def _number(env: Mapping[str, str], name: str, launcher: str) -> int:
    text = env.get(name)
    if text is None:
        raise SwiftError(f"this looks like a process of {launcher}, but {name} is not set: start all ranks with one launcher")
    if not text.isdigit():
        raise SwiftError(f"{name}={text!r} is not a number: start all ranks with one launcher ({launcher})")
    return int(text)


def _checked(launcher: Launcher, env: Mapping[str, str], rank: int, size: int, local: int, local_size: int) -> Place:
    if not (0 <= rank < size and 0 <= local < local_size <= size):
        raise SwiftError(
            f"{launcher} gave contradicting ranks: rank {rank} of {size}, local rank {local} of {local_size}; "
            "unset variables left over from another launcher"
        )
    port = env.get("MASTER_PORT")
    if port is not None and not port.isdigit():
        raise SwiftError(f"MASTER_PORT={port!r} is not a port number")
    address = env.get("MASTER_ADDR") if port is not None else None
    return Place(launcher, rank, size, local, local_size, address, int(port) if address and port else None)


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


def _choose_device(wanted: str, place: Place) -> torch.device:
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
