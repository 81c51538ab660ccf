"""Floating-point operations of a forward pass, counted stage by stage: as published, and as really computed.

A multiply and an add count as two. Matrix products and attention are counted; norms, GELUs and additions are not, as is
usual and as PyTorch's counter does.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from swiftv2.config.model import ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.models.decoders import expansion, hidden_width
from swiftv2.models.geometry import Grid, block_specs, stage_grids
from swiftv2.models.routes import Route, StageRoute, sample_route, shared_route
from swiftv2.models.visible import decoder_model


def forward_flops(config: ModelConfig) -> dict[str, int]:
    """FLOPs of one clip of the configured grid and length, whole windows counted: the published figure.

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


def computed_flops(config: ModelConfig, template: NDArray[np.bool_] | None = None) -> dict[str, int]:
    """FLOPs that this package spends on one clip of the configured grid and length.

    Counted from the slots of every attention: tokens without brain cost nothing where they are left out; padding of
    groups to the length of their bucket counts.

    Args:
        config: the model.
        template: (h, w, d) bool, the first stage's tokens that hold brain; None counts all of them.

    Returns:
        The keys of `forward_flops`.

    Raises:
        SwiftError: the template is not of the model's grid, or empty.
    """
    grids = stage_grids(config)
    if template is not None and (template.shape != grids[0][:3] or not template.any()):
        raise SwiftError(
            f"a template of {template.shape} tokens, {int(template.sum())} of them with brain, does not fit "
            f"{config.name}, whose first stage has {grids[0][:3]}"
        )
    kept = None if template is None else template.astype(np.bool_).tobytes()
    shape = (*config.image_size, config.frames)
    route = shared_route(config, shape, kept, 1, torch.device("cpu"), torch.float32)
    embedded = math.prod(grids[0]) if route.cells is None else len(route.cells)
    counts = {"patch_embed": _linear(embedded, math.prod(config.patch_size) * config.in_channels, config.embed_dim)}
    counts |= _route_flops(config, route)
    encoder, decoder = sum(counts.values()), _decoder(config, grids[-1])
    return counts | {"encoder": encoder, "decoder": decoder, "total": encoder + decoder}


def visible_flops(config: ModelConfig, visible: NDArray[np.bool_], there: NDArray[np.bool_]) -> dict[str, int]:
    """FLOPs that visible-only encoding spends on one clip of the configured length, the mean over those given.

    Args:
        config: the model.
        visible: (B, h, w, d, t) bool, tokens that are encoded.
        there: (B, h, w, d, t) bool, all tokens that packing leaves in, hidden or not (all, where it leaves none out).

    Returns:
        The keys of `forward_flops`.
    """
    cpu, clips = torch.device("cpu"), len(visible)
    shape, patch = (*config.image_size, config.frames), math.prod(config.patch_size) * config.in_channels
    route = sample_route(config, visible, cpu, torch.float32)
    counts = {"patch_embed": _linear(int(visible.sum()), patch, config.embed_dim)} | _route_flops(config, route)
    counts = {name: round(count / clips) for name, count in counts.items()}
    own, placing = decoder_model(config), config.decoder.visible
    if config.packing == "subject":
        back = sample_route(own, there, cpu, torch.float32)
    else:
        template = np.ascontiguousarray(there[0, ..., 0]).tobytes() if config.packing == "template" else None
        back = shared_route(own, shape, template, 1, cpu, torch.float32)
    share = clips if config.packing == "subject" else 1
    width, merged = config.embed_dim * 2 ** (len(config.depths) - 1), 2 ** (len(config.depths) - 1)
    decoder = _linear(math.prod(stage_grids(config)[-1]), width, merged**3 * placing.width)
    decoder += (_stage(own, 0, back.stages[0]) + _linear(back.slots[0][-1], placing.width, patch)) // share
    if placing.skip:
        decoder += round(_linear(int(visible.sum()), config.embed_dim, placing.width) / clips)
    encoder = sum(counts.values())
    return counts | {"encoder": encoder, "decoder": decoder, "total": encoder + decoder}


def encoder_flops(config: ModelConfig, route: Route) -> int:
    """FLOPs of a forward pass of the encoder over a route, all its samples together; counted as in `computed_flops`."""
    rows = route.batch * (math.prod(stage_grids(config)[0]) if route.cells is None else len(route.cells))
    rows = rows if route.rows is None else len(route.rows)
    embedded = _linear(rows, math.prod(config.patch_size) * config.in_channels, config.embed_dim)
    return embedded + route.batch * sum(_route_flops(config, route).values())


def placing_flops(config: ModelConfig, route: Route, clips: int, visible: int) -> int:
    """FLOPs of a forward pass of the decoder that places mask tokens, all clips together.

    Args:
        config: of the encoder.
        route: the decoder's.
        clips: in the batch.
        visible: tokens that were encoded, of all clips together.
    """
    own, placing = decoder_model(config), config.decoder.visible
    patch, merged = math.prod(config.patch_size) * config.in_channels, 2 ** (len(config.depths) - 1)
    width = config.embed_dim * merged
    count = clips * _linear(math.prod(stage_grids(config)[-1]), width, merged**3 * placing.width)
    count += route.batch * (_stage(own, 0, route.stages[0]) + _linear(route.slots[0][-1], placing.width, patch))
    return count + (_linear(visible, config.embed_dim, placing.width) if placing.skip else 0)


def simmim_decoder_flops(config: ModelConfig, clips: int) -> int:
    """FLOPs of a forward pass of SimMIM's decoder."""
    return clips * _decoder(config, stage_grids(config)[-1])


def _route_flops(config: ModelConfig, route: Route) -> dict[str, int]:
    """FLOPs of each stage over a route, for each of the samples side by side."""
    counts = [_stage(config, stage, one) for stage, one in enumerate(route.stages)]
    for stage, (_, following) in enumerate(pairwise(route.slots)):
        width = config.embed_dim * 2**stage
        counts[stage] += _linear(following[0], 8 * width, 2 * width)
    return {f"stage_{stage + 1}": count for stage, count in enumerate(counts)}


def _stage(config: ModelConfig, stage: int, route: StageRoute) -> int:
    width = config.embed_dim * 2**stage
    hidden, count = int(width * config.mlp_ratio), 0
    for block in route.blocks:
        for step in block:
            rows = sum(groups * length for groups, length, _ in step.layout.buckets)
            pairs = sum(groups * length**2 for groups, length, _ in step.layout.buckets)
            count += _linear(rows, width, 4 * width) + 2 * _linear(pairs, width, 1)
        count += 2 * _linear(rows, width, hidden)
    return count


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
