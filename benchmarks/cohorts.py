"""Generated cohorts and stores of them, made once and kept between benchmarks."""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftv2.config.data import GridConfig
from swiftv2.config.synth import SynthConfig
from swiftv2.data.changes import build as build_module
from swiftv2.data.changes import plan as plan_build
from swiftv2.data.changes.build import build
from swiftv2.data.ingest import run as ingest
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Store
from swiftv2.data.synth import generate
from swiftv2.files import write_file

CODE = (build_module, ingest, layout, plan_build)
"""Modules on which a cached store depends."""
HALF = 2
"""Bytes of a half-precision number: what the full volumes of the older formats are made of."""


@dataclass(frozen=True)
class Cohort:
    """A generated cohort on disk, and what making it cost."""

    folder: Path
    frames: int
    seconds: float
    workers: int


def cohort(folder: Path, subjects: int, frames: int, voxel_mm: float, workers: int | None = None) -> Cohort:
    """Generate a cohort of one run a subject under `folder`, or find the one that was generated there with these settings."""
    config = SynthConfig(subjects=subjects, voxel_mm=voxel_mm, frames=frames, session_share=0.0, withdrawn_share=0.0)
    place = folder / f"cohort-{subjects}x{frames}-{voxel_mm:g}mm"
    record = place.with_suffix(".json")
    if not record.is_file():
        used = workers or os.cpu_count() or 1
        report = generate(config, place, used)
        found = {"frames": report.frames, "seconds": report.seconds, "workers": used, "config": config.model_dump(mode="json")}
        write_file(record, json.dumps(found).encode())
    found = json.loads(record.read_text(encoding="utf-8"))
    return Cohort(place, found["frames"], found["seconds"], found["workers"])


def store(source: Cohort, voxel_mm: float) -> Path:
    """Build the store of a cohort beside it with the default layout, or find it there; other code makes another one."""
    code = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in CODE)).hexdigest()[:8]
    path = source.folder.with_name(f"{source.folder.name}-{code}.zarr")
    build(source.folder, path, GridConfig(voxel_mm=voxel_mm), "generated", salt="0" * 32)
    return path


def full_volume_bytes(opened: Store) -> int:
    """Bytes of all frames of a store as half-precision full volumes, without any header."""
    return sum(run.frames for run in opened.runs) * math.prod(opened.grid.shape) * HALF


def index_path(store_path: Path) -> Path:
    """The file that lists a store's runs."""
    attributes = read_json(store_path / "zarr.json")["attributes"]["swiftv2"]
    return store_path / str(attributes.get("index", "runs.jsonl"))


def rewrite_index(store_path: Path, lines: list[dict[str, Any]]) -> None:
    """Give a copy of a store other runs: its index file, and what the store's attributes say of it."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    write_file(index_path(store_path), data)
    group = read_json(store_path / "zarr.json")
    attributes = group["attributes"]["swiftv2"]
    changed = {"runs": len(lines), "runs_sha256": hashlib.sha256(data).hexdigest()}
    attributes |= changed
    if attributes.get("history"):
        attributes["history"][-1] |= changed
    write_file(store_path / "zarr.json", json.dumps(group).encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
