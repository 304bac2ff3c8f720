"""Names of the released latent-diffusion, Stable Diffusion 1 and guided-diffusion U-Nets -> `UNetLDM`.

Sources: state dicts of CompVis/latent-diffusion, CompVis/stable-diffusion and openai/guided-diffusion,
module by module. Guided diffusion's files hold a U-Net and nothing else; those of CompVis also the first
stage, the condition's network, moving averages and the schedule, which `unet_tensors` takes apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.port.strict import Row, Table, port_parameters, take, with_moving_average
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.runtime.state_dicts import to_device

_AT = r"((?:input_blocks|output_blocks)\.\d+\.\d|middle_block\.\d)"

_COMMON = (
    Row(r"time_embed\.([02])", r"time_embed/dense_\1", "dense"),
    Row(r"label_emb", r"time_embed/label_emb", "embed"),
    Row(r"label_emb\.([02])", r"time_embed/label_emb_\1", "dense"),
    Row(r"cond_stage_model\.embedding", r"class_embedder/embedding", "embed"),
    Row(r"(input_blocks\.0\.0)", r"\1/conv", "conv"),
    Row(_AT + r"\.(in_layers|out_layers)\.0", r"\1/\2_0", "norm"),
    Row(_AT + r"\.(in_layers\.2|out_layers\.3|skip_connection)", r"\1/\2", "conv"),
    Row(_AT + r"\.emb_layers\.1", r"\1_emb_layers_1/dense", "dense"),
    Row(_AT + r"\.(op|conv)", r"\1/\2", "conv"),
    Row(r"out\.0", r"out/out_0", "norm"),
    Row(r"out\.2", r"out/out_2", "conv"),
)
_ATTENTION = (
    Row(_AT + r"\.norm", r"\1/norm", "norm"),
    Row(_AT + r"\.(qkv|proj_out)", r"\1/\2", "dense"),
)
_IN = _AT + r"\.transformer_blocks\.(\d)"
_TRANSFORMER = (
    Row(_AT + r"\.norm", r"\1_proj_in/norm", "norm"),
    Row(_AT + r"\.proj_in", r"\1_proj_in/proj_in", "dense"),
    Row(_IN + r"\.(norm[123])", r"\1_transformer_blocks_\2/\3", "norm"),
    Row(_IN + r"\.(attn[12]\.to_(?:q|k|v|out\.0))", r"\1_transformer_blocks_\2/\3", "dense"),
    Row(_IN + r"\.(ff\.net\.(?:0\.proj|2))", r"\1_transformer_blocks_\2/\3", "dense"),
    Row(_AT + r"\.proj_out", r"\1_proj_out/proj_out", "dense"),
)

# What a CompVis checkpoint holds besides its networks.
PARTS = {
    "unet": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "condition": "cond_stage_model.",
}
LONE = ("scale_factor",)
BUFFERS = (  # all of the schedule, recomputed
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
)
AVERAGES = r"model_ema\..*"


def native_table(config: UNetLDMConfig) -> Table:
    """The rows of a state dict whose names begin at `input_blocks`, `cond_stage_model.embedding` beside.

    An attention and a spatial transformer both have a `norm` and a `proj_out`; a model has one or the
    other, by its config.
    """
    return Table((*_COMMON, *(_ATTENTION if config.context_dim is None else _TRANSFORMER)))


def from_native(
    tensors: Mapping[str, np.ndarray], config: UNetLDMConfig, source: object = "the state dict"
) -> dict:
    """Parameters of `UNetLDM` from native names, as `unet_tensors` or a file of guided diffusion has them.

    Raises ValueError listing all that is missing, left over or of another shape.
    """
    return to_device(
        port_parameters(tensors, native_table(config), parameter_shapes(config), source)
    )


def unet_tensors(
    tensors: Mapping[str, np.ndarray],
    config: UNetLDMConfig,
    *,
    ema: bool,
    source: object = "the checkpoint",
) -> tuple[dict[str, np.ndarray], float]:
    """(the U-Net's tensors in native names, the latents' scale factor) of a whole CompVis checkpoint.

    ema: take the moving averages, as all published figures of LSUN, CelebA-HQ and FFHQ do; cin256-v2 and
    sd-v1-4.ckpt have none. With a class embedder its table comes along. The scale factor is the file's
    `scale_factor`, or 1.0 where it has none (VQ first stages; Stable Diffusion's 0.18215 is in its config).

    Raises ValueError for tensors of no known part, or averages that do not match the parameters.
    """
    if ema:
        tensors = with_moving_average(tensors, source=source)
    parts = take(tensors, PARTS, LONE, (*BUFFERS, AVERAGES), source)
    if not parts["unet"]:
        raise ValueError(
            f"{source} has no tensors called {PARTS['unet']}*: it is no checkpoint of latent diffusion."
        )
    unet = dict(parts["unet"])
    if config.num_classes is not None and config.context_dim is not None:
        unet |= {f"{PARTS['condition']}{key}": value for key, value in parts["condition"].items()}
    # Of `load_state_dict` it is a tensor still in the file, which `float` does not take.
    return unet, float(np.asarray(parts[""].get("scale_factor", 1.0)))
