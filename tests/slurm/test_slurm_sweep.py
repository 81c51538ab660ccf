"""A sweep on a real Slurm: an array, an element that fails and one that waits for it, mended and queued again alone."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster

import swiftv2

pytestmark = pytest.mark.slow

ROOT = Path(swiftv2.__file__).parents[1]
CONFIG = """
run: {dir: unused}
data: {normalisation: {kind: per_voxel}, split: {fractions: [0.5, 0.5, 0.0]}}
clip: {frames: 8}
model:
  name: tiny
  image_size: [10, 18, 10]
  frames: 8
  embed_dim: 8
  depths: [2, 2]
  num_heads: [2, 4]
  patch_size: [2, 3, 2, 2]
mask: {patch_size: [2, 3, 2, 2]}
schedule: {warmup_steps: 2}
engine: {backend: plain, precision: fp32, device: cpu}
train: {max_steps: 3, global_batch: 2, save_every: 3, evaluate_every: 100, save_minutes: 0}
"""
ELEMENTS: list[dict[str, Any]] = [
    {"name": "low", "set": ["optimizer.lr=1e-4"]},
    {"name": "high", "set": ["optimizer.lr=1e-2"]},
    {"name": "broken", "set": ["model.image_size=[12, 18, 10]"]},
    {"name": "child", "set": ["run.seed=1"], "after": ["broken"]},
]
SWEEP: dict[str, Any] = {
    "config": "tiny.yaml",
    "folder": "runs/tiny",
    "elements": ELEMENTS,
    "nodes": 1,
    "tasks_per_node": 1,
    "time": "1:00:00",
}


class Sweeps:
    """`swiftv2 sweep` in a folder, on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def run(self, *words: str, check: bool = True) -> Any:
        """A command's JSON."""
        here = {"PYTHONPATH": str(ROOT), "SWIFTV2_PYTHON": sys.executable, "SWIFTV2_SITE": "local", "OMP_NUM_THREADS": "1"}
        here["SBATCH_GPUS_PER_NODE"] = "1"  # Several elements fit on a node then.
        done = self.cluster.run(
            sys.executable, "-m", "swiftv2", *words, "--json", env=here, folder=self.folder, seconds=60, check=check
        )
        return json.loads(done.stdout)

    def submit(self, *words: str) -> Any:
        return self.run("sweep", "submit", "tiny_sweep.yaml", *words)

    def status(self) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in self.run("sweep", "status", "tiny_sweep.yaml")["elements"]}

    def until(self, holds: Callable[[Mapping[str, Mapping[str, Any]]], bool], seconds: float) -> dict[str, dict[str, Any]]:
        """The first status of which something holds."""
        end = time.monotonic() + seconds
        while not holds(found := self.status()):
            assert time.monotonic() < end, [*found.values(), self.logs()]
            time.sleep(0.5)
        return found

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("runs/tiny/slurm-*.out")))


@pytest.fixture
def sweeps(cluster: Cluster, tmp_path: Path) -> Sweeps:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "tiny_sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return Sweeps(cluster, tmp_path)


def test_a_sweep_of_four_of_which_one_fails_and_is_queued_again_alone(sweeps: Sweeps, real_store: Path) -> None:
    # The words of a command go to all elements, so the store stands in the file, where one element has another.
    write(sweeps, common=[f"data.store={real_store}"])
    first, second = sweeps.submit()["arrays"]
    assert [(one["name"], one["index"]) for one in first["elements"]] == [("low", 0), ("high", 1), ("broken", 2)]
    assert second["after"] == {"broken": f"{first['job']}_2"}
    found = sweeps.status()
    assert {found[name]["state"] for name in ("low", "high", "broken")} <= {"pending", "running"}
    assert (found["child"]["state"], found["child"]["job"]) == ("waiting", f"{second['job']}_3")
    assert found["child"]["reason"] == f"for broken (job {first['job']}_2)"
    again = sweeps.submit()
    assert not again["arrays"]
    assert set(again["passed_over"]) == {"low", "high", "broken", "child"}

    found = sweeps.until(lambda all_: {one["state"] for one in all_.values()} <= {"finished", "failed"}, 150)
    assert {name: one["state"] for name, one in found.items()} == {
        "low": "finished",
        "high": "finished",
        "broken": "failed",
        "child": "failed",
    }
    assert "is not the grid of" in found["broken"]["reason"]
    assert found["child"]["reason"] == "broken, for which it waited, has failed"
    assert (found["low"]["step"], found["low"]["steps"]) == (3, 3)
    assert not (sweeps.folder / "runs" / "tiny" / "child").exists()

    write(sweeps, common=[f"data.store={real_store}"], broken=[])
    mended = sweeps.submit("--failed")
    assert mended["passed_over"] == {"low": "finished", "high": "finished"}
    third, fourth = mended["arrays"]
    assert [(one["name"], one["index"]) for one in third["elements"]] == [("broken", 2)]
    assert fourth["after"] == {"broken": f"{third['job']}_2"}
    found = sweeps.until(lambda all_: all(one["state"] == "finished" for one in all_.values()), 150)
    assert found["broken"]["job"] == f"{third['job']}_2"

    standing = {Path(one["run"]).name: one for one in sweeps.run("status", "runs/tiny")["runs"]}
    assert set(standing) == set(found)
    for one in standing.values():
        assert (one["state"], one["step"], one["attempts"]) == ("finished", 3, 1), "not run twice"
    rates = {}
    for name in found:
        settings = yaml.safe_load((sweeps.folder / "runs" / "tiny" / name / "config.yaml").read_text())
        rates[name] = settings["optimizer"]["lr"]
    assert (rates["low"], rates["high"]) == (1e-4, 1e-2)


def write(sweeps: Sweeps, common: list[str], broken: list[str] | None = None) -> None:
    tree = {**SWEEP, "common": common}
    if broken is not None:
        tree["elements"] = [{**one, "set": broken} if one["name"] == "broken" else one for one in ELEMENTS]
    (sweeps.folder / "tiny_sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
