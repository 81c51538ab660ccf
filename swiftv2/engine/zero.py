"""DeepSpeed ZeRO, stages 0, 1 and 2; its configuration is generated here and nowhere else."""

import argparse
import contextlib
import io
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.comm import comm
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import lazy_init_hp_params_optimizer_state
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from swiftv2.config.engine import EngineConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine.backend import MOMENTS, Backend, Kind, Verdict
from swiftv2.engine.collective import on_first
from swiftv2.engine.launch import World
from swiftv2.engine.optimizer import adamw, set_learning_rate
from swiftv2.errors import SwiftError

NATIVE = "deepspeed"
_COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor", "broadcast")


def deepspeed_config(config: EngineConfig, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration for ours.

    Args:
        config: stage, precision, buckets, clipping.
        micro_batch: clips that a rank computes at a time.
        accumulation: micro-batches of a rank in one step.

    Returns:
        A tree of plain values, ready for `deepspeed.initialize` and for JSON.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Without a wrapper of its own DeepSpeed's clipping fails on a skipped step: the backend clips there itself.
        "gradient_clipping": 0.0 if _unwrapped(config) else config.gradient_clipping,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": config.reduce_bucket_size,
            "allgather_bucket_size": config.allgather_bucket_size,
            "overlap_comm": config.overlap_comm,
            "contiguous_gradients": config.contiguous_gradients,
            "round_robin_gradients": False,
        },
        "bf16": {
            "enabled": config.precision == "bf16",
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": config.optimizer_dtype == "bf16",
            "bf16_optimizer_states": config.optimizer_dtype == "bf16",
        },
        "data_types": {"grad_accum_dtype": config.gradient_accumulation_dtype},
        "communication_data_type": config.communication_dtype,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


class ZeroBackend(Backend):
    """Optimizer state (stage 1) and gradients (stage 2) partitioned between ranks by DeepSpeed."""

    def __init__(
        self,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        module: nn.Module,
        decay: set[str],
        world: World,
        micro_batch: int,
        accumulation: int,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(module.to(world.device), world, accumulation)
        self.config = config
        _calm_logging()
        if world.device.type == "cpu":
            # DeepSpeed would compile a shared-memory all-reduce for minutes; gloo gives the same sums.
            deepspeed.ops.__compatible_ops__ = {}
        self.optimizer = adamw(self.parameters, decay, optimizer, rates)
        # DeepSpeed's one way to gather in the ZeRO step; PyTorch renamed it and says so at every rank's first step.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.all_gather_into_tensor` is deprecated", FutureWarning)
        self._generated = deepspeed_config(config, micro_batch, accumulation)
        with _quiet():
            self.engine, *_ = deepspeed.initialize(
                # Left to itself DeepSpeed takes the GPU of the local rank's number, which is not there where a launcher
                # shows every rank its own one as number 0.
                args=argparse.Namespace(device_rank=world.device.index or 0),
                model=module,
                optimizer=self.optimizer,
                config=self._generated,
                dist_init_required=False,
            )
        self._time_collectives()
        self._unwritten: list[str] = []
        writer = self.engine.checkpoint_engine
        writer.save = self._noting_failure(writer.save)
        scripts = self.engine._copy_recovery_script  # noqa: SLF001 (the one other thing that DeepSpeed writes)
        self.engine._copy_recovery_script = self._noting_failure(scripts)  # noqa: SLF001
        # Before this, the groups held the module's parameters; DeepSpeed put its own fp32 ones in their place.
        self._create_state()

    def generated_config(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        return self._generated

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module, and the clock off its collectives."""
        self.engine.destroy()
        for name in _COLLECTIVES:
            vars(comm.cdb).pop(name, None)

    def _time_collectives(self) -> None:
        """Let the clock know when DeepSpeed's backward pass and step are at a collective.

        What is begun there and waited for elsewhere (engine.overlap_comm) counts where it is waited for.
        """

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def timed_call(*values: Any, **options: Any) -> Any:
                with self.clock.part("communication"):
                    return call(*values, **options)

            return timed_call

        for name in _COLLECTIVES:
            vars(comm.cdb).pop(name, None)  # another backend's of this process
            setattr(comm.cdb, name, timed(getattr(comm.cdb, name)))

    def _forward_backward(self, batch: Any) -> Tensor:
        if self._losses:
            self.engine.step()  # closes the former micro-batch; updates nothing before the last one
        with self.clock.part("forward"):
            loss: Tensor = self.engine(batch)
        with self.clock.part("backward"):
            self.engine.backward(loss)
        return loss

    def _step(self, lr: float, verdict: Verdict) -> None:
        set_learning_rate(self.engine.optimizer, lr)
        if _unwrapped(self.config):
            self._step_unwrapped(verdict)
            return
        # Each of DeepSpeed's optimizers asks this of the norm before it updates, and drops the gradient where it is so.
        for module in (stage_1_and_2, bf16_optimizer, unfused_optimizer):
            module.is_invalid_grad_norm = verdict.refuses
        self.engine.step()
        if not self.engine.was_step_applied():
            verdict.refuses(math.inf)  # an infinity that DeepSpeed found before it came to the norm

    def _step_unwrapped(self, verdict: Verdict) -> None:
        """Our AdamW steps without DeepSpeed's wrapper, which would look at overflow and norm: do so here."""
        norm = get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if verdict.refuses(norm):
            for parameter in self.parameters.values():
                parameter.grad = None
        elif self.config.gradient_clipping > 0:
            clip_grads_with_norm_(self.parameters.values(), self.config.gradient_clipping, norm)
        self.engine.step()

    def _partitioned(self) -> bool:
        return self.config.zero_stage > 0

    def _masters(self) -> dict[str, Tensor]:
        """Stage 0: the whole fp32 weights that AdamW moves, by name, in the order of its groups."""
        wrapped = self.engine.optimizer
        owners = getattr(wrapped, "fp16_groups", None) or [list(self.parameters.values())]
        masters = getattr(wrapped, "fp32_groups", None) or owners
        names = {id(p): name for name, p in self.parameters.items()}
        pairs = zip(chain(*owners), chain(*masters), strict=True)
        return {names[id(owner)]: master for owner, master in pairs}

    def _create_state(self) -> None:
        """Give AdamW's state its tensors and link them to the parameters, which DeepSpeed does only in the first step."""
        fused = self.optimizer.defaults["fused"]
        for index, group in enumerate(self.optimizer.param_groups):
            for tensor in group["params"]:
                state = self.optimizer.state[tensor]
                state["step"] = torch.tensor(0.0, device=tensor.device if fused else "cpu")
                for kind in MOMENTS:
                    state.setdefault(kind, torch.zeros_like(tensor.detach()))
            if self._partitioned():
                self._link_state(index, group["params"][0])

    def _link_state(self, group: int, partition: Tensor) -> None:
        wrapped = self.engine.optimizer
        # Stage 1 in bf16 with fp32 gradients is another class with another name for the same thing.
        owners = wrapped.bf16_groups if hasattr(wrapped, "bf16_groups") else wrapped.bit16_groups
        lazy_init_hp_params_optimizer_state(owners[group], partition, self.optimizer.state)

    def _held(self, kind: Kind) -> Iterator[tuple[str, int, Tensor]]:
        if not self._partitioned():
            for name, master in self._masters().items():
                values = master if kind == "weight" else self.optimizer.state[master][kind]
                yield name, 0, values.detach().view(-1)
            return
        for name, parameter in self.parameters.items():
            kept = parameter._hp_mapping  # type: ignore[attr-defined]  # noqa: SLF001 (what universal checkpoints read too)
            if kept is not None:
                stretch = kept.get_hp_fragment(None if kind == "weight" else kind)
                yield name, kept.lp_fragment_address.start, stretch.detach().view(-1)

    def _replicated(self) -> bool:
        return not self._partitioned()

    def _finish_restore(self, adam_steps: int) -> None:
        for group in self.optimizer.param_groups:
            for tensor in group["params"]:
                self.optimizer.state[tensor]["step"].fill_(adam_steps)
        if self._partitioned():
            self.engine.optimizer.update_lp_params()
        else:
            for name, master in self._masters().items():
                self.parameters[name].copy_(master)

    def _adam_steps(self) -> int:
        return int(self.optimizer.state[self.optimizer.param_groups[0]["params"][0]]["step"])

    def _noting_failure(self, write: Callable[..., Any]) -> Callable[..., None]:
        """The same, but a failure to write waits in `_unwritten`: DeepSpeed's barriers would wait for a rank that raised."""

        def call(*values: Any, **options: Any) -> None:
            try:
                write(*values, **options)
            except (OSError, RuntimeError) as error:
                self._unwritten.append(str(error).splitlines()[0])

        return call

    def save_native(self, folder: Path, step: int, samples: int) -> list[str]:
        """Write DeepSpeed's own checkpoint as `deepspeed/` (collective)."""
        # DeepSpeed counts what this process has seen of it; a run that was resumed has done more.
        self.engine.global_steps, self.engine.global_samples = step, samples
        self._unwritten.clear()
        on_first(lambda: folder.mkdir(parents=True, exist_ok=True), self.world)
        with _quiet():
            self.engine.save_checkpoint(str(folder), tag=NATIVE, save_latest=False)
        if self._unwritten:
            raise SwiftError(f"{folder}: DeepSpeed's files cannot be written ({self._unwritten[0]}): is the disk full?")
        names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        return [name for name in names if _writer(name) == self.world.rank]


def _writer(name: str) -> int:
    """The rank that wrote a file: DeepSpeed's partitions carry theirs in the name, all others are rank 0's."""
    found = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(found.group(1)) if found else 0


def _unwrapped(config: EngineConfig) -> bool:
    """Whether DeepSpeed leaves AdamW as it is: stage 0 in fp32."""
    return config.zero_stage == 0 and config.precision == "fp32"


def _calm_logging() -> None:
    """Warnings only, and on standard error."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:  # and not one that somebody derived to catch records
            handler.stream = sys.stderr  # setStream would flush the former one, which may be closed


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Keeps what DeepSpeed prints off standard output, which belongs to the command's own answer."""
    return contextlib.redirect_stdout(io.StringIO())
