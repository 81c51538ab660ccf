"""Configuration of the data: grid, clips, normalisation, splits, loading."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from swiftv2.config.base import Config


class GridConfig(Config):
    """The one fixed window in world coordinates to which a store brings every run."""

    kind: Literal["mni152", "source"] = "mni152"
    """mni152: a 192 mm cube that holds the whole MNI152 brain mask; source: the first run's own grid (say its space too)."""
    voxel_mm: PositiveFloat = 2.0
    """Voxel edge in mm (mni152 only), a divisor of 192: 2 gives 96^3, 4 gives 48^3, 6 gives 32^3."""
    orientation: Literal["RAS", "LAS"] = "RAS"
    """Order of the voxel axes in the store; LAS is what the published SwiFT v1 weights expect."""
    space: str | None = None
    """Template space of all runs, such as MNI152NLin2009cAsym; needed where neither file names nor side-cars tell."""
    resample: bool = False
    """Whether runs on another grid (voxel size or sub-voxel offset) are resampled (linear); refused otherwise."""
    mask: Literal["template", "box"] = "template"
    """Voxels kept: the template's brain mask (mni152 only), or every voxel of the box."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "source" and self.mask == "template":
            raise ValueError("grid.mask=template needs grid.kind=mni152; with grid.kind=source say grid.mask=box")
        return self


class ClipConfig(Config):
    """How clips are cut from runs (spec: starts at range(0, T - duration + 1, max(round(stride_between x duration), 1)))."""

    frames: PositiveInt = 20
    """Frames of a clip."""
    stride_within: PositiveInt = 1
    """Every how many frames of the run one is taken."""
    stride_between: PositiveFloat = 1.0
    """Distance between the starts of neighbouring clips, as a multiple of a clip's duration."""
    target_tr: PositiveFloat | None = None
    """Seconds between the frames of a clip before stride_within; runs of another TR are interpolated. Their own when unset."""
    seconds: PositiveFloat | None = None
    """Length of a clip in seconds, instead of `frames`; needs target_tr."""
    gaps: Literal["keep", "avoid", "between"] = "keep"
    """Censored volumes: keep (clips run across them), avoid (no clip holds one), between (clips are cut anew between them)."""
    displacement_mm: PositiveFloat | None = None
    """Framewise displacement above which a volume counts as censored, beside those that the confounds censor; needs gaps."""

    @model_validator(mode="before")
    @classmethod
    def _length(cls, tree: Any) -> Any:
        """Clips of so many seconds have so many frames."""
        if not isinstance(tree, dict) or tree.get("seconds") is None:
            return tree
        if tree.get("target_tr") is None:
            raise ValueError("clip.seconds needs clip.target_tr, the seconds between frames")
        try:
            step = float(tree["target_tr"]) * int(tree.get("stride_within", 1))
            frames = round(float(tree["seconds"]) / step)
        except (TypeError, ValueError, ZeroDivisionError):
            return tree  # The checks of the fields say what is wrong.
        if frames < 2:
            raise ValueError(f"clip.seconds={tree['seconds']} is shorter than two frames of {step:g} s")
        stated = tree.get("frames")
        if stated is not None and stated != frames:
            raise ValueError(
                f"clip.seconds={tree['seconds']} makes {frames} frames, clip.frames says {stated}: say clip.frames=null"
            )
        return {**tree, "frames": frames}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.displacement_mm is not None and self.gaps == "keep":
            raise ValueError("clip.displacement_mm censors volumes: say clip.gaps=avoid or clip.gaps=between")
        return self


class NormalisationConfig(Config):
    """How BOLD is scaled, on the device, when it is loaded."""

    kind: Literal["none", "minmax", "znorm_zeroback", "znorm_minback", "robust", "per_voxel"] = "znorm_minback"
    """none: source units; minmax; z-norm over brain voxels with background 0 or at the brain's minimum; robust; per voxel."""
    scope: Literal["run", "clip"] = "run"
    """Where the statistics come from: the whole run (kept in the store) or the clip itself."""


class SplitConfig(Config):
    """Which subjects train, validate and test; a subject is in one part only."""

    file: Path | None = None
    """A text file with the headers train, val and test, one subject id a line; when unset the seed decides."""
    seed: NonNegativeInt = 0
    """Seed of the random split."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares of subjects for train, val and test of the random split; they sum to 1."""
    train_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the training subjects that is used, chosen by the seed; smaller shares lie within larger ones, and validation
    and test are left alone."""
    families: bool = True
    """Whether the random split keeps subjects of one `family_id` together; reading it needs the store's file of ids."""

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) < 0 or abs(sum(value) - 1.0) > 1e-6:
            raise ValueError(f"fractions {value} must not be negative and must sum to 1")
        return value


class MixingConfig(Config):
    """How often the cohorts of a run come; an epoch has as many samples as the run has clips."""

    kind: Literal["proportional", "temperature", "weights"] = "proportional"
    """proportional to clips; to clips^(1/temperature); or as weights say."""
    temperature: float | None = Field(default=None, ge=1.0)
    """1 is proportional, a large one makes all cohorts come equally often (kind=temperature only)."""
    weights: dict[str, PositiveFloat] | None = None
    """Weight of each cohort of the run by name (kind=weights only)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind, value in (("weights", self.weights), ("temperature", self.temperature)):
            if (self.kind == kind) != (value is not None):
                raise ValueError(f"data.mixing: kind={kind} and {kind} go together")
        return self


class StoreConfig(Config):
    """The store that is read and how."""

    store: Path
    """Path of the Zarr store."""
    cohorts: tuple[str, ...] | None = None
    """Cohorts of the store to use; all when unset."""
    allow_mixed_tr: bool = False
    """Whether runs of different repetition times may meet as they are; refused otherwise (clip.target_tr makes them one)."""
    allow_cleaned: bool = False
    """Whether runs that were cleaned (voxel means about zero) may meet others, or be scaled by one mean over all voxels."""
    on_bad_clip: Literal["fail", "quarantine"] = "fail"
    """Clips that fail their checksum, are not finite or do not change: end the run, or are left out by all ranks together."""
    quarantine_limit: float = Field(default=0.01, ge=0.0, le=1.0)
    """Largest share of the training clips that may be left out so before the run ends."""
    patience_seconds: NonNegativeFloat = 150.0
    """Seconds that a rank waits for a store that cannot be reached before it ends; others wait for it meanwhile, so this is to
    be less than faults.hang_seconds."""
    normalisation: NormalisationConfig = NormalisationConfig()
    """Scaling of the BOLD signal."""
    threads: PositiveInt = 2
    """Threads of each rank that read and decode chunks."""
    prefetch: int = Field(default=2, ge=1, le=64)
    """Micro-batches that each rank reads ahead."""
    prefetch_mb: PositiveInt = 1024
    """Most megabytes that each rank reads ahead, whatever `prefetch` says; one micro-batch is always read."""


class DataConfig(StoreConfig):
    """The store that pretraining reads, and which of its subjects and clips."""

    frames_per_run: PositiveInt | None = None
    """Only so many first frames of each training run are used, as if scans were shorter; all when unset."""
    mixing: MixingConfig = MixingConfig()
    """How often each cohort comes."""
    exclude: Path | None = None
    """Clips left out from the beginning: an `exclusions.json` that another run on the same store has written."""
    split: SplitConfig = SplitConfig()
    """Subjects for training, validation and test."""
