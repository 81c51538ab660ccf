"""Configuration of a downstream task: what is predicted, from which subjects, and who trains, validates and tests."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from swiftv2.config.base import Config
from swiftv2.config.data import ClipConfig, StoreConfig

TargetKind = Literal["classification", "regression"]
SplitKind = Literal["file", "seed", "kfold", "site", "few_shot"]
MetricName = Literal["loss", "accuracy", "balanced_accuracy", "auroc", "auprc", "f1", "mae", "mse", "r2", "pearson_r"]
LOWER_IS_BETTER = frozenset({"loss", "mae", "mse"})
"""Metrics of which the smallest value is the best."""


class TargetConfig(Config):
    """One label that is predicted."""

    column: str
    """Column of the store's label tables; with `events`, of the events."""
    kind: TargetKind
    """classification: the column's values are classes; regression: they are numbers."""
    classes: tuple[str, ...] | None = None
    """Classes in order (of two, the second is the positive one); others count as missing. All values, sorted, when unset."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """balanced: errors count by the inverse of how often their class comes among the training subjects."""
    threshold: Literal["validation", "half"] = "validation"
    """Probability from which on the positive of two classes is predicted: the one of the best balanced accuracy on the
    validation subjects, or one half."""
    scale: Literal["standard", "none"] = "standard"
    """Numbers are learned with the mean and deviation of the training subjects taken out; metrics are in the label's units."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.classes is not None and self.kind == "regression":
            raise ValueError(f"{self.column}: classes are for kind=classification")
        if self.classes is not None and (len(set(self.classes)) != len(self.classes) or len(self.classes) < 2):
            raise ValueError(f"{self.column}: classes={list(self.classes)} must be two or more, each once")
        return self


class EventsConfig(Config):
    """A task state at each time, from BIDS events.tsv files: every clip has a label of its own."""

    folder: Path
    """BIDS folder with `*_task-*_events.tsv` (onset and duration in seconds from the run's first volume)."""
    delay_seconds: NonNegativeFloat = 5.0
    """Haemodynamic delay: a volume at time t has the label of the event at t minus this."""
    purity: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of a clip's volumes that must have one label for the clip to have it; other clips are left out."""
    between: str | None = None
    """Label of volumes in no event, such as rest; clips of them are left out when unset."""


class TaskSplitConfig(Config):
    """Which subjects train, validate and test; nobody, and no family, is in two parts."""

    kind: SplitKind = "kfold"
    """file: three lists; seed: by chance with `fractions`; kfold: `count` folds of which one tests; site: whole sites test
    (all of them in turn with `count`, or `test_sites`); few_shot: `shots` train, as many or fewer validate, all others test."""
    unit: Literal["subject", "run"] = "subject"
    """What is divided. run: runs of the same subjects train and test, for decoding within subjects only, and said so in
    every report."""
    file: Path | None = None
    """Text file with the headers train, val and test, one subject a line (kind=file)."""
    seed: NonNegativeInt = 0
    """Seed of the draw."""
    count: PositiveInt = 10
    """Folds (kfold, site), or draws that differ (seed, few_shot)."""
    index: NonNegativeInt = 0
    """Which of them this run is about, from 0."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares for train, val and test (kind=seed)."""
    val_share: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of the subjects that do not test which validates (kfold, site)."""
    stratify: bool = True
    """Whether parts have alike shares of the first target's classes, or of its fifths where it is a number."""
    families: bool = True
    """Whether subjects with one value of `family_column` stay together."""
    family_column: str = "family_id"
    """Column that names families; subjects without a value stand alone."""
    site_column: str = "site"
    """Column that names sites (kind=site)."""
    test_sites: tuple[str, ...] | None = None
    """Sites that test, together (kind=site); when unset, fold `index` tests on the site of that number."""
    shots: PositiveInt = 100
    """Training subjects (kind=few_shot)."""
    val_shots: PositiveInt | None = None
    """Validation subjects (kind=few_shot), matched to the training subjects in classes; a quarter of `shots` when unset."""

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0 or abs(sum(value) - 1.0) > 1e-6:
            raise ValueError(f"fractions {value} must be above 0 and sum to 1")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "file") != (self.file is not None):
            raise ValueError("split: kind=file and file go together")
        if self.kind == "kfold" and self.count < 3:
            raise ValueError(f"split: {self.count} folds are too few: take 3 or more")
        if self.kind == "few_shot" and self.count < 10:
            raise ValueError(f"split: count={self.count} draws of few subjects tell little: take 10 or more")
        if self.index and self.kind == "file":
            raise ValueError("split: a file is one split; index is for the others")
        if self.index >= self.count and self.kind != "site":
            raise ValueError(f"split: index={self.index} is beyond count={self.count}; it begins at 0")
        return self


class TaskConfig(Config):
    """A downstream task: its store, what is predicted, from which clips, and the split."""

    name: str
    """Name for people and reports."""
    targets: tuple[TargetConfig, ...] = Field(min_length=1)
    """What is predicted; several share one model, and a subject may lack some."""
    data: StoreConfig
    """The store and how it is read."""
    sessions: tuple[str, ...] | None = None
    """Sessions (visits) whose runs are used; all when unset. Labels of subjects that differ between visits need one."""
    scan_tasks: tuple[str, ...] | None = None
    """Runs of these BIDS tasks are used, such as rest; all when unset."""
    clip: ClipConfig = ClipConfig()
    """How clips are cut from runs."""
    clips_per_run: PositiveInt | None = None
    """Clips of each run that are used at most, spread evenly over it; all when unset."""
    split: TaskSplitConfig = TaskSplitConfig()
    """Who trains, validates and tests."""
    covariates: tuple[str, ...] = ()
    """Columns (numbers, or names that become indicators; C(column) for numbers that stand for names) whose linear share is
    taken out of regression targets, and of the features of linear models, by coefficients fitted on the training subjects;
    `motion` is the mean framewise displacement."""
    events: EventsConfig | None = None
    """Labels of clips rather than of subjects. Statistics of the whole run are then forbidden: they hold the future."""
    select: MetricName = "loss"
    """Metric on validation subjects, the mean over targets, by which the best step, threshold and trial are chosen."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        columns = [target.column for target in self.targets]
        if len(set(columns)) != len(columns):
            raise ValueError(f"targets: a column comes twice in {columns}")
        kinds = {target.kind for target in self.targets}
        needs = {"mae": "regression", "mse": "regression", "r2": "regression", "pearson_r": "regression", "loss": None}
        needed = needs.get(self.select, "classification")
        if needed is not None and kinds != {needed}:
            raise ValueError(f"select={self.select} is for tasks whose targets are all of kind {needed}")
        if self.events is not None:
            self._check_events()
        return self

    def _check_events(self) -> None:
        if len(self.targets) != 1 or self.targets[0].kind != "classification":
            raise ValueError("events: a task state is one classification target: name the events' column in it")
        if self.data.normalisation.kind != "none" and self.data.normalisation.scope == "run":
            raise ValueError(
                "events: data.normalisation.scope=run uses statistics of the whole run, which hold volumes of other states "
                "and of the test: say scope=clip"
            )
        if self.covariates:
            raise ValueError("events: covariates are of subjects; a task state has none")
