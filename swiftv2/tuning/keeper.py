"""The keeper of a study: hands trials out, takes their values, decides which end early; all by Optuna's ask and tell."""

import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from swiftv2.config.tune import TuneConfig
from swiftv2.errors import SwiftError
from swiftv2.records import Holder
from swiftv2.tuning.folder import DATABASE, StudyFolder
from swiftv2.tuning.space import draw, make_pruner, make_sampler, values_of

_ON_THE_WAY_SECONDS = 30.0
"""How long a trial that was handed out is nobody else's before its worker has claimed it."""
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class Task(NamedTuple):
    """What a worker is to do."""

    kind: str
    """trial, wait (others still run, and one of them may be lost) or done."""
    number: int = -1
    values: Mapping[str, Any] = MappingProxyType({})
    """Settings by dotted key."""


class Asker(NamedTuple):
    """Who asks."""

    worker: str
    holder: Holder
    """Its process, by which former starts of the same Slurm job are known for dead."""
    trials: int
    """Trials that it was told to make in all: a study that grows is asked by workers that know."""


class Keeper:
    """A study in its storage. Of a SQLite file there is one, in one process; of a server, one in each worker.

    Args:
        config: the search.
        max_steps: length of a trial.

    Raises:
        SwiftError: the storage cannot be reached or read.
    """

    def __init__(self, config: TuneConfig, max_steps: int) -> None:
        self.config = config
        self.folder = StudyFolder(config.folder)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Drawing all settings together is "experimental" since 2020.
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        url = storage_url(config)
        try:
            self.storage = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=study_name(config),
                direction="minimize",
                pruner=make_pruner(config.pruner, max_steps),
                load_if_exists=True,
            )
        except Exception as error:
            # Drivers of databases raise what they like, their absence among it; URLs may hold passwords.
            shown = "the study's database" if config.storage else str(config.folder / DATABASE)
            raise SwiftError(f"{shown} cannot be opened ({type(error).__name__}): {_first_line(error)}") from error
        self._on_the_way: dict[int, tuple[str, float]] = {}

    def close(self) -> None:
        """Give the storage's connections back."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.study.get_trials(deepcopy=False)

    def ask(self, asker: Asker) -> Task:
        """The next trial of a worker: one that was lost, its own first, else a new one.

        Raises:
            UsageError: a new one is wanted, and the end of the study was begun.
        """
        trials = self.trials()
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        for trial in sorted(running, key=lambda one: (one.user_attrs.get("worker") != asker.worker, one.number)):
            if self._is_free(trial, asker) and not self._is_given_up(trial):
                return self._hand_out(trial.number, asker)
        if len(trials) < asker.trials:
            self.folder.refuse_growth()
            return self._hand_out(self.study.ask().number, asker)
        still = any(trial.state == TrialState.RUNNING for trial in self.trials())
        return Task("wait" if still else "done")

    def report(self, number: int, rows: Sequence[tuple[int, float]]) -> bool:
        """Note values on validation subjects by step; whether the trial is to be ended early."""
        trial, before = self._trial(number), self._frozen(number)
        ended = "pruned_at" in before.user_attrs
        for step, value in rows:
            if step not in before.intermediate_values:
                trial.report(value, step)
            if not ended and trial.should_prune():
                trial.set_user_attr("pruned_at", step)
                ended = True
        return ended

    def tell(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        """Note how a trial has ended: complete, pruned or failed; or that it must be gone on with: lost."""
        trial = self._trial(number)
        if state == "lost":
            self._count_loss(number)
            return
        if reason is not None:
            trial.set_user_attr("reason", reason)
        if state == "complete" and (value is None or not math.isfinite(value)):
            raise SwiftError(f"trial {number} ended without a finite value")
        self.study.tell(number, value if state == "complete" else None, STATES[state], skip_if_finished=True)

    def table(self) -> list[dict[str, Any]]:
        """What is known of each trial, as plain values."""
        return [self._row(trial) for trial in self.trials()]

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        values = trial.intermediate_values
        state = next((name for name, one in STATES.items() if one == trial.state), "running")
        return {
            "number": trial.number,
            "state": state,
            "value": trial.value if trial.state == TrialState.COMPLETE else None,
            "steps": max(values, default=None),
            "lowest": min(values.values(), default=None),
            "settings": values_of(self.config, trial.params),
            "worker": trial.user_attrs.get("worker"),
            "losses": trial.user_attrs.get("losses", 0),
            "reason": trial.user_attrs.get("reason"),
        }

    def _is_free(self, trial: FrozenTrial, asker: Asker) -> bool:
        worker, since = self._on_the_way.get(trial.number, (asker.worker, 0.0))
        if worker != asker.worker and time.monotonic() - since < _ON_THE_WAY_SECONDS:
            return False
        return not self.folder.is_claimed(trial.number, asker.holder, self.config.stale_seconds)

    def _is_given_up(self, trial: FrozenTrial) -> bool:
        """Whether a trial that nobody runs was lost too often; one whose worker gave it back was not lost."""
        former = self.folder.last_claim(trial.number)
        counted = trial.user_attrs.get("counted")
        losses = trial.user_attrs.get("losses", 0)
        if former is not None and not former.released and counted != former.token:
            losses = self._count_loss(trial.number, former.token)
        if losses <= self.config.retries:
            return False
        self.tell(trial.number, "failed", None, f"it was lost {losses} times, with its worker or by itself: see its log")
        return True

    def _count_loss(self, number: int, token: str | None = None) -> int:
        trial = self._trial(number)
        losses = int(trial.user_attrs.get("losses", 0)) + 1
        trial.set_user_attr("losses", losses)
        if token is not None:
            trial.set_user_attr("counted", token)
        return losses

    def _hand_out(self, number: int, asker: Asker) -> Task:
        self.study.sampler = make_sampler(self.config, number)
        trial = self._trial(number)
        values = draw(trial, self.config)
        trial.set_user_attr("worker", asker.worker)
        self._on_the_way[number] = (asker.worker, time.monotonic())
        return Task("trial", number, values)

    def _trial(self, number: int) -> optuna.trial.Trial:
        return optuna.trial.Trial(self.study, self._frozen(number)._trial_id)  # noqa: SLF001 (Optuna names trials so alone)

    def _frozen(self, number: int) -> FrozenTrial:
        return self.trials()[number]


def storage_url(config: TuneConfig) -> str:
    """Where the study is kept; a variable of the environment that is not set is named.

    Raises:
        SwiftError: a variable in `storage` is not set.
    """
    if config.storage is None:
        return f"sqlite:///{(config.folder / DATABASE).absolute()}"
    url = os.path.expandvars(config.storage)
    if "$" in url:
        raise SwiftError(f"storage={config.storage}: one of its variables is not set in the environment: export it")
    return url


def study_name(config: TuneConfig) -> str:
    """Name of the study in its storage: on a server, that of its folder tells it from others of its name."""
    return config.name if config.storage is None else f"{config.name} {Path(config.folder).absolute()}"


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return "look at its URL" if "://" in text else text
