"""What the launchers ask before and after the ranks: is all well to begin, and is the job to be started again."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.config.engine import split_batch
from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.load import find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.tune import load_study
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json
from swiftv2.records import EVENTS, read_lines
from swiftv2.terminal import add_command, say, warn

if TYPE_CHECKING:
    from swiftv2.cluster.requeue import Attempt, Verdict

MOST = 30
VERBS = ("pretrain", "finetune", "sweep", "tune", "embed", "store")
_AGAIN, _KILLED = 75, 128


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
    parser.add_argument("verb", help=f"what the launcher is for: {', '.join(VERBS)}")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="what it was given")
    text = (
        "say whether a Slurm job whose ranks have ended is to be requeued: status 75 where it is, with the hosts to leave out "
        "on standard output; the reason stands on standard error."
    )
    parser = add_command(verbs, "end", _end, text, ("swiftv2 job end pretrain runs/5M --status 75 --mark 400",))
    _add_most(parser)
    parser.add_argument("verb", help=f"what the launcher is for: {', '.join(VERBS)}")
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

    attempt, words = requeue.this_attempt(os.environ), arguments.words
    if arguments.verb == "store":
        target = _store(words)
        lines = [str(target), str(requeue.store_mark(target)), "store", *words]
    elif arguments.verb == "embed":
        target = _embeddings(words)
        lines = [str(target), str(_files(target)), "embed", *words]
    elif arguments.verb == "tune":
        target = _study(words)
        lines = [str(target), str(_saves(target)), "tune", "run", *words]
    else:
        run_dir, command = _checked_run(arguments.verb, words)
        mark = requeue.begin(run_dir, attempt, arguments.most)
        lines = [str(run_dir), str(mark), *command]
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
        judges = {"store": requeue.judge_store, "tune": _judge_study, "embed": _judge_embeddings}
        judge = judges.get(arguments.verb, requeue.judge_run)
        verdict = judge(target, attempt, arguments.status, arguments.mark, arguments.most)
    warn(f"{'requeued: ' if verdict.again else ''}{verdict.reason}")
    if verdict.exclude:
        say(",".join(verdict.exclude))
    return verdict.status


def _checked_run(verb: str, words: list[str]) -> tuple[Path, list[str]]:
    """Directory of a run and the words that start it; its configuration, and that it has a store, are checked."""
    config, words = _run(verb, words)
    resolved: PretrainConfig | FinetuneConfig
    if verb == "finetune":
        resolved = load(FinetuneConfig, config, words)
        key, store = "task.data.store", resolved.task.data.store
    else:
        resolved = load(PretrainConfig, config, words)
        key, store = "data.store", resolved.data.store
    ranks = os.environ.get("SLURM_NTASKS")
    if ranks is not None and ranks.isdigit():
        split_batch(resolved.train.global_batch, int(ranks), resolved.train.micro_batch)
    if not (store / "zarr.json").is_file():
        raise UsageError(f"{key}={store} is no store: build one with `sbatch slurm/store_build.sh`")
    return resolved.run.dir, ["finetune" if verb == "finetune" else "pretrain", str(config), *words]


def _run(verb: str, words: list[str]) -> tuple[Path, list[str]]:
    """Configuration and words of a run: as given, or of the element of a sweep that this job is."""
    if not words or "=" in words[0]:
        raise UsageError(f"{verb} needs a preset or a YAML file before the words that change it")
    if verb in {"pretrain", "finetune"}:
        return find_preset(verb, words[0]), words[1:]
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


def _embeddings(words: list[str]) -> Path:
    """Folder that `embed WEIGHTS SOURCE OUT ...` writes."""
    if len(words) < 3 or any(word.startswith("-") or "=" in word for word in words[:3]):
        raise UsageError("give weights, source and folder first: sbatch slurm/embed.sh WEIGHTS STORE OUT [OPTIONS]")
    return Path(words[2])


def _study(words: list[str]) -> Path:
    """Folder of the study that `tune run STUDY ...` works on."""
    if not words or "=" in words[0] or words[0].startswith("-"):
        raise UsageError("tune needs the file of a study, or a preset of configs/tune, before the words that change it")
    return load_study(words[0], tuple(word for word in words[1:] if "=" in word and not word.startswith("-"))).folder


def _judge_study(folder: Path, attempt: "Attempt", status: int, mark: int, most: int) -> "Verdict":
    """What is to be done with a job that was a worker of a study, whose other workers go on."""
    trials = read_json(folder / "status.json")["trials"] if (folder / "status.json").exists() else []
    if status == 0 and any(row["state"] == "running" for row in trials):
        status = _KILLED + 1  # What `srun` says where it has lost a node.
    return _judge(folder, attempt, status, _saves(folder) > mark, most)


def _judge_embeddings(folder: Path, attempt: "Attempt", status: int, mark: int, most: int) -> "Verdict":
    """What is to be done with a job that embeds."""
    if status == 0 and not (folder / "embeddings.json").exists():
        status = _KILLED + 1
    return _judge(folder, attempt, status, _files(folder) > mark, most)


def _judge(folder: Path, attempt: "Attempt", status: int, further: bool, most: int) -> "Verdict":
    from swiftv2.cluster.requeue import Verdict

    if status == 0:
        return Verdict(0, f"{folder} is done")
    if status != _AGAIN and status <= _KILLED:
        return Verdict(status, f"failed with status {status}; a person must look")
    if not further:
        return Verdict(1, f"not requeued after status {status}: nothing was saved in {folder} since the job began")
    if attempt.restart >= most:
        return Verdict(1, f"not requeued: it was {attempt.restart} times, as often as is allowed; given again, it goes on")
    return Verdict(_AGAIN, f"stopped with status {status}, with what was done saved")


def _saves(study: Path) -> int:
    """How far the trials of a study are: checkpoints that were made, those that are gone among them."""
    events = (read_lines(path) for path in (study / "trials").glob(f"trial_*/{EVENTS}"))
    return sum(row["event"] in {"saved", "judged"} for rows in events for row in rows)


def _files(folder: Path) -> int:
    """How far embeddings are: files that were finished."""
    return sum(path.is_file() and not path.name.startswith(".") for path in folder.rglob("*"))
