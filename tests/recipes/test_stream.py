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
from swiftv2.data.samples.order import SampleOrder
from swiftv2.data.samples.reading import Reading
from swiftv2.errors import SwiftError
from swiftv2.recipes.stream import DeviceStream

CLIP = ClipConfig(frames=6, stride_within=2, stride_between=0.5)
CPU = torch.device("cpu")


def _stream(source: MemorySource, device: torch.device = CPU, limit: float = 1.0, **options: Any) -> DeviceStream:
    clips = index_clips(source.runs, CLIP)
    epochs = options.pop("epochs", [])
    reader = BatchReader(
        source,
        clips,
        SampleOrder(3, len(clips)),
        MaskConfig(ratio=0.5, patch_size=(2, 2, 2, 2)),
        NormalisationConfig(),
        seed=3,
        micro_batch=4,
        reading=Reading(pin=device.type == "cuda", on_bad_clip="quarantine"),
        **options,
    )
    return DeviceStream(reader, device, limit, begin_epoch=epochs.append)


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
    agreed = [(fault["clip"], fault["position"]) for fault in faults]
    stream.exclude([*agreed, *agreed, (0, 8)])
    assert stream.exclusions == sorted({*agreed, (0, 8)})
    stream.close()


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


def test_too_many_exclusions_end_the_run() -> None:
    stream = _stream(MemorySource(), limit=0.05)
    clips = len(index_clips(MemorySource().runs, CLIP))
    stream.exclude([(clip, 0) for clip in range(clips // 20)])
    with pytest.raises(SwiftError, match=rf"{clips // 20 + 1} of {clips} clips are left out.*quarantine_limit=0\.05"):
        stream.exclude([(clips - 1, 4)])
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
