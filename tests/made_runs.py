"""Run directories written by hand: as long, as broken and as oddly named as tests need them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

BEGAN = 1_790_000_000.0
EVIL = '</script><script>document.title = "owned"</script><b>&"\''
PHASES = {"data": 0.02, "copy": 0.01, "forward": 0.1, "backward": 0.2, "communication": 0.03, "optimizer": 0.04, "other": 0.01}


def evaluation(
    model: float, baseline: float, *, half: float = 0.02, cohorts: tuple[str, ...] = ("one",), subjects: int = 15
) -> dict[str, Any]:
    """An evaluation: R2 of model and of the better baseline, each with intervals of so much on either side."""

    def around(mean: float) -> dict[str, float | None]:
        return (
            {"mean": mean, "low": mean - half, "high": mean + half}
            if subjects > 1
            else {"mean": mean, "low": None, "high": None}
        )

    methods = {
        "model": {"r2": around(model), "l1": 0.7, "l2": 0.8},
        "visible_mean": {"r2": around(baseline), "l1": 0.8, "l2": 1.0},
        "time_interpolation": {"r2": around(baseline - 0.3), "l1": 0.9, "l2": 1.3},
    }
    gains = {"visible_mean": around(model - baseline), "time_interpolation": around(model - baseline + 0.3)}
    group = {"subjects": subjects, "clips": 4 * subjects, "methods": methods, "r2_gain": gains, "l1_ratio": 0.8}
    return {"step": 100, "split": "val", "loss": 0.8, "loss_kind": "l2", "groups": dict.fromkeys(("all", *cohorts), group)}


def rows(steps: int, *, every: int = 100) -> list[dict[str, Any]]:
    """Metrics of so many steps with a falling, wavy loss, a peak at step 13, and an evaluation now and then."""
    found = []
    for step in range(1, steps + 1):
        loss = 9.0 if step == 13 else 0.8 + 0.4 * math.exp(-5 * step / steps) + 0.02 * math.sin(7.3 * step)
        row = {"step": step, "attempt": 1, "time": BEGAN + step, "loss": loss, "loss_ratio": loss / 1.1, "learning_rate": 1e-3}
        row |= {
            "gradient_norm": 0.2 + 0.1 * math.cos(3.1 * step),
            "skipped": False,
            "clips_per_second": 10.0,
            "data_wait": 0.05,
        }
        row |= {
            "step_seconds": sum(PHASES.values()),
            "mfu": 0.31,
            "tflops": 1.5,
            "memory/peak_gb": 3.2,
            "total/cpu_hours": step / 900,
        }
        row |= {f"seconds/{phase}": seconds for phase, seconds in PHASES.items()}
        if step % every == 0:
            row |= {"heldout/loss": loss + 0.05, "heldout/all/r2/model": 0.3, "heldout/all/r2/visible_mean": -0.1}
        found.append(row)
    return found


def write_run(path: Path, *, steps: int = 300, made: Mapping[str, Any] | None = None, **settings: Any) -> Path:
    """A run directory.

    Args:
        path: its folder.
        steps: that it has made.
        made: files by name, instead of those that are written: text, or values for JSON; None for none.
        settings: sections of its configuration, before the usual ones.
    """
    path.mkdir(parents=True)
    tree = {
        "run": {"dir": str(path), "seed": 0},
        "train": {"max_steps": steps, "evaluate_every": 100},
        "model": {"name": "tiny"},
    }
    events = [
        {
            "step": None,
            "attempt": 1,
            "time": BEGAN,
            "event": "start",
            "world_size": 2,
            "launcher": "torchrun",
            "host": "node-1",
        },
        {"step": 50, "attempt": 1, "time": BEGAN + 50, "event": "saved", "kind": "permanent", "bytes": 1e6, "seconds": 0.5},
    ]
    command = ["python", "-m", "swiftv2", "pretrain", "configs/pretrain/demo.yaml", f"run.dir={path}", "optimizer.lr=1e-3"]
    files: dict[str, Any] = {
        "config.yaml": yaml.safe_dump(tree | settings, sort_keys=False),
        "environment.json": {
            "swiftv2": "0.1.0",
            "host": "node-1",
            "world_size": 2,
            "device": "cpu",
            "command": command,
            "folder": "/home/ada/code",
        },
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows(steps)),
        "events.jsonl": "".join(json.dumps(row) + "\n" for row in events),
        "evaluation.json": evaluation(0.3, -0.1),
        "resume.sh": "#!/bin/sh\ncd /home/ada/code || exit 1\n"
        f"exec python -m swiftv2 pretrain configs/pretrain/demo.yaml run.dir={path}\n",
    }
    for name, content in {**files, **(made or {})}.items():
        if content is not None:
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path
