"""Building a store of at least 5 GB (half-precision full volumes): rate, memory, and what follows for 50,000 subjects.

    python benchmarks/build.py --folder FOLDER --out benchmarks/results/2026-11-22-build.md

The first call generates the cohort and the long runs (several minutes at 2 mm); later ones build the store only. Each build
is made of processes started for it; memory is each rank's own peak (VmHWM).
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from cohorts import Cohort, cohort, full_volume_bytes, read_json
from formats import size_of
from machine import child, cpu_seconds, memory, page, parser, prose, run_children, table, write_page

from swiftv2.config.data import GridConfig
from swiftv2.data.changes.build import build
from swiftv2.data.ranks import Alone, Communicator, MPICommunicator
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError
from swiftv2.files import write_file

SUBJECTS, FRAMES_OF_SUBJECT, RANKS = 50_000, 490, 128
"""The cohort that the arithmetic is for, and the ranks that build it."""
COPY_LEVEL = 1
"""How hard the long runs are compressed; reading them takes the same way whatever the level."""


@dataclass(frozen=True)
class Built:
    """A finished build, as its ranks report it."""

    store: Path
    ranks: list[dict[str, float]]

    @property
    def seconds(self) -> float:
        """The slowest rank's."""
        return max(rank["seconds"] for rank in self.ranks)

    @property
    def peak(self) -> float:
        """Bytes of the rank that held most."""
        return max(rank["peak"] for rank in self.ranks)


def build_in_processes(source: Path, store: Path, ranks: int, voxel_mm: float) -> Built:
    """Build a store by processes of its own, under mpiexec where there are several."""
    shutil.rmtree(store, ignore_errors=True)
    launcher = [] if ranks == 1 else [_mpiexec(), "-n", str(ranks)]
    with tempfile.TemporaryDirectory() as reports:
        words = ["--folder", str(source), "--build", str(store), "--reports", reports, "--voxel", f"{voxel_mm:g}"]
        run_children([*launcher, *child("build.py", *words, *(["--alone"] if ranks == 1 else []))])
        return Built(store, [read_json(Path(reports) / f"{rank}.json") for rank in range(ranks)])


def _mpiexec() -> str:
    """The launcher that belongs to this environment's MPI, else the first one on the path.

    Raises:
        SwiftError: there is none.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.is_file() else shutil.which("mpiexec")
    if found is None:
        raise SwiftError("there is no mpiexec: pip install mpich mpi4py, or load the machine's MPI")
    return found


def be_rank(options: argparse.Namespace) -> None:
    """Build as one of the ranks, and leave a report."""
    comm: Communicator = Alone() if options.alone else MPICommunicator()
    start = memory("VmHWM")
    busy, begun = cpu_seconds(), time.perf_counter()
    build(options.folder, options.build, GridConfig(voxel_mm=options.voxel), "generated", salt="0" * 32, comm=comm)
    report = {"seconds": time.perf_counter() - begun, "cpu": cpu_seconds() - busy, "start": start, "peak": memory("VmHWM")}
    write_file(options.reports / f"{comm.rank}.json", json.dumps(report).encode())


def rates(source: Cohort, folder: Path, voxel_mm: float) -> Iterator[str]:
    """Lines: builds of the whole cohort by one rank and by two."""
    read, _ = size_of(source.folder)
    rows, builds = [], {}
    for ranks in (1, 2):
        made = builds[ranks] = build_in_processes(source.folder, folder / f"built-by-{ranks}.zarr", ranks, voxel_mm)
        opened = Store.open(made.store)
        cpu = sum(rank["cpu"] for rank in made.ranks)
        peaks = " and ".join(f"{rank['peak'] / 2**20:.0f}" for rank in made.ranks)
        rows.append(
            [
                str(ranks),
                f"{made.seconds:.1f}",
                f"{len(opened) / made.seconds:.2f}",
                f"{source.frames / made.seconds:.0f}",
                f"{read / made.seconds / 1e6:.1f}",
                f"{1000 * cpu / source.frames:.1f}",
                peaks,
            ]
        )
    opened, alike = Store.open(builds[1].store), _same(builds[1].store, builds[2].store)
    size, files = size_of(builds[1].store)
    full = full_volume_bytes(opened)
    yield from prose(
        f"Cohort: {len(opened)} runs, {source.frames} frames of {'x'.join(map(str, opened.grid.shape))} voxels, "
        f"{full / 1e9:.2f} GB as half-precision full volumes, {read / 1e9:.2f} GB of NIfTI files. Generated in "
        f"{source.seconds:.0f} s by {source.workers} workers: {source.frames / source.seconds:.1f} frames/s."
    )
    heads = ["ranks", "seconds", "runs/s", "frames/s", "source MB/s", "CPU ms a frame", "peak MiB of each rank"]
    yield from table(heads, rows)
    bold = sum(1 for _ in (builds[1].store / "bold").rglob("c.*"))
    yield from prose(
        f"The store: {size / 1e6:.0f} MB, {size / full:.3f} of the full volumes; {bold} shards of BOLD, "
        f"{bold / len(opened):.2f} a run, and {files - bold} other files, whose number grows by "
        f"{len(_small(builds[1].store))} every {layout.ROWS_PER_SHARD} runs. The stores of one rank and of two are "
        f"{'equal byte for byte' if alike else 'NOT EQUAL'}. The time is that of `build` in its ranks; starting Python and "
        "MPI is not in it."
    )
    yield from ["", "## Memory against the length of a run"]
    line = yield from memory_table(source, folder, voxel_mm)
    yield from ["", f"## {SUBJECTS:,} subjects on {RANKS} ranks"]
    yield from arithmetic(opened, source.frames / builds[2].seconds / 2, size_of(builds[1].store / "bold")[0], line)


def memory_table(source: Cohort, folder: Path, voxel_mm: float) -> Generator[str, None, tuple[float, float]]:
    """Lines: peak memory of builds of one run each; returns the fitted line (bytes at length 0, bytes a byte)."""
    lengths = [max(20, source.frames // 30 * part) for part in (1, 6, 12)]
    rows, kept, peaks = [], [], []
    for length in lengths:
        made = build_in_processes(long_run(source, folder, length), folder / f"long-{length}.zarr", 1, voxel_mm)
        opened = Store.open(made.store)
        kept.append(float(length * len(opened.voxels) * np.dtype(opened.runs[0].dtype).itemsize))
        peaks.append(made.peak)
        source_bytes = float(length * math.prod(opened.runs[0].source_shape[:3]) * np.dtype(opened.runs[0].dtype).itemsize)
        start = made.ranks[0]["start"]
        rows.append([str(length), *(f"{number / 2**20:.0f}" for number in (source_bytes, kept[-1], start, made.peak))])
        shutil.rmtree(made.store)
    slope, base = np.polyfit(kept, peaks, 1)
    yield ""
    yield from table(["frames", "MiB of the file's voxels", "MiB of the kept voxels", "MiB before the build", "peak MiB"], rows)
    yield from prose(
        f"Fitted: peak = {base / 2**20:.0f} MiB + {slope:.2f} x bytes of the run's kept voxels. One run a rank at a time."
    )
    return float(base), float(slope)


def long_run(source: Cohort, folder: Path, length: int) -> Path:
    """A folder with one run of `length` volumes: those of the cohort's first run, again and again."""
    place = folder / f"run-of-{length}"
    if (place / "done").is_file():
        return place
    shutil.rmtree(place, ignore_errors=True)
    bold = next(path for path in sorted(source.folder.rglob("*_desc-preproc_bold.nii.gz")))
    target = place / bold.parent.relative_to(source.folder)
    target.mkdir(parents=True)
    for name in ("dataset_description.json", "synth.json"):
        if (source.folder / name).is_file():
            shutil.copy(source.folder / name, place / name)
    stem = bold.name.split("_space-")[0]
    for beside in bold.parent.glob(f"{stem}_space-*"):
        if beside != bold:
            shutil.copy(beside, target / beside.name)
    image: Any = nibabel.load(bold)
    volumes = np.asanyarray(image.dataobj.get_unscaled())
    header = image.header.copy()
    header.set_data_shape((*volumes.shape[:3], length))
    raw = header.copy()
    raw["scl_slope"], raw["scl_inter"] = image.dataobj.slope, image.dataobj.inter
    with nibabel.openers.Opener(str(target / bold.name), "wb", compresslevel=COPY_LEVEL) as file:
        raw.write_to(file)
        file.write(b"\0" * (int(image.dataobj.offset) - file.tell()))
        for frame in range(length):
            file.write(volumes[..., frame % volumes.shape[3]].tobytes(order="F"))
    write_file(place / "done", b"")
    return place


def arithmetic(opened: Store, rate: float, size: int, line: tuple[float, float]) -> Iterator[str]:
    """Lines: what the measured rates mean for a large cohort; nothing of it is measured."""
    frames = SUBJECTS * FRAMES_OF_SUBJECT
    each = size / sum(run.frames for run in opened.runs)
    kept = FRAMES_OF_SUBJECT * len(opened.voxels) * np.dtype(opened.runs[0].dtype).itemsize
    small = len(_small(opened.path))
    files = SUBJECTS + small * -(-SUBJECTS // layout.ROWS_PER_SHARD)
    yield from prose(
        f"Arithmetic from the above, for {SUBJECTS:,} subjects of {FRAMES_OF_SUBJECT} frames ({frames / 1e6:.1f} million "
        f"frames) on {RANKS} ranks that are as fast as one of the two ranks here ({rate:.1f} frames/s) and on a file system "
        "that keeps up:"
    )
    yield from table(
        ["what", "value"],
        [
            ["hours", f"{frames / rate / RANKS / 3600:.1f}"],
            ["TB of the store", f"{frames * each / 1e12:.2f}"],
            ["TB as half-precision full volumes", f"{frames * math.prod(opened.grid.shape) * 2 / 1e12:.1f}"],
            ["files", f"{files:,} ({files / SUBJECTS:.2f} a run)"],
            ["MB of a BOLD shard", f"{FRAMES_OF_SUBJECT * each / 1e6:.0f}"],
            ["peak MiB of a rank", f"{(line[0] + line[1] * kept) / 2**20:.0f}"],
            ["write rate of all ranks, GB/s", f"{rate * RANKS * each / 1e9:.2f}"],
        ],
    )


def _small(store: Path) -> list[Path]:
    """The arrays whose shards are shared by runs."""
    return [path for path in store.iterdir() if path.is_dir() and any(path.glob("c.*.*"))]


def _same(one: Path, other: Path) -> bool:
    names = [sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()) for store in (one, other)]
    return names[0] == names[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


def main() -> None:
    """Generate what is missing, build, print; or be one rank of a build."""
    options = _options()
    if options.build:
        be_rank(options)
        return
    source = cohort(options.folder, options.subjects, options.run_frames, options.voxel)
    body = rates(source, options.folder, options.voxel)
    write_page(page("Building a store", ("numpy", "zarr", "numcodecs", "nibabel", "mpi4py"), body), options.out)


def _options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--subjects", type=int, default=15, help="subjects of the cohort, one run each")
    made.add_argument("--run-frames", type=int, default=200, help="volumes of a run")
    made.add_argument("--voxel", type=float, default=2.0, help="voxel edge in mm")
    made.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--reports", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return made.parse_args()


if __name__ == "__main__":
    main()
