"""The folder of a study: where its parts lie, what was said when it began, and who works on which trial."""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

import yaml

from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.load import build, find_preset, load, override, read_yaml
from swiftv2.config.tune import TuneConfig
from swiftv2.engine.lease import is_alive
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import write_file
from swiftv2.records import LEASE, Holder, read_holder

STUDY, STATUS, MARKER, RESULT, PAGE = "study.yaml", "status.json", "finish.json", "study.json", "report.html"
DATABASE = "study.sqlite"
_FIXED = ("space", "sampler", "pruner", "seed", "storage")
"""What must not change once a study has begun: its trials could not be compared."""


class StudyFolder:
    """Names of a study's parts below its folder.

    Args:
        path: the folder; nothing is made yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keeper = path / "keeper"
        self.requests = path / "mail" / "requests"
        self.answers = path / "mail" / "answers"
        self.logs = path / "logs"

    def trial(self, number: int) -> Path:
        """Run directory of a trial; its configuration lies beside it, with .yaml."""
        return self.path / "trials" / f"trial_{number:04d}"

    def seed(self, number: int) -> Path:
        """Run directory of the best configuration with a seed of its own."""
        return self.path / "seeds" / f"seed_{number}"

    def claim(self, number: int) -> Path:
        """Folder of the lease that a worker holds while it runs a trial."""
        return self.path / "claims" / f"trial_{number:04d}"

    def make(self) -> None:
        """Make the folders.

        Raises:
            SwiftError: the folder holds other things, or cannot be written.
        """
        known = {"keeper", "mail", "logs", "trials", "claims", STUDY}
        if self.path.is_dir() and not (self.path / STUDY).exists():
            others = {one.name for one in self.path.iterdir() if not one.name.startswith(".")} - known
            if others:
                raise SwiftError(f"{self.path} is not empty and no study: give another folder")
        try:
            for folder in (self.keeper, self.requests, self.answers, self.logs, self.path / "trials", self.path / "claims"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SwiftError(f"folder={self.path} cannot be written ({error.strerror}): give another one") from error

    def refuse_growth(self) -> None:
        """Raise where the end of the study was begun.

        Raises:
            UsageError: its test subjects were, or are being, predicted.
        """
        if (self.path / MARKER).exists():
            raise UsageError(
                f"{self.path}: the test subjects of this study were predicted, so it grows no more: give a new folder"
            )

    def last_claim(self, number: int) -> Holder | None:
        """Who has worked, or works, on a trial; None where nobody has taken it yet."""
        return read_holder(self.claim(number) / LEASE)

    def is_claimed(self, number: int, asker: Holder, stale_seconds: float) -> bool:
        """Whether a living worker runs a trial, as far as `asker` can tell."""
        path = self.claim(number) / LEASE
        try:
            former = read_holder(path)
            age = 0.0 if former is None else self._now() - path.stat().st_mtime
        except (SwiftError, FileNotFoundError):
            return True  # It is being written: the next question finds it.
        return former is not None and is_alive(former, asker, age, stale_seconds)

    def _now(self) -> float:
        """The file system's clock, by which heartbeats are written."""
        clock = self.path / "claims" / f".clock.{os.getpid()}.{secrets.token_hex(4)}"
        clock.touch()
        try:
            return clock.stat().st_mtime
        finally:
            clock.unlink()


def settle(config: TuneConfig) -> dict[str, Any]:
    """The tree that all trials start from; what the study began with must be as it is now.

    The first worker writes `study.yaml`; presets and files that change later do not change trials in silence.

    Returns:
        The fine-tuning configuration, without defaults: what weights and tasks fill in stays theirs to say.

    Raises:
        UsageError: a configuration is wrong, or differs from what the study began with.
        SwiftError: the folder holds other things.
    """
    folder = StudyFolder(config.folder)
    base = read_base(config)
    folder.make()
    path = config.folder / STUDY
    dumped = config.model_dump(mode="json")
    text = yaml.safe_dump({**dumped, "base": base}, sort_keys=False)
    beside = path.with_name(f".{STUDY}.{secrets.token_hex(8)}")
    write_file(beside, text)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)  # A rename would overwrite that of a worker that was faster.
    finally:
        beside.unlink()
    former = read_yaml(path)
    for key, now in [*((key, dumped[key]) for key in _FIXED), ("base", base)]:
        if former.get(key) != now:
            told = f"fine-tuning configuration ({_difference(former.get(key), now)})" if key == "base" else key
            raise UsageError(
                f"{config.folder} began with another {told}: its trials could not be compared; give a new folder, or mend it"
            )
    return base


def read_base(config: TuneConfig) -> dict[str, Any]:
    """The fine-tuning configuration that trials start from, checked, without defaults.

    Raises:
        UsageError: it is wrong.
    """
    path = find_preset("finetune", config.finetune)
    words = [*config.set, f"run.dir={config.folder / 'trials'}", "evaluate.test=false"]
    return load(FinetuneConfig, path, words).model_dump(mode="json", exclude_unset=True)


def finetune_config(base: dict[str, Any], words: list[str], where: str) -> str:
    """A fine-tuning configuration as YAML: the base, changed by words.

    Raises:
        UsageError: these settings do not go together.
    """
    tree = yaml.safe_load(yaml.safe_dump(base))
    for word in words:
        override(tree, word)
    config = build(FinetuneConfig, tree, where, words)
    text: str = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    return text


def steps_of(base: dict[str, Any]) -> int:
    """Length of a trial in steps."""
    return build(FinetuneConfig, base, STUDY).train.max_steps


def _difference(former: Any, now: Any, prefix: str = "") -> str:
    """The first key that differs between two trees."""
    if not isinstance(former, dict) or not isinstance(now, dict):
        return prefix.rstrip(".") or "all of it"
    for key in dict.fromkeys([*former, *now]):
        if former.get(key) != now.get(key):
            return _difference(former.get(key), now.get(key), f"{prefix}{key}.")
    return prefix.rstrip(".")
