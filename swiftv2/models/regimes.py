"""How much of an encoder learns: all, the last blocks, low-rank additions, or nothing; and at which rates."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from swiftv2.config.finetune import EncoderConfig
from swiftv2.errors import UsageError
from swiftv2.models.mup import learning_rates
from swiftv2.models.swin4d import Swin4D

ENCODER = "encoder."


class LowRank(nn.Module):
    """An addition of low rank to a weight: W + alpha / rank * B A, B zero at first (LoRA, Hu et al. 2021, arXiv 2106.09685).

    Args:
        weight: (out, in) that it is added to; it does not learn.
        rank: of the addition.
        alpha: its scale times the rank.
        generator: where A's first values come from.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        bound = 1 / math.sqrt(inputs)
        self.down = nn.Parameter(torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, in)."""
        return weight + self.scale * (self.up @ self.down).to(weight.dtype)


def prepare(predictor: nn.Module, config: EncoderConfig, seed: int) -> None:
    """Let learn what the regime says, in place: the head always, of `predictor.encoder` a part.

    Args:
        predictor: has an `encoder`, its weights loaded.
        config: regime, fraction, rank, alpha.
        seed: where first values of additions come from.
    """
    encoder: Swin4D = predictor.get_submodule("encoder")  # type: ignore[assignment]
    if config.regime in ("last_blocks", "frozen", "lora"):
        encoder.requires_grad_(requires_grad=False)
    if config.regime == "last_blocks":
        for part in _last_parts(encoder, config.fraction):
            part.requires_grad_(requires_grad=True)
    if config.regime == "lora":
        generator = torch.Generator().manual_seed(seed)
        for block in _blocks(encoder):
            layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
            for layer in layers:
                if config.rank > min(layer.weight.shape):
                    raise UsageError(f"encoder.rank={config.rank} is no low rank for a layer of {tuple(layer.weight.shape)}")
                addition = LowRank(layer.weight, config.rank, config.alpha, generator)
                parametrize.register_parametrization(layer, "weight", addition)
    if encoder.config.variant == "swift_v1":
        # v1 keeps this norm and never applies it; under ZeRO a parameter without a gradient would decay.
        encoder.norm.requires_grad_(requires_grad=False)


def merge(predictor: nn.Module) -> None:
    """Add what was learned at low rank to the weights themselves, in place; the layers are then as they were before."""
    for module in list(predictor.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def rates(predictor: nn.Module, config: EncoderConfig, head_rate: float) -> dict[str, float]:
    """Multiples of the learning rate by parameter name, where they are not 1.

    Args:
        predictor: prepared.
        config: `layer_decay`.
        head_rate: multiple of pooling and head.
    """
    encoder: Swin4D = predictor.get_submodule("encoder")  # type: ignore[assignment]
    found = {ENCODER + name: rate for name, rate in learning_rates(encoder, encoder.config).items()}
    depth = {name: below for below, names in enumerate(_from_the_top(encoder)) for name in names}
    learned = {name: p for name, p in predictor.named_parameters() if p.requires_grad}
    for name in learned:
        if name.startswith(ENCODER):
            # Under muP the rate of an addition is that of the weight it is added to.
            plain = name.replace("parametrizations.weight.0.down", "weight").replace("parametrizations.weight.0.up", "weight")
            found[name] = found.get(plain, 1.0) * config.layer_decay ** depth[name.removeprefix(ENCODER)]
        else:
            found[name] = head_rate
    return {name: found[name] for name in learned if found[name] != 1.0}


def learned_share(predictor: nn.Module) -> float:
    """Share of the encoder's parameters that learn; low-rank additions count as learned and as parameters."""
    parameters = list(predictor.get_submodule("encoder").parameters())
    return sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)


def _blocks(encoder: Swin4D) -> list[nn.Module]:
    """All blocks, the first stage's first."""
    return [block for stage in encoder.layers for block in stage.get_submodule("blocks").children()]


def _last_parts(encoder: Swin4D, fraction: float) -> Iterator[nn.Module]:
    """The last ceil(fraction x blocks) blocks, the merging between them, and the last norm.

    Position tables of a stage learn where all of its blocks do; the patch embedding where all blocks of the encoder do.
    """
    blocks = _blocks(encoder)
    learned = set(map(id, blocks[len(blocks) - max(math.ceil(fraction * len(blocks) - 1e-9), 1) :]))
    yield encoder.norm
    for index, stage in enumerate(encoder.layers):
        own = list(stage.get_submodule("blocks").children())
        inside = [block for block in own if id(block) in learned]
        yield from inside
        merging = stage.get_submodule("downsample") if index + 1 < len(encoder.layers) else None
        if merging is not None and id(own[-1]) in learned:
            yield merging
        if len(inside) == len(own) and len(encoder.pos_embeds):
            yield encoder.pos_embeds[index]
    if len(learned) == len(blocks):
        yield encoder.patch_embed


def _from_the_top(encoder: Swin4D) -> Iterator[list[str]]:
    """Names of the encoder's parameters: of the last norm and last block, of the block below it, down to the embedding.

    A merging is with the block that it follows, a position table with the first block of its stage.
    """
    names = [name for name, _ in encoder.named_parameters()]
    groups: list[list[str]] = []
    for stage in range(len(encoder.layers)):
        blocks = len(list(encoder.layers[stage].get_submodule("blocks").children()))
        for block in range(blocks):
            prefixes = [f"layers.{stage}.blocks.{block}."]
            prefixes += [f"pos_embeds.{stage}."] if block == 0 else []
            prefixes += [f"layers.{stage}.downsample."] if block == blocks - 1 else []
            groups.append([name for name in names if name.startswith(tuple(prefixes))])
    groups[-1] += [name for name in names if name.startswith("norm.")]
    yield from reversed(groups)
    yield [name for name in names if name.startswith("patch_embed.")]
