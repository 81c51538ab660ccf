"""The objective of a run and a micro-batch for it, for plans: what `swiftv2.plan` runs without allocating it."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from swiftv2.config.model import ModelConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data import keyed
from swiftv2.data.grid import CUBE_MM, mni152_grid, template_voxels
from swiftv2.data.samples.batch import Batch, common_dtype
from swiftv2.data.samples.masks import Shape3, brain_cells, cell_counts, draw_mask
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError
from swiftv2.models import decay_names, learning_rates
from swiftv2.plan.accounts import Layout
from swiftv2.plan.memory import Passes
from swiftv2.plan.model import plan_model
from swiftv2.plan.run import MFU, RunPlan, Work, check_machine, plan_run
from swiftv2.plan.tape import FakeNumbers, Tape, forget_tables, record, stretch
from swiftv2.recipes.objective import Objective

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 (the name of an operator)


@dataclass(frozen=True, eq=False)
class Window:
    """The kept voxels of a grid."""

    shape: Shape3
    """(H, W, D)."""
    voxels: torch.Tensor
    """(V,) int64, flat C-order."""
    dtype: torch.dtype
    """In which clips come from the store."""
    source: str
    """Where this was found, in words."""

    @property
    def brain(self) -> torch.Tensor:
        """(H, W, D) bool."""
        flat = torch.zeros(self.shape, dtype=torch.bool).view(-1)
        flat[self.voxels] = True
        return flat.view(self.shape)


def find_window(config: PretrainConfig) -> Window:
    """The store's voxels where the store is there, else those of the MNI152 brain in a cube of the model's size, else all."""
    if config.data.store.is_dir():
        store = Store.open(config.data.store)
        voxels = torch.as_tensor(store.voxels).long()
        return Window(store.grid.shape, voxels, common_dtype({run.dtype for run in store.runs}), "the store")
    shape = config.model.image_size
    if len(set(shape)) == 1:
        try:
            grid = mni152_grid(CUBE_MM / shape[0], "RAS", "MNI152NLin6Asym")
            voxels = torch.as_tensor(template_voxels(grid)).long()
            return Window(shape, voxels, torch.int16, "the MNI152 brain (no store is there yet)")
        except SwiftError:
            pass  # A cube that no MNI152 grid has.
    return Window(shape, torch.arange(int(np.prod(shape))), torch.int16, "every voxel of the grid (no store is there yet)")


def make_objective(config: PretrainConfig, window: Window) -> Objective:
    """The objective as pretraining builds it."""
    return Objective(config, window.voxels, window.shape)


def make_batch(config: PretrainConfig, window: Window, clips: int) -> Batch:
    """A micro-batch whose brains are the whole template; masks are drawn as in a run."""
    frames, count = config.clip.frames, len(window.voxels)
    cells = cell_counts(window.shape, frames, config.mask.patch_size)
    held = brain_cells(window.voxels.numpy(), window.shape, config.mask.patch_size)
    masks = [draw_mask(config.mask, cells, held, keyed.generator(0, "plan", clip)) for clip in range(clips)]
    numbers = torch.zeros(clips, dtype=torch.int64)
    per_voxel = config.data.normalisation.kind == "per_voxel" and config.data.normalisation.scope == "run"
    return Batch(
        bold=torch.zeros(clips, frames, count, dtype=window.dtype),
        slope=torch.ones(clips),
        intercept=torch.zeros(clips),
        statistics=torch.ones(clips, 6),
        voxel_mean=torch.zeros(clips, count) if per_voxel else None,
        voxel_std=torch.ones(clips, count) if per_voxel else None,
        brain=torch.ones(clips, count, dtype=torch.bool),
        mask=torch.from_numpy(np.stack(masks)),
        sample=numbers,
        epoch=numbers,
        clip=torch.arange(clips),
        start=numbers,
        tr=torch.ones(clips),
        cohort=numbers,
        subject=numbers,
        weight=torch.ones(clips),
    )


def passes(config: PretrainConfig, window: Window) -> Passes:
    """What forward and backward passes of a run hold, recorded from its real objective.

    One clip is recorded by itself; passes of two clips and of three tell those of every larger number, where they differ in
    sizes alone, as they do.
    """

    @cache
    def of(clips: int) -> Tape:
        return record(
            lambda: (make_objective(config, window), make_batch(config, window, clips)), clips, config.engine.precision
        )

    @cache
    def several() -> Tape | None:
        return stretch(of(2), of(3))

    def tape(clips: int) -> Tape:
        return of(clips) if clips == 1 else several() or of(clips)

    size = make_batch(config, window, 1).bytes
    return Passes(tape, lambda clips: float(clips * size))


def layout(config: PretrainConfig) -> Layout:
    """Trainable parameters of the objective, and their groups in the optimizer."""
    window = torch.arange(1)
    with torch.device("meta"):
        objective = Objective(config.model_copy(update={"model": _unpacked(config.model)}), window, config.model.image_size)
    names, rates = decay_names(objective), learning_rates(objective, config.model)
    trained = [(name, p.numel()) for name, p in objective.named_parameters() if p.requires_grad]
    group = tuple(2 if name in rates else int(name not in names) for name, _ in trained)
    return Layout(tuple(size for _, size in trained), group)


def _unpacked(model: ModelConfig) -> ModelConfig:
    """The same parameters without a template, which needs numbers to be made from."""
    return model.model_copy(update={"packing": "none"})


def counted_flops(config: PretrainConfig, window: Window) -> dict[str, int]:
    """Forward FLOPs of one clip as PyTorch's counter finds them in a pass of the real objective.

    Returns:
        The keys of `forward_flops`.
    """

    def attention(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
        samples, heads, length, width = query
        return 4 * samples * heads * length * key[2] * width

    with FakeNumbers() as numbers, torch.no_grad():
        objective, batch = make_objective(config, window), make_batch(config, window, 1)
        numbers.building = False
        with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention}) as counter:
            objective(batch)
    forget_tables()
    modules = counter.get_flop_counts()
    encoder = "Objective.simmim.encoder"
    paths = {"patch_embed": f"{encoder}.patch_embed"}
    paths |= {f"stage_{i + 1}": f"{encoder}.layers.{i}" for i in range(len(config.model.depths))}
    counts = {part: sum(modules.get(path, {}).values()) for part, path in paths.items()}
    decoder = sum(modules.get("Objective.simmim.decoder", {}).values())
    return counts | {"encoder": sum(counts.values()), "decoder": decoder, "total": sum(counts.values()) + decoder}


def plan(config: PretrainConfig, *, nodes: int, gpu: str, mfu: float = MFU, tokens: float | None = None) -> RunPlan:
    """Plan a run; see `swiftv2.plan.run.plan_run`."""
    check_machine(config, nodes, gpu)
    window, parameters = find_window(config), layout(config)
    model = plan_model(config.model)
    if config.objective == "visible_only":
        # Its decoder is another one than the model's own.
        model = replace(model, decoder_parameters=parameters.total - model.encoder_parameters)
    work = Work(lambda changed: passes(changed, window), parameters, model, counted_flops(config, window), window.source)
    return plan_run(config, work, nodes=nodes, gpu=gpu, mfu=mfu, tokens=tokens)
