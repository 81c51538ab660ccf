"""The verbs of `tune`: search for the best settings of a fine-tuning run."""

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.config.load import dump
from swiftv2.config.tune import load_study
from swiftv2.errors import UsageError
from swiftv2.terminal import add_command, add_json, answer, say, table, warn

if TYPE_CHECKING:
    from rich.table import Table

_STUDY = "YAML file of the study, or preset of configs/tune"
_WORDS = "words that change single settings of the study, such as trials=100; an unknown key is refused"


def add(verbs: Any) -> None:
    """The verbs of `tune`."""
    text = (
        "work on a study: take trials one after the other until it has all of them. Start it as often as there are nodes, at "
        "any time; one of the workers keeps the study. SIGTERM, SIGUSR1 or Ctrl-C end with status 75, with the trial's state "
        "saved: given again, it goes on. A greater `trials` lets a study grow."
    )
    examples = (
        "swiftv2 tune run study.yaml",
        "swiftv2 tune run last_blocks folder=studies/sex set='[task=hcp_sex, encoder.weights=weights]' --workers 4",
        "sbatch --array=0-7 slurm/tune.sh study.yaml trials=200",
    )
    parser = add_command(verbs, "run", _run, text, examples)
    parser.add_argument("study", help=_STUDY)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=_WORDS)
    parser.add_argument(
        "--worker", metavar="NAME", help="name of this worker; of host and process, or of the Slurm task, if unset"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="workers on this machine (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the study and the configuration of its trials, and stop")
    text = "tell how a study stands: its trials, the best of them, what failed and why."
    parser = add_command(verbs, "status", _status, text, ("swiftv2 tune status studies/sex",))
    parser.add_argument("folder", type=Path, help="folder of the study")
    add_json(parser)
    text = (
        "end a study: the best trial by the validation subjects is trained again with other seeds, and these predict the test "
        "subjects, once. Afterwards the study grows no more, and this command gives the stored result."
    )
    parser = add_command(verbs, "finish", _finish, text, ("swiftv2 tune finish study.yaml seeds=5",))
    parser.add_argument("study", help=_STUDY)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=_WORDS)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    config = load_study(arguments.study, tuple(arguments.overrides))
    if arguments.workers < 1:
        raise UsageError(f"--workers {arguments.workers}: give 1 or more")
    from swiftv2.tuning.crew import run_crew
    from swiftv2.tuning.folder import read_base
    from swiftv2.tuning.worker import Worker, default_name

    if arguments.dry_run:
        import yaml

        say(dump(config) + yaml.safe_dump({"base": read_base(config)}, sort_keys=False).rstrip("\n"))
        return 0
    if arguments.workers > 1:
        words = [arguments.study, *arguments.overrides]
        return run_crew(words, arguments.workers, config.ranks, arguments.worker or "local", warn)
    name = arguments.worker or default_name(os.environ)
    status = Worker(config, name, warn).run()
    if status == 0:
        say(f"{config.folder}: all trials are done; `swiftv2 tune finish` ends the study")
    return status


def _status(arguments: argparse.Namespace) -> int:
    from swiftv2.tuning.finish import read_status

    found = read_status(arguments.folder)
    trials = found["trials"]
    counts = {state: sum(row["state"] == state for row in trials) for state in ("complete", "pruned", "failed", "running")}
    complete = [row for row in trials if row["state"] == "complete"]
    best = min(complete, key=lambda row: (row["value"], row["number"]), default=None)
    width = shutil.get_terminal_size((160, 24)).columns
    rows = [
        [
            str(row["number"]),
            row["state"],
            _number(row["value"] if row["value"] is not None else row["lowest"]),
            "" if row["steps"] is None else str(row["steps"]),
            (row["reason"] or " ".join(f"{key}={_plain(value)}" for key, value in row["settings"].items()))[
                : max(width - 40, 40)
            ],
        ]
        for row in trials
    ]
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    lines: list[str | Table] = [
        f"{found['name']}: {len(trials)} trials, {told}\n",
        table(["trial", "state", "value", "step", "settings"], rows),
    ]
    if best is not None:
        lines.append(f"\nbest: trial {best['number']}, {_number(best['value'])} (of the validation subjects; lower is better)")
    values = {**found, "counts": counts, "best": best, "folder": str(arguments.folder)}
    answer(values, *lines, as_json=arguments.json)
    return 0


def _finish(arguments: argparse.Namespace) -> int:
    config = load_study(arguments.study, tuple(arguments.overrides))
    from swiftv2.tuning.finish import finish
    from swiftv2.tuning.folder import PAGE

    found = finish(config, warn)
    tried = found["tried"]
    rows = [
        [column, metric, _number(one["mean"]), _number(one["std"]), f"{_number(one['low'])} to {_number(one['high'])}"]
        for column, metrics in found["test"].items()
        for metric, one in metrics.items()
    ]
    answer(
        found,
        f"{found['name']}: {tried['configurations']} configurations were tried, {tried['pruned']} of them ended early and "
        f"{tried['failed']} failed; trial {found['best']['trial']} was the best on the validation subjects\n",
        table(["target", "metric", "test, mean over seeds", "deviation", "range"], rows, words=2),
        f"\nlook at {config.folder / PAGE}",
        as_json=arguments.json,
    )
    return 0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plain(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)
