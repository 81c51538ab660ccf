"""How the ranks of a checkup come together: with patience for those that are missing, and with or without a device."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from swiftv2.engine.checkup import MEET_SECONDS, own_host
from swiftv2.engine.launch import World, choose_device
from swiftv2.engine.place import Place
from swiftv2.errors import RankError

JOINT_SECONDS = 7200.0
"""Longer than any measurement: the checkup itself ends what hangs, before a library ends the process for that."""


def own_device(wanted: str, place: Place) -> torch.device:
    """The device of this rank as training would choose it.

    Args:
        wanted: `engine.device`.
        place: this process among the ranks.

    Raises:
        SwiftError: it is not there.
    """
    chosen = choose_device(wanted, place)
    if chosen.type != "cuda":
        # Spares DeepSpeed, imported later, the search for an accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return chosen


def connect(place: Place, *, first: bool = False) -> Store:
    """A connection to the store between the ranks, which rank 0, or torchrun, keeps; it waits for no rank but that.

    Args:
        place: this process among the ranks.
        first: whether it is this process's first one: then rank 0 begins to keep the store.

    Raises:
        RankError: nobody answers there.
    """
    if place.size == 1:
        return HashStore()
    host, port = str(place.address), int(str(place.port))
    keeper = first and place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(host, port, None, keeper, timedelta(seconds=MEET_SECONDS), wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise RankError(f"rank {place.rank} on {own_host()} cannot reach rank 0 at {host}:{port}: {reason}") from error
    # torchrun's store outlives a restart of the ranks.
    return PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def join(place: Place, chosen: torch.device, store: Store) -> World:
    """Join the process groups: as in training, NCCL between GPUs, and gloo between hosts (collective).

    Args:
        place: this process among the ranks.
        chosen: this rank's device; of one kind on all ranks.
        store: between the ranks, on a connection that nothing else uses.
    """
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed asks for it
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if place.size > 1:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.size)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = str(place.address), str(place.port)
    patience = timedelta(seconds=JOINT_SECONDS)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    groups = PrefixStore("groups", store)
    dist.init_process_group(backend, store=groups, rank=place.rank, world_size=place.size, timeout=patience)
    ranks = (place.rank, place.size, place.local_rank, place.local_size)
    if place.size == 1:
        return World(*ranks, chosen, place.launcher)
    control = dist.new_group(backend="gloo", timeout=patience)
    return World(*ranks, chosen, place.launcher, control, (str(place.address), int(str(place.port))))
