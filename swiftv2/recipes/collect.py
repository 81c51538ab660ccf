"""One tidy table of the finished runs of a ladder or a sweep: what a scaling law is fitted to."""

import csv
import hashlib
import io
import json
import math
import statistics
from collections import Counter as Count
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.sweep import SweepConfig
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json, write_file
from swiftv2.recipes.baselines import MODEL
from swiftv2.recipes.data import CONTRACT
from swiftv2.recipes.holdings import Counter, unfinished
from swiftv2.records import METRICS, read_metrics

CSV, JSON = "table.csv", "table.json"
_LAST_SHARE = 0.1
"""Part of the lines of metrics over which the training loss is averaged: that of one batch is noise."""


@dataclass(frozen=True)
class Row:
    """A finished run; losses are means over held-out clips of the mean error of masked brain voxels."""

    name: str
    size: str
    embed_dim: int
    parameters: int
    """Of the encoder."""
    decoder_parameters: int
    tokens: int
    """Of all patches, seen in training from its very beginning."""
    brain_tokens: int | None
    """Of patches that hold brain; None where the store is gone, as with unique_tokens."""
    unique_tokens: int | None
    """Of all patches, in the training split."""
    flops: int
    """Of training from its very beginning, forward and backward, encoder and decoder, stage by stage."""
    loss: float
    train_loss: float
    """As configured (loss.kind, loss.over), a mean over the last tenth of the steps."""
    baseline_loss: float
    """Of the best baseline: the mean of visible frames, interpolation in time, or (per-voxel scaling) the mean of the run."""
    lr: float
    parametrisation: str
    schedule: str
    """cosine, constant, or cooldown: a constant rate that falls at the end."""
    seed: int
    steps: int
    global_batch: int
    mask_ratio: float
    patch: str
    """Voxels and frames, such as 6x6x6x2."""
    data_fraction: float
    """Of the training subjects."""
    subjects: int
    """In training."""
    seconds: float
    """Steps times the median seconds of one; evaluation and saves are not counted."""
    node_hours: float


@dataclass(frozen=True)
class Table:
    """All rows, what is not among them, and what must be known before a law is fitted."""

    rows: tuple[Row, ...]
    left_out: Mapping[str, str]
    """Names of elements without a row, with the reason."""
    warnings: tuple[str, ...]


def collect(sweep: SweepConfig, trunks: Collection[str] = (), where: Mapping[str, str] | None = None) -> Table:
    """The table of a sweep's finished runs.

    Args:
        sweep: the sweep.
        trunks: elements that are there for their branches only.
        where: values of columns, as text, that rows must have (numbers however they are written); others are left out.

    Raises:
        UsageError: there is no such column.
        SwiftError: a file of a run directory is damaged.
    """
    wanted, columns = dict(where or {}), [field.name for field in fields(Row)]
    unknown = sorted(wanted.keys() - set(columns))
    if unknown:
        raise UsageError(f"--where {unknown[0]}: the table has no such column; it has {', '.join(columns)}")
    counter, rows, left_out = Counter(), [], {}
    tasks: dict[str, Mapping[str, Any]] = {}
    for name in sweep.names():
        run_dir = sweep.run_dir(name)
        why = "it is the trunk of others, without a cooldown" if name in trunks else unfinished(run_dir)
        if why is not None:
            left_out[name] = why
            continue
        config = load(PretrainConfig, run_dir / "config.yaml")
        row = _row(name, run_dir, config, counter, sweep.resources(name).nodes or 1)
        if isinstance(row, str):
            left_out[name] = row
            continue
        other = next((key for key in wanted if not _holds(getattr(row, key), wanted[key])), None)
        if other is not None:
            left_out[name] = f"its {other} is {getattr(row, other)}"
            continue
        rows.append(row)
        tasks[name] = _task(config, run_dir)
    warnings = _differences(tasks) + _mixed(rows)
    gone = [row.name for row in rows if row.unique_tokens is None]
    if gone:
        warnings.append(
            f"the store of {len(gone)} runs ({gone[0]}{', ...' * (len(gone) > 1)}) is not there: their brain_tokens and "
            "unique_tokens are left empty"
        )
    return Table(tuple(rows), left_out, tuple(warnings))


def write_table(table: Table, folder: Path, source: str) -> tuple[Path, Path]:
    """Write table.csv and table.json.

    Args:
        table: what is written.
        folder: is made where it is not there.
        source: the ladder or sweep that it is of.

    Returns:
        The two files.

    Raises:
        SwiftError: it has no row.
    """
    if not table.rows:
        name, why = next(iter(table.left_out.items()))
        raise SwiftError(f"{source}: no finished run to make a table of; {name} is left out: {why}")
    names = [field.name for field in fields(Row)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in table.rows)
    content = {
        "source": source,
        "columns": names,
        "rows": [asdict(row) for row in table.rows],
        "left_out": dict(table.left_out),
        "warnings": list(table.warnings),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CSV, text.getvalue())
    write_file(folder / JSON, json.dumps(content, indent=1) + "\n")
    return folder / CSV, folder / JSON


def _holds(value: Any, wanted: str) -> bool:
    """Whether a column's value is the one that was written."""
    if isinstance(value, int | float):
        try:
            return float(wanted) == float(value)
        except ValueError:
            return False
    return str(value) == wanted


def _row(name: str, run_dir: Path, config: PretrainConfig, counter: Counter, nodes: int) -> Row | str:
    """A run's row, or why it has none."""
    metrics = read_metrics(run_dir / METRICS)
    steps = config.train.max_steps
    last: Mapping[str, Any] = next((row for row in reversed(metrics) if row["step"] == steps), {})
    # The configured distance, except that Huber's and the like are judged in L1 as the baselines are.
    kind = "l2" if config.loss.kind == "l2" else "l1"
    scores = {key.rpartition("/")[2]: value for key, value in last.items() if key.startswith(f"heldout/all/{kind}/")}
    loss = scores.pop(MODEL, None)
    trained = [row["loss"] for row in metrics if row.get("loss") is not None and row["step"] > (1 - _LAST_SHARE) * steps]
    if loss is None or not math.isfinite(loss) or not scores or not trained:
        return f"it has no held-out loss at its last step, {steps}: was it trained to its end?"
    held, there = counter.hold(config), config.data.store.is_dir()
    read = counter.read(config, run_dir) if there else None
    clips = steps * config.train.global_batch
    seconds = steps * statistics.median(row["step_seconds"] for row in metrics if row.get("step_seconds"))
    schedule = config.schedule
    return Row(
        name=name,
        size=config.model.name,
        embed_dim=config.model.embed_dim,
        parameters=held.parameters,
        decoder_parameters=held.decoder_parameters,
        tokens=clips * held.tokens_per_clip,
        brain_tokens=None if held.brain_tokens_per_clip is None else clips * held.brain_tokens_per_clip,
        unique_tokens=None if read is None else read.unique_tokens,
        flops=clips * held.training_flops,
        loss=loss,
        train_loss=statistics.fmean(trained),
        baseline_loss=min(scores.values()),
        lr=config.optimizer.lr,
        parametrisation=config.model.parametrisation,
        schedule="cooldown" if schedule.kind == "constant" and schedule.cooldown_steps else schedule.kind,
        seed=config.run.seed,
        steps=steps,
        global_batch=config.train.global_batch,
        mask_ratio=config.mask.ratio,
        patch="x".join(map(str, config.model.patch_size)),
        data_fraction=config.data.split.train_share,
        subjects=len(read_json(run_dir / CONTRACT)["splits"]["train"]),
        seconds=seconds,
        node_hours=seconds / 3600 * nodes,
    )


def _task(config: PretrainConfig, run_dir: Path) -> dict[str, Any]:
    """What must be equal for held-out losses to be compared, by key."""
    contract = read_json(run_dir / CONTRACT)
    subjects = "\n".join(contract["splits"][config.evaluate.split])
    task = {f"mask.{key}": value for key, value in config.mask.model_dump(mode="json").items()}
    task |= {f"clip.{key}": value for key, value in config.clip.model_dump(mode="json").items()}
    return task | {
        "model.patch_size": list(config.model.patch_size),
        "data.normalisation": config.data.normalisation.model_dump(mode="json"),
        "the distance": "l2" if config.loss.kind == "l2" else "l1",
        "evaluate.max_clips": config.evaluate.max_clips,
        "the store": contract["store"]["id"],
        "held-out subjects": hashlib.sha256(subjects.encode()).hexdigest()[:8],
    }


def _differences(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each key in which runs were validated differently."""
    found = []
    for key in next(iter(tasks.values()), {}):
        counts = Count(json.dumps(task[key]) for task in tasks.values())
        if len(counts) > 1:
            told = ", ".join(f"{value} ({count} rows)" for value, count in counts.most_common())
            found.append(f"rows differ in {key}: {told}; losses of different tasks cannot be fitted together")
    return found


def _mixed(rows: Sequence[Row]) -> list[str]:
    """One line for each way of training in which rows differ, where each is a law of its own."""
    found = []
    for column in ("parametrisation", "schedule"):
        values = sorted({str(getattr(row, column)) for row in rows})
        if len(values) > 1:
            found.append(
                f"rows differ in {column}: {', '.join(values)}; fit each by itself (sweep collect --where {column}={values[0]})"
            )
    return found
