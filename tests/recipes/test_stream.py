"""Batches on their way to the device: epochs told once, exclusions by agreement, a limit, copies that change nothing."""

import contextlib
import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_batches import MemorySource

from swiftv2.config.data import ClipConfig, NormalisationConfig
from swiftv2.config.model import MaskConfig
from swiftv2.data.samples.batches import BatchReader
from swiftv2.data.samples.clips import index_clips
from swiftv2.data.samples.order import Exclusion as OrderExclusion
from swiftv2.data.samples.order import SampleOrder
from swiftv2.data.samples.reading import Reading
from swiftv2.engine.stream import Exclusion
from swiftv2.errors import SwiftError
from swiftv2.recipes.stream import DeviceStream

CLIP = ClipConfig(frames=6, stride_within=2, stride_between=0.5)
CPU = torch.device("cpu")


def _stream(source: MemorySource, device: torch.device = CPU, limit: float = 1.0, **options: Any) -> DeviceStream:
    clips = index_clips(source.runs, CLIP)
    epochs, known = options.pop("epochs", []), [OrderExclusion(*one) for one in options.pop("exclusions", [])]
    told = {name: options.pop(name) for name in ("withdrawn", "noted", "remembered") if name in options}
    reader = BatchReader(
        source,
        clips,
        SampleOrder(3, len(clips), known),
        MaskConfig(ratio=0.5, patch_size=(2, 2, 2, 2)),
        NormalisationConfig(),
        seed=3,
        micro_batch=4,
        reading=Reading(pin=device.type == "cuda", on_bad_clip="quarantine"),
        **options,
    )
    return DeviceStream(reader, device, limit, begin_epoch=epochs.append, **told)


def _broken(bad_run: int) -> MemorySource:
    source = MemorySource()

    def spoil(run: int, _start: int, bold: NDArray[Any]) -> None:
        if run == bad_run:
            bold[...] = 1

    source.after_read = spoil
    return source


def test_every_epoch_is_told_before_its_first_batch() -> None:
    epochs: list[int] = []
    source = MemorySource()
    stream = _stream(source, epochs=epochs, samples_consumed=40)
    clips = len(index_clips(source.runs, CLIP))
    for _ in range(3 * clips // 4):
        first = int(next(stream).sample[0])
        assert epochs[-1] == first // clips
    assert epochs == list(range(40 // clips, epochs[-1] + 1))
    assert len(epochs) > 2
    stream.close()


def test_what_a_rank_finds_is_not_agreed_before_all_say_so() -> None:
    stream = _stream(_broken(3))
    while not stream.faulty():
        next(stream)
    assert stream.exclusions == []
    faults = stream.faults()
    assert {fault["run"] for fault in faults} == {"run3"}
    assert not stream.faulty()
    agreed = [Exclusion(fault["clip"], fault["position"]) for fault in faults]
    stream.exclude([*agreed, *agreed, Exclusion(0, 8)])
    assert stream.exclusions == sorted({*agreed, Exclusion(0, 8)})
    stream.close()


def test_the_samples_of_the_last_micro_batches_are_named() -> None:
    source = MemorySource()
    clips = index_clips(source.runs, CLIP)
    stream = _stream(source, remembered=3)
    assert stream.recent(3) == []
    handed = [next(stream) for _ in range(5)]
    told = stream.recent(2)
    assert stream.recent(0) == []
    stream.close()
    expected = [
        (number, *pair) for number, batch in enumerate(handed[-2:]) for pair in zip(batch.clip, batch.sample, strict=True)
    ]
    assert [(one["micro_batch"], one["clip"], one["position"]) for one in told] == expected
    for one in told:
        run, start = int(clips.run[one["clip"]]), int(clips.start[one["clip"]])
        assert (one["run"], one["first"], one["last"]) == (source.runs[run].key, start, start + 10)
    with pytest.raises(ValueError, match="4 micro-batches are asked for and 3 remembered"):
        stream.recent(4)


def test_fewer_micro_batches_than_asked_for_keep_their_places() -> None:
    stream = _stream(MemorySource())
    next(stream)
    assert {one["micro_batch"] for one in stream.recent(4)} == {3}
    stream.close()


def test_all_that_is_left_out_is_noted_whenever_it_changes() -> None:
    noted: list[list[Exclusion]] = []
    stream = _stream(MemorySource(), noted=noted.append)
    stream.exclude([Exclusion(3, 8, "rewound")])
    stream.exclude([Exclusion(3, 8, "rewound"), Exclusion(3, 9)])
    stream.exclude([Exclusion(3, 4), Exclusion(1, 8, "asked")])
    stream.close()
    assert noted == [[], [(3, 8, "rewound")], [(1, 8, "asked"), (3, 4, "unusable")]]
    assert stream.exclusions == noted[-1]


def test_a_run_told_in_advance_sees_what_a_run_sees_that_went_back() -> None:
    """Two runs over damaged clips: one finds a stretch bad, goes back and passes over it, one knows from the start."""
    source = _broken(3)
    found = _stream(source)
    for _ in range(8):
        next(found)
    bad = [Exclusion(one["clip"], one["position"]) for one in found.faults()]
    refused = [Exclusion(one["clip"], one["position"], "rewound") for one in found.recent(2)]
    found.exclude(bad)
    found.close()
    assert bad
    left_out = [*found.exclusions, *refused]
    back = _stream(source, samples_consumed=16, exclusions=left_out)
    told = _stream(source, exclusions=[Exclusion(clip, position, "asked") for clip, position, _ in left_out])
    for _ in range(4):
        next(told)
    for _ in range(60):
        one, other = next(back), next(told)
        for name in ("sample", "clip", "epoch", "start", "bold", "mask"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        gone = {clip for clip, position, _ in left_out if position <= int(one.sample[0])}
        assert not gone & set(one.clip.tolist())
    assert [one[:2] for one in back.exclusions] == [one[:2] for one in told.exclusions]
    back.close()
    told.close()


def test_what_is_wrong_with_a_batch_that_was_taken_ahead_counts_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the next batch is copied while the present one is computed; copies are left out here."""
    source = MemorySource()
    clips = index_clips(source.runs, CLIP)
    third = [(int(clips.run[c]), int(clips.start[c])) for c in SampleOrder(3, len(clips)).clips_at(np.arange(8, 12))]

    def fail(run: int, start: int) -> None:
        if (run, start) in third:
            raise SwiftError("gone")

    source.before_read = fail
    stream = _stream(source)
    monkeypatch.setattr(stream, "_copies", object())
    for name, stand_in in {"current_stream": lambda _: Nothing(), "stream": lambda _: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _self, _stream: None)
    for expected in (0, 4):
        time.sleep(0.2)
        assert int(next(stream).sample[0]) == expected
    with pytest.raises(SwiftError, match="gone"):
        next(stream)
    stream.close()


class Nothing:
    def wait_stream(self, other: object) -> None:
        del other


def test_too_many_clips_of_no_use_end_the_run() -> None:
    clips = len(index_clips(MemorySource().runs, CLIP))
    stream = _stream(MemorySource(), limit=0.05, withdrawn=(30, 31))
    stream.exclude([Exclusion(clip, 0) for clip in (*range(clips // 20), 30, 31)])
    stream.exclude([Exclusion(clip, 8, ("rewound", "asked")[clip % 2]) for clip in range(40, 60)])
    with pytest.raises(SwiftError, match=rf"{clips // 20 + 1} of {clips} clips are left out.*quarantine_limit=0\.05"):
        stream.exclude([Exclusion(clips - 1, 4)])
    stream.close()


@pytest.mark.gpu
def test_copies_beside_the_computation_change_nothing() -> None:
    streams = [_stream(_broken(3), device) for device in (CPU, torch.device("cuda"))]
    for _ in range(40):
        here, there = (next(stream) for stream in streams)
        for name in ("bold", "mask", "brain", "slope", "clip", "sample", "weight"):
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name).cpu())
    for stream in streams:
        stream.close()
