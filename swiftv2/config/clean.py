"""Configuration of the cleaning that a build may do."""

from typing import Literal, Self

from pydantic import PositiveFloat, model_validator

from swiftv2.config.base import Config


class CleanConfig(Config):
    """How each voxel's time course is cleaned while a store is built (nilearn.signal.clean); nothing is cleaned by default."""

    strategy: Literal["none", "simple", "compcor"] = "none"
    """Confounds that are regressed out, by the names of nilearn's load_confounds_strategy; none: no confounds."""
    detrend: bool = False
    """Whether each voxel's linear trend is removed."""
    high_pass_hz: PositiveFloat | None = None
    """Frequencies below are removed; none when unset."""
    low_pass_hz: PositiveFloat | None = None
    """Frequencies above are removed; none when unset."""
    keep_mean: bool = True
    """Whether each voxel's mean is put back, so that images keep their contrast and z-norms their meaning."""

    @property
    def active(self) -> bool:
        """Whether anything is cleaned."""
        return self.strategy != "none" or self.detrend or self.high_pass_hz is not None or self.low_pass_hz is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high_pass_hz and self.low_pass_hz and self.high_pass_hz >= self.low_pass_hz:
            raise ValueError(f"clean.high_pass_hz={self.high_pass_hz:g} must lie below clean.low_pass_hz={self.low_pass_hz:g}")
        return self
