"""Options of diffusers' constructors that make the published networks.

Sources: the constructors of diffusers 0.42, and the sizes of the releases (`models.published`).
"""

from .references import draw


def blocks(attends, down, attended_down, up, attended_up):
    """Names of blocks; attends: whether each resolution has attention, highest first."""
    return dict(
        down_block_types=tuple(attended_down if has else down for has in attends),
        up_block_types=tuple(attended_up if has else up for has in reversed(attends)),
    )


def unet_blocks(*attends):
    return blocks(attends, "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")


def resnet_blocks(*attends):
    """Residual blocks resample, and the time scales and shifts."""
    names = "ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"
    return dict(
        **blocks(attends, *names),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
    )


def text_blocks(*attends):
    names = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
    return blocks(attends, *names)


_DDPM = dict(
    flip_sin_to_cos=False,
    freq_shift=1,
    downsample_padding=0,
    norm_eps=1e-6,
    attention_head_dim=None,
    layers_per_block=2,
)
# name of `models.published`: (class, its options, condition, side of the input here, parameters)
UNETS = {
    "ddpm_cifar10": (
        "UNet2DModel",
        dict(
            **_DDPM,
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            **unet_blocks(False, True, False, False),
        ),
        None,
        32,
        35_746_307,
    ),
    "ddpm_256": (
        "UNet2DModel",
        dict(
            **_DDPM,
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            **unet_blocks(False, False, False, False, True, False),
        ),
        None,
        64,
        113_673_219,
    ),
    "lsun_beds256": (
        "UNet2DModel",
        dict(
            sample_size=64,
            block_out_channels=(224, 448, 672, 896),
            attention_head_dim=32,
            **unet_blocks(False, True, True, True),
        ),
        None,
        32,
        274_056_163,
    ),
    "adm_lsun256": (
        "UNet2DModel",
        dict(
            sample_size=256,
            in_channels=3,
            out_channels=6,
            block_out_channels=(256, 256, 512, 512, 1024, 1024),
            attention_head_dim=64,
            **resnet_blocks(False, False, False, True, True, True),
        ),
        None,
        64,
        552_814_086,
    ),
    # A class is a context of one token, whose table diffusers keeps outside the U-Net.
    "cin256-v2": (
        "UNet2DConditionModel",
        dict(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            block_out_channels=(192, 384, 576, 960),
            cross_attention_dim=512,
            attention_head_dim=1,  # heads, in this class
            **text_blocks(False, True, True, True),
        ),
        draw("class", 2, 1, 512),
        32,
        400_920_579,
    ),
    "sd-v1-4": (
        "UNet2DConditionModel",
        dict(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
            **text_blocks(True, True, True, False),
        ),
        draw("context", 2, 77, 768),
        32,
        859_520_964,
    ),
}
DIT_XL_2 = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=8,
    num_layers=28,
    sample_size=32,
    patch_size=2,
    num_embeds_ada_norm=1000,
)
PIXART_1024 = dict(
    sample_size=128,
    num_layers=28,
    num_attention_heads=16,
    attention_head_dim=72,
    cross_attention_dim=1152,
    caption_channels=4096,
    use_additional_conditions=True,
)
CHURCHES = dict(
    sample_size=32,
    in_channels=4,
    out_channels=4,
    block_out_channels=(192, 384, 384, 768, 768),
    attention_head_dim=24,
    **resnet_blocks(True, True, True, True, False),
)
# name of `models.first_stage`: (class, its options, parameters)
STAGES = {
    "sd": (
        "AutoencoderKL",
        dict(block_out_channels=(128, 256, 512, 512), latent_channels=4, scaling_factor=0.18215),
        83_653_863,
    ),
    "vq-f4": (
        "VQModel",
        # LDM's latents of a VQ stage are not scaled; the class's own factor is Stable Diffusion's.
        dict(
            block_out_channels=(128, 256, 512),
            latent_channels=3,
            num_vq_embeddings=8192,
            scaling_factor=1.0,
        ),
        55_322_782,
    ),
}
