"""Where a launcher puts this process among its ranks; read from environment variables alone, without torch or MPI."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from swiftv2.errors import SwiftError

Launcher = Literal["alone", "torchrun", "mpirun", "srun"]

# Step ids from here on are Slurm's own (batch script, interactive shell): no task of ours.
_SLURM_SPECIAL_STEPS = 4_294_967_290


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
    address = env.get("MASTER_ADDR") or (first_host(nodes) if nodes else None)
    if address is None:
        raise SwiftError("started by srun, but neither SLURM_STEP_NODELIST nor MASTER_ADDR is set: set MASTER_ADDR")
    job, step = _number(env, "SLURM_JOB_ID", "srun"), int(env["SLURM_STEP_ID"])
    # The same for all ranks without a message, below the ephemeral ports, and another one for the job's next step.
    port = place.port or 20_000 + (job + 97 * step) % 12_000
    return Place("srun", rank, size, local, place.local_size, address, port)


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
