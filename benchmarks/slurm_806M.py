"""The true 806M through its own launcher on a Slurm of this host: ZeRO-2 steps, a time limit, a requeue, and its end.

    python benchmarks/slurm_806M.py --folder FOLDER --out benchmarks/results/2026-11-22-slurm-806M.md

`slurm/pretrain_806M.sh` as it is, on one node with one rank and no GPU, on clips of 48^3 voxels and 4 frames of a generated
cohort. As root, with Slurm's Debian packages; takes some ten minutes, 20 GB of memory and 30 GB of disk.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from machine import ROOT, environment, page, parser, prose, table, write_page

from swiftv2.records import EVENTS, METRICS, read_lines, read_metrics

sys.path.insert(0, str(ROOT / "tests" / "slurm"))
from cluster import Cluster, remove

PACKAGES = ("torch", "deepspeed", "zarr")
STEPS = 3
ALL_IN_BF16 = (
    "engine.gradient_accumulation_dtype=bf16",
    "engine.optimizer_dtype=bf16",
    "train.save_in_background=false",
)
WORDS = (
    "model.image_size=[48, 48, 48]",
    "model.frames=4",
    "clip.frames=4",
    "data.split.fractions=[0.5, 0.5, 0.0]",
    "train.global_batch=1",
    f"train.max_steps={STEPS}",
    "train.evaluate_every=1000",
    "evaluate.max_clips=1",
    "train.deepspeed_files=false",
    "train.save_minutes=0",
    "faults.hang_seconds=900",
    *ALL_IN_BF16,
)
SALT = "5d41402abc4b2a76b9719d911017c592"


class Watched(NamedTuple):
    """What was seen of the job from outside."""

    peak_bytes: int
    """Resident memory of the rank at most."""
    free_bytes: int
    """Memory that the host had available at least meanwhile."""
    seconds: float


def make_store(folder: Path) -> Path:
    """A small generated cohort at 4 mm, as a store."""
    settings = yaml.safe_load((ROOT / "configs/synth/demo.yaml").read_text()) | {"subjects": 8, "frames": 40}
    (folder / "synth.yaml").write_text(yaml.safe_dump(settings))
    words = (
        ("synth", str(folder / "bids"), "--config", str(folder / "synth.yaml")),
        (
            "build",
            str(folder / "bids"),
            str(folder / "cohort.zarr"),
            "--cohort",
            "generated",
            "--salt",
            SALT,
            "grid.voxel_mm=4",
        ),
    )
    for one in words:
        subprocess.run([sys.executable, "-m", "swiftv2", "store", *one], env=environment(), check=True, stdout=sys.stderr)
    return folder / "cohort.zarr"


def run(cluster: Cluster, folder: Path, store: Path) -> Watched:
    """Queue the launcher, give its job an early end after the first step, and wait until it is done."""
    run_dir, began = folder / "run", time.monotonic()
    variables = {
        "SWIFTV2_ROOT": str(ROOT),
        "SWIFTV2_SITE": "local",
        "SWIFTV2_PYTHON": sys.executable,
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "SBATCH_CONSTRAINT": "",
    }
    options = ("--nodes=1", "--ntasks-per-node=1")
    job = cluster.submit(
        ROOT / "slurm/pretrain_806M.sh",
        *WORDS,
        f"data.store={store}",
        f"run.dir={run_dir}",
        env=variables,
        options=options,
        folder=folder,
    )
    seen, over = [0, 1 << 62], threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            for pid in cluster.processes(job):
                seen[0] = max(seen[0], _field(Path(f"/proc/{pid}/status"), "VmHWM"))
            seen[1] = min(seen[1], _field(Path("/proc/meminfo"), "MemAvailable"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    while not read_lines(run_dir / METRICS):
        time.sleep(2)
        if cluster.state(job) not in {"PENDING", "CONFIGURING", "RUNNING"}:
            raise SystemExit(cluster.report(job))
    cluster.end_in(job, 300)
    cluster.wait(job, "PENDING", 400, restarts=1)
    # The limit stays with the job, and is now shorter than the warning before it.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2-00:00:00")
    cluster.wait(job, "COMPLETED", 1500)
    over.set()
    watcher.join()
    return Watched(seen[0], seen[1], time.monotonic() - began)


def write(run_dir: Path, watched: Watched) -> list[str]:
    """The body of the page."""
    events, metrics = read_lines(run_dir / EVENTS), read_metrics(run_dir / METRICS)
    attempts = {row["step"]: row["attempt"] for row in metrics}
    saved = [row for row in events if row["event"] == "saved"]
    requeued = [row for row in events if row["event"] == "requeued"]
    stopped = [row for row in events if row["event"] == "stopped"]
    starts = [row for row in events if row["event"] == "start"]
    finished = any(row["event"] == "finished" for row in events)
    lines = prose(
        f"{len(starts)} starts of one job, {len(requeued)} requeue by its own script after "
        f"{', '.join(row['signal'] for row in stopped)}, {'finished' if finished else 'NOT FINISHED'} after "
        f"{watched.seconds / 60:.1f} minutes. The rank held {watched.peak_bytes / 1e9:.1f} GB at most (in the step, "
        f"where AdamW makes two copies of the largest group), the host had {watched.free_bytes / 1e9:.1f} GB left at least. "
        f"A checkpoint is {saved[0]['bytes'] / 1e9:.1f} GB."
    )
    lines += ["", "Settings besides the preset's and the small grid:", "", "```", *ALL_IN_BF16, "```", ""]
    rows = [
        (f"{row['step']}", f"{attempts[row['step']]}", f"{row['loss']:.4f}", f"{row['gradient_norm']:.3f}",
         f"{row['step_seconds']:.0f}")
        for row in metrics
    ]  # fmt: skip
    return lines + table(("step", "attempt", "loss", "gradient norm", "seconds a step, mean"), rows)


def _field(path: Path, name: str) -> int:
    """Bytes of a field of /proc in kB; 0 where the process is gone."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


def main(words: Sequence[str] | None = None) -> None:
    """Run it and write the page."""
    asked = parser(__doc__).parse_args(words)
    asked.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=asked.folder.resolve()))
    store = make_store(folder)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="swiftv2-806M-")) / "slurm")
    try:
        cluster.up()
        watched = run(cluster, folder, store)
    finally:
        remove(cluster)
    write_page(page("806M under Slurm", PACKAGES, write(folder / "run", watched)), asked.out)


if __name__ == "__main__":
    main()
