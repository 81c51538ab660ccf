"""Floating-point operations of a forward pass, counted stage by stage; padded tokens included.

A multiply and an add count as two. Matrix products and attention are counted; norms, GELUs and additions are not, as is
usual and as PyTorch's counter does.
"""

import math

from swiftv2.config.model import ModelConfig
from swiftv2.models.decoders import expansion, hidden_width
from swiftv2.models.geometry import Grid, block_specs, stage_grids


def forward_flops(config: ModelConfig) -> dict[str, int]:
    """FLOPs of one clip of the configured grid and length.

    Returns:
        `patch_embed`, `stage_1`... (each with its blocks and the merging that ends it), their sum `encoder`, `decoder`,
        and `total` = encoder + decoder.
    """
    grids = stage_grids(config)
    counts = {"patch_embed": _linear(math.prod(grids[0]), math.prod(config.patch_size) * config.in_channels, config.embed_dim)}
    for stage, grid in enumerate(grids):
        count = sum(_block(config, stage, block, grid) for block in range(config.depths[stage]))
        if stage + 1 < len(grids):
            width = config.embed_dim * 2**stage
            count += _linear(math.prod(grids[stage + 1]), 8 * width, 2 * width)
        counts[f"stage_{stage + 1}"] = count
    encoder, decoder = sum(counts.values()), _decoder(config, grids[-1])
    return counts | {"encoder": encoder, "decoder": decoder, "total": encoder + decoder}


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _block(config: ModelConfig, stage: int, block: int, grid: Grid) -> int:
    width = config.embed_dim * 2**stage
    count = 2 * _linear(math.prod(grid), width, int(width * config.mlp_ratio))
    for spec in block_specs(config, stage, block, grid):
        rows = spec.windows * spec.length
        projections = _linear(rows, width, 3 * width) + _linear(rows, width, width)
        count += projections + 2 * _linear(rows, width, spec.length)
    return count


def _decoder(config: ModelConfig, grid: Grid) -> int:
    rows, factors = math.prod(grid), expansion(config)
    width = config.embed_dim * 2 ** (len(config.depths) - 1)
    hidden = hidden_width(config, width)
    voxels = math.prod(factors) * config.in_channels
    if config.decoder.kind == "linear":
        return _linear(rows, width, voxels)
    if config.decoder.kind == "mlp":
        return _linear(rows, width, hidden) + _linear(rows, hidden, voxels)
    frames = factors[3]
    temporal = _linear(rows, width, hidden) + _linear(rows, hidden, width * frames)
    return temporal + _linear(rows * frames, width, voxels // frames)
