"""Task states from BIDS events.tsv: labels of volumes and of clips."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from swiftv2.config.data import ClipConfig
from swiftv2.data.labels import RunName
from swiftv2.data.samples.clips import index_clips
from swiftv2.data.samples.events import Event, frame_labels, label_clips, read_events
from swiftv2.errors import UsageError

ONE = RunName("01", "", "objects", "1")
HEADER = "onset\tduration\ttrial_type\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, *runs: RunName) -> dict[int, list[Event]]:
    named = dict(enumerate(runs))
    return read_events(folder, named, {i: f"r{i}" for i in named}, "trial_type")


def test_the_file_that_names_most_of_a_run_wins_and_others_inherit(tmp_path: Path) -> None:
    write(tmp_path, "task-objects_events.tsv", HEADER + "0\t5\tall\n")
    write(tmp_path, "sub-01/func/sub-01_task-objects_run-01_events.tsv", HEADER + "0\t5\town\n")
    write(tmp_path, "sub-01/func/sub-01_task-rest_run-1_events.tsv", HEADER + "0\t5\tother\n")
    found = read(tmp_path, ONE, RunName("02", "", "objects", "1"))
    assert found == {0: [Event(0.0, 5.0, "own")], 1: [Event(0.0, 5.0, "all")]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("onset\tduration\n0\t5\n", "no column 'trial_type'"),
        (HEADER + "zero\t5\tface\n", "line 2: onset 'zero'"),
        (HEADER + "0\t-5\tface\n", "line 2: onset '0' and duration '-5'"),
        (HEADER + "0\t5\n", "line 2: 2 cells"),
        (HEADER + "0\t5\tface\n4\t5\thouse\n", "line 3: overlaps an event of another label"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_by_line_and_never_by_subject(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, "sub-01_task-objects_run-1_events.tsv", text)
    with pytest.raises(UsageError, match=said) as caught:
        read(tmp_path, ONE)
    assert "sub-01" not in str(caught.value)
    assert "r0" in str(caught.value)


def test_a_run_without_events_and_a_folder_without_any_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \*_events.tsv"):
        read(tmp_path, ONE)
    write(tmp_path, "sub-02_task-objects_run-1_events.tsv", HEADER)
    with pytest.raises(UsageError, match=r"no events\.tsv fits run r0"):
        read(tmp_path, ONE)


def test_a_volume_has_the_label_of_the_event_that_it_answers_to() -> None:
    events = [Event(4.0, 4.0, "face"), Event(10.0, 2.0, "house")]
    assert frame_labels(events, 7, 2.0, 0.0, "rest") == ["rest", "rest", "face", "face", "rest", "house", "rest"]
    assert frame_labels(events, 7, 2.0, 2.0, None) == [None, None, None, "face", "face", None, "house"]


def test_clips_of_one_state_are_kept_and_mixed_ones_left_out() -> None:
    run: Any = SimpleNamespace(key="r0", subject="s0", cohort="c", frames=12, tr=2.0, steady_from=0, since=1, withdrawn=0)
    clips = index_clips([run], ClipConfig(frames=3))
    states = {0: ["face"] * 3 + ["face", "face", "house"] + ["house"] * 3 + [None] * 3}
    kept, labels = label_clips(clips, [run], states, purity=1.0)
    assert (kept.tolist(), labels) == ([0, 2], ["face", "house"])
    kept, labels = label_clips(clips, [run], states, purity=0.6)
    assert (kept.tolist(), labels) == ([0, 1, 2], ["face", "face", "house"])
    assert np.array_equal(clips.start[kept], [0, 3, 6])
