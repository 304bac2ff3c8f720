"""The U-Net of latent diffusion, Stable Diffusion 1 and guided diffusion, as one block program.

Sources: Dhariwal and Nichol 2021; Rombach et al. 2022; the released checkpoints. Every operator goes
through `sites.op`; the forward pass is the block program. Parameter names follow the checkpoints, dots as
underscores (`input_blocks.4.0.in_layers.2` is `input_blocks_4_0/in_layers_2`). Blocks of their own are the
time projection of each residual block (`input_blocks_4_0_emb_layers_1/dense`), so that temporal features
can be treated as one unit, and of a spatial transformer its entry, each of its blocks, and its exit
(`input_blocks_4_1_{proj_in, transformer_blocks_0, proj_out}`), the units of published reconstructions.

The published sizes are in `unet_ldm_published.py`.
"""

from __future__ import annotations

import dataclasses
import functools

from flax import linen as nn

from qdiff_jax.models.attention import (
    AttentionBlock,
    TransformerBlock,
    TransformerIn,
    TransformerOut,
)
from qdiff_jax.models.program import Node, run_program, validate
from qdiff_jax.models.unet_ddpm import ConvIn, TimeProjection, Upsample
from qdiff_jax.models.unet_ldm_blocks import (
    ClassEmbedder,
    ConvOut,
    Downsample,
    ResBlock,
    TimeEmbedding,
)


@dataclasses.dataclass(frozen=True)
class UNetLDMConfig:
    """Sizes of the network.

    multipliers: of the channels per resolution, highest first. attention_downsampling: factors by which
    the image is smaller than the input where attention follows each residual block (the middle always
    has it). heads or head_channels: how many heads everywhere, or how many channels each; one of them.
    new_attention_order: see `AttentionBlock`. scale_shift_norm, resblock_updown: see `ResBlock`.

    num_classes, context_dim and vector_dim decide what the third argument y of the module is:

    - none of them: nothing, the model is unconditional;
    - num_classes alone: labels [B] int32 below num_classes, embedded and added to the time embedding;
      there is no null class;
    - context_dim alone: a context [B, context_length, context_dim] float32 (a text) for the
      transformers that then stand where attention is; any length will do, context_length is the usual;
    - both: labels [B] int32, embedded as a context of length 1; the null class is num_classes;
    - vector_dim alone: numbers [B, vector_dim] float32, embedded by two dense layers and added to the time
      embedding; there is no null class.

    dtype: "float32" or "bfloat16", the compute type; parameters are float32. Raises ValueError for sizes
    that do not divide or contradict each other.
    """

    channels: int = 224
    multipliers: tuple[int | float, ...] = (1, 2, 3, 4)
    res_blocks: int = 2
    attention_downsampling: tuple[int, ...] = (8, 4, 2)
    resolution: int = 64
    in_channels: int = 3
    out_channels: int = 3
    heads: int | None = None
    head_channels: int | None = 32
    new_attention_order: bool = False
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    num_classes: int | None = None
    context_dim: int | None = None
    context_length: int = 77
    vector_dim: int | None = None
    transformer_depth: int = 1
    groups: int = 32
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def learn_sigma(self) -> bool:
        """Whether the output is [eps, v], twice in_channels, as guided diffusion's models have it."""
        return self.out_channels == 2 * self.in_channels

    @property
    def null_class(self) -> int | None:
        """The label of the unconditional branch; None where there is no such label."""
        return None if self.context_dim is None else self.num_classes

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per resolution, highest first."""
        return tuple(round(self.channels * multiplier) for multiplier in self.multipliers)

    def heads_of(self, width: int) -> int:
        """How many heads an attention of this many channels has."""
        return self.heads if self.heads is not None else width // self.head_channels

    def __post_init__(self):
        if (self.heads is None) == (self.head_channels is None):
            raise ValueError(
                f"Give heads or head_channels, one of them: they are {self.heads} and "
                f"{self.head_channels}."
            )
        per_head = self.head_channels if self.heads is None else self.heads
        if per_head < 1:
            raise ValueError(
                f"{'head_channels' if self.heads is None else 'heads'} must be at least 1, got {per_head}."
            )
        levels = [2**i for i in range(len(self.multipliers))]
        nowhere = [factor for factor in self.attention_downsampling if factor not in levels]
        if nowhere:
            raise ValueError(
                f"attention_downsampling has {nowhere}, and the {len(levels)} levels are smaller by "
                f"{levels}; name factors of levels."
            )
        if self.context_dim is None and self.transformer_depth != 1:
            raise ValueError(
                f"transformer_depth={self.transformer_depth} without a context_dim: a model without a "
                "context has no transformers; leave it 1."
            )
        if self.transformer_depth < 1:
            raise ValueError(f"transformer_depth must be at least 1, got {self.transformer_depth}.")
        if self.context_dim is not None and self.new_attention_order:
            raise ValueError(
                "new_attention_order with a context_dim: transformers have q, k and v apart, so that it "
                "changes nothing; leave it False."
            )
        if self.vector_dim is not None and (self.num_classes, self.context_dim) != (None, None):
            raise ValueError(
                f"vector_dim={self.vector_dim} stands alone: a model has one condition, and num_classes is "
                f"{self.num_classes}, context_dim {self.context_dim}; leave them None."
            )
        attended = {w for i, w in enumerate(self.widths) if 2**i in self.attention_downsampling}
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"groups={self.groups} must divide every width, {width} too.")
            if (width in attended or width == self.widths[-1]) and width % per_head:
                raise ValueError(
                    f"{'head_channels' if self.heads is None else 'heads'}={per_head} must divide every "
                    f"width with attention, {width} too."
                )
        if self.resolution % 2 ** (len(self.multipliers) - 1):
            raise ValueError(
                f"resolution={self.resolution} must be divisible by "
                f"{2 ** (len(self.multipliers) - 1)}, one halving per level below the first."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is not one of 'float32', 'bfloat16'.")


@functools.cache
def unet_ldm_program(config: UNetLDMConfig) -> tuple[Node, ...]:
    """The block program: inputs "x" [B, H, W, C], "t" [B] and, conditional, "y" (see the config)."""
    c = config
    body: list[Node] = []
    temporal: list[Node] = []
    context = None if c.context_dim is None else "y"
    if c.context_dim is not None and c.num_classes is not None:
        context = "class_embedder"
        embedder = ClassEmbedder(c.num_classes + 1, c.context_dim, c.dtype, parent=None)
        temporal.append(Node(context, embedder, ("y",)))
    labels = c.num_classes if context is None else None
    time = TimeEmbedding(c.channels, labels, c.vector_dim, c.dtype, parent=None)
    conditional = labels is not None or c.vector_dim is not None
    temporal.append(Node("time_embed", time, ("t", "y") if conditional else ("t",)))

    def block(name, module, *reads):
        body.append(Node(name, module, reads))
        return name

    def res_block(name, features, *maps, resample=""):
        projection = f"{name}_emb_layers_1"
        size = features * (2 if c.scale_shift_norm else 1)
        temporal.append(Node(projection, TimeProjection(size, parent=None), ("time_embed",)))
        module = ResBlock(
            features, c.groups, c.dropout, c.scale_shift_norm, resample=resample, parent=None
        )
        return block(name, module, *maps, projection)

    def attention(name, features, h):
        heads = c.heads_of(features)
        if context is None:
            module = AttentionBlock(heads, c.groups, c.new_attention_order, parent=None)
            return block(name, module, h)
        tokens = block(f"{name}_proj_in", TransformerIn(c.groups, parent=None), h)
        for i in range(c.transformer_depth):
            module = TransformerBlock(heads, parent=None)
            tokens = block(f"{name}_transformer_blocks_{i}", module, tokens, context)
        return block(f"{name}_proj_out", TransformerOut(parent=None), tokens, h)

    h = block("input_blocks_0_0", ConvIn(c.widths[0], c.dtype, parent=None), "x")
    skips = [h]
    last = len(c.widths) - 1
    for level, features in enumerate(c.widths):
        for _ in range(c.res_blocks):
            name = f"input_blocks_{len(skips)}"
            h = res_block(f"{name}_0", features, h)
            if 2**level in c.attention_downsampling:
                h = attention(f"{name}_1", features, h)
            skips.append(h)
        if level != last:
            name = f"input_blocks_{len(skips)}_0"
            if c.resblock_updown:
                h = res_block(name, features, h, resample="down")
            else:
                h = block(name, Downsample(parent=None), h)
            skips.append(h)
    h = res_block("middle_block_0", c.widths[last], h)
    h = attention("middle_block_1", c.widths[last], h)
    h = res_block("middle_block_2", c.widths[last], h)
    total = len(skips)
    for level in reversed(range(len(c.widths))):
        features = c.widths[level]
        for i in range(c.res_blocks + 1):
            name = f"output_blocks_{total - len(skips)}"
            h = res_block(f"{name}_0", features, h, skips.pop())
            attended = 2**level in c.attention_downsampling
            if attended:
                h = attention(f"{name}_1", features, h)
            if level and i == c.res_blocks:
                name = f"{name}_{2 if attended else 1}"
                if c.resblock_updown:
                    h = res_block(name, features, h, resample="up")
                else:
                    h = block(name, Upsample(parent=None), h)
    block("out", ConvOut(c.out_channels, c.groups, parent=None), h)
    program = (*temporal, *body)
    validate(program, ("x", "t", "y"))
    return program


class UNetLDM(nn.Module):
    """Noise estimate [B, H, W, out_channels] float32 from x [B, H, W, C], t [B] and the condition y.

    Where out_channels is twice in_channels the channels are [eps, v]; `v` is what "learned_range" of the
    DDPM sampler reads.
    """

    config: UNetLDMConfig

    @nn.compact
    def __call__(self, x, t, y=None, train=False):
        c = self.config
        if c.num_classes is not None and y is None:
            null = f", with {c.num_classes} for the null class" if c.context_dim is not None else ""
            raise ValueError(
                f"This U-Net is conditional on {c.num_classes} classes: pass y [B] int32{null}."
            )
        if c.num_classes is None and c.context_dim is not None:
            if y is None or y.ndim != 3 or y.shape[-1] != c.context_dim:
                raise ValueError(
                    f"This U-Net is conditional on a context: pass y [B, L, {c.context_dim}] float32, "
                    f"not {None if y is None else y.shape}."
                )
        if c.vector_dim is not None and (y is None or y.shape != (len(x), c.vector_dim)):
            raise ValueError(
                f"This U-Net is conditional on numbers: pass y [B, {c.vector_dim}] float32, not "
                f"{None if y is None else y.shape}."
            )
        return run_program(self, unet_ldm_program(c), {"x": x, "t": t, "y": y}, train=train)
