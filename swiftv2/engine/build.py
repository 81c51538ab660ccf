"""From configuration to a backend."""

from collections.abc import Mapping

from torch import nn

from swiftv2.config.engine import EngineConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine.backend import Backend
from swiftv2.engine.launch import World
from swiftv2.engine.plain import PlainBackend


def build_backend(
    config: EngineConfig,
    optimizer: OptimizerConfig,
    module: nn.Module,
    decay: set[str],
    world: World,
    micro_batch: int,
    accumulation: int,
    rates: Mapping[str, float] | None = None,
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
        rates: multiples of the learning rate by name, where they are not 1.
    """
    if config.backend == "plain":
        return PlainBackend(config, optimizer, module, decay, world, accumulation, rates)
    # Importing DeepSpeed takes seconds: only where training starts.
    from swiftv2.engine.zero import ZeroBackend

    return ZeroBackend(config, optimizer, module, decay, world, micro_batch, accumulation, rates)
