"""Stands where `swiftv2 finetune CONFIG` stands: leaves the same files, and stops and goes on by the same signals.

The value that it comes down to depends on the rate alone, and is lowest at 1e-3. A file `pace` beside the
study's folder says how many seconds a step takes.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import yaml

STEPS, EVERY = 10, 2


def main() -> int:
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    run, rate = Path(config["run"]["dir"]), float(config["optimizer"]["lr"])
    pace = run.parents[2] / "pace"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    state = run / "checkpoints" / "state"
    step = int(state.read_text()) if state.exists() else 0
    note(run / "events.jsonl", step=None, attempt=1, event="start", pid=os.getpid(), resumed=step)
    if config["optimizer"].get("weight_decay") == 0.25:
        note(run / "events.jsonl", step=step, attempt=1, event="failed", error="SwiftError", problem="the loss is not finite")
        return 1
    distance = abs(math.log10(rate) + 3.0)
    while step < STEPS:
        time.sleep(float(pace.read_text()) if pace.exists() else 0.0)
        step += 1
        note(run / "metrics.jsonl", step=step, attempt=1, loss=distance)
        if step % EVERY == 0:
            note(run / "metrics.jsonl", step=step, attempt=1, **{"val/select": distance + 1.0 / step})
        state.write_text(str(step))
        if stopped:
            note(run / "events.jsonl", step=step, attempt=1, event="stopped")
            return 75
    test = config["evaluate"]["test"]
    seed = config["run"].get("seed", 0)
    if test:
        note(run.parents[1] / "test_reads.jsonl", seed=seed)
    judged = {"n": 4, "metrics": {"auroc": {"value": 0.9 - 0.01 * seed, "low": 0.5, "high": 1.0}}}
    result = {
        "task": "pretended",
        "split": {"kind": "kfold", "index": 0, "count": 10, "seed": 0, "unit": "subject"},
        "subjects": {"train": 8, "val": 4, "test": 4},
        "targets": {"sex": {"kind": "classification", "val": judged, "test": judged if test else None}},
        "best_step": STEPS,
        "select": {"metric": "loss", "value": distance + 1.0 / STEPS},
        "seed": seed,
    }
    (run / "result.json").write_text(json.dumps(result))
    return 0


def note(path: Path, **values: object) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(values) + "\n")


sys.exit(main())
