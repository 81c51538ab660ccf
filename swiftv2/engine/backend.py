"""What the loop asks of a backend, and what all backends share: gradients of the global batch, whole states by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swiftv2.engine.clock import Clock
from swiftv2.engine.collective import gather, on_each
from swiftv2.engine.launch import World
from swiftv2.engine.shards import SavedState, Stretch
from swiftv2.errors import SwiftError

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")
KINDS: tuple[Kind, ...] = ("weight", *MOMENTS)

BASELINE = "baseline/"
"""Begins the name of a count that is the sum over clips of what a baseline would lose."""

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
        counts: what the module counted beside the loss, summed over the global batch, and what `Backend.step` was given,
            summed over ranks.
    """

    loss: float
    grad_norm: float
    refused: str | None = None
    losses: tuple[float, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss_ratio(self) -> float | None:
        """The loss over that of the better baseline on the same batch; None where none was counted, or it is 0."""
        least = min((value for name, value in self.counts.items() if name.startswith(BASELINE)), default=0.0)
        return self.loss * self.counts["clips"] / least if least > 0 else None


class Verdict:
    """What is made of a step before its update; the numbers come to the host once.

    Args:
        numbers: (1 + n,) float64 on the device: the loss, then n others.
        judge: see `Backend.step`.
        clock: told that the device was waited for.
    """

    def __init__(self, numbers: Tensor, judge: Judge, clock: Clock) -> None:
        self.loss = self.norm = math.nan
        self.others: list[float] = []
        self.refused: str | None = None
        self._numbers, self._judge, self._clock, self._asked = numbers, judge, clock, False

    def refuses(self, norm: Tensor | float) -> bool:
        """Whether a gradient of this norm is not to be used; asked again, it answers as before."""
        if not self._asked:
            self._asked = True
            other = norm if isinstance(norm, Tensor) else torch.tensor(norm)
            numbers = torch.cat((self._numbers, other.detach().reshape(1).to(self._numbers)))
            self._clock.lap()
            self.loss, *self.others, self.norm = numbers.tolist()
            self._clock.waited()
            # DeepSpeed's norms say -1 where one is not finite.
            self.norm = self.norm if self.norm >= 0 else math.inf
            self.refused = "its gradient norm is not finite" if not math.isfinite(self.norm) else None
            self.refused = self._judge(self.loss, self.norm) or self.refused
        return self.refused is not None


class Backend(ABC):
    """Computes steps and holds weights and optimizer state.

    The module's `forward(batch)` gives the mean loss over the clips of a micro-batch, a scalar. Every rank computes
    `accumulation` micro-batches of equal size a step, so that the mean of the means is the mean over the global batch. A
    module may have `counts`: sums over the clips of its last forward pass by name, scalars on its device or plain numbers, of
    equal names on all ranks and in all micro-batches of a step; they travel with the loss.

    Attributes:
        clock: told which part of a step is computed.
    """

    def __init__(self, module: nn.Module, world: World, accumulation: int) -> None:
        self.module = module
        self.world = world
        self.accumulation = accumulation
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.clock = Clock(world.device)
        self._losses: list[Tensor] = []
        self._counts: dict[str, Tensor | float] = {}
        self._without_gradient: set[str] | None = None
        self._hooks: list[RemovableHandle] = []

    def begin(self, step: int) -> None:
        """Step number `step` of the run begins; a module that has `begin_step` is told."""
        told = getattr(self.module, "begin_step", None)
        if told is not None:
            told(step)

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
        for name, value in getattr(self.module, "counts", {}).items():
            self._counts[name] = self._counts.get(name, 0.0) + value
        return self._losses[-1]

    def step(self, lr: float, judge: Judge = lambda *_: None, also: Mapping[str, float] = MappingProxyType({})) -> StepResult:
        """Update the weights with the gradient of the global batch (collective).

        A gradient that is not finite, or that `judge` refuses, leaves weights and optimizer state as they were. Loss and norm
        come to the host together, at the one place where a gradient is looked at for infinities anyway.

        Args:
            lr: learning rate.
            judge: asked before the update; all ranks must come to the same answer by themselves.
            also: numbers of this rank that are summed over ranks on the way, of equal names on all.

        Raises:
            SwiftError: the micro-batches of a step are not complete, or, in the first step, a trainable parameter got no
                gradient (it would decay under ZeRO and stand still elsewhere).
        """
        if len(self._losses) != self.accumulation:
            raise SwiftError(f"a step has {self.accumulation} micro-batches, {len(self._losses)} were computed")
        self._check_gradients()
        with self.clock.part("optimizer"):
            losses = torch.stack(self._losses)
            counts = {**self._counts, **also}
            self._losses.clear()
            self._counts.clear()
            numbers = self._numbers(losses.double().mean() / self.world.size, counts)
            if self.world.size > 1:
                with self.clock.part("communication"):
                    dist.all_reduce(numbers)
            verdict = Verdict(numbers, judge, self.clock)
            self._step(lr, verdict)
        refused = verdict.refused
        summed = dict(zip(counts, verdict.others, strict=True))
        return StepResult(verdict.loss, verdict.norm, refused, tuple(losses.tolist()) if refused else (), summed)

    def _numbers(self, loss: Tensor, counts: Mapping[str, Tensor | float]) -> Tensor:
        """(1 + n,) float64: the loss and the counts; plain numbers are filled in, since a copy would wait for the device."""
        filled = [
            value.detach().double().reshape(())
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float64, device=loss.device)
            for value in counts.values()
        ]
        return torch.stack((loss, *filled))

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
