"""The end of a search: the best configuration, with several seeds, predicts the test subjects, once."""

import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from optuna.trial import TrialState

from swiftv2.config.tune import TuneConfig
from swiftv2.engine.lease import Lease, last_attempt
from swiftv2.errors import InterruptedRunError, SwiftError, UsageError
from swiftv2.files import read_json, write_file
from swiftv2.tuning.child import RESULT, Child
from swiftv2.tuning.desk import write_status
from swiftv2.tuning.folder import MARKER, PAGE, STUDY, StudyFolder, finetune_config, settle, steps_of
from swiftv2.tuning.folder import RESULT as STUDY_RESULT
from swiftv2.tuning.keeper import Keeper
from swiftv2.tuning.page import draw, write_page
from swiftv2.tuning.space import words

_POLL_SECONDS = 0.5


def finish(config: TuneConfig, tell: Callable[[str], None], command: Sequence[str] | None = None) -> dict[str, Any]:
    """Choose the best trial by validation, repeat it with seeds of its own, and judge it on the test subjects.

    What is chosen is written down before a test subject is read, and stays chosen: a call that was broken off goes on with the
    seeds that lack, and one after the end gives the stored result.

    Args:
        config: the search.
        tell: told in one line what happens.
        command: words that start a run before its configuration; `swiftv2 finetune` when None.

    Returns:
        The content of `study.json`.

    Raises:
        UsageError: there is no such study, or trials are missing or still run.
        SwiftError: no trial came to its end, somebody works on the study, or a seed's run failed.
        InterruptedRunError: told to stop; the same command goes on.
    """
    if not (config.folder / STUDY).exists():
        raise UsageError(f"{config.folder} holds no study: `swiftv2 tune run` begins one")
    if (config.folder / STUDY_RESULT).exists():
        return read_json(config.folder / STUDY_RESULT)
    base = settle(config)
    folder = StudyFolder(config.folder)
    try:
        lease = Lease.acquire(folder.keeper, 1 + last_attempt(folder.keeper), stale_seconds=config.stale_seconds)
    except SwiftError as error:
        raise SwiftError(f"workers are still at the study: wait for their end ({error})") from error
    with lease, _keeper(config, base) as keeper:
        write_status(keeper)
        marker = _choose(config, keeper)
        runs = _repeat(config, folder, base, marker, tell, command)
        found = _conclude(config, keeper, marker, runs)
        figures = draw(keeper.study, config.folder / "figures")
    write_page(config.folder / PAGE, found, figures)
    # The result last, so that it stands for all of it.
    write_file(config.folder / STUDY_RESULT, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


@contextmanager
def _keeper(config: TuneConfig, base: dict[str, Any]) -> Iterator[Keeper]:
    keeper = Keeper(config, steps_of(base))
    try:
        yield keeper
    finally:
        keeper.close()


def _choose(config: TuneConfig, keeper: Keeper) -> dict[str, Any]:
    """What is to be repeated; written down once."""
    path = config.folder / MARKER
    if path.exists():
        return read_json(path)
    table = keeper.table()
    running = [row["number"] for row in table if row["state"] == "running"]
    if running:
        raise UsageError(
            f"{len(running)} of the trials are not at their end (the first is {running[0]}): `swiftv2 tune run` goes on"
        )
    if len(table) < config.trials:
        raise UsageError(
            f"the study has {len(table)} of {config.trials} trials: `swiftv2 tune run` makes the others; to end it with these, "
            f"say trials={len(table)}"
        )
    complete = [row for row in table if row["state"] == "complete"]
    if not complete:
        raise SwiftError(f"{config.folder}: no trial came to its end: look at what `swiftv2 tune status` says of them")
    best = min(complete, key=lambda row: (row["value"], row["number"]))
    seeds = list(range(1, config.seeds + 1))
    marker = {
        "trial": best["number"],
        "value": best["value"],
        "settings": best["settings"],
        "seeds": seeds,
        "time": time.time(),
    }
    write_file(path, json.dumps(marker, indent=1) + "\n")
    return marker


def _repeat(
    config: TuneConfig,
    folder: StudyFolder,
    base: dict[str, Any],
    marker: Mapping[str, Any],
    tell: Callable[[str], None],
    command: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Results of the chosen configuration with each seed; what has one is not run again."""
    first = int(base.get("run", {}).get("seed", 0))
    runs = []
    with _hearing() as told:
        for seed in marker["seeds"]:
            run = folder.seed(first + seed)
            if not (run / RESULT).exists():
                said = words({**marker["settings"], "run.dir": str(run), "run.seed": first + seed, "evaluate.test": True})
                tell(f"seed {first + seed} of trial {marker['trial']}")
                child = Child(
                    run, finetune_config(base, said, f"seed {seed}"), folder.logs / f"{run.name}.log", config.ranks, command
                )
                ended = child.follow(lambda child: child.tell_to_stop() if told else None, _POLL_SECONDS)
                if ended.state == "failed":
                    raise SwiftError(f"{run}: {ended.reason}; the same command tries again")
                if ended.state != "complete":
                    raise InterruptedRunError(f"{run}: {ended.reason}; the same command goes on, with the same configuration")
            runs.append({"seed": first + seed, "run": str(run.relative_to(config.folder)), **read_json(run / RESULT)})
    return runs


def _conclude(config: TuneConfig, keeper: Keeper, marker: Mapping[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    table = keeper.table()
    counts = {state: sum(row["state"] == state for row in table) for state in ("complete", "pruned", "failed")}
    importance, why = _importance(keeper.study, config.seed)
    return {
        "name": config.name,
        "folder": str(config.folder),
        "finished": time.time(),
        "tried": {"configurations": len(table), **counts},
        "sampler": config.sampler.kind,
        "pruner": config.pruner.kind,
        "best": {"trial": marker["trial"], "value": marker["value"], "settings": marker["settings"]},
        "task": runs[0]["task"],
        "split": runs[0]["split"],
        "subjects": runs[0]["subjects"],
        "select": {"metric": runs[0]["select"]["metric"], **_spread([one["select"]["value"] for one in runs])},
        "test": _over_seeds(runs, "test"),
        "val": _over_seeds(runs, "val"),
        "seeds": [{key: one[key] for key in ("seed", "run", "best_step", "select")} for one in runs],
        "importance": importance,
        "importance_unknown": why,
        "failed": [{"trial": row["number"], "reason": row["reason"]} for row in table if row["state"] == "failed"],
        "trials": table,
    }


def _over_seeds(runs: Sequence[Mapping[str, Any]], part: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By target and metric: mean, deviation and values over seeds."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for column, target in runs[0]["targets"].items():
        judged = [one["targets"][column][part] for one in runs]
        found[column] = {
            metric: _spread([one["metrics"][metric]["value"] for one in judged]) for metric in target[part]["metrics"]
        }
    return found


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "low": min(known, default=None),
        "high": max(known, default=None),
        "values": list(values),
    }


def _importance(study: optuna.Study, seed: int) -> tuple[dict[str, float] | None, str | None]:
    """Share of each setting in how much values differ between trials (fANOVA, Hutter et al. 2014), or why it is not known."""
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if len(complete) < 2 or len({trial.value for trial in complete}) < 2:
        return None, "fewer than two trials of different values came to their end"
    try:
        return optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=seed)
        ), None
    except (ValueError, RuntimeError) as error:
        return None, str(error).partition("\n")[0]


@contextmanager
def _hearing() -> Iterator[list[int]]:
    """Signals that came."""
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        told.append(number)

    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    former = [signal.signal(number, note) for number in heard]
    try:
        yield told
    finally:
        for number, handler in zip(heard, former, strict=True):
            signal.signal(number, handler)


def read_status(folder: Path) -> dict[str, Any]:
    """What the last keeper has left of a study.

    Raises:
        UsageError: there is no study, or it has no trial yet.
    """
    if not (folder / STUDY).exists():
        raise UsageError(f"{folder} holds no study: give the folder of a study that `swiftv2 tune run` has begun")
    path = StudyFolder(folder).path / "status.json"
    if not path.exists():
        raise UsageError(f"{folder}: the study has no trial yet")
    return read_json(path)
