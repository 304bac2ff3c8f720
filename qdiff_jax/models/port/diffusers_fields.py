"""The fields of diffusers' configs: which decide sizes, which must be at their defaults, which do not matter.

Source: the constructors of diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Fields(NamedTuple):
    """read: {field: diffusers' default} of what decides sizes. fixed: {field: the value built here, which is
    diffusers' default too}. ignored: fields that change nothing in float32 inference."""

    read: Mapping[str, Any]
    fixed: Mapping[str, Any]
    ignored: tuple[str, ...] = ()


NEEDED = object()  # a field without a default

_UNET = Fields(
    read={
        "sample_size": NEEDED,
        "in_channels": NEEDED,
        "out_channels": NEEDED,
        "block_out_channels": NEEDED,
        "down_block_types": NEEDED,
        "up_block_types": NEEDED,
        "layers_per_block": 2,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "attention_head_dim": 8,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
    },
    fixed={
        "act_fn": "silu",
        "center_input_sample": False,
        "class_embed_type": None,
        "mid_block_scale_factor": 1,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
    },
    ignored=("dropout", "num_train_timesteps"),
)
UNET_2D = Fields(
    read={
        **_UNET.read,
        "attn_norm_num_groups": None,
        "downsample_type": "conv",
        "upsample_type": "conv",
    },
    fixed={**_UNET.fixed, "add_attention": True, "mid_block_type": "UNetMidBlock2D"},
    ignored=_UNET.ignored,
)
UNET_CONDITION = Fields(
    read={
        **_UNET.read,
        "cross_attention_dim": 1280,
        "num_attention_heads": None,
        "transformer_layers_per_block": 1,
    },
    fixed={
        **_UNET.fixed,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    },
    # A linear projection is a 1x1 convolution on tokens; attention is in float32 anyway.
    ignored=(
        *_UNET.ignored,
        "addition_embed_type_num_heads",
        "upcast_attention",
        "use_linear_projection",
    ),
)
_TRANSFORMER = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "patch_size": 2,
}
_TRANSFORMER_FIXED = {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False}
_TRANSFORMER_FIXED |= {"attention_bias": True}
_TRANSFORMER_IGNORED = ("dropout", "norm_num_groups", "upcast_attention")
DIT = Fields(
    read={**_TRANSFORMER, "sample_size": 32, "num_embeds_ada_norm": 1000},
    # The rest belongs to other uses of the older class.
    fixed={
        **_TRANSFORMER_FIXED,
        "norm_type": "ada_norm_zero",
        "attention_type": "default",
        "caption_channels": None,
        "cross_attention_dim": None,
        "double_self_attention": False,
        "interpolation_scale": None,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_additional_conditions": None,
        "use_linear_projection": False,
    },
    ignored=(*_TRANSFORMER_IGNORED, "norm_eps"),  # see `DiTConfig.semantics`
)
PIXART = Fields(
    read={
        **_TRANSFORMER,
        "sample_size": 128,
        "out_channels": 8,
        "caption_channels": NEEDED,
        "cross_attention_dim": 1152,
        "interpolation_scale": None,
        "use_additional_conditions": None,
    },
    fixed={
        **_TRANSFORMER_FIXED,
        "norm_type": "ada_norm_single",
        "norm_eps": 1e-6,
        "attention_type": "default",
    },
    ignored=(
        *_TRANSFORMER_IGNORED,
        "num_embeds_ada_norm",
        "num_vector_embeds",
        "double_self_attention",
        "only_cross_attention",
        "use_linear_projection",
    ),
)
