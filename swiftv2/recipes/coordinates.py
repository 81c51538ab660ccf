"""Coordinate check: how large activations are, against the width, after a few steps of Adam.

Yang et al., "Tensor Programs V" (arXiv 2203.03466), appendix D.1: under muP sizes stay where they are as the width grows;
in the standard form some grow with it, and with them the rate that is too large.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from swiftv2.config.load import build
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig, OptimizerConfig
from swiftv2.data import keyed
from swiftv2.engine.optimizer import adamw
from swiftv2.errors import UsageError
from swiftv2.models import SimMIM, decay_names, learning_rates
from swiftv2.models.attention import GroupAttention
from swiftv2.models.swin4d import Stage

PARAMETRISATIONS = ("standard", "mup")


def check_coordinates(
    model: ModelConfig,
    widths: Sequence[int],
    *,
    steps: int = 4,
    lr: float = 1e-2,
    clips: int = 2,
    seeds: int = 2,
    told: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a model at several widths for a few steps, in both parametrisations, and measure its activations.

    Clips are noise that is smooth in time, of the model's own grid and length; on the CPU, in float32.

    Args:
        model: architecture; its width is replaced, and its `base_embed_dim` (or the smallest of `widths` where it is in the
            standard form) is the base.
        widths: of the first stage, at least two, ascending.
        steps: of AdamW at a constant rate.
        lr: that rate; large, so that what grows has grown after few steps.
        clips: in the one batch that all steps see.
        seeds: first values over which sizes are averaged.
        told: is given a line a model.

    Returns:
        `widths`, `steps`, `lr`; `quantities`: for each name the mean absolute activations of both parametrisations, a list a
        step (from 0, before the first) of one value a width; `slopes`: of log size against log width after the last step.

    Raises:
        UsageError: widths are too few, or do not suit the model, or the rate is none or too large.
    """
    if len(widths) < 2 or sorted(set(widths)) != list(widths):
        raise UsageError(f"widths {list(widths)}: give at least two, ascending")
    if steps < 1 or seeds < 1 or clips < 1:
        raise UsageError(f"steps={steps}, seeds={seeds}, clips={clips}: give 1 or more of each")
    if not 0 < lr < math.inf:
        raise UsageError(f"lr={lr:g}: give a learning rate above 0, such as 1e-2")
    base = model.base_embed_dim if model.parametrisation == "mup" else widths[0]
    # The brain fills the box: packing would leave nothing out.
    tree = model.model_dump() | {"packing": "none"}
    quantities: dict[str, dict[str, list[list[float]]]] = {}
    for form in PARAMETRISATIONS:
        own = {"parametrisation": form} | ({"base_embed_dim": base} if form == "mup" else {})
        free = {"base_embed_dim": ModelConfig.model_fields["base_embed_dim"].default}
        columns = []
        for width in widths:
            config = build(ModelConfig, tree | free | own | {"embed_dim": width}, where=f"width {width}")
            columns.append(_mean([_sizes(config, steps, lr, clips, seed) for seed in range(seeds)]))
            if told is not None:
                told(f"{form}, width {width}: done")
        for name in columns[0]:
            rows = [[column[name][step] for column in columns] for step in range(steps + 1)]
            quantities.setdefault(name, {})[form] = rows
    broken = next((name for name, forms in quantities.items() if not np.isfinite(list(forms.values())).all()), None)
    if broken is not None:
        raise UsageError(f"lr={lr:g}: training diverges, sizes of {broken} are not finite; lower the rate or the steps")
    slopes = {name: {form: _slope(widths, rows[-1]) for form, rows in forms.items()} for name, forms in quantities.items()}
    return {"widths": list(widths), "steps": steps, "lr": lr, "quantities": quantities, "slopes": slopes}


def _sizes(config: ModelConfig, steps: int, lr: float, clips: int, seed: int) -> dict[str, list[float]]:
    """Mean absolute activations by name, one for each step from 0 on."""
    mask_config = MaskConfig(patch_size=config.patch_size)
    model = SimMIM(config, mask_config, LossConfig(kind="l2"), seed)
    rates = learning_rates(model, config)
    optimizer = adamw(dict(model.named_parameters()), decay_names(model), OptimizerConfig(lr=lr, weight_decay=0.0), rates)
    volume, mask, brain = _batch(config, clips)
    sizes: dict[str, list[float]] = {}
    for step in range(steps + 1):
        with _watched(model, sizes):
            output = model(volume, mask, brain)
        sizes.setdefault("reconstruction", []).append(_size(output.reconstruction))
        if step < steps:
            optimizer.zero_grad()
            output.clip_loss.mean().backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return sizes


def _batch(config: ModelConfig, clips: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth noise (clips, C, H, W, D, T), a random mask of 60 % of the patches, and a brain that fills the box."""
    draws = keyed.generator(0, "coordinates")
    noise = draws.standard_normal((clips, config.in_channels, *config.image_size, config.frames), dtype=np.float32)
    volume = torch.from_numpy(np.cumsum(noise, axis=-1) / np.sqrt(np.arange(1, config.frames + 1, dtype=np.float32)))
    grid = [-(-n // p) for n, p in zip((*config.image_size, config.frames), config.patch_size, strict=True)]
    mask = torch.from_numpy(draws.random((clips, *grid)) < 0.6)
    return volume, mask, torch.ones(clips, *config.image_size, dtype=torch.bool)


@contextmanager
def _watched(model: SimMIM, sizes: dict[str, list[float]]) -> Iterator[None]:
    """Add the sizes of one forward pass."""
    hooks = []

    def watch(module: nn.Module, name: str, measure: Callable[[nn.Module, Any, Any], float]) -> None:
        hooks.append(module.register_forward_hook(lambda m, i, o: sizes.setdefault(name, []).append(measure(m, i, o))))

    watch(model.encoder.patch_embed, "patch embedding", lambda _module, _inputs, out: _size(out))
    stages = [child for child in model.encoder.layers if isinstance(child, Stage)]
    for number, stage in enumerate(stages, start=1):
        block = list(stage.blocks)[-1]
        watch(block, f"stage {number}, last block", lambda _module, _inputs, out: _size(out))
        attention = [child for child in block.modules() if isinstance(child, GroupAttention)][-1]
        watch(attention, f"stage {number}, attention scores", _scores)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _scores(attention: nn.Module, inputs: tuple[Any, ...], _out: Any) -> float:
    """Mean absolute score of each token with itself, before the softmax and without rotation."""
    if not isinstance(attention, GroupAttention):
        raise TypeError("only attention has scores")
    with torch.no_grad():
        x, width = inputs[0], inputs[0].shape[-1]
        query, key, _ = torch.split(functional.linear(x, attention.qkv.weight, attention.qkv.bias), width, dim=-1)
        products = (query * key).view(*x.shape[:-1], attention.heads, -1).sum(-1)
        return _size(products * attention.scale)


def _size(x: Tensor) -> float:
    return float(x.detach().abs().mean())


def _mean(runs: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {name: np.mean([run[name] for run in runs], axis=0).tolist() for name in runs[0]}


def _slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])
