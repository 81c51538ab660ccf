"""The whole configuration of a pretraining run."""

from typing import Self

from pydantic import model_validator

from swiftv2.config.base import Config
from swiftv2.config.data import ClipConfig, DataConfig
from swiftv2.config.engine import EngineConfig, EvaluateConfig, FaultsConfig, RunConfig, ScheduleConfig, TrainConfig
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig, ObjectiveName, OptimizerConfig
from swiftv2.config.tracking import TrackingConfig


class PretrainConfig(Config):
    """Everything that a pretraining run is made from."""

    run: RunConfig
    """The run directory and the seed."""
    data: DataConfig
    """The store and how it is read."""
    clip: ClipConfig = ClipConfig()
    """How clips are cut from runs."""
    model: ModelConfig
    """The encoder and the decoder; in a file, the name of a preset of configs/model or a mapping with `preset:`."""
    objective: ObjectiveName = "simmim"
    """simmim: hidden patches become a mask token and all tokens are encoded; visible_only: visible tokens alone are
    encoded, and a light decoder puts mask tokens in place: another objective, with weights of its own kind."""
    mask: MaskConfig = MaskConfig()
    """What is hidden."""
    loss: LossConfig = LossConfig()
    """How the reconstruction is judged."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO, communication."""
    train: TrainConfig
    """Steps, batch, saves."""
    faults: FaultsConfig = FaultsConfig()
    """When a step is refused, a run rewound, a rank taken for hung."""
    tracking: TrackingConfig = TrackingConfig()
    """Who is told the numbers beside metrics.jsonl."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Held-out subjects."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        past = [step for step in self.train.keep_steps if step > self.train.max_steps]
        if past:
            raise ValueError(f"train.keep_steps: step {past[0]} is never reached with train.max_steps={self.train.max_steps}")
        if self.run.branch_step is not None and self.run.branch_step >= self.train.max_steps:
            raise ValueError(
                f"run.branch_step={self.run.branch_step} leaves nothing to do with train.max_steps={self.train.max_steps}"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        patch, cell = self.model.patch_size, self.mask.patch_size
        if any(c % p for c, p in zip(cell, patch, strict=True)):
            raise ValueError(f"mask.patch_size={cell} must be a multiple of model.patch_size={patch} on every axis")
        padded = tuple(-(-n // p) * p for n, p in zip((*self.model.image_size, self.clip.frames), patch, strict=True))
        if any(n % c for n, c in zip(padded, cell, strict=True)):
            raise ValueError(f"mask.patch_size={cell} must divide the padded clip {padded} on every axis")
        if self.objective == "visible_only" and self.model.variant == "swift_v1":
            raise ValueError("objective=visible_only leaves tokens out, and variant=swift_v1 attends to all: take another one")
        if self.data.normalisation.kind == "per_voxel" and self.data.normalisation.scope == "clip":
            raise ValueError(
                "data.normalisation: per_voxel with scope=clip tells the model the mean of each voxel's hidden frames; "
                "use scope=run"
            )
        if self.model.packing != "none" and self.loss.over == "everywhere":
            raise ValueError(
                f"loss.over=everywhere counts background, which model.packing={self.model.packing} leaves out: "
                "take loss.over=brain_voxels or brain_tokens"
            )
        if self.engine.compile and self.model.checkpoint_keep != "nothing":
            raise ValueError(
                f"engine.compile=true hides products and attention from model.checkpoint_keep={self.model.checkpoint_keep}: "
                "take checkpoint_keep=nothing or compile=false"
            )
        if self.clip.frames > self.model.frames and self.model.variant != "decoupled":
            raise ValueError(
                f"clip.frames={self.clip.frames} is longer than model.frames={self.model.frames}, "
                "for which the time tables are made: raise model.frames"
            )
        return self
