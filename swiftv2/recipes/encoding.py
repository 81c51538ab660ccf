"""From the clips of a store to embeddings and tokens, shard by shard, on one device."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from swiftv2 import weights
from swiftv2.config.data import StoreConfig
from swiftv2.config.model import MaskConfig, ModelConfig
from swiftv2.data.samples.batch import Batch, RunTable
from swiftv2.data.samples.batches import evaluation_batches
from swiftv2.data.samples.clips import ClipIndex
from swiftv2.data.samples.normalise import normalise, scatter
from swiftv2.data.samples.reading import Reading
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError
from swiftv2.models.geometry import patches_with_brain, stage_grids
from swiftv2.models.heads import Pool, pooled_tokens
from swiftv2.models.swin4d import Swin4D
from swiftv2.recipes import embeddings
from swiftv2.recipes.embeddings import Format, Shard, TokenWriter
from swiftv2.recipes.objective import template_mask
from swiftv2.recipes.overlap import Overlap


@dataclass(frozen=True)
class EmbedOptions:
    """How embeddings are made.

    Attributes:
        stages: the last one's, or all.
        pool: mean over tokens, or the mean and then the deviation: only the latter holds how signals vary within a clip.
        tokens: whether the features of each token are kept, too.
        format: of the embeddings.
        device: auto, cpu or cuda.
        precision: of the encoder's weights and computations; bf16 on CUDA only.
        batch: clips at a time.
        untrained: whether the encoder has first values rather than the weights': a baseline.
        seed: of those first values.
        refuse_overlap: whether subjects that the weights were trained on, or may have been, are refused.
        clip: settings of `ClipConfig` that are not the weights' own.
        data: settings of `StoreConfig` but its store and normalisation.
        cohort: of a single file.
        space: of a single file whose name and side-cars do not tell it.
        resample: whether a single file on another grid is interpolated.
    """

    stages: Literal["last", "all"] = "last"
    pool: Literal["mean", "mean_std"] = "mean"
    tokens: bool = False
    format: Format = "parquet"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: int = 8
    untrained: bool = False
    seed: int = 0
    refuse_overlap: bool = False
    clip: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    cohort: str | None = None
    space: str | None = None
    resample: bool = False


@dataclass(frozen=True, eq=False)
class Work:
    """What is embedded, by what, and where it goes."""

    folder: Path
    card: weights.Card
    contract: weights.InputContract
    model: ModelConfig
    store: Store
    data: StoreConfig
    clips: ClipIndex
    groups: list[NDArray[np.int64]]
    overlap: Overlap | None
    options: EmbedOptions
    file: bool

    @property
    def widths(self) -> dict[int, int]:
        """Width of the tokens of each stage that is kept, by its number."""
        every = {stage + 1: self.model.embed_dim * 2**stage for stage in range(len(self.model.depths))}
        return every if self.options.stages == "all" else {len(every): every[len(every)]}

    @property
    def stages(self) -> dict[int, int]:
        """Width of the embeddings of each stage that is kept, by its number."""
        return {stage: Pool(self.options.pool, width).width for stage, width in self.widths.items()}

    def plan(self) -> dict[str, Any]:
        """What shards of one folder have in common."""
        options = {name: getattr(self.options, name) for name in ("stages", "pool", "tokens", "format", "precision")}
        return {
            "weights": self.card.sha256,
            "untrained": self.options.seed if self.options.untrained else None,
            "store": {"fingerprint": self.store.fingerprint, "version": self.store.version},
            "input": self.contract.model_dump(mode="json"),
            "clip": self.clips.config.model_dump(mode="json"),
            "cohorts": self.data.cohorts,
            "on_bad_clip": self.data.on_bad_clip,
            "packing": self.model.packing,
            "shards": len(self.groups),
            **options,
        }


def build_encoder(work: Work, folder: Path) -> Swin4D:
    """The encoder, for evaluation, in float32.

    Raises:
        SwiftError: the weights are damaged, or leave out other places than the store.
    """
    trained = weights.load_encoder(folder)
    mask = template_mask(torch.as_tensor(work.store.voxels).long(), work.store.grid.shape)
    encoder = Swin4D(work.model, seed=work.options.seed)
    if work.model.packing == "template":
        encoder.use_template(mask)
        if trained.config.packing == "template":
            mine = patches_with_brain(mask[None], work.model.patch_size)[0]
            if not torch.equal(trained.template.cpu(), mine):
                raise SwiftError(
                    f"{folder}: its template mask keeps {int(trained.template.sum())} places, that of the store "
                    f"{int(mine.sum())}: weights and store are of different grids"
                )
    if not work.options.untrained:
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in trained.state_dict().items()}
        own = encoder.state_dict()
        encoder.load_state_dict(tensors | ({"template": own["template"]} if "template" in own else {}))
    return encoder.eval()


def make_shard(work: Work, number: int, encoder: Swin4D, voxels: Tensor) -> None:
    """Embed the clips of one group of runs and write them."""
    places = np.flatnonzero(np.isin(work.clips.run, work.groups[number]))
    clips = dataclasses.replace(work.clips, run=work.clips.run[places], start=work.clips.start[places])
    device = voxels.device
    reading = Reading(
        threads=work.data.threads,
        prefetch=work.data.prefetch,
        prefetch_mb=work.data.prefetch_mb,
        pin=device.type == "cuda",
        on_bad_clip=work.data.on_bad_clip,
        table=RunTable(work.store.runs),
        patience_seconds=work.data.patience_seconds,
    )
    # Batches carry a mask at which nobody looks here.
    mask = MaskConfig(patch_size=work.model.patch_size, among="all")
    batches = evaluation_batches(
        work.store, clips, mask, work.data.normalisation, seed=0, batch=work.options.batch, reading=reading
    )
    pooled: dict[int, list[Tensor]] = {stage: [] for stage in work.stages}
    kept, tr = [], []
    with batches, _tokens(work, number, len(clips)) as tokens, torch.inference_mode():
        for batch in batches:
            usable = torch.nonzero(batch.weight > 0)[:, 0]
            if not len(usable):
                continue
            kept.append(batch.clip[usable].numpy())
            tr.append(batch.tr[usable].numpy())
            features, counted = _features(work, encoder, batch.to(device, non_blocking=True), voxels)
            for stage, found in features.items():
                pooled[stage].append(_pool(work, found, counted[stage])[usable.to(device)].cpu())
                if tokens is not None:
                    rows = found[usable.to(device)].float().permute(0, 2, 3, 4, 5, 1).cpu().numpy()
                    tokens.add(stage, rows, counted[stage][usable.to(device)].cpu().numpy())
            if tokens is not None:
                tokens.step(len(usable))
    if not kept:
        raise SwiftError(
            f"no clip of shard {number} can be used: `swiftv2 store verify {work.store.path}` lists what is damaged"
        )
    chosen = np.concatenate(kept)
    runs = [work.store.runs[run] for run in clips.run[chosen].tolist()]
    keys = {"subject": [r.subject for r in runs], "run": [r.key for r in runs], "cohort": [r.cohort for r in runs]}
    stages = {stage: torch.cat(found).numpy() for stage, found in pooled.items()}
    shard = Shard(keys, clips.start[chosen], np.concatenate(tr), stages, len(clips) - len(chosen))
    embeddings.write_shard(work.folder, number, shard)


class _NoTokens:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _tokens(work: Work, number: int, clips: int) -> "TokenWriter | _NoTokens":
    if not work.options.tokens:
        return _NoTokens()
    grids = stage_grids(work.model, (*work.store.grid.shape, work.clips.frames))
    path = embeddings.tokens_path(work.folder, number)
    return TokenWriter(path, clips, {stage: grids[stage - 1] for stage in work.widths}, work.widths)


def _features(work: Work, encoder: Swin4D, batch: Batch, voxels: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Features (B, C, h, w, d, t) of each stage that is kept, and which tokens count, (B, h, w, d) bool."""
    shape = work.store.grid.shape
    signal, fill = normalise(batch, work.data.normalisation)
    volume = scatter(signal, voxels, shape, fill)
    brain = scatter(batch.brain[:, None], voxels, shape)[:, 0, ..., 0]
    if work.options.stages == "all":
        features = dict(enumerate(encoder.stages(volume, brain), start=1))
    else:
        features = {len(work.model.depths): encoder(volume, brain=brain)}
    return features, {stage: pooled_tokens(work.model, brain, found.shape[2:]) for stage, found in features.items()}


def _pool(work: Work, features: Tensor, counted: Tensor) -> Tensor:
    pool: nn.Module = Pool(work.options.pool, features.shape[1])
    pooled: Tensor = pool(features, counted)
    return pooled
