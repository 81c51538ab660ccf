"""Configuration of the training engine: precision, ZeRO, schedule, steps, saves, evaluation."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from swiftv2.config.base import Config
from swiftv2.errors import UsageError

FloatName = Literal["fp32", "bf16"]
MOST_PROFILED = 100
"""Steps of a profile at most: a step leaves thousands of events."""


class EngineConfig(Config):
    """Where and how a step is computed; DeepSpeed's own configuration is generated from this."""

    backend: Literal["deepspeed", "plain"] = "deepspeed"
    """deepspeed: ZeRO; plain: the plain PyTorch reference (one rank, or several with averaged gradients)."""
    zero_stage: Literal[0, 1, 2] = 2
    """What ZeRO partitions: 0 nothing, 1 optimizer states, 2 gradients too."""
    precision: FloatName = "bf16"
    """bf16: bf16 weights and activations with fp32 master weights; fp32: all in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest norm of the global gradient; 0 turns clipping off."""
    reduce_bucket_size: PositiveInt = 50_000_000
    """Elements reduced at a time."""
    allgather_bucket_size: PositiveInt = 50_000_000
    """Elements gathered at a time."""
    overlap_comm: bool = False
    """Whether reductions overlap the backward pass."""
    contiguous_gradients: bool = True
    """Whether gradients are copied into one contiguous buffer."""
    gradient_accumulation_dtype: FloatName = "fp32"
    """Number format in which gradients of micro-batches are summed."""
    communication_dtype: FloatName = "fp32"
    """Number format in which gradients travel between ranks."""
    optimizer_dtype: FloatName = "fp32"
    """Number format of master weights and Adam's moments. bf16 takes 10 bytes a parameter in place of 18 and rounds small
    updates away: for trying machines out where memory is short, not for results. It needs bf16 elsewhere, and ZeRO 1 or 2."""
    compile: bool = False
    """Whether torch.compile compiles the model's blocks. It pays on GPUs with many small kernels, not on CPUs; the first
    step then takes minutes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.precision == "fp32" and self.gradient_accumulation_dtype == "bf16":
            raise ValueError("gradient_accumulation_dtype=bf16 needs precision=bf16; with precision=fp32 say fp32")
        unwrapped = self.backend == "deepspeed" and self.zero_stage == 0 and self.precision == "bf16"
        if unwrapped and self.gradient_accumulation_dtype == "fp32":
            raise ValueError(
                "DeepSpeed's zero_stage=0 with precision=bf16 cannot sum gradients in fp32: take zero_stage=1 or 2, "
                "backend=plain, precision=fp32, or gradient_accumulation_dtype=bf16"
            )
        low = self.backend == "deepspeed" and self.zero_stage > 0 and self.gradient_accumulation_dtype == "bf16"
        if self.optimizer_dtype == "bf16" and not low:
            raise ValueError(
                "optimizer_dtype=bf16 needs backend=deepspeed, zero_stage=1 or 2, precision=bf16 and "
                "gradient_accumulation_dtype=bf16"
            )
        if self.compile and self.backend == "deepspeed" and self.zero_stage > 0 and self.overlap_comm:
            raise ValueError(
                "compile=true with overlap_comm=true gives NaN from the first step under ZeRO (DeepSpeed #8061): "
                "turn one of them off"
            )
        return self


class ScheduleConfig(Config):
    """Learning rate over steps."""

    kind: Literal["cosine", "constant"] = "cosine"
    """cosine: warm-up, then a cosine to final_ratio; constant: warm-up, a constant rate, then a linear cooldown."""
    warmup_steps: NonNegativeInt = 100
    """Steps over which the rate rises linearly from 0."""
    cooldown_steps: NonNegativeInt = 0
    """Last steps over which a constant rate falls linearly to final_ratio."""
    final_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Rate at the end, as a share of the peak."""


class TrainConfig(Config):
    """Steps, batch and what happens every how many steps."""

    max_steps: PositiveInt
    """Optimizer steps of the whole run."""
    global_batch: PositiveInt
    """Clips in one optimizer step, over all ranks and micro-batches."""
    micro_batch: PositiveInt | None = None
    """Clips that a rank computes at a time; when unset, all of its share at once."""
    log_every: PositiveInt = 1
    """Steps between lines of metrics."""
    save_every: PositiveInt = 500
    """Steps between permanent checkpoints."""
    keep_last: PositiveInt = 2
    """Permanent checkpoints kept beside the best; older ones are deleted."""
    keep_every: PositiveInt | None = None
    """Permanent checkpoints of steps that this divides are kept for ever; none when unset."""
    keep_steps: tuple[PositiveInt, ...] = ()
    """Steps after which a permanent checkpoint is made and kept for ever, such as those from which branches begin."""
    save_minutes: NonNegativeFloat = 2.0
    """Minutes between ephemeral checkpoints, written while training goes on, of which the newest two are kept; 0: none."""
    save_in_background: bool = True
    """Whether training goes on while a checkpoint is written, from a copy on the host; false writes from where the state lies,
    without that memory, while training waits."""
    deepspeed_files: bool = True
    """Whether permanent checkpoints hold DeepSpeed's own files too, for other tools; resuming does not need them."""
    time_limit_minutes: PositiveFloat | None = None
    """Wall-clock minutes after which the run stops with its state saved; Slurm's own end time is heeded besides."""
    skip_steps: tuple[PositiveInt, ...] = ()
    """Steps whose samples are passed over without an update, as if their gradient had been refused."""
    evaluate_every: PositiveInt = 500
    """Steps between evaluations on held-out subjects."""
    profile: str | None = None
    """Steps that the torch profiler looks at, such as `steps:10-15`; none when unset. See profiling.md."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.profile is not None:
            profiled_steps(self.profile)
        return self


class FaultsConfig(Config):
    """When a step is refused, a run rewound, a rank taken for hung."""

    spike_window: int = Field(default=128, ge=2)
    """Accepted steps by whose mean and spread the next loss and gradient norm are judged, once there are so many."""
    spike_sigma: PositiveFloat = 6.0
    """Standard deviations above the mean from which a loss or a gradient norm is refused; one that is not finite always is."""
    rewind_after: PositiveInt = 3
    """Refused steps in a row after which the run goes back to the checkpoint before them and leaves their samples out."""
    most_rewinds: NonNegativeInt = 3
    """Rewinds of a run; where another one would be due, it ends with a diagnosis."""
    failed_saves: PositiveInt = 3
    """Checkpoints in a row that may fail (a full disk) before the run ends."""
    hang_seconds: PositiveFloat = 180.0
    """Seconds without a micro-batch after which all ranks write down where they are and end; five times as many while loading,
    in the first step, in an evaluation and in a save."""
    grace_seconds: PositiveFloat = 240.0
    """Seconds after a request to stop within which a step must end; then the run ends on its last checkpoint."""


class EvaluateConfig(Config):
    """Evaluation on held-out subjects."""

    split: Literal["val", "test"] = "val"
    """Part of the subjects that is evaluated."""
    max_clips: PositiveInt | None = None
    """Clips evaluated at most, spread evenly over subjects; all when unset."""
    batch: PositiveInt = 4
    """Clips that a rank evaluates at a time."""
    draw_subjects: bool = False
    """Whether pictures may show real subjects; generated data are always drawn."""
    pictures: NonNegativeInt = 2
    """Fixed held-out clips drawn at each evaluation, beside maps and means of cohorts; 0 writes none of these."""


class RunConfig(Config):
    """The run directory and the seed."""

    dir: Path
    """Folder that holds everything the run leaves; an existing one is resumed."""
    seed: NonNegativeInt = 0
    """Seed of every draw."""
    init_from: Path | None = None
    """Exported weights (a folder with weights.safetensors) from which a new run starts; never mixed with resuming."""
    branch_from: Path | None = None
    """Run directory whose checkpoint of `branch_step` a new run goes on from: weights, moments, place in the data. What
    follows may differ, such as a cooldown of the rate; model, data, batch and seed are the other run's."""
    branch_step: PositiveInt | None = None
    """Step of the checkpoint of `branch_from`; see train.keep_steps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.branch_from is None) != (self.branch_step is None):
            raise ValueError("run.branch_from and run.branch_step go together: a run directory, and a step that it has kept")
        if self.branch_from is not None and self.init_from is not None:
            raise ValueError("run.branch_from brings its own weights: leave out run.init_from")
        return self


def profiled_steps(asked: str) -> tuple[int, int]:
    """First and last step of `steps:A-B`.

    Raises:
        ValueError: it says nothing of that form, or too many steps.
    """
    found = re.fullmatch(r"steps:([1-9]\d{0,11})-([1-9]\d{0,11})", asked)
    if found is None:
        raise ValueError(f"profile={asked}: write it as steps:A-B, first and last step from 1 on, such as steps:10-15")
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise ValueError(f"profile={asked} ends before it begins: write steps:{last}-{first}")
    if last - first >= MOST_PROFILED:
        raise ValueError(f"profile={asked} asks for {last - first + 1} steps: at most {MOST_PROFILED}, and six tell as much")
    return first, last


def split_batch(global_batch: int, world_size: int, micro_batch: int | None) -> tuple[int, int]:
    """Micro-batch and accumulation steps of a rank for a global batch.

    Args:
        global_batch: clips in one optimizer step.
        world_size: number of ranks.
        micro_batch: clips a rank computes at a time; None takes the rank's whole share.

    Returns:
        (micro_batch, accumulation) with world_size x micro_batch x accumulation == global_batch.

    Raises:
        UsageError: the split is impossible; the message names those that work.
    """
    if global_batch % world_size:
        fitting = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        raise UsageError(
            f"train.global_batch={global_batch} cannot be split over {world_size} ranks; "
            f"world sizes that work: {', '.join(map(str, fitting))}"
        )
    share = global_batch // world_size
    micro = share if micro_batch is None else micro_batch
    if share % micro:
        fitting = [n for n in range(1, share + 1) if share % n == 0]
        raise UsageError(
            f"train.micro_batch={micro} does not divide the {share} clips of each of {world_size} ranks "
            f"(train.global_batch={global_batch}); micro-batches that work: {', '.join(map(str, fitting))}"
        )
    return micro, share // micro
