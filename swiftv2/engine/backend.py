"""What the loop asks of a backend, and what all backends share: gradients of the global batch, whole states by name."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swiftv2.config.engine import EngineConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine.collective import gather, on_all, on_first
from swiftv2.engine.launch import World
from swiftv2.errors import SwiftError

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss over the global batch, global gradient norm before clipping, whether it was skipped."""

    loss: float
    grad_norm: float
    skipped: bool


class Backend(ABC):
    """Computes steps and holds weights and optimizer state.

    The module's `forward(batch)` gives the mean loss over the clips of a micro-batch, a scalar. Every rank computes
    `accumulation` micro-batches of equal size a step, so that the mean of the means is the mean over the global batch.
    """

    def __init__(self, module: nn.Module, world: World, accumulation: int) -> None:
        self.module = module
        self.world = world
        self.accumulation = accumulation
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._losses: list[Tensor] = []
        self._without_gradient: set[str] | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    @abstractmethod
    def layout(self) -> str:
        """Name of the form in which `save` leaves the backend's own files; equal layouts can be loaded natively."""

    def forward_backward(self, batch: Any) -> Tensor:
        """Add one micro-batch to the gradient of the step.

        Args:
            batch: whatever the module's `forward` takes, on this rank's device.

        Returns:
            Its loss on this rank, a detached scalar.
        """
        if len(self._losses) == self.accumulation:
            raise SwiftError(f"a step has {self.accumulation} micro-batches: call step() before the next one")
        if self._without_gradient is None:
            self._watch_gradients()
        loss = self._forward_backward(batch)
        self._losses.append(loss.detach())
        return self._losses[-1]

    def step(self, lr: float) -> StepResult:
        """Update the weights with the gradient of the global batch (collective).

        A gradient that is not finite leaves weights and optimizer state as they were.

        Raises:
            SwiftError: the micro-batches of a step are not complete, or, in the first step, a trainable parameter got no
                gradient (it would decay under ZeRO and stand still elsewhere).
        """
        if len(self._losses) != self.accumulation:
            raise SwiftError(f"a step has {self.accumulation} micro-batches, {len(self._losses)} were computed")
        self._check_gradients()
        loss = torch.stack(self._losses).double().mean()
        self._losses.clear()
        if self.world.size > 1:
            dist.all_reduce(loss)
        grad_norm, skipped = self._step(lr)
        return StepResult(loss.item() / self.world.size, grad_norm, skipped)

    def full_state(self) -> dict[str, Tensor]:
        """Whole fp32 weights on the CPU by name, with frozen parameters and buffers (collective; empty but on rank 0)."""
        state = {name: tensor.cpu() for name, tensor in self._tensors("weight") if self.world.rank == 0}
        if self.world.rank == 0:
            state |= {name: tensor.detach().cpu().contiguous() for name, tensor in self._others().items()}
        return state

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into an existing folder, in both forms (collective).

        `weights.safetensors` and `optimizer.safetensors` hold whole fp32 tensors by parameter name and fit any world size,
        ZeRO stage and backend; a backend's own files (DeepSpeed's) lie beside them.
        """
        _write_on_first(folder / WEIGHTS, self.full_state(), self.world)
        moments = {
            f"{kind}/{name}": tensor.cpu() for kind in MOMENTS for name, tensor in self._tensors(kind) if self.world.rank == 0
        }
        moments["step"] = torch.tensor(self._adam_steps(), dtype=torch.int64)
        _write_on_first(folder / OPTIMIZER, moments, self.world)
        self._save_native(folder)

    def load(self, folder: Path, layout: str) -> None:
        """Take weights and optimizer state from a folder that `save` wrote (collective).

        The caller has checked the files' hashes: DeepSpeed's own are pickles, which only a run's own checkpoint may bring.

        Args:
            folder: the checkpoint.
            layout: the layout under which it was saved; where it equals this backend's, its own files are loaded and
                training goes on bit for bit, else the whole tensors by name, which is exact for the state itself.

        Raises:
            SwiftError: parameters are missing, unknown or of another shape.
        """
        if layout == self.layout and self._load_native(folder):
            return
        on_all(lambda: self._check_names(folder), self.world)
        with safe_open(folder / WEIGHTS, "pt") as weights, safe_open(folder / OPTIMIZER, "pt") as moments:
            for name, tensor in self._others().items():
                tensor.data.copy_(weights.get_tensor(name))
            self._assign("weight", {name: weights.get_tensor(name) for name in self.parameters})
            for kind in MOMENTS:
                self._assign(kind, {name: moments.get_tensor(f"{kind}/{name}") for name in self.parameters})
            self._finish_assignment(int(moments.get_tensor("step")))

    def generated_config(self) -> dict[str, Any] | None:
        """The configuration made from ours for a library below (DeepSpeed); None where there is none."""
        return None

    def close(self) -> None:
        """Release what the backend holds beside the module."""
        return

    @abstractmethod
    def _forward_backward(self, batch: Any) -> Tensor: ...

    @abstractmethod
    def _step(self, lr: float) -> tuple[float, bool]: ...

    @abstractmethod
    def _tensors(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """Whole fp32 tensors of all trainable parameters, in order (collective)."""

    @abstractmethod
    def _assign(self, kind: Kind, values: Mapping[str, Tensor]) -> None:
        """Set weights or moments from whole tensors."""

    @abstractmethod
    def _finish_assignment(self, adam_steps: int) -> None:
        """Set the optimizer's step count and renew whatever derives from the fp32 weights."""

    @abstractmethod
    def _adam_steps(self) -> int: ...

    def _save_native(self, folder: Path) -> None:
        """Write the backend's own files beside the whole tensors; none by default."""
        del folder

    def _load_native(self, folder: Path) -> bool:
        """Load the backend's own files; False where it has none."""
        del folder
        return False

    def _others(self) -> dict[str, Tensor]:
        """Frozen parameters and persistent buffers: in no optimizer, yet part of the state."""
        kept = self.module.state_dict(keep_vars=True)
        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        return frozen | {name: b for name, b in self.module.named_buffers() if name in kept}

    def _check_names(self, folder: Path) -> None:
        expected = {name: tuple(t.shape) for name, t in (self.parameters | self._others()).items()}
        with safe_open(folder / WEIGHTS, "pt") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 (no iterator)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise SwiftError(
                    f"{folder / WEIGHTS}: {name} has shape {found.get(name, 'none')} there and "
                    f"{expected.get(name, 'none')} in the model: the configuration describes another model"
                )

    def _watch_gradients(self) -> None:
        missing = self._without_gradient = set(self.parameters)
        for name, parameter in self.parameters.items():
            hook = parameter.register_hook(lambda _, n=name: missing.discard(n))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def _check_gradients(self) -> None:
        """Once, in the first step: every trainable parameter must have got a gradient on every rank."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        missing = sorted(set().union(*gather(self._without_gradient or set(), self.world)))
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise SwiftError(
                f"{len(missing)} trainable parameters got no gradient in the first step: {shown}; "
                "freeze them (requires_grad=False) or take them out of the model"
            )


def build_backend(
    config: EngineConfig,
    optimizer: OptimizerConfig,
    module: nn.Module,
    decay: set[str],
    world: World,
    micro_batch: int,
    accumulation: int,
) -> Backend:
    """The backend that the configuration names, around a module whose weights are initialised (collective).

    Args:
        config: backend, ZeRO stage, precision, clipping.
        optimizer: AdamW.
        module: its `forward(batch)` gives the mean loss of a micro-batch; rank 0's weights are given to all.
        decay: names of the parameters that are decayed.
        world: this process among the ranks.
        micro_batch: clips that a rank computes at a time.
        accumulation: micro-batches of a rank in one step.
    """
    if config.backend == "plain":
        from swiftv2.engine.plain import PlainBackend

        return PlainBackend(config, optimizer, module, decay, world, accumulation)
    # Importing DeepSpeed takes seconds: only where training starts.
    from swiftv2.engine.zero import ZeroBackend

    return ZeroBackend(config, optimizer, module, decay, world, micro_batch, accumulation)


def _write_on_first(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    def write() -> None:
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise SwiftError(f"{path}: cannot be written: {error}") from error

    on_first(write, world)
