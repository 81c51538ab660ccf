"""The reference backend in plain PyTorch: what ZeRO must equal."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from swiftv2.config.engine import EngineConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine.backend import MOMENTS, Backend, Kind, Verdict
from swiftv2.engine.launch import World
from swiftv2.engine.optimizer import adamw, set_learning_rate

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PlainBackend(Backend):
    """Whole weights, gradients and optimizer state on every rank; gradients are averaged between ranks once a step.

    With bf16 the module computes in bf16 while AdamW moves fp32 master weights, which start, as in DeepSpeed, from the
    weights rounded to bf16.
    """

    def __init__(
        self,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        module: nn.Module,
        decay: set[str],
        world: World,
        accumulation: int,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        module.to(world.device)
        super().__init__(module, world, accumulation)
        self.config = config
        if world.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.masters = dict(self.parameters)
        if config.precision == "bf16":
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
            self.masters = {name: nn.Parameter(p.detach().float()) for name, p in self.parameters.items()}
        self.optimizer = adamw(self.masters, decay, optimizer, rates)
        # AdamW makes its state in the first step; a checkpoint may be written or read before.
        for master in self.masters.values():
            zeros = {kind: torch.zeros_like(master.detach()) for kind in MOMENTS}
            device = master.device if self.optimizer.defaults["fused"] else "cpu"
            self.optimizer.state[master] = {"step": torch.tensor(0.0, device=device), **zeros}

    def _forward_backward(self, batch: Any) -> Tensor:
        with self.clock.part("forward"):
            loss: Tensor = self.module(batch)
        with self.clock.part("backward"):
            torch.autograd.backward(loss / self.accumulation)
            if self.config.gradient_accumulation_dtype == "fp32":
                self._move_gradients()
        return loss

    def _move_gradients(self) -> None:
        """Add the gradients of bf16 weights to those of their fp32 masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def _step(self, lr: float, verdict: Verdict) -> None:
        self._move_gradients()
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        if self.world.size > 1:
            with self.clock.part("communication"):
                self._average(gradients)
        norm = get_total_norm(gradients)
        if not verdict.refuses(norm):
            if self.config.gradient_clipping > 0:
                clip_grads_with_norm_(self.masters.values(), self.config.gradient_clipping, norm)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self._renew()
        self.optimizer.zero_grad()

    def _average(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in gradients]).to(_DTYPES[self.config.communication_dtype])
        dist.all_reduce(flat)
        flat /= self.world.size
        for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    @torch.no_grad()
    def _renew(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _held(self, kind: Kind) -> Iterator[tuple[str, int, Tensor]]:
        for name, master in self.masters.items():
            yield name, 0, (master if kind == "weight" else self.optimizer.state[master][kind]).detach().view(-1)

    def _replicated(self) -> bool:
        return True

    def _finish_restore(self, adam_steps: int) -> None:
        for master in self.masters.values():
            self.optimizer.state[master]["step"].fill_(adam_steps)
        self._renew()

    def _adam_steps(self) -> int:
        return int(self.optimizer.state[next(iter(self.masters.values()))]["step"])
