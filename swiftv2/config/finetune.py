"""The whole configuration of a fine-tuning run."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from swiftv2.config.base import Config
from swiftv2.config.engine import EngineConfig, FaultsConfig, ScheduleConfig, TrainConfig
from swiftv2.config.model import ModelConfig, OptimizerConfig
from swiftv2.config.task import TaskConfig
from swiftv2.config.tracking import TrackingConfig

RegimeName = Literal["scratch", "full", "last_blocks", "frozen", "lora"]


class FinetuneRunConfig(Config):
    """The run directory and the seed."""

    dir: Path
    """Folder that holds everything the run leaves; an existing one is resumed."""
    name: str | None = None
    """Name of the method in results and comparisons; the regime's when unset."""
    seed: NonNegativeInt = 0
    """Seed of every draw: the head's first values, order, augmentation, dropout."""


class EncoderConfig(Config):
    """Where the encoder comes from and how much of it learns."""

    weights: Path | None = None
    """Folder of exported weights (SwiFT v1's imported ones too); their input contract is honoured. Unset for scratch."""
    model: ModelConfig | None = None
    """Architecture for regime=scratch without weights: a preset of configs/model, or a mapping with `preset:`."""
    regime: RegimeName = "full"
    """scratch: all from first values (with `weights`, of the same architecture); full: all go on from the weights;
    last_blocks: the last `fraction` of the blocks; frozen: the head alone; lora: low-rank additions to attention and MLP."""
    fraction: float = Field(default=0.3, gt=0.0, le=1.0)
    """Share of the encoder's blocks, from the last, that learns (last_blocks); the last norm learns with them."""
    rank: PositiveInt = 8
    """Rank of the additions (lora)."""
    alpha: PositiveFloat = 16.0
    """Scale of the additions: alpha / rank (lora; Hu et al. 2021, arXiv 2106.09685)."""
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Each block below the last has this multiple of the rate of the block above it (BEiT, arXiv 2106.08254); 1: all alike."""
    drop_path: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Stochastic depth while fine-tuning; the weights' own when unset."""
    overlap: Literal["refuse", "declare"] = "refuse"
    """Subjects of the test or validation part that the weights were pretrained on: refuse, or go on and say how many."""
    packing: Literal["none", "template", "subject"] | None = None
    """Tokens that are computed (model.packing); the weights' own when unset."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.regime == "scratch":
            if (self.weights is None) == (self.model is None):
                raise ValueError("encoder: regime=scratch takes the architecture of encoder.weights or encoder.model: give one")
        elif self.weights is None:
            raise ValueError(f"encoder: regime={self.regime} goes on from pretrained weights: give encoder.weights")
        elif self.model is not None:
            raise ValueError("encoder: the weights bring their architecture: leave out encoder.model")
        return self


class HeadConfig(Config):
    """From the encoder's features to predictions."""

    kind: Literal["linear", "mlp"] = "linear"
    """linear: one layer; mlp: a hidden layer before it."""
    pool: Literal["mean", "mean_std", "attention"] = "mean"
    """Over the tokens of a clip: mean; mean and deviation; a learned weighting."""
    norm: bool = True
    """Whether pooled features are layer-normalised before the head."""
    hidden: PositiveInt = 256
    """Width of the hidden layer (mlp)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the pooled features that is dropped in training."""
    rate: PositiveFloat = 1.0
    """Learning rate of the head as a multiple of the encoder's last block's."""


class AugmentConfig(Config):
    """Random changes of training clips, made on the device; all off by default."""

    affine: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that a clip is moved, turned and scaled, alike in all its frames."""
    translate_mm: NonNegativeFloat = 4.0
    """Largest shift along each axis."""
    rotate_degrees: NonNegativeFloat = 5.0
    """Largest turn about each axis."""
    zoom: float = Field(default=0.05, ge=0.0, lt=0.5)
    """Largest relative change of size."""
    elastic: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that a clip is deformed smoothly, alike in all its frames."""
    elastic_mm: NonNegativeFloat = 4.0
    """Largest displacement at the deformation's control points, about 30 mm apart."""
    noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that Gaussian noise is added to the brain."""
    noise_std: NonNegativeFloat = 0.1
    """Its deviation, in units of the normalised signal."""
    scale: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Largest relative change of the whole clip's amplitude."""
    speed: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Largest relative change of a clip's speed, about its middle, by interpolation between frames."""
    frame_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability that a frame is replaced by the one before it."""
    reverse: bool = False
    """Whether half of the clips run backwards in time: not where the direction of time is what is learned."""
    flip: bool = False
    """Whether half of the clips are mirrored left to right: not where hemispheres differ in what is learned."""

    @property
    def changes(self) -> bool:
        """Whether anything is asked for."""
        often = (self.affine, self.elastic, self.noise, self.scale, self.speed, self.frame_dropout)
        return any(often) or self.reverse or self.flip


class FinetuneEvaluateConfig(Config):
    """Evaluation on validation subjects, and on test subjects once."""

    max_clips: PositiveInt | None = None
    """Validation clips at most while training, spread evenly over subjects; all when unset."""
    batch: PositiveInt = 8
    """Clips that a rank evaluates at a time."""
    test: bool = True
    """Whether the finished run predicts the test subjects. Trials of a search leave them alone."""
    bootstrap: PositiveInt = 1000
    """Draws of subjects for intervals."""


class FinetuneConfig(Config):
    """Everything that a fine-tuning run is made from."""

    run: FinetuneRunConfig
    """The run directory and the seed."""
    task: TaskConfig
    """What is predicted; in a file, the name of a preset of configs/task or a mapping with `preset:`."""
    encoder: EncoderConfig
    """Weights and regime."""
    head: HeadConfig = HeadConfig()
    """What is put on top."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training clips."""
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
    evaluate: FinetuneEvaluateConfig = FinetuneEvaluateConfig()
    """Validation and test."""
