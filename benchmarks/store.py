"""Random clips from a store and from the formats before it: rate, bytes, processor time, file opens and metadata calls.

    python benchmarks/store.py --folder FOLDER --out benchmarks/results/2026-11-22-store.md
    python benchmarks/store.py --folder FOLDER --choice --out benchmarks/results/2026-11-22-store-choice.md

Without --choice: the formats side by side, the loader and what models consume. With it: chunks, codecs and readers.
The first call generates a cohort and converts it (several minutes at 2 mm); later ones read what it left in the folder.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from cohorts import cohort, full_volume_bytes, store
from formats import (
    CODECS,
    FRESH,
    H5_FRAME,
    H5_OWN,
    LIMIT,
    OURS,
    PT,
    READERS,
    Codec,
    Format,
    Reader,
    convert,
    formats,
    layout_of,
    recode,
    size_of,
)
from machine import (
    BEGIN,
    END,
    child,
    count_calls,
    cpu_seconds,
    drop,
    fill,
    mark,
    page,
    parser,
    prose,
    resident,
    table,
    write_page,
)
from real import real_table
from timing import Clip, Cost, random_clips, ratio, read_in_turn

from swiftv2.config.data import ClipConfig, NormalisationConfig
from swiftv2.config.load import find_preset, read_yaml
from swiftv2.config.model import MaskConfig, ModelConfig
from swiftv2.data.samples.batches import BatchReader
from swiftv2.data.samples.clips import index_clips
from swiftv2.data.samples.order import SampleOrder
from swiftv2.data.samples.reading import Reading
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError
from swiftv2.plan import plan_model

PEAK = 312e12
"""FLOPs a second of an A100 in bf16, dense, as its maker states."""
CHUNKS = (1, 2, 5, 10)
PACKAGES = ("numpy", "torch", "zarr", "numcodecs", "h5py", "zarrs", "tensorstore")
CALL_HEADS = ("opens a clip", "stats and listings", "seeks", "worst: opens", "stats and listings", "seeks")
TARGETS = ((PT, 6.0), (H5_FRAME, 9.0), (H5_OWN, 18.0))


def older_formats(path: Path) -> Path:
    """Folder of the formats that a store is compared with; they do not depend on its layout."""
    return path.with_name(f"{path.stem.rsplit('-', 1)[0]}-formats")


def formats_page(options: argparse.Namespace, path: Path, runs_seconds: float) -> Iterator[str]:
    """The formats side by side, cold and warm."""
    opened = Store.open(path)
    made = formats(older_formats(path), path)
    readers = {name: one.open() for name, one in made.items()}
    check_equal(readers, opened)
    full = full_volume_bytes(opened)
    frames = sum(run.frames for run in opened.runs)
    yield from prose(
        f"Cohort: {len(opened)} runs, {frames} frames of {'x'.join(map(str, opened.grid.shape))} voxels, {full / 1e9:.2f} GB "
        f"as half-precision full volumes; {len(opened.voxels):,} voxels are kept. Generated in {runs_seconds:.0f} s."
    )
    yield from prose(
        f"Clips: {options.frames} frames, run and start uniformly random, the same for every format; {options.clips} clips a "
        f"round, {options.rounds} rounds, every clip by all formats in turn; one process. Medians over rounds, ratios within "
        "a round (lowest to highest). The older formats are favoured: HDF5 files stay open, `.pt` frames are stacked, not "
        f"joined on their last axis. This store has {layout_of(path, opened.runs[0])}; the older formats have no checksums."
    )
    cold = read_in_turn(readers, opened.runs, options.frames, options.clips, options.rounds, cold=True)
    files = [file for reader in readers.values() for run in range(len(opened)) for file in reader.files(run)]
    fill(files)
    cached = resident(files)
    warm = read_in_turn(readers, opened.runs, options.frames, options.clips, options.rounds, cold=False)
    left = max(cost.resident for cost in cold.values())
    yield from prose(
        f"Cold: the run's files are dropped (fsync, posix_fadvise DONTNEED) before each clip; {100 * left:.1f} % of their "
        "pages were then still in the page cache by mincore. The host below this virtual disk may cache what the guest does "
        f"not. Warm: {100 * cached:.1f} % of the pages in the page cache."
    )
    for title, costs in (("Cold", cold), ("Warm", warm)):
        yield from ["", f"## {title}", "", *_format_rows(costs, options.frames)]
    yield from ["", "## Bytes and system calls", ""]
    calls = {} if options.no_strace else {name: count(options, path, name) for name in made if name not in (LIMIT, FRESH)}
    yield from _size_rows(made, full, calls)
    yield from prose(
        "Over 64 random clips, the first opening of every file included; worst: each clip from a run whose file was never "
        "opened before. Counted by strace between the opening of the data set and the end."
    )
    ours = size_of(path)[0] / size_of(made[PT].folder)[0]
    yield from ["", "## Targets", "", *_targets(cold, warm, ours, calls)]
    yield from ["", "## The loader", "", *loader(path, options)]


def _format_rows(costs: dict[str, Cost], frames: int) -> list[str]:
    heads = ["format", "clips/s", "frames/s", f"times `{PT}`", "share of the limit", "CPU ms a clip", "MB from disk a clip"]
    rows = [
        [
            name,
            f"{cost.rate:.1f}",
            f"{cost.rate * frames:.0f}",
            ratio(cost.times(costs[PT])),
            ratio(cost.times(costs[LIMIT]), percent=True),
            f"{1000 * cost.cpu_per_clip:.1f}",
            f"{cost.disk_per_clip / 1e6:.1f}",
        ]
        for name, cost in costs.items()
    ]
    return table(heads, rows)


def _size_rows(made: dict[str, Format], full: int, calls: dict[str, "Calls"]) -> list[str]:
    heads = ["format", "MB", "of full half precision", "files", *CALL_HEADS]
    rows = []
    for name, one in made.items():
        size, files = size_of(one.folder)
        counted = [f"{number:.2f}" for number in calls[name]] if name in calls else [""] * len(CALL_HEADS)
        rows.append([name, f"{size / 1e6:.0f}", f"{size / full:.3f}", str(files), *counted])
    return table(heads, rows)


def _targets(cold: dict[str, Cost], warm: dict[str, Cost], size: float, calls: dict[str, "Calls"]) -> list[str]:
    rows = []
    for name, wanted in TARGETS:
        rows.append(_target(f"cold, times {name}", cold[OURS].times(cold[name]), wanted))
    rows.append(_target("cold, share of the limit", cold[OURS].times(cold[LIMIT]), 0.3))
    rows.append(_target(f"warm, times {PT}", warm[OURS].times(warm[PT]), 3.0))
    rows.append(
        ["bytes on disk, of half-precision `.pt`", "at most 0.333", f"{size:.3f}", "met" if size <= 1 / 3 else "MISSED"]
    )
    if OURS in calls:
        often, never = sum(calls[OURS][:3]), sum(calls[OURS][3:])
        what = "opens and metadata calls a clip"
        rows.append([f"{what}, amortised over 64 clips", "below 1", f"{often:.2f}", "met" if often < 1 else "MISSED"])
        rows.append([f"{what}, no run opened before", "none", f"{never:.2f}", ""])
    return table(["what", "target", "measured", ""], rows)


def _target(what: str, measured: tuple[float, float, float], wanted: float) -> list[str]:
    percent = wanted < 1
    aim = f"at least {100 * wanted:.0f} %" if percent else f"at least {wanted:.0f}"
    return [what, aim, ratio(measured, percent=percent), "met" if measured[0] >= wanted else "MISSED"]


def check_equal(readers: dict[str, Reader], opened: Store) -> None:
    """Hold every format's first clip to the store's.

    Raises:
        SwiftError: a format holds other numbers.
    """
    run = opened.runs[0]
    wanted = opened.read_bold(0, 0, 5).astype(np.float32) * run.slope + run.intercept
    for name in (H5_OWN, H5_FRAME):
        found = np.asarray(readers[name].read(0, 0, 5), dtype=np.float32).reshape(5, -1)[:, opened.voxels]
        if not np.allclose(found, wanted, rtol=1e-3):
            raise SwiftError(f"{name} holds other numbers than the store: remove the benchmark's folder")
    scaled = np.asarray(readers[PT].read(0, 0, 5), dtype=np.float32).reshape(5, -1)[:, opened.voxels]
    if np.corrcoef(scaled.ravel(), wanted.ravel())[0, 1] < 0.999:
        raise SwiftError(f"{PT} holds other numbers than the store: remove the benchmark's folder")


Calls = tuple[float, ...]
"""Opens, stats and listings, seeks a clip: over random clips, then where no clip's run was ever opened."""


def count(options: argparse.Namespace, path: Path, name: str) -> Calls:
    """Count the system calls of a format in processes of their own."""
    found: list[float] = []
    for mode, clips in (("random", 64), ("first", len(Store.open(path)))):
        words = ["--folder", str(options.folder), "--trace", name, "--trace-mode", mode, *_cohort_words(options)]
        found += [number / clips for number in count_calls(child("store.py", *words))]
    return tuple(found)


def _cohort_words(options: argparse.Namespace) -> list[str]:
    words = ("subjects", "run_frames", "voxel", "frames")
    return [text for word in words for text in (f"--{word.replace('_', '-')}", f"{getattr(options, word):g}")]


def trace(options: argparse.Namespace, path: Path) -> None:
    """Read clips of one format between two marks in the list of system calls."""
    runs = Store.open(path).runs
    clips: list[Clip] = [(run, 0) for run in range(len(runs))]
    if options.trace_mode == "random":
        clips = random_clips(runs, options.frames, 64, "trace")
    known = formats(older_formats(path), path)
    reader = known[options.trace].open() if options.trace in known else READERS[options.trace](path)
    mark(BEGIN)
    for run, start in clips:
        reader.read(run, start, options.frames)
    mark(END)


def loader(path: Path, options: argparse.Namespace) -> Iterator[str]:
    """Lines: what the loader delivers with one thread and two, and what models consume."""
    opened = Store.open(path)
    clips = index_clips(opened.runs, ClipConfig(frames=options.frames, stride_between=0.25))
    mask = MaskConfig.model_validate(read_yaml(find_preset("pretrain", "5M"))["mask"])
    shards = sorted((path / "bold").rglob("c.*"))
    rates: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    batches = max(2, options.clips)
    for number in range(options.rounds):
        for threads in (1, 2):
            for cold in (True, False):
                drop(shards) if cold else fill(shards)
                order = SampleOrder(number, len(clips))
                reading = Reading(threads=threads)
                reader = BatchReader(opened, clips, order, mask, NormalisationConfig(), seed=0, micro_batch=4, reading=reading)
                with reader:
                    cpu, begun = cpu_seconds(), time.perf_counter()
                    for _ in range(batches):
                        next(reader)
                    seconds = time.perf_counter() - begun
                rates.setdefault((threads, cold), []).append((4 * batches / seconds, (cpu_seconds() - cpu) / (4 * batches)))
    yield from prose(
        f"`BatchReader`, micro-batches of 4 clips with masks and brains, {batches} batches a round, {options.rounds} rounds; "
        "the first batch's wait included. Cold: shards dropped before the first batch; later clips share pages with earlier "
        "ones."
    )
    median = {key: np.median(np.array(values), axis=0) for key, values in rates.items()}
    heads = ["threads", "cold clips/s", "warm clips/s", "warm MB/s of stored numbers", "CPU ms a clip, warm"]
    size = options.frames * len(opened.voxels) * np.dtype(opened.runs[0].dtype).itemsize / 1e6
    yield from table(
        heads,
        [
            [
                str(threads),
                f"{median[threads, True][0]:.1f}",
                f"{median[threads, False][0]:.1f}",
                f"{median[threads, False][0] * size:.0f}",
                f"{1000 * median[threads, False][1]:.1f}",
            ]
            for threads in (1, 2)
        ],
    )
    yield from headroom(float(median[2, False][0]), float(median[2, False][1]), size)


def headroom(rate: float, cpu: float, size: float) -> Iterator[str]:
    """Lines: clips a second that models consume on an A100 against what the loader delivers; arithmetic only."""
    yield from ["", "### What models consume on an A100"]
    yield from prose(
        "Arithmetic, nothing measured on a GPU: forward and backward cost 3 x the forward FLOPs of `swiftv2 plan` (a dense "
        f"96^3 x 20 clip), {PEAK / 1e12:.0f} TFLOP/s in bf16, at the stated share of them. Cores that keep up: clips/s x CPU "
        "seconds a clip, warm, on cores like these, if threads scale; a Perlmutter GPU node has 16 cores (32 threads) a GPU."
    )
    rows = []
    for name in ("5M", "806M"):
        config = ModelConfig.model_validate(read_yaml(find_preset("model", name)))
        flops = 3 * plan_model(config).forward_flops_per_clip["total"]
        for share in (0.1, 0.2, 0.4):
            wanted = PEAK * share / flops
            rates = [f"{wanted:.1f}", f"{wanted * size:,.0f}", f"{rate / wanted:.2f}", f"{wanted * cpu:.1f}"]
            rows.append([name, f"{flops / 1e9:,.0f}", f"{100 * share:.0f} %", *rates])
    heads = ["model", "GFLOP a clip", "share of the peak", "clips/s a GPU", "MB/s a GPU", "this loader, 2 threads: times that"]
    yield from table([*heads, "cores that keep up"], rows)


def choice_page(options: argparse.Namespace, path: Path, runs_seconds: float) -> Iterator[str]:
    """Chunks, codecs and readers on the same clips."""
    opened = Store.open(path)
    full = full_volume_bytes(opened)
    frames = sum(run.frames for run in opened.runs)
    yield from prose(
        f"Cohort: {len(opened)} runs, {frames} frames, {full / 1e9:.2f} GB as half-precision full volumes, "
        f"{len(opened.voxels):,} voxels kept; generated in {runs_seconds:.0f} s. Random {options.frames}-frame clips, "
        f"{options.clips} a round, {options.rounds} rounds; every clip by all readers of one layout in turn and by `.pt`, to "
        "which ratios are paired. One process; libraries may use both cores, `ours` uses one. All readers verify checksums. "
        "Cold: files dropped before each clip (fsync, posix_fadvise DONTNEED); the host below this virtual disk may cache "
        "what the guest does not."
    )
    heads = [
        "codec",
        "chunk",
        "of full half precision",
        "reader",
        "cold clips/s",
        "warm clips/s",
        f"cold times `{PT}`",
        f"warm times `{PT}`",
    ]
    heads += ["cold share of `pread`", "CPU ms a clip, cold", "warm"]
    rows: list[list[str]] = []
    before = formats(older_formats(path), path)[PT].open()
    for codec in CODECS:
        for chunk in CHUNKS:
            variant = recode(path, options.folder / f"{path.stem}-variants" / f"{codec}-{chunk}", chunk, codec)
            rows += _variant_rows(options, opened, variant, before, codec, chunk)
    yield from table(heads, rows)
    if not options.no_strace:
        yield from ["", "## System calls of the readers, default layout", ""]
        rows = [[name, *(f"{number:.2f}" for number in count(options, path, name))] for name in READERS]
        yield from table(["reader", *CALL_HEADS], rows)
    yield from ["", "## Compression of real BOLD", "", *real_table(options.real, CHUNKS, CODECS)]


def _variant_rows(
    options: argparse.Namespace, opened: Store, variant: Path, before: Reader, codec: Codec, chunk: int
) -> Iterator[list[str]]:
    limit = formats(options.folder, variant)[LIMIT].open()
    readers = {**{name: make(variant) for name, make in READERS.items()}, PT: before, LIMIT: limit}
    wanted = opened.read_bold(1, 3, options.frames)
    for name in READERS:
        if not np.array_equal(np.asarray(readers[name].read(1, 3, options.frames)), wanted):
            raise SwiftError(f"{name} reads other numbers from chunks of {chunk}, {codec}")
    cold = read_in_turn(readers, opened.runs, options.frames, options.clips, options.rounds, cold=True)
    fill(file for reader in readers.values() for run in range(len(opened)) for file in reader.files(run))
    warm = read_in_turn(readers, opened.runs, options.frames, options.clips, options.rounds, cold=False)
    share = size_of(variant / "bold")[0] / full_volume_bytes(opened)
    for name in READERS:
        rates = [f"{cold[name].rate:.1f}", f"{warm[name].rate:.1f}"]
        ratios = [ratio(cold[name].times(cold[PT])), ratio(warm[name].times(warm[PT]))]
        ratios += [ratio(cold[name].times(cold[LIMIT]), percent=True)]
        cpu = [f"{1000 * costs[name].cpu_per_clip:.1f}" for costs in (cold, warm)]
        yield [codec, str(chunk), f"{share:.3f}", name, *rates, *ratios, *cpu]


def main() -> None:
    """Make what is missing, measure, print."""
    options = _options()
    source = cohort(options.folder, options.subjects, options.run_frames, options.voxel)
    path = store(source, options.voxel)
    if options.trace:
        trace(options, path)
        return
    convert(path, older_formats(path))
    body = choice_page(options, path, source.seconds) if options.choice else formats_page(options, path, source.seconds)
    title = "Chunk, codec and reader of the store" if options.choice else "The store against the formats before it"
    write_page(page(title, PACKAGES, body), options.out)


def _options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--choice", action="store_true", help="compare chunks, codecs and readers instead of formats")
    made.add_argument("--rounds", type=int, default=5, help="rounds over all formats")
    made.add_argument("--clips", type=int, default=12, help="clips of a round")
    made.add_argument("--frames", type=int, default=20, help="frames of a clip")
    made.add_argument("--subjects", type=int, default=8, help="subjects of the cohort, one run each")
    made.add_argument("--run-frames", type=int, default=85, help="volumes of a run")
    made.add_argument("--voxel", type=float, default=2.0, help="voxel edge in mm")
    made.add_argument("--no-strace", action="store_true", help="do not count system calls")
    made.add_argument("--real", type=Path, nargs="*", default=[], help="further real 4-D NIfTI files to compress")
    made.add_argument("--trace", help=argparse.SUPPRESS)
    made.add_argument("--trace-mode", choices=("random", "first"), default="random", help=argparse.SUPPRESS)
    return made.parse_args()


if __name__ == "__main__":
    main()
