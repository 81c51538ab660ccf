"""How fast the generated cohort is made, and what its temporal variance is made of.

    python benchmarks/synth.py --voxels 6 4 --out benchmarks/results/2026-11-22-synth.md

Speed is that of `swiftv2.data.synth.generate`, all files written; workers start and the ceilings are computed within the
time. Processor seconds tell the work where other programs take part of the cores. The split is computed from the generator's
own components on the grey matter of several subjects, each voxel's mean removed.
"""

import argparse
import platform
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from swiftv2.config.synth import SynthConfig
from swiftv2.data import keyed
from swiftv2.data.synth import generate
from swiftv2.data.synth.anatomy import Atlas, load_atlas
from swiftv2.data.synth.files import field_of_view
from swiftv2.data.synth.people import Person, draw_people
from swiftv2.data.synth.volumes import (
    FRAMES_AT_ONCE,
    SLOPE,
    SMOOTH_NOISE_SHARE,
    SOURCES,
    Array,
    components,
    make_anatomy,
    make_run,
    motion,
    noise,
    noise_level,
    shared_signal,
    spike,
)

PARTS = (*SOURCES, "motion", "smooth noise", "white noise")


def variances(config: SynthConfig, person: Person, atlas: Atlas) -> dict[str, float]:
    """Temporal variance of each part in grey matter (per cent squared), of the whole, and what else is known of the run."""
    lattice = field_of_view(atlas, config.voxel_mm)
    anatomy = make_anatomy(person, atlas, lattice, keyed.generator(config.seed, "anatomy", person.index))
    frames = config.run_frames(person.tr)
    grey = (anatomy.grey > 0.5)[anatomy.head]
    # The draws in the order in which a run makes them.
    rng = keyed.generator(config.seed, "benchmark", person.index)
    courses, maps = components(person, anatomy, frames, rng)
    level = noise_level(person, anatomy, shared_signal(courses, maps))
    smooth, white = noise(anatomy, frames, person.tr, rng)
    steps, spikes = motion(person, frames, rng)
    moved = np.zeros_like(smooth)
    static = anatomy.static[anatomy.head]
    for frame in np.flatnonzero(spikes):
        moved[frame] = 100 * spike(anatomy, steps[frame]) / static
    parts: dict[str, Array] = {name: shared_signal(courses[which], maps[which]) for name, which in SOURCES.items()}
    parts |= {"motion": moved}
    found = {name: _variance(part, grey) for name, part in parts.items()}
    found["smooth noise"] = level**2 * SMOOTH_NOISE_SHARE * _variance(smooth, grey)
    found["white noise"] = level**2 * (1 - SMOOTH_NOISE_SHARE) * _variance(white, grey)
    run = make_run(person, anatomy, frames, 0, keyed.generator(config.seed, "benchmark", person.index))
    values = run.stored[:, anatomy.head].astype(np.float32) * SLOPE
    found["whole"] = _variance(100 * values / static, grey)
    brain = values[:, anatomy.brain[anatomy.head]].astype(np.float64)
    found["static share"] = float(brain.mean(axis=0).var() / brain.var())
    found["temporal SNR"] = float(np.median(values[:, grey].mean(axis=0) / values[:, grey].std(axis=0)))
    return found


def _variance(part: Array, grey: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
    return float(part[:, grey].var(axis=0, dtype=np.float64).mean())


def split_table(config: SynthConfig, subjects: int) -> Iterator[str]:
    """Markdown lines: each part's share of the temporal variance, mean and range over subjects."""
    atlas = load_atlas(config.voxel_mm)
    runs = [variances(config, person, atlas) for person in draw_people(config, subjects)]
    yield "| part | share of the temporal variance | lowest and highest | deviation, % of the mean |"
    yield "|---|---|---|---|"
    for name in PARTS:
        shares = np.array([run[name] / run["whole"] for run in runs])
        deviation = np.sqrt(np.mean([run[name] for run in runs]))
        yield f"| {name} | {shares.mean():.3f} | {shares.min():.3f} to {shares.max():.3f} | {deviation:.2f} |"
    rest = np.array([1 - sum(run[name] for name in PARTS) / run["whole"] for run in runs])
    yield f"| chance correlations between parts, rounding | {rest.mean():.3f} | {rest.min():.3f} to {rest.max():.3f} | |"
    yield ""
    for name, what in (("static share", "Static share of all brain variance"), ("temporal SNR", "Temporal SNR, median voxel")):
        values = np.array([run[name] for run in runs])
        yield f"{what}: {values.mean():.3f} ({values.min():.3f} to {values.max():.3f})."


def speed_table(voxels: list[float], subjects: int, frames: int) -> Iterator[str]:
    """Markdown lines: volumes a second for each voxel size by one worker and by two."""
    yield "| voxel | grid of the files | workers | seconds | frames/s | processor seconds | frames per processor s | MB a run |"
    yield "|---|---|---|---|---|---|---|---|"
    for voxel_mm in voxels:
        config = SynthConfig(subjects=subjects, voxel_mm=voxel_mm, frames=frames, session_share=0.0)
        shape = "x".join(map(str, reversed(field_of_view(load_atlas(voxel_mm), voxel_mm).shape)))
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                begun = processor_seconds()
                report = generate(config, Path(folder) / "cohort", workers)
                busy = processor_seconds() - begun
                sizes = [path.stat().st_size for path in Path(folder).rglob("*_bold.nii.gz")]
            rate, size = report.frames / report.seconds, np.mean(sizes) / 1e6
            work = f"{report.seconds:.1f} | {rate:.1f} | {busy:.1f} | {report.frames / busy:.1f}"
            yield f"| {voxel_mm:g} mm | {shape} | {workers} | {work} | {size:.1f} |"


def processor_seconds() -> float:
    """Processor time of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", type=float, nargs="+", default=[6.0, 4.0], help="voxel edges in mm")
    parser.add_argument("--subjects", type=int, default=16, help="subjects of each cohort whose making is timed")
    parser.add_argument("--frames", type=int, default=120, help="volumes of a run")
    parser.add_argument("--split", type=float, default=4.0, help="voxel edge in mm of the runs whose variance is split")
    parser.add_argument("--split-subjects", type=int, default=12, help="runs whose variance is split")
    parser.add_argument("--out", type=Path, help="file to be written instead of the screen")
    arguments = parser.parse_args()
    split = SynthConfig(voxel_mm=arguments.split, frames=arguments.frames)
    lines = [
        f"## Speed ({arguments.subjects} subjects, {arguments.frames} frames each)",
        "",
        *speed_table(arguments.voxels, arguments.subjects, arguments.frames),
        "",
        (
            f"## What grey matter's temporal variance is made of ({arguments.split:g} mm, {arguments.split_subjects} subjects, "
            f"{arguments.frames} frames, TR 2 s)"
        ),
        "",
        *split_table(split, arguments.split_subjects),
        "",
        f"Python {platform.python_version()}, numpy {np.__version__}, blocks of {FRAMES_AT_ONCE} frames.",
    ]
    text = "\n".join(lines) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
