"""Commands on the checkpoints of a run."""

import argparse
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import SwiftError, UsageError
from swiftv2.terminal import Shown, add_command, add_json, answer, table

if TYPE_CHECKING:  # engine is imported where a command runs: --help does without.
    from swiftv2.engine.checkpoint import Checkpoint
    from swiftv2.engine.interval import Expected, Failures, Suggestion

FAILED = 1
DAY_HOURS = 24.0
RUN_DIR = "run directory of `swiftv2 pretrain`"


def add(verbs: Any) -> None:
    """The verbs of `checkpoint`."""
    text = "list the checkpoints of a run, oldest first: kind, size, age, what is wrong."
    parser = add_command(verbs, "list", _checkpoint_list, text, ["swiftv2 checkpoint list runs/first"])
    add_json(parser)
    parser.add_argument("run_dir", type=Path, help=RUN_DIR)
    text = "check size and hash of every file of every checkpoint. Exit status 1 where one is damaged."
    parser = add_command(verbs, "verify", _checkpoint_verify, text, ["swiftv2 checkpoint verify runs/first"])
    add_json(parser)
    parser.add_argument("run_dir", type=Path, help=RUN_DIR)
    text = "write weights and their card as safetensors + JSON, which load without DeepSpeed."
    example = "swiftv2 checkpoint export runs/first weights/first --step 1000"
    parser = add_command(verbs, "export", _checkpoint_export, text, [example])
    add_json(parser)
    parser.add_argument("run_dir", type=Path, help=RUN_DIR)
    parser.add_argument("folder", type=Path, help="folder to be made; it takes weights.safetensors and weights.json")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; the newest whole one by default")
    _add_suggest(verbs)
    _add_adopt(verbs)


def _add_suggest(verbs: Any) -> None:
    text = (
        "suggest how often to save, from what the run's saves have cost and how often failures are expected; without options "
        "as often as Llama 3 met them, by GPUs."
    )
    examples = (
        "swiftv2 checkpoint suggest runs/first",
        "swiftv2 checkpoint suggest runs/first --nodes 64 --node-mtbf-days 400",
    )
    parser = add_command(verbs, "suggest", _checkpoint_suggest, text, examples)
    add_json(parser)
    parser.add_argument("run_dir", type=Path, help=RUN_DIR)
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--failures-per-day", type=float, metavar="X", help="failures of the whole job in a day")
    rate.add_argument("--mtbf-hours", type=float, metavar="H", help="mean hours between failures of the whole job")
    rate.add_argument("--nodes", type=int, metavar="N", help="nodes of the job, with --node-mtbf-days")
    parser.add_argument("--node-mtbf-days", type=float, metavar="D", help="mean days between failures of one node")


def _add_adopt(verbs: Any) -> None:
    text = (
        "make a checkpoint of a run of one that plain DeepSpeed has written (ZeRO 0, 1 or 2, any number of ranks), from which "
        "`swiftv2 pretrain` goes on. Names and shapes are compared with the model when it does."
    )
    examples = (
        "swiftv2 checkpoint adopt elsewhere/global_step4000 runs/first --trust-pickles",
        "swiftv2 checkpoint adopt elsewhere runs/new --trust-pickles --config configs/pretrain/51M.yaml data.store=cohort.zarr",
    )
    parser = add_command(verbs, "adopt", _checkpoint_adopt, text, examples)
    add_json(parser)
    parser.add_argument("source", type=Path, help="folder of a DeepSpeed tag, or the one that holds `latest`")
    parser.add_argument("run_dir", type=Path, help=f"{RUN_DIR}, or, with --config, a new one")
    parser.add_argument(
        "overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="words that change single settings of --config"
    )
    trust = "read DeepSpeed's files, which are pickles; only classes of a short list are made, so that none runs code"
    parser.add_argument("--trust-pickles", action="store_true", help=trust)
    parser.add_argument("--config", type=Path, metavar="CONFIG", help="YAML file of the run, where RUN_DIR has no config.yaml")
    parser.add_argument("--step", type=int, metavar="N", help="step that it counts as; DeepSpeed's own count by default")


def _checkpoint_list(arguments: argparse.Namespace) -> int:
    found = _found(arguments.run_dir)
    rows, cells = [], []
    for c in found:
        size, written = _size(c), _written(c)
        row = {"step": c.step, "path": str(c.path), "problem": c.problem, "kind": c.kind, "bytes": size, "time": written}
        rows.append(row)
        age = "" if written is None else _duration(time.time() - written)
        cells.append([str(c.step), c.kind or "", c.problem or str(c.path), "" if size is None else _megabytes(size), age])
    shown = table(["step", "kind", "path", "size", "age"], cells, words=3)
    answer({"checkpoints": rows}, shown, as_json=arguments.json)
    return 0


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    from swiftv2.engine.checkpoint import verify_checkpoint

    found = _found(arguments.run_dir)
    rows, lines, total = [], [], 0
    with Shown("checkpoints") as shown:
        for done, checkpoint in enumerate(found, start=1):
            size, problem = None, None
            try:
                verify_checkpoint(checkpoint.path)
                size = _size(checkpoint) or 0
                total += size
            except SwiftError as error:
                problem = str(error)
            rows.append({"step": checkpoint.step, "problem": problem, "bytes": size})
            lines.append(f"step {checkpoint.step}: {problem or f'whole, {_megabytes(size or 0)} read'}")
            shown.update(done, len(found))
    damaged = any(row["problem"] for row in rows)
    answer({"ok": not damaged, "checkpoints": rows, "bytes": total}, *lines, as_json=arguments.json)
    return FAILED if damaged else 0


def _checkpoint_export(arguments: argparse.Namespace) -> int:
    from swiftv2.recipes.export import export_checkpoint
    from swiftv2.recipes.finetuned import export_finetuned, is_finetuning
    from swiftv2.recipes.modelcard import write_model_card

    if is_finetuning(arguments.run_dir):
        if arguments.step is not None:
            raise UsageError("--step is for pretraining: of a fine-tuning run the step that validation chose is exported")
        folder = export_finetuned(arguments.run_dir, arguments.folder)
    else:
        folder = export_checkpoint(arguments.run_dir, arguments.folder, arguments.step)
    write_model_card(folder, arguments.run_dir)
    files = "weights.safetensors, weights.json and MODEL_CARD.md"
    answer({"folder": str(folder)}, f"{folder}: {files}", as_json=arguments.json)
    return 0


def _checkpoint_suggest(arguments: argparse.Namespace) -> int:
    from swiftv2.engine.interval import suggest
    from swiftv2.records import read_lines

    failures = _failures(arguments)
    config = _run_config(arguments.run_dir)
    events, metrics = (read_lines(arguments.run_dir / f"{name}.jsonl") for name in ("events", "metrics"))
    try:
        made = suggest(events, metrics, config.train, failures)
    except SwiftError as error:
        raise SwiftError(f"{arguments.run_dir}: {error}") from error
    answer(_suggestion_values(made, config), *_suggestion_parts(made, config), as_json=arguments.json)
    return 0


def _checkpoint_adopt(arguments: argparse.Namespace) -> int:
    if not arguments.trust_pickles:
        raise UsageError(
            f"{arguments.source}: DeepSpeed's files are pickles, which can be made to run code: if you trust where they are "
            "from, say --trust-pickles"
        )
    config = _adopted_config(arguments)
    from swiftv2.engine.adopt import adopt

    made = adopt(arguments.source, arguments.run_dir, config, arguments.step)
    values = {**made._asdict(), "folder": str(made.folder)}
    text = (
        f"{made.folder}: step {made.step}, {made.samples} clips, {made.adam_steps} updates of Adam, saved by {made.world_size} "
        f"rank{'s' if made.world_size > 1 else ''}, {_megabytes(made.bytes)}"
    )
    answer(values, text, "`swiftv2 pretrain` with this run.dir goes on from it.", as_json=arguments.json)
    return 0


def _adopted_config(arguments: argparse.Namespace) -> PretrainConfig:
    """The configuration of the run that adopts.

    Raises:
        UsageError: there is none, or two that differ.
    """
    run_dir: Path = arguments.run_dir
    if arguments.config is None:
        if arguments.overrides:
            raise UsageError(f"{arguments.overrides[0]}: settings change those of --config, and there is none")
        return _run_config(run_dir)
    config = load(PretrainConfig, arguments.config, [*arguments.overrides, f"run.dir={run_dir}"])
    kept = run_dir / "config.yaml"
    if kept.exists() and load(PretrainConfig, kept) != config:
        raise UsageError(f"{kept} is there already and differs: leave out --config, or give another run directory")
    return config


def _run_config(run_dir: Path) -> PretrainConfig:
    path = run_dir / "config.yaml"
    if not path.exists():
        raise UsageError(f"{path} is missing: give a run directory of `swiftv2 pretrain`")
    return load(PretrainConfig, path)


def _found(run_dir: Path) -> "Sequence[Checkpoint]":
    """Checkpoints, the oldest first.

    Raises:
        SwiftError: there are none.
    """
    from swiftv2.engine.checkpoint import list_checkpoints

    found = list_checkpoints(run_dir)
    if not found:
        raise SwiftError(f"{run_dir}: no checkpoints there; give a run directory")
    return found[::-1]


def _size(checkpoint: "Checkpoint") -> int | None:
    """Bytes that the manifest lists; None where it is damaged."""
    from swiftv2.engine.manifest import read_manifest

    try:
        return sum(int(entry["size"]) for entry in read_manifest(checkpoint.path)["files"].values())
    except SwiftError:
        return None


def _written(checkpoint: "Checkpoint") -> float | None:
    """When the manifest was written, which is the last file; None where there is none."""
    from swiftv2.engine.manifest import MANIFEST

    path = checkpoint.path / MANIFEST
    return path.stat().st_mtime if path.exists() else None


def _failures(arguments: argparse.Namespace) -> "Failures | None":
    """How often failures are expected, where options say so.

    Raises:
        UsageError: a number is missing, or none above 0.
    """
    from swiftv2.engine.interval import Failures

    given = (arguments.failures_per_day, arguments.mtbf_hours, arguments.nodes, arguments.node_mtbf_days)
    if any(number is not None and not 0 < number < float("inf") for number in given):
        raise UsageError("how often failures come must be a number above 0")
    if (arguments.nodes is None) != (arguments.node_mtbf_days is None):
        raise UsageError("--nodes and --node-mtbf-days go together")
    day = timedelta(days=1).total_seconds()
    if arguments.failures_per_day is not None:
        return Failures(day / arguments.failures_per_day, "--failures-per-day")
    if arguments.mtbf_hours is not None:
        return Failures(day / DAY_HOURS * arguments.mtbf_hours, "--mtbf-hours")
    if arguments.nodes is not None:
        return Failures(day * arguments.node_mtbf_days / arguments.nodes, "--nodes and --node-mtbf-days")
    return None


def _suggestion_values(made: "Suggestion", config: PretrainConfig) -> dict[str, Any]:
    train = config.train
    return {
        "saves": made.saves,
        "blocking_seconds": made.costs.blocking,
        "save_seconds": made.costs.seconds,
        "permanent_blocking_seconds": made.costs.permanent,
        "bytes": made.bytes,
        "step_seconds": made.costs.step,
        "restart_seconds": made.costs.restart,
        "mtbf_seconds": made.failures.seconds,
        "mtbf_source": made.failures.source,
        "optimum_seconds": made.optimum,
        "configured": {"save_minutes": train.save_minutes, "save_every": train.save_every, **_expected(made.configured)},
        "suggested": {"save_minutes": made.save_minutes, **_expected(made.suggested)},
        "notes": made.notes,
    }


def _expected(expected: "Expected") -> dict[str, Any]:
    return {
        "interval_seconds": expected.interval,
        "blocking_share": expected.blocking,
        "failure_share": expected.failures,
        "lost_share": expected.share,
        "lost_mean_seconds": expected.lost_mean,
        "lost_most_seconds": expected.lost_most,
        "keeps_blocking": expected.keeps_blocking,
        "keeps_lost": expected.keeps_lost,
    }


def _suggestion_parts(made: "Suggestion", config: PretrainConfig) -> list[Any]:
    costs = made.costs
    titles = [
        "",
        "from save to save",
        "saves block",
        "failures cost",
        "lost in all",
        "a failure: mean",
        "at most",
        "1 %",
        "5 min",
    ]
    rows = []
    for name, one in (("configured", made.configured), ("suggested", made.suggested)):
        shares = [f"{share:.3%}" for share in (one.blocking, one.failures, one.share)]
        kept = ["yes" if holds else "NO" for holds in (one.keeps_blocking, one.keeps_lost)]
        rows.append([name, _duration(one.interval), *shares, _duration(one.lost_mean), _duration(one.lost_most), *kept])
    count = " and ".join(f"{number} {kind}" for kind, number in made.saves.items() if number)
    measured = (
        f"Measured on {count} saves: {costs.blocking:.3f} s blocking, {costs.seconds:.1f} s until it counts, "
        f"{_megabytes(made.bytes)}; a start takes {_duration(costs.restart)}, a step {costs.step:.2f} s."
    )
    expected = (
        f"A failure every {_duration(made.failures.seconds)} ({made.failures.source}); the least time is lost with a save "
        f"every {_duration(made.optimum)} (Young, Daly)."
    )
    return [
        measured,
        expected,
        table(titles, rows),
        *(f"Note: {note}." for note in made.notes),
        f"train.save_minutes={made.save_minutes:g}  (now {config.train.save_minutes:g})",
    ]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    """Seconds as people say them, such as `3.2 h`."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
