"""What the launchers ask before and after the ranks: is all well to begin, and is the job to be started again."""

import argparse
import os
from pathlib import Path
from typing import Any

from swiftv2.config.engine import split_batch
from swiftv2.config.load import find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import SwiftError, UsageError
from swiftv2.terminal import add_command, say, warn

MOST = 30
VERBS = ("pretrain", "sweep", "store")


def add(verbs: Any) -> None:
    """The verbs of `job`."""
    text = (
        "check what a Slurm job is to start, and print for slurm/body.sh, each on its line: the folder that it works on, how "
        "far that is, and the words that start it."
    )
    parser = add_command(
        verbs, "begin", _begin, text, ("swiftv2 job begin pretrain configs/pretrain/5M.yaml data.store=cohort.zarr",)
    )
    _add_most(parser)
    parser.add_argument("verb", help="what the launcher is for: pretrain, sweep or store")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="what it was given")
    text = (
        "say whether a Slurm job whose ranks have ended is to be requeued: status 75 where it is, with the hosts to leave out "
        "on standard output; the reason stands on standard error."
    )
    parser = add_command(verbs, "end", _end, text, ("swiftv2 job end pretrain runs/5M --status 75 --mark 400",))
    _add_most(parser)
    parser.add_argument("verb", help="what the launcher is for: pretrain, sweep or store")
    parser.add_argument("target", type=Path, help="the folder that `job begin` has printed")
    parser.add_argument("--status", type=int, required=True, help="of the ranks, as srun gives it")
    parser.add_argument("--mark", type=int, required=True, help="how far it was, as `job begin` has printed it")
    parser.add_argument("--doctor", type=Path, metavar="FILE", help="what `doctor --json` has printed, where that failed")


def _add_most(parser: argparse.ArgumentParser) -> None:
    text = f"starts after the first that a job may have; {MOST} by default"
    parser.add_argument("--most", type=int, default=MOST, metavar="N", help=text)


def _begin(arguments: argparse.Namespace) -> int:
    if arguments.verb not in VERBS:
        raise UsageError(f"this version of swiftv2 has no command {arguments.verb}: its launchers start {', '.join(VERBS)}")
    from swiftv2.cluster import requeue

    attempt = requeue.this_attempt(os.environ)
    if arguments.verb == "store":
        target = _store(arguments.words)
        lines = [str(target), str(requeue.store_mark(target)), "store", *arguments.words]
    else:
        config, words = _run(arguments.verb, arguments.words)
        resolved = load(PretrainConfig, config, words)
        ranks = os.environ.get("SLURM_NTASKS")
        if ranks is not None and ranks.isdigit():
            split_batch(resolved.train.global_batch, int(ranks), resolved.train.micro_batch)
        if not (resolved.data.store / "zarr.json").is_file():
            raise UsageError(f"data.store={resolved.data.store} is no store: build one with `sbatch slurm/store_build.sh`")
        run_dir = resolved.run.dir
        mark = requeue.begin(run_dir, attempt, arguments.most)
        lines = [str(run_dir), str(mark), "pretrain", str(config), *words]
    if any("\n" in line for line in lines):
        raise UsageError("a word holds a line break: write it without")
    say("\n".join(lines))
    return 0


def _end(arguments: argparse.Namespace) -> int:
    from swiftv2.cluster import requeue

    attempt, target = requeue.this_attempt(os.environ), arguments.target
    if arguments.doctor is not None:
        verdict = requeue.judge_checkup(target, attempt, arguments.status, arguments.doctor, arguments.most)
    else:
        judge = requeue.judge_store if arguments.verb == "store" else requeue.judge_run
        verdict = judge(target, attempt, arguments.status, arguments.mark, arguments.most)
    warn(f"{'requeued: ' if verdict.again else ''}{verdict.reason}")
    if verdict.exclude:
        say(",".join(verdict.exclude))
    return verdict.status


def _run(verb: str, words: list[str]) -> tuple[Path, list[str]]:
    """Configuration and words of a run: as given, or of the element of a sweep that this job is."""
    if not words or "=" in words[0]:
        raise UsageError(f"{verb} needs a preset or a YAML file before the words that change it")
    if verb == "pretrain":
        return find_preset("pretrain", words[0]), words[1:]
    from swiftv2.cluster.sweep import element
    from swiftv2.config.sweep import load_sweep

    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not index.isdigit():
        raise SwiftError("SLURM_ARRAY_TASK_ID is not set: a sweep is a job array; `swiftv2 sweep submit FILE` queues it")
    config, set_words = element(load_sweep(Path(words[0])), int(index), tuple(words[1:]))
    return config, list(set_words)


def _store(words: list[str]) -> Path:
    """Folder of the store that `build SOURCE STORE ...` or `append SOURCE STORE ...` works on."""
    if len(words) < 3 or words[0] not in {"build", "append"} or any(word.startswith("-") for word in words[:3]):
        raise UsageError("give source and store first: sbatch slurm/store_build.sh SOURCE STORE [--cohort NAME ...]")
    return Path(words[2])
