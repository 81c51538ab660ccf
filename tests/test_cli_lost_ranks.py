"""Which failures of collectives mean "run me again": those of ranks that do not reach each other, not mistakes."""

from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from swiftv2.engine.loss import lost_each_other
from swiftv2.errors import InterruptedRunError, SwiftError

SOON = timedelta(seconds=0.5)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"


def says(error: RuntimeError) -> Callable[[], NoReturn]:
    """What gloo and NCCL were seen to say; gloo's errors have no kind of their own."""

    def fail() -> NoReturn:
        raise error

    return fail


FAILURES: dict[str, tuple[Callable[[], object], bool]] = {
    "no store": (lambda: TCPStore("127.0.0.1", 1, is_master=False, timeout=SOON), True),
    "a store without an answer": (lambda: HashStore().wait(["key"], SOON), True),
    "a mistake": (lambda: torch.ones(2) @ torch.ones(3), False),
    "gone": (says(RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:938. This is typically ...")), True),
    "reset": (says(RuntimeError(f"{GLOO}pair.cc:537] Read error [127.0.0.1]:43157: Connection reset by peer.")), True),
    "silent": (says(RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation")), True),
    "sizes": (says(RuntimeError(f"[enforce fail at {GLOO[1:]}pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4")), False),
    "NCCL": (says(dist.DistBackendError("NCCL error: remote process exited or there was a network error")), True),
    "two ranks on one GPU": (says(dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected")), False),
}


@pytest.mark.parametrize("name", FAILURES)
def test_only_lost_ranks_are_worth_another_try(name: str) -> None:
    fail, lost = FAILURES[name]
    with pytest.raises(RuntimeError) as caught:
        fail()
    assert lost_each_other(caught.value) == lost, caught.value


def test_the_status_says_run_me_again() -> None:
    assert issubclass(InterruptedRunError, SwiftError)
    assert InterruptedRunError.exit_status == 75
