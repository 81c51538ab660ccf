"""Visible-only encoding: hidden tokens leave the encoder, and a light decoder puts mask tokens where they were.

Hidden tokens are left out by the definition of packing: never keys, and zero children in merging. Masked autoencoders for
hierarchical transformers: UM-MAE (Li et al. 2022, arXiv 2205.10063), GreenMIM (Huang et al. 2022, arXiv 2205.13515).
"""

import math

import torch
from torch import Tensor, nn

from swiftv2.config.load import build
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig, ObjectiveName
from swiftv2.models.blocks import Block, DecoupledBlock
from swiftv2.models.decoders import pixel_shuffle
from swiftv2.models.geometry import stage_grids, token_grid
from swiftv2.models.initialise import initialise
from swiftv2.models.mup import FixedWidth, Readout
from swiftv2.models.routes import Route
from swiftv2.models.simmim import MaskedModel, SimMIM
from swiftv2.models.swin4d import PositionTables


def decoder_model(config: ModelConfig) -> ModelConfig:
    """The decoder as a model of one stage on the encoder's first grid, of the same family.

    Its windows span the clip in time, so that frames that are hidden whole can be filled in from others.

    Raises:
        UsageError: width and heads do not suit the family.
    """
    own = config.decoder.visible
    times = token_grid(config, (*config.image_size, config.frames))[3]
    changes = {
        "embed_dim": own.width,
        "depths": (own.depth,),
        "num_heads": (own.num_heads,),
        "first_window_size": (*config.first_window_size[:3], times),
        "last_layer_full_msa": False,
        "drop_path": 0.0,
        "checkpoint_stages": (),
        "parametrisation": "standard",
        "base_embed_dim": ModelConfig.model_fields["base_embed_dim"].default,
    }
    return build(ModelConfig, config.model_dump() | changes, where="model.decoder.visible")


class PlacingDecoder(FixedWidth):
    """The last stage's features spread over the first stage's grid, mask tokens where it was hidden, blocks, then voxels.

    Args:
        config: of the encoder; `decoder.visible` says how large this is.
        width: channels of the encoder's last stage.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.config = decoder_model(config)
        own, self.merged = self.config.embed_dim, 2 ** (len(config.depths) - 1)
        self.expand = Readout(width, self.merged**3 * own, config.width_multiplier)
        self.skip = Readout(config.embed_dim, own, config.width_multiplier) if config.decoder.visible.skip else None
        self.mask_token = nn.Parameter(torch.zeros(own))
        if config.absolute_position:
            self.positions = PositionTables(own, stage_grids(self.config)[0], config.variant != "decoupled")
        kind = DecoupledBlock if config.variant == "decoupled" else Block
        self.blocks = nn.ModuleList([kind(self.config, 0) for _ in range(self.config.depths[0])])
        self.norm = nn.LayerNorm(own)
        self.voxels = nn.Linear(own, math.prod(config.patch_size) * config.in_channels)

    def forward(self, features: Tensor, embedded: Tensor, visible: Tensor, route: Route, grid: tuple[int, ...]) -> Tensor:
        """Features to voxels.

        Args:
            features: (B, C_last, h, w, d, t) of the last stage.
            embedded: (n, E), embeddings of the visible patches.
            visible: (n,) int64, their rows among those of (cell, sample).
            route: of all tokens, hidden or not, through this decoder.
            grid: tokens (h, w, d, t) of the first stage.

        Returns:
            (B, C, H, W, D, T) of the padded clip; 0 where packing leaves a token out.
        """
        batch, own, (h, w, d, t) = len(features), self.config.embed_dim, grid
        spread = pixel_shuffle(self.expand(features.permute(0, 2, 3, 4, 5, 1)), (self.merged,) * 3 + (1,))
        x = spread[:, :, :h, :w, :d].permute(2, 3, 4, 5, 0, 1).reshape(-1, own)
        shown = x.new_zeros(len(visible), own) if self.skip is None else self.skip(embedded)
        x = x + self.mask_token.to(x.dtype).expand(len(x), -1).index_copy(0, visible, shown)
        if route.rows is not None:
            x = x.index_select(0, route.rows)
        elif route.cells is not None:
            x = x.view(-1, batch, own).index_select(0, route.cells)
        x = route.enter(x.reshape(-1, route.batch, own))
        (stage,) = route.stages
        if self.config.absolute_position:
            x = self.positions(x, stage, t)
        for block, steps in zip(self.blocks, stage.blocks, strict=True):
            x = block(x, steps, None)
        patches = route.leave(self.voxels(self.norm(x))).view(h, w, d, t, batch, -1)
        return pixel_shuffle(patches.permute(4, 0, 1, 2, 3, 5), self.config.patch_size)


class VisibleOnly(MaskedModel):
    """An encoder of visible tokens alone and a decoder that places mask tokens.

    Args:
        model: architecture of encoder and decoder; any variant but swift_v1.
        mask: only its cell size matters here; which cells are hidden comes with the batch.
        loss: distance and the positions that count.
        seed: where the first values of the parameters come from.

    Raises:
        SwiftError: see `MaskedModel`; or width and heads of the decoder do not suit the family.
    """

    def __init__(self, model: ModelConfig, mask: MaskConfig, loss: LossConfig, seed: int = 0) -> None:
        super().__init__(model, mask, loss)
        self.decoder = PlacingDecoder(model, self.encoder.width)
        initialise(self, model, seed)

    def reconstruct(self, volume: Tensor, hidden: Tensor, brain: Tensor, drop_path: Tensor | None) -> Tensor:
        """(B, C, H, W, D, T) of the padded clip; no value of a hidden patch is read.

        Raises:
            SwiftError: a clip has no visible token.
        """
        features, embedded, visible = self.encoder.encode_visible(volume, ~hidden, drop_path, brain)
        route = self.encoder.route(volume, brain, self.decoder.config)
        out: Tensor = self.decoder(features, embedded, visible, route, token_grid(self.config, volume.shape[2:]))
        return out


def make_masked(objective: ObjectiveName, model: ModelConfig, mask: MaskConfig, loss: LossConfig, seed: int = 0) -> MaskedModel:
    """The model of an objective; arguments as of `SimMIM` and `VisibleOnly`."""
    return (SimMIM if objective == "simmim" else VisibleOnly)(model, mask, loss, seed)
