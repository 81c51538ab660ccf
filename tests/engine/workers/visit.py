"""`swiftv2 doctor` on ranks of which the last one has something of its own."""

import ctypes
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from swiftv2.cli import main

CLONE_NEWUTS = 0x04000000
MORE = 600 << 20


def own_hostname(name: str) -> None:
    """A host name that only this process sees, where a process may have one."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUTS) == 0:
        socket.sethostname(name)


def limit_memory() -> None:
    """Address space for what is there and little more."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + MORE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def once_joined(action: Callable[[], None]) -> None:
    """Do something once the ranks have met."""

    def watch() -> None:
        while not dist.is_initialized():
            time.sleep(0.01)
        action()

    threading.Thread(target=watch, daemon=True).start()


what, *words = sys.argv[1:]
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if what == "store":
    own_hostname(f"host{rank}")
if rank == size - 1:
    if what == "store":
        words.append("data.store=none.zarr")
    elif what == "memory":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401  # it takes address space of its own

        once_joined(limit_memory)
    else:
        once_joined(lambda: os.kill(os.getpid(), signal.Signals[what]))
sys.exit(main(["doctor", *words]))
