"""Configuration of the model, its decoders and what is learned by masking."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from swiftv2.config.base import Config

Size3 = tuple[PositiveInt, PositiveInt, PositiveInt]
Size4 = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]


class VisibleDecoderConfig(Config):
    """The decoder of objective=visible_only, which puts mask tokens back on the first stage's grid."""

    width: PositiveInt = 64
    """Channels."""
    depth: PositiveInt = 1
    """Blocks; their windows are those of the first stage in space and span the clip in time."""
    num_heads: PositiveInt = 4
    """Attention heads; divides width."""
    skip: bool = False
    """Whether the visible patches' embeddings are handed to the decoder beside the last stage's features."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not divisible by num_heads={self.num_heads}")
        return self


class DecoderConfig(Config):
    """What turns the encoder's last stage back into voxels: kind and hidden_ratio for objective=simmim."""

    kind: Literal["linear", "mlp", "factorized"] = "linear"
    """linear: SimMIM's one layer with pixel shuffle; mlp: a hidden layer before it; factorized: time first, then space."""
    hidden_ratio: PositiveFloat = 1.0
    """Width of the hidden layer of mlp and factorized decoders, as a multiple of the last stage's width."""
    visible: VisibleDecoderConfig = VisibleDecoderConfig()
    """The decoder of objective=visible_only."""


class ModelConfig(Config):
    """A Swin4D encoder with its decoder; axes are (H, W, D, T): NIfTI order, time last."""

    name: str
    """Name of the preset, for people and for reports."""
    variant: Literal["swift_v1", "unified", "decoupled"] = "unified"
    """swift_v1: the published SwiFT; unified: v2's 4-D attention with a final norm; decoupled: temporal then spatial."""
    image_size: Size3 = (96, 96, 96)
    """Grid of voxels (H, W, D) for which the position tables are made; padded on the right to a multiple of the patch."""
    frames: PositiveInt = 20
    """Clip length in frames for which the time tables are made; shorter clips use their first entries."""
    in_channels: PositiveInt = 1
    """Channels of the input volume."""
    embed_dim: PositiveInt = 36
    """Width of the first stage; it doubles at every following stage."""
    depths: tuple[PositiveInt, ...] = (2, 2, 18, 2)
    """Blocks in each stage."""
    num_heads: tuple[PositiveInt, ...] = (6, 12, 24, 48)
    """Attention heads in each stage; each must divide its stage's width."""
    patch_size: Size4 = (6, 6, 6, 2)
    """Voxels and frames of one token."""
    window_size: Size4 = (4, 4, 4, 4)
    """Attention window in tokens, from the second stage on."""
    first_window_size: Size4 = (4, 4, 4, 4)
    """Attention window of the first stage."""
    last_layer_full_msa: bool = True
    """Whether the last stage attends over its whole spatial grid (never shifted)."""
    mlp_ratio: PositiveFloat = 4.0
    """Width of the MLP's hidden layer as a multiple of the stage's width."""
    qkv_bias: bool = True
    """Whether queries, keys and values carry a bias."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Stochastic depth: probability of dropping the last block's branches, growing linearly from 0 over the depth."""
    absolute_position: bool = True
    """Learned absolute position tables before each stage: place and time (always on) for swift_v1 and unified, place
    alone for decoupled, whose rotary embeddings know distances but no anatomical place."""
    rope_theta: PositiveFloat = 1e4
    """Base of the rotary embeddings (decoupled only); in space the last `head dimension % 6` channels stay unrotated."""
    layer_scale_temporal: PositiveFloat = 1.0
    """Initial value of the temporal branch's LayerScale (decoupled only)."""
    layer_scale_spatial: PositiveFloat = 0.9
    """Initial value of the spatial branch's LayerScale (decoupled only)."""
    parametrisation: Literal["standard", "mup"] = "standard"
    """mup: first values, learning rates, attention and readout scale with the width such that settings tuned at one width
    hold at others (Tensor Programs V); at `base_embed_dim` it is the standard form."""
    base_embed_dim: PositiveInt = 36
    """Width of the first stage at which mup equals the standard form, that of 7M (parametrisation=mup only)."""
    packing: Literal["none", "template", "subject"] = "none"
    """Tokens that are computed: all; those that hold brain in the template mask of the grid; or in each subject's own
    mask. Background tokens are then never attended to, and are zero children in merging. A subject's own mask gives away
    the size of the head, and with it sex."""
    attention_buckets: PositiveInt = 8
    """Most lengths to which groups of tokens that attend to one another are padded; fewer kernels, or less padding. Where
    every sample has tokens of its own (packing=subject, visible-only encoding) lengths are fixed instead."""
    checkpoint_stages: tuple[int, ...] = ()
    """Stages (0-based) whose blocks recompute their activations in the backward pass."""
    checkpoint_keep: Literal["nothing", "attention", "products"] = "nothing"
    """What such blocks keep beside their input: nothing, the results of attention, or of all matrix products too."""
    decoder: DecoderConfig = DecoderConfig()
    """From features to voxels."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths has {len(self.depths)} stages, num_heads {len(self.num_heads)}: give one entry a stage")
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * 2**stage
            if width % heads:
                raise ValueError(f"stage {stage}: width {width} is not divisible by {heads} heads")
            if self.variant == "decoupled" and (width // heads % 2 or width // heads < 6):
                raise ValueError(
                    f"stage {stage}: rotary embeddings need an even head dimension of at least 6, got {width // heads}"
                )
        placing = self.decoder.visible.width // self.decoder.visible.num_heads
        if self.variant == "decoupled" and (placing % 2 or placing < 6):
            raise ValueError(f"decoder.visible: rotary embeddings need an even head dimension of at least 6, got {placing}")
        for stage in self.checkpoint_stages:
            if not 0 <= stage < len(self.depths):
                raise ValueError(f"checkpoint_stages: there is no stage {stage}; stages are 0 to {len(self.depths) - 1}")
        if self.checkpoint_keep != "nothing" and not self.checkpoint_stages:
            raise ValueError(f"checkpoint_keep={self.checkpoint_keep} needs checkpoint_stages: nothing is recomputed now")
        if self.variant != "decoupled" and not self.absolute_position:
            raise ValueError(f"absolute_position=false needs variant=decoupled; {self.variant} has no other notion of place")
        return self

    @model_validator(mode="after")
    def _check_mup(self) -> Self:
        if self.parametrisation == "standard":
            if self.base_embed_dim != ModelConfig.model_fields["base_embed_dim"].default:
                raise ValueError(f"base_embed_dim={self.base_embed_dim} needs parametrisation=mup: the standard form has none")
            return self
        if self.variant == "swift_v1":
            raise ValueError("parametrisation=mup: swift_v1 is the published model; take variant=unified or decoupled")
        for stage, heads in enumerate(self.num_heads):
            if self.base_embed_dim * 2**stage % heads:
                raise ValueError(
                    f"base_embed_dim={self.base_embed_dim}: stage {stage} of the base is not divisible by {heads} heads"
                )
        return self

    @property
    def width_multiplier(self) -> float:
        """Width as a multiple of the base's under mup; 1 for the standard form."""
        return self.embed_dim / self.base_embed_dim if self.parametrisation == "mup" else 1.0

    @model_validator(mode="after")
    def _check_swift_v1(self) -> Self:
        if self.variant != "swift_v1":
            return self
        if self.packing != "none":
            raise ValueError(f"packing={self.packing}: SwiFT v1 attends to background; only packing=none is exact for it")
        if self.patch_size[3] != 1:
            raise ValueError(f"patch_size={self.patch_size}: variant=swift_v1 has patches of one frame")
        merged = 2 ** (len(self.depths) - 1)
        tokens = [-(-n // p) for n, p in zip(self.image_size, self.patch_size[:3], strict=True)]
        if any(n % merged for n in tokens):
            raise ValueError(
                f"image_size={self.image_size} gives {tuple(tokens)} tokens, which variant=swift_v1 cannot halve "
                f"{len(self.depths) - 1} times: choose a grid or a patch with multiples of {merged} tokens, or variant=unified"
            )
        return self


ObjectiveName = Literal["simmim", "visible_only"]


class MaskConfig(Config):
    """Which cells of a clip are hidden."""

    kind: Literal["random", "tube", "temporal"] = "random"
    """random: each cell by itself; tube: the same cells at every time; temporal: all cells of some frames."""
    ratio: float = Field(default=0.6, gt=0.0, lt=1.0)
    """Share of the cells that is masked; ceil(ratio x cells) are."""
    patch_size: Size4 = (6, 6, 6, 2)
    """Voxels and frames of one mask cell: a multiple of the model's patch, a divisor of the padded clip."""
    among: Literal["brain", "all"] = "brain"
    """Cells to draw from: those that hold any brain voxel, or all of the box."""
    temporal_choice: Literal["last", "random"] = "last"
    """Frames that a temporal mask hides: the last ones, as published, or randomly chosen ones."""


class LossConfig(Config):
    """Reconstruction loss over masked positions: per clip a mean, then the mean over the global batch."""

    kind: Literal["l1", "smooth_l1", "huber", "l2"] = "l1"
    """Distance between reconstructed and true voxels."""
    delta: PositiveFloat = 1.0
    """Where smooth_l1 (its beta) and huber (its delta) turn from square to linear."""
    over: Literal["brain_voxels", "brain_tokens", "everywhere"] = "brain_voxels"
    """Masked positions that count: brain voxels, all voxels of tokens with any brain, or every voxel of the box."""


class OptimizerConfig(Config):
    """AdamW; norms, biases, position tables and the mask token are never decayed."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
