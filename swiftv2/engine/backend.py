"""What the loop asks of a backend, and what all backends share: gradients of the global batch, whole states by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swiftv2.engine.collective import gather, on_each
from swiftv2.engine.launch import World
from swiftv2.engine.shards import SavedState, Stretch
from swiftv2.errors import SwiftError

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")
KINDS: tuple[Kind, ...] = ("weight", *MOMENTS)

Judge = Callable[[float, float], str | None]
"""Given a step's loss and gradient norm, why its update is refused; None where it is not."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: mean over the global batch.
        grad_norm: of the global gradient before clipping.
        refused: why weights and optimizer state were left as they were; None where they were updated.
        losses: of this rank's micro-batches, where the step was refused.
    """

    loss: float
    grad_norm: float
    refused: str | None = None
    losses: tuple[float, ...] = ()


class Verdict:
    """What is made of a step before its update; the numbers come to the host once."""

    def __init__(self, loss: Tensor, judge: Judge) -> None:
        self.loss = self.norm = math.nan
        self.refused: str | None = None
        self._tensor, self._judge, self._asked = loss, judge, False

    def refuses(self, norm: Tensor | float) -> bool:
        """Whether a gradient of this norm is not to be used; asked again, it answers as before."""
        if not self._asked:
            self._asked = True
            other = norm if isinstance(norm, Tensor) else torch.tensor(norm)
            pair = torch.stack((self._tensor, other.detach().reshape(()).to(self._tensor)))
            self.loss, self.norm = pair.tolist()
            # DeepSpeed's norms say -1 where one is not finite.
            self.norm = self.norm if self.norm >= 0 else math.inf
            self.refused = "its gradient norm is not finite" if not math.isfinite(self.norm) else None
            self.refused = self._judge(self.loss, self.norm) or self.refused
        return self.refused is not None


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

    def step(self, lr: float, judge: Judge = lambda *_: None) -> StepResult:
        """Update the weights with the gradient of the global batch (collective).

        A gradient that is not finite, or that `judge` refuses, leaves weights and optimizer state as they were. Loss and norm
        come to the host together, at the one place where a gradient is looked at for infinities anyway.

        Args:
            lr: learning rate.
            judge: asked before the update; all ranks must come to the same answer by themselves.

        Raises:
            SwiftError: the micro-batches of a step are not complete, or, in the first step, a trainable parameter got no
                gradient (it would decay under ZeRO and stand still elsewhere).
        """
        if len(self._losses) != self.accumulation:
            raise SwiftError(f"a step has {self.accumulation} micro-batches, {len(self._losses)} were computed")
        self._check_gradients()
        losses = torch.stack(self._losses)
        self._losses.clear()
        loss = losses.double().mean() / self.world.size
        if self.world.size > 1:
            dist.all_reduce(loss)
        verdict = Verdict(loss, judge)
        self._step(lr, verdict)
        refused = verdict.refused
        return StepResult(verdict.loss, verdict.norm, refused, tuple(losses.tolist()) if refused else ())

    def stretches(self) -> Iterator[Stretch]:
        """This rank's part of the state: flat fp32 views, with frozen parameters and buffers whole on rank 0.

        Together the ranks' parts hold every element once.
        """
        for kind in KINDS:
            for name, start, values in self._held(kind):
                stripe = _stripe(values.numel(), self.world) if self._replicated() else slice(None)
                # What other ranks hold too is written by stripes.
                yield Stretch(f"{kind}/{name}", start + (stripe.start or 0), values[stripe])
        if self.world.rank == 0:
            for name, tensor in self._others().items():
                yield Stretch(f"other/{name}", 0, tensor.detach().reshape(-1))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all whole tensors of the state, by key."""
        trained = {f"{kind}/{name}": tuple(p.shape) for kind in KINDS for name, p in self.parameters.items()}
        return trained | {f"other/{name}": tuple(t.shape) for name, t in self._others().items()}

    @property
    def adam_steps(self) -> int:
        """Updates of the optimizer so far."""
        return self._adam_steps()

    def save_native(self, folder: Path, step: int, samples: int) -> list[str]:
        """Write the backend's own files, for other tools, into a folder (collective; DeepSpeed's alone).

        Args:
            folder: of the checkpoint.
            step: steps of the run so far, those that were refused included.
            samples: consumed so far by all ranks.

        Returns:
            Names, below the folder, of what this rank wrote.

        Raises:
            SwiftError: on this rank, where one cannot be written.
        """
        del folder, step, samples
        return []

    @torch.no_grad()
    def restore(self, checkpoint: Path) -> None:
        """Take weights and optimizer state from a checkpoint of any number of ranks, backend and ZeRO stage (collective).

        Raises:
            SwiftError: on all ranks, where parameters are missing, unknown or of another shape.
        """
        with on_each(lambda: self._open(checkpoint), self.world) as saved:
            for name, tensor in self._others().items():
                tensor.data.copy_(saved.whole(f"other/{name}"))
            for kind in KINDS:
                for name, start, values in self._held(kind):
                    values.copy_(saved.read(f"{kind}/{name}", start, values.numel()))
            self._finish_restore(saved.adam_steps)

    def generated_config(self) -> dict[str, Any] | None:
        """The configuration made from ours for a library below (DeepSpeed); None where there is none."""
        return None

    def close(self) -> None:
        """Release what the backend holds beside the module."""
        return

    @abstractmethod
    def _forward_backward(self, batch: Any) -> Tensor: ...

    @abstractmethod
    def _step(self, lr: float, verdict: "Verdict") -> None:
        """Ask the verdict once, with the gradient's norm, and update or drop the gradient."""

    @abstractmethod
    def _held(self, kind: Kind) -> Iterator[tuple[str, int, Tensor]]:
        """Names, starts and flat fp32 views of all that this rank keeps of the trainable parameters."""

    @abstractmethod
    def _replicated(self) -> bool:
        """Whether every rank keeps everything."""

    @abstractmethod
    def _finish_restore(self, adam_steps: int) -> None:
        """Set the optimizer's step count and renew whatever derives from the fp32 weights (collective)."""

    @abstractmethod
    def _adam_steps(self) -> int: ...

    def _open(self, checkpoint: Path) -> SavedState:
        saved = SavedState(checkpoint)
        expected, found = self.shapes(), saved.shapes
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                name = key.partition("/")[2]
                raise SwiftError(
                    f"{checkpoint}: {name} has shape {found.get(key, 'none')} there and {expected.get(key, 'none')} in the "
                    "model: the configuration describes another model"
                )
        return saved

    def _others(self) -> dict[str, Tensor]:
        """Frozen parameters and persistent buffers: in no optimizer, yet part of the state."""
        kept = self.module.state_dict(keep_vars=True)
        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        return frozen | {name: b for name, b in self.module.named_buffers() if name in kept}

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


def _stripe(elements: int, world: World) -> slice:
    return slice(elements * world.rank // world.size, elements * (world.rank + 1) // world.size)
