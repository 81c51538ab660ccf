import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import nitime
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from swiftv2.config.data import ClipConfig, GridConfig, NormalisationConfig
from swiftv2.config.model import MaskConfig
from swiftv2.data import keyed
from swiftv2.data.changes.build import build
from swiftv2.data.samples.batch import Batch, RunTable, common_dtype
from swiftv2.data.samples.batches import BatchReader, evaluation_batches
from swiftv2.data.samples.clips import index_clips, spread_clips
from swiftv2.data.samples.masks import brain_cells, draw_mask
from swiftv2.data.samples.normalise import gather, normalise, scaling, scatter
from swiftv2.data.samples.order import Exclusion, SampleOrder
from swiftv2.data.samples.reading import Reading
from swiftv2.data.store.reader import Store
from swiftv2.errors import DamagedError, SwiftError

CLIP = ClipConfig(frames=6, stride_within=2, stride_between=0.5)
MASK = MaskConfig(ratio=0.5, patch_size=(2, 2, 2, 2))
ZNORM = NormalisationConfig()


@dataclass(frozen=True)
class MemoryRun:
    key: str
    subject: str
    cohort: str
    frames: int
    tr: float
    slope: float
    intercept: float
    dtype: str
    statistics: tuple[float, ...]
    steady_from: int = 0
    since: int = 1
    withdrawn: int = 0


@dataclass(frozen=True)
class MemoryGrid:
    shape: tuple[int, int, int]


class MemorySource:
    """Runs in memory, each value telling its run, frame and voxel; counts reads and can fail or dawdle."""

    def __init__(self, subjects: int = 5, dtypes: tuple[str, ...] = ("int16",), offset: int = 0) -> None:
        self.offset = offset
        self.grid = MemoryGrid((6, 5, 4))
        self.voxels: NDArray[np.int64] = np.arange(10, 90, dtype=np.int64)
        self.runs = [
            MemoryRun(
                key=f"run{i}",
                subject=f"s{i // 2}",
                cohort="AB"[i // 2 % 2],
                frames=30 + 5 * i,
                tr=2.0,
                slope=0.5 + i,
                intercept=float(-i),
                dtype=dtypes[i % len(dtypes)],
                statistics=tuple(float(100 * i + j) for j in range(6)),
            )
            for i in range(2 * subjects)
        ]
        self.before_read: Callable[[int, int], None] = lambda _run, _start: None
        self.after_read: Callable[[int, int, NDArray[Any]], None] = lambda _run, _start, _bold: None
        self.reads = 0
        self._lock = threading.Lock()

    def read_bold(
        self, run_index: int, start: int, frames: int, stride: int, *, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        self.before_read(run_index, start)
        with self._lock:
            self.reads += 1
        run = self.runs[run_index]
        assert start + (frames - 1) * stride < run.frames
        times = start + stride * np.arange(frames)
        bold = (self.offset + run_index * 1000 + times[:, None] * 10 + self.voxels % 10).astype(run.dtype)
        self.after_read(run_index, start, bold)
        if out is None:
            return bold
        out[...] = bold
        return out

    def brain(self, run_index: int) -> NDArray[np.bool_]:
        return np.asarray(self.voxels % 7 != run_index % 7)

    def voxel_mean(self, run_index: int) -> NDArray[np.float32]:
        return (self.voxels + run_index).astype(np.float32)

    def voxel_std(self, run_index: int) -> NDArray[np.float32]:
        return (self.voxels + 0.5 * run_index).astype(np.float32)


def _reader(source: MemorySource, **options: Any) -> BatchReader:
    clips = index_clips(source.runs, CLIP)
    settings: dict[str, Any] = {"seed": 3, "micro_batch": 4, **options}
    normalisation = settings.pop("normalisation", ZNORM)
    how = {field.name: settings.pop(field.name) for field in dataclasses.fields(Reading) if field.name in settings}
    settings["reading"] = Reading(**how)
    return BatchReader(source, clips, SampleOrder(3, len(clips)), MASK, normalisation, **settings)


def _take(reader: BatchReader, count: int) -> list[Batch]:
    with reader:
        return list(itertools.islice(reader, count))


def _by_sample(batches: list[Batch]) -> dict[int, list[Any]]:
    """Everything that a batch says of each sample, by position."""
    samples: dict[int, list[Any]] = {}
    for batch in batches:
        for i, position in enumerate(batch.sample.tolist()):
            assert position not in samples
            values = (getattr(batch, field.name) for field in fields(batch))
            samples[position] = [None if value is None else value[i].tolist() for value in values]
    return samples


def test_a_batch_says_what_the_store_says_of_its_clips() -> None:
    source = MemorySource()
    clips = index_clips(source.runs, CLIP)
    order = SampleOrder(3, len(clips))
    batch = _take(_reader(source, normalisation=NormalisationConfig(kind="per_voxel")), 1)[0]
    assert len(batch) == 4
    assert batch.bold.dtype == torch.int16
    assert batch.bold.shape == (4, 6, 80)
    cells = brain_cells(source.voxels, (6, 5, 4), MASK.patch_size)
    for i in range(4):
        clip = int(order.clips_at(np.array([i]))[0])
        run, start = int(clips.run[clip]), int(clips.start[clip])
        info = source.runs[run]
        np.testing.assert_array_equal(batch.bold[i], source.read_bold(run, start, 6, 2))
        np.testing.assert_array_equal(batch.brain[i], source.brain(run))
        assert batch.voxel_mean is not None
        assert batch.voxel_std is not None
        np.testing.assert_array_equal(batch.voxel_mean[i], source.voxel_mean(run))
        np.testing.assert_array_equal(batch.voxel_std[i], source.voxel_std(run))
        drawn = draw_mask(MASK, (3, 3, 2, 3), cells, keyed.generator(3, "mask", 0, clip))
        np.testing.assert_array_equal(batch.mask[i], drawn)
        assert batch.statistics[i].tolist() == list(info.statistics)
        assert [float(x[i]) for x in (batch.slope, batch.intercept, batch.tr)] == [info.slope, info.intercept, info.tr]
        assert (int(batch.sample[i]), int(batch.epoch[i]), int(batch.clip[i]), int(batch.start[i])) == (i, 0, clip, start)
        assert (int(batch.subject[i]), int(batch.cohort[i])) == (run // 2, run // 2 % 2)
        assert batch.weight[i] == 1


def test_per_voxel_statistics_come_only_where_they_are_needed() -> None:
    assert _take(_reader(MemorySource()), 1)[0].voxel_mean is None
    scope_clip = NormalisationConfig(kind="per_voxel", scope="clip")
    assert _take(_reader(MemorySource(), normalisation=scope_clip), 1)[0].voxel_mean is None


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 24, 1), (2, 6, 2), (3, 4, 2), (8, 3, 1), (4, 1, 6)])
def test_every_world_size_and_accumulation_reads_the_same_samples(world: int, micro: int, accumulation: int) -> None:
    steps = 3
    expected = _by_sample(_take(_reader(MemorySource(), micro_batch=24, samples_consumed=17), steps))
    found: list[Batch] = []
    for rank in range(world):
        reader = _reader(
            MemorySource(),
            micro_batch=micro,
            accumulation=accumulation,
            rank=rank,
            world_size=world,
            samples_consumed=17,
        )
        found += _take(reader, steps * accumulation)
    assert _by_sample(found) == expected


@pytest.mark.parametrize("consumed", [0, 1, 5, 40, 200])
def test_a_reader_goes_on_from_any_sample(consumed: int) -> None:
    whole = _by_sample(_take(_reader(MemorySource()), 60))
    resumed = _by_sample(_take(_reader(MemorySource(), samples_consumed=consumed), 8))
    assert resumed == {position: whole[position] for position in resumed}
    assert min(resumed) == consumed
    assert max(row[9] for row in whole.values()) > 0, "the test should reach a second epoch"


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (2, 2), (7, 5)])
def test_threads_and_prefetch_change_nothing(threads: int, prefetch: int) -> None:
    source = MemorySource()
    source.before_read = lambda run, start: time.sleep((run * 7 + start) % 5 / 2000)
    found = _by_sample(_take(_reader(source, threads=threads, prefetch=prefetch), 10))
    assert found == _by_sample(_take(_reader(MemorySource(), threads=1, prefetch=1), 10))


def test_reading_ahead_is_bounded() -> None:
    source = MemorySource()
    with _reader(source, threads=4, prefetch=2) as reader:
        next(reader)
        time.sleep(0.2)
        assert source.reads == (1 + 2) * 4


@pytest.mark.parametrize("policy", ["fail", "quarantine"])
def test_what_cannot_be_read_now_ends_the_run_under_any_policy(policy: str) -> None:
    source = MemorySource()

    def fail(_run: int, _start: int) -> None:
        raise SwiftError("store x: run run0 cannot be read now (Too many open files)")

    source.before_read = fail
    with pytest.raises(SwiftError, match="Too many open files"):
        _take(_reader(source, on_bad_clip=policy), 100)


def test_more_faults_than_allowed_end_the_run_at_once() -> None:
    """As where a whole file system is gone: nobody tries all clips one after another."""
    source = MemorySource(subjects=40)

    def fail(_run: int, _start: int) -> None:
        raise DamagedError("the checksum fails")

    source.before_read = fail
    with pytest.raises(SwiftError, match=r"6 clips of no use on this rank, more than data\.quarantine_limit allows"):
        _take(_reader(source, on_bad_clip="quarantine", most_faults=5, threads=1, prefetch=1), 100)


def test_an_unreadable_clip_names_run_and_frames_and_the_threads_end() -> None:
    source = MemorySource()

    def fail(run: int, start: int) -> None:
        if run == 4:
            raise DamagedError(f"run run4, frames {start} to {start + 10}: checksum")

    source.before_read = fail
    before = threading.active_count()
    with pytest.raises(SwiftError, match=r"run run4, frames \d+ to \d+.*checksum"):
        _take(_reader(source, threads=3), 100)
    assert threading.active_count() == before


def test_a_failure_that_names_its_run_is_passed_on_as_it_is() -> None:
    source = MemorySource()

    def fail(run: int, _start: int) -> None:
        raise SwiftError(f"store x: run {source.runs[run].key} was withdrawn: exclude it")

    source.before_read = fail
    with _reader(source) as reader, pytest.raises(SwiftError, match=r"^store x: run run\d was withdrawn: exclude it$"):
        next(reader)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["checksum", "constant", "not finite"])
def test_clips_of_no_use_are_replaced_alike_on_every_world_size(world: int, kind: str) -> None:
    """Whoever reads first, each position holds what the order has there once all clips of no use are excluded."""
    dtypes = ("float32",) if kind == "not finite" else ("int16",)
    clips = index_clips(MemorySource().runs, CLIP)
    bad = {int(i) for i in np.flatnonzero(clips.run == 3)} | {0, 7, 40, len(clips) - 1}

    def broken() -> MemorySource:
        source = MemorySource(dtypes=dtypes)
        places = {(int(clips.run[i]), int(clips.start[i])) for i in bad}

        def spoil(run: int, start: int, bold: NDArray[Any]) -> None:
            if (run, start) in places:
                if kind == "checksum":
                    raise DamagedError(f"run {source.runs[run].key}: the checksum fails")
                bold[...] = 7 if kind == "constant" else np.nan

        source.after_read = spoil
        return source

    order = SampleOrder(3, len(clips), [Exclusion(clip, 0) for clip in bad])
    expected = order.clips_at(np.arange(2 * len(clips) // 12 * 12)).tolist()
    found: dict[int, int] = {}
    told: dict[int, int] = {}
    for rank in range(world):
        options = {"rank": rank, "world_size": world, "micro_batch": 12 // world, "threads": 3, "on_bad_clip": "quarantine"}
        with _reader(broken(), **options) as reader:
            for batch in itertools.islice(reader, len(expected) // 12):
                found |= dict(zip(batch.sample.tolist(), batch.clip.tolist(), strict=True))
                assert batch.start.tolist() == clips.start[batch.clip].tolist()
                assert batch.slope.tolist() == [0.5 + clips.run[clip] for clip in batch.clip.tolist()]
                assert bool((batch.bold.float().std(1).sum(1) > 0).all())
            told |= {fault.clip: fault.position for fault in reader.faults()}
            assert reader.faults() == []
    assert [found[position] for position in range(len(expected))] == expected
    assert set(told) == bad
    assert all(position % 12 == 0 for position in told.values())


@pytest.mark.parametrize(("kind", "message"), [(7, "does not change from frame to frame"), (np.nan, "NaN or infinity")])
def test_clips_of_no_use_end_the_run_by_default(kind: float, message: str) -> None:
    source = MemorySource(dtypes=("float32",))

    def spoil(run: int, _start: int, bold: NDArray[Any]) -> None:
        if run == 2:
            bold[...] = kind

    source.after_read = spoil
    with pytest.raises(SwiftError, match=rf"run run2, frames \d+ to \d+: .*{message}"):
        _take(_reader(source), 100)


def test_reading_ahead_is_bounded_in_bytes() -> None:
    source = MemorySource()
    source.voxels = np.arange(0, 120).repeat(2500)
    source.grid = MemoryGrid((60, 50, 100))
    # A batch takes 4 clips x 6 frames x 300,000 voxels x 2 bytes, some 14 MB.
    with _reader(source, threads=4, prefetch=9, prefetch_mb=45) as reader:
        next(reader)
        time.sleep(1.0)
        assert source.reads == (1 + 2) * 4


def test_clips_come_at_another_repetition_time() -> None:
    """A ramp in time stays that ramp, whatever TR it was sampled at; both kinds of runs meet in one batch."""
    source = MemorySource()
    source.runs = [dataclasses.replace(run, tr=1.0 if i % 2 else 2.0, frames=60) for i, run in enumerate(source.runs)]
    config = ClipConfig(frames=8, target_tr=1.5)
    clips = index_clips(source.runs, config)
    with BatchReader(source, clips, SampleOrder(0, len(clips)), MASK, ZNORM, seed=0, micro_batch=6) as reader:
        for batch in itertools.islice(reader, 6):
            assert batch.bold.dtype == torch.float32
            assert batch.tr.tolist() == [1.5] * 6
            for i, clip in enumerate(batch.clip.tolist()):
                run = int(clips.run[clip])
                offset = run * 1000 + source.voxels % 10
                seconds = batch.start[i].item() * source.runs[run].tr + 1.5 * np.arange(8)
                ramp = offset + 10 * seconds[:, None] / source.runs[run].tr
                # A clip of a faster run begins a filter's margin later, and a triangle between its frames leans a little.
                expected, atol = (ramp, 1e-3) if run % 2 == 0 else (ramp + 10, 2.0)
                np.testing.assert_allclose(batch.bold[i].numpy(), expected, atol=atol)


def test_closing_ends_the_threads_and_the_iteration() -> None:
    before = threading.active_count()
    reader = _reader(MemorySource(), threads=3)
    next(reader)
    reader.close()
    reader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(reader)


def test_runs_of_different_formats_meet_in_float32() -> None:
    source = MemorySource(dtypes=("int16", "uint16", "float32"))
    batches = _take(_reader(source), 5)
    assert {batch.bold.dtype for batch in batches} == {torch.float32}
    plain = _by_sample(_take(_reader(MemorySource()), 5))
    assert {p: row[0] for p, row in _by_sample(batches).items()} == {p: row[0] for p, row in plain.items()}


def test_formats_keep_every_value() -> None:
    assert common_dtype({"int16"}) == common_dtype({"<i2"}) == torch.int16
    assert common_dtype({"uint8"}) == torch.uint8
    assert common_dtype({"uint16"}) == torch.int32
    assert common_dtype({"uint16", "int32"}) == torch.int32
    assert common_dtype({"float64"}) == torch.float32
    high = MemorySource(dtypes=("uint16",), offset=50_000)
    low = _take(_reader(MemorySource()), 1)[0].bold
    torch.testing.assert_close(_take(_reader(high), 1)[0].bold, low.int() + 50_000, rtol=0, atol=0)


def test_moving_a_batch_keeps_what_it_says() -> None:
    batch = _take(_reader(MemorySource()), 1)[0]
    assert _by_sample([batch.to("cpu")]) == _by_sample([batch])
    assert batch.to("meta").bold.device.type == "meta"
    assert batch.to("meta").voxel_mean is None


def test_an_order_of_other_clips_is_refused() -> None:
    source = MemorySource()
    clips = index_clips(source.runs, CLIP)
    with pytest.raises(ValueError, match="the order is of 3 clips"):
        BatchReader(source, clips, SampleOrder(0, 3), MASK, ZNORM, seed=0, micro_batch=1)


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("max_clips", [1, 7, 20, None])
def test_an_evaluation_counts_every_clip_once_on_any_world_size(world: int, max_clips: int | None) -> None:
    source = MemorySource()
    clips = index_clips(source.runs, CLIP, range(2, 10))
    table = RunTable(source.runs)
    expected = spread_clips(table.subject[clips.run], max_clips).tolist()
    counted: list[int] = []
    shapes = []
    masks: dict[int, list[Any]] = {}
    for rank in range(world):
        options: dict[str, Any] = {"seed": 5, "batch": 4, "max_clips": max_clips, "rank": rank, "world_size": world}
        with evaluation_batches(source, clips, MASK, ZNORM, **options) as batches:
            read = list(batches)
        shapes.append([len(batch) for batch in read])
        for batch in read:
            counted += batch.clip[batch.weight > 0].tolist()
            masks |= dict(zip(batch.clip.tolist(), batch.mask.tolist(), strict=True))
    assert sorted(counted) == expected
    assert all(shape == shapes[0] for shape in shapes), "ranks must run equally many batches"
    cells = brain_cells(source.voxels, (6, 5, 4), MASK.patch_size)
    clip = expected[-1]
    assert masks[clip] == draw_mask(MASK, (3, 3, 2, 3), cells, keyed.generator(5, "evaluate", clip)).tolist()


def test_real_bold_comes_out_of_a_store_and_back_into_its_volumes(tmp_path: Path) -> None:
    """Packed, scattered and gathered again, clips of two real runs are the frames of the store."""
    grid = GridConfig(kind="source", mask="box", space="scanner-of-the-package")
    table = tmp_path / "labels.csv"
    table.write_text("subject,file\nfirst,fmri1.nii.gz\nsecond,fmri2.nii.gz\n")
    files = str(Path(nitime.__file__).parent / "data" / "fmri*.nii.g[z]")
    build(files, tmp_path / "store", grid, "real", labels=table)
    store = Store.open(tmp_path / "store")
    clips = index_clips(store.runs, ClipConfig(frames=8, stride_within=2, stride_between=0.3))
    options: dict[str, Any] = {"seed": 0, "micro_batch": 3, "reading": Reading(threads=3)}
    per_voxel = NormalisationConfig(kind="per_voxel")
    voxels = torch.from_numpy(store.voxels)
    with BatchReader(store, clips, SampleOrder(0, len(clips)), MASK, per_voxel, **options) as reader:
        for batch in itertools.islice(reader, 4):
            for i, (clip, start) in enumerate(zip(batch.clip.tolist(), batch.start.tolist(), strict=True)):
                np.testing.assert_array_equal(batch.bold[i], store.read_bold(int(clips.run[clip]), start, 8, 2))
            signal, fill = normalise(batch, per_voxel)
            volume = scatter(signal, voxels, store.grid.shape, fill)
            torch.testing.assert_close(gather(volume, voxels), signal, rtol=0, atol=0)
            whole = scaling(batch, NormalisationConfig(scope="clip")).centre.flatten()
            # A clip's mean lies near its run's: real BOLD moves by percents.
            torch.testing.assert_close(whole, batch.statistics[:, 0], rtol=0.02, atol=0.0)


def test_the_table_numbers_subjects_and_cohorts_by_name() -> None:
    table = RunTable(MemorySource().runs)
    assert table.cohort_names == ("A", "B")
    assert table.subject_keys == ("s0", "s1", "s2", "s3", "s4")
    assert table.cohort_of_subject.tolist() == [0, 1, 0, 1, 0]
