import time
from pathlib import Path
from typing import Any

import pytest

from swiftv2.data.changes import tally
from swiftv2.data.changes.tally import Progress, Tally
from swiftv2.data.ranks import Alone, share

BEFORE = Progress(done=3, total=10, refused=1, bytes_done=300, bytes_total=1000)


class FirstOfThree(Alone):
    """Rank 0; what the others do, they have left in their files and give at the end."""

    size = 3

    def __init__(self, others: list[tuple[int, int, int]]) -> None:
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


class SecondOfThree(Alone):
    rank = 1
    size = 3

    def gather(self, value: Any) -> None:  # type: ignore[override]
        del value


def test_one_state_for_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "SECONDS", 0.01)
    states: list[Progress] = []
    with Tally(tmp_path, SecondOfThree(), BEFORE, states.append) as second:
        time.sleep(0.02)
        second.add(200, refused=True)
        second.finish()
    assert states == []
    (tmp_path / "2").write_text("1 0")  # Half of what the third rank is writing.
    with Tally(tmp_path, FirstOfThree([(1, 1, 200), (1, 0, 150)]), BEFORE, states.append) as first:
        first.add(100, refused=False)
        deadline = time.monotonic() + 20
        while not states or states[-1].done < 5:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert states[-1] == Progress(5, 10, 2, 600, 1000)
        first.finish()
    assert states[-1] == Progress(6, 10, 2, 750, 1000)


def test_files_are_dealt_once_and_evenly() -> None:
    sizes = [7, 1, 5, 3, 3, 9, 2]

    class Rank(Alone):
        def __init__(self, rank: int) -> None:
            self.rank = rank
            self.size = 3

    parts = [share(sizes, Rank(rank)) for rank in range(3)]
    assert sorted(number for part in parts for number in part) == list(range(7))
    assert max(sum(sizes[number] for number in part) for part in parts) <= 11
