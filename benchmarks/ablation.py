"""What leaving background and hidden tokens out, and knowing places, do to what is learned, to time and to memory.

    python benchmarks/ablation.py --folder FOLDER --out benchmarks/results/2026-11-22-ablation.md

Trains every case on the generated cohort of `make pretrain`, from the same seeds for the same steps, and scores all of them
on the same held-out clips and masks; runs that are done are kept in the folder. Then times steps in turn in one process, and
weighs each case in a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from ablation_cases import BATCH, CASES, SIZES, WORDS, Setup, peak, ratios, run_folder, time_in_turn, training_words, weigh
from ablation_scores import BASELINES, PAIRS, Scores, score
from machine import ROOT, environment, page, parser, prose, run_children, table, write_page

from swiftv2.errors import SwiftError
from swiftv2.recipes.baselines import Estimate

PACKAGES = ("numpy", "torch")
SALT = "5d41402abc4b2a76b9719d911017c592"
"""That of `make pretrain`: the keys of generated subjects are no secret."""
LONG = 40
"""Frames of clips twice as long as those trained on."""
LASTING = ("decoupled", "decoupled, places")
"""Cases without tables of time."""
MEBI = 2**20


def make_cohort(folder: Path) -> None:
    """The cohort of `make pretrain`, unless it is there."""
    store, bids = folder / "cohort.zarr", folder / "bids"
    if store.is_dir():
        return
    program = [sys.executable, "-m", "swiftv2", "store"]
    run_children([*program, "synth", str(bids), "--config", str(ROOT / "configs" / "synth" / "demo.yaml")])
    run_children([*program, "build", str(bids), str(store), "--cohort", "generated", "--salt", SALT, "grid.voxel_mm=4"])


def train(folder: Path, wanted: Iterable[tuple[str, int]], steps: int, jobs: int) -> None:
    """Train cases and seeds, so many at a time with one thread each.

    Raises:
        SwiftError: a run failed; its last words are told.
    """

    def one(case: str, seed: int) -> None:
        if (run_folder(folder, case, seed) / "checkpoints" / f"step_{steps}").is_dir():
            return
        config = str(ROOT / "configs" / "pretrain" / "demo.yaml")
        words = [sys.executable, "-m", "swiftv2", "pretrain", config, *training_words(folder, case, seed, steps)]
        alone = environment() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=alone, cwd=ROOT)
        if done.returncode:
            raise SwiftError(f"training {case}, seed {seed}, failed: {' '.join(done.stderr.strip().splitlines()[-2:])}")

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(one, case, seed) for case, seed in wanted]:
            future.result()


def interval(value: Estimate | None) -> str:
    """A mean with its 95 % interval."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{value.mean:.4f} ({value.low:.4f} to {value.high:.4f})"


def learned(found: Mapping[int, Scores]) -> list[str]:
    """Tables of R2 and loss, and of paired differences."""
    some = next(iter(found.values())).scores
    seeds = list(found)
    rows = []
    for name in (*CASES, *BASELINES):
        cells = []
        for seed in seeds:
            here = found[seed].scores.methods.get(name)
            cells += ["", ""] if here is None else [interval(here.r2), f"{here.l2:.4f}"]
        rows.append([name, WORDS.get(name, "copying"), *cells])
    heads = ["case", "what it is", *(f"{what}, seed {seed}" for seed in seeds for what in ("R2 on the fluctuation", "loss"))]
    lines = prose(
        f"Held out: {some.subjects} subjects, {some.clips} clips, the same masks for all cases of a seed. R2 on the "
        "fluctuation of hidden brain voxels, mean over subjects with a 95 % bootstrap interval over subjects; loss: their "
        "mean squared error."
    )
    lines += [*table(heads, rows), ""]
    lines += prose(
        "Differences of R2, subject by subject. An interval that holds 0 shows no difference. It speaks of subjects, not "
        "of seeds: what another seed gives stands beside it."
    )
    pairs = []
    for first, second in PAIRS:
        gains = [found[s].differences.get((first, second)) for s in seeds]
        pairs.append([f"{first} less {second}", *("" if g is None else interval(g.r2_gain[second]) for g in gains)])
    return [*lines, *table(["pair", *(f"seed {seed}" for seed in seeds)], [pair for pair in pairs if any(pair[1:])]), ""]


def lasting(found: Scores) -> list[str]:
    """Table of clips longer than trained on."""
    names = (*LASTING, *BASELINES)
    rows = [[name, interval(found.scores.methods[name].r2), f"{found.scores.methods[name].l2:.4f}"] for name in names]
    lines = prose(
        f"Clips of {LONG} frames, which none of the models was trained on ({found.scores.clips} clips of the same held-out "
        "subjects; other clips than above, so only the lines of this table may be compared):"
    )
    return [*lines, *table(["case", "R2 on the fluctuation", "loss"], rows), ""]


def costs(size: str, rounds: int, threads: int) -> list[str]:
    """Table of time, memory, FLOPs and parameters at a size."""
    batch, cases = SIZES[size]
    setups = {case: Setup.make(case, size) for case in cases}
    seconds = time_in_turn(setups, rounds)
    rows = []
    for case, setup in setups.items():
        flops, (encoder, decoder) = setup.flops(), setup.parameters()
        share = ratios(seconds[case], seconds[cases[0]])
        rows.append(
            [
                case,
                f"{np.median(seconds[case]):.2f}",
                f"{share[0]:.2f} ({share[1]:.2f} to {share[2]:.2f})",
                f"{peak(case, size, threads) / MEBI:.0f}",
                f"{flops['encoder'] / 1e9:.2f} + {flops['decoder'] / 1e9:.2f}",
                f"{encoder / 1e6:.2f} + {decoder / 1e6:.2f}",
            ]
        )
    first = f"of {cases[0]}'s"
    heads = ["case", "s a step", f"time, {first}", "peak, MiB", "GFLOP forward, a clip", "parameters, millions"]
    heads[4:] = [f"{head} (encoder + decoder)" for head in heads[4:]]
    config = setups[cases[0]].config
    lines = prose(
        f"Model {size}: forward and backward of clips of {config.clip.frames} frames in the template brain, {batch} at a time, "
        f"mask ratio {config.mask.ratio:g}, float32, threads: {threads}. All cases in turn in one process, median of {rounds} "
        "rounds, ratios round by round (median, least to most). Peak: resident memory beyond model and batch, each case in a "
        "process of its own."
    )
    return [*lines, *table(heads, rows), ""]


def main() -> None:
    """Train, score, time, weigh, and write the page."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    options.add_argument("--second", nargs="*", default=["dense", "packed", "visible"], help="cases trained from seed 1 too")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    options.add_argument("--threads", type=int, default=1, help="threads of the timed process")
    options.add_argument("--train-only", action="store_true", help="train what is missing and stop")
    options.add_argument("--weigh", nargs=2, metavar=("CASE", "SIZE"), help="print the peak of one case, in this process")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.weigh:
        sys.stdout.write(f"{weigh(*chosen.weigh)}\n")
        return
    folder = chosen.folder.resolve()
    make_cohort(folder)
    seeds = {0: list(CASES), 1: [case for case in CASES if case in chosen.second]}
    train(folder, [(case, seed) for seed, cases in seeds.items() for case in cases], chosen.steps, chosen.jobs)
    if chosen.train_only:
        return
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    found = {seed: score(folder, seed, cases=cases) for seed, cases in seeds.items() if cases}
    intro = (
        f"Each case is trained alone for {chosen.steps} steps of {BATCH} clips of 20 frames on the cohort of `make pretrain` "
        "(generated, 48 subjects at 4 mm; configs/pretrain/demo.yaml, L2 loss, mask ratio 0.6, float32): about one "
        "pass over a small cohort of smooth generated signal. It compares settings there and says nothing of long "
        "training on real data."
    )
    body = ["## What is learned", *prose(intro), *learned(found)]
    body += ["## Longer clips", *lasting(score(folder, 0, LONG, LASTING))]
    body += ["## Time and memory"]
    for size in SIZES:
        body += costs(size, chosen.rounds, chosen.threads)
    write_page(page("Objectives, packing and positions: an ablation", PACKAGES, body), chosen.out)


if __name__ == "__main__":
    main()
