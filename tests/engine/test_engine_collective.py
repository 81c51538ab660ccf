"""One rank's failure ends all ranks, whatever it was: none is left waiting."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from swiftv2.engine.collective import on_all, on_first
from swiftv2.engine.launch import World
from swiftv2.errors import SwiftError, UsageError

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("together", [on_first, on_all])
def test_alone_a_mistake_keeps_its_own_kind(together: type) -> None:
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 // 0, ALONE)
    with pytest.raises(UsageError, match=r"^wrong$"):
        together(lambda: fail(UsageError("wrong")), ALONE)
    with pytest.raises(SwiftError, match="No such file"):
        together(lambda: Path("/nowhere/at/all").read_text(), ALONE)


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    world = World(rank, 2, rank, 2, torch.device("cpu"))
    heard = []
    for together, failing in ((on_first, 0), (on_all, 1)):
        for error in (KeyError("a mistake"), UsageError("wrong")):
            try:
                together(lambda: fail(error) if rank == failing else rank, world)  # noqa: B023 (called at once)
            except Exception as raised:  # noqa: BLE001 (its kind is what is looked at)
                heard.append(f"{type(raised).__name__}: {raised}")
    heard.append(f"{on_first(lambda: rank, world)} {on_all(lambda: rank, world)}")
    (folder / f"heard_{rank}").write_text("\n".join(heard))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_mistake_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    spawn(_rank, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    told = "SwiftError: rank {} failed: KeyError: 'a mistake'"
    own, wrong = "KeyError: 'a mistake'", "UsageError: wrong"
    first, second = ((tmp_path / f"heard_{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == [own, wrong, f"{told.format(1)} (rank 1)", f"{wrong} (rank 1)", "0 [0, 1]"]
    assert second == [told.format(0), wrong, own, f"{wrong} (rank 1)", "0 [0, 1]"]
