"""Configuration of a generated cohort."""

from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from swiftv2.config.base import Config

WINDOW_MM = 192
"""Edge in mm of the world window in which generated voxels lie."""


class SynthConfig(Config):
    """What is generated: size, sampling, structure and faults of the cohort."""

    subjects: int = Field(default=48, ge=8)
    """Subjects with good files."""
    voxel_mm: PositiveFloat = 4.0
    """Voxel edge in mm; it divides 192: 2 gives 96^3, 4 gives 48^3, 6 gives 32^3 grids."""
    frames: int = Field(default=120, ge=20)
    """Volumes of a run."""
    minutes: PositiveFloat | None = None
    """Length of a run in minutes, at every repetition time; instead of `frames`."""
    repetition_times: tuple[PositiveFloat, ...] = Field(default=(2.0,), min_length=1)
    """Seconds between volumes; the sites take them in turn, so there are at least as many sites."""
    sites: PositiveInt = 3
    """Scanning sites."""
    session_share: float = Field(default=0.15, ge=0.0, le=1.0)
    """Share of the subjects with two sessions."""
    sibling_share: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of the subjects who have a sibling in the cohort (one `family_id`, alike traits, same site)."""
    missing_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the labels that are missing (`n/a`)."""
    withdrawn_share: float = Field(default=0.03, ge=0.0, lt=1.0)
    """Share of the subjects listed in `withdrawn.txt`; their files are there."""
    las_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the subjects whose voxels are in LAS order; the others are RAS."""
    non_steady_frames: NonNegativeInt = 2
    """Most non-steady volumes at the start of a run; each run has between 0 and this many, marked in its confounds."""
    bad_files: NonNegativeInt = 0
    """Further subjects with a bad file each: in turn truncated, with NaN, constant, 3-D, without orientation codes."""
    other_voxel_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the subjects at `other_voxel_mm`, which a store takes only with resampling."""
    other_voxel_mm: PositiveFloat = 3.0
    """Voxel edge in mm of their files; it divides 192."""
    seed: NonNegativeInt = 0
    """Seed of every draw."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, size in (("voxel_mm", self.voxel_mm), ("other_voxel_mm", self.other_voxel_mm)):
            if WINDOW_MM % size or not 1 <= size <= 12:
                raise ValueError(f"{name}={size:g} must divide {WINDOW_MM} mm and lie between 1 and 12 mm")
        if len(self.repetition_times) > self.sites:
            raise ValueError(f"sites={self.sites} leave some of the {len(self.repetition_times)} repetition_times unused")
        if self.minutes is not None and min(self.run_frames(tr) for tr in self.repetition_times) < 20:
            raise ValueError(f"minutes={self.minutes:g} gives runs of fewer than 20 volumes; make it longer")
        return self

    def run_frames(self, repetition_time: float) -> int:
        """Volumes of a run at this repetition time (seconds)."""
        return self.frames if self.minutes is None else round(self.minutes * 60 / repetition_time)
