"""What the configs of this folder share: a published row as a config of `experiments.evaluate`."""

import pathlib

import ml_collections

from configs._sampler import sampler
from qdiff_jax.config import parse_arg
from qdiff_jax.diffusion.protocols import PROTOCOLS, Protocol

# What stands in for a published network in smoke runs, by the beginning of its name.
_MINIATURES = {
    "ddpm": "random:miniature",
    "lsun": "random:ldm",
    "celeba256": "random:ldm",
    "ffhq256": "random:ldm",
    "cin256-v2": "random:ldm",
    "sd-v1-4": "random:sd",
    "DiT": "random:dit_latent",
    "PixArt": "random:pixart",
}
_PROMPTED = ("random:sd", "random:pixart")
_SMOKE_STEPS = 2
# How many images ADM's statistics are of: the training sets.
IMAGENET = 1_281_167
LSUN_BEDROOMS = 3_033_042


def sampler_of(protocol: Protocol) -> dict:
    """The sub-dict `sampler` of a published protocol."""
    options = protocol.sampler["options"]
    return sampler(
        name=protocol.sampler["name"],
        spacing=protocol.sampler["spacing"],
        steps=protocol.sampler["steps"],
        eta=options.get("eta", 0.0),
        guidance_scale=-1.0 if protocol.guidance_scale is None else protocol.guidance_scale,
        offset=protocol.sampler.get("grid", {}).get("offset", 0),
        final=options.get("final", ""),
        variance=options.get("variance", ""),
        guided_channels=protocol.guided_channels or 0,
    )


def row(
    arg,
    *,
    protocol: str,
    network: str,
    model: str,
    tool: str,
    data: dict,
    samples: int,
    seed: int,
    shard: int = 500,
    batch: int = 50,
    average: bool = False,
    first_stage: str = "",
    text: str = "",
    prompts: str = "",
    pictures: int = 0,
) -> ml_collections.ConfigDict:
    """The config of one row. arg: the words behind the colon, `smoke` or none.

    protocol: of `diffusion.protocols`. network, average, first_stage, text: of
    `models.load_pipeline.Parts`. data: fields of `data` beside their defaults. The rest: of
    `experiments.evaluate_config.EvaluateConfig`.
    """
    smoke = parse_arg(arg, smoke=False).smoke
    published = PROTOCOLS[protocol]
    config = ml_collections.ConfigDict()
    config.model = model
    config.bundle = ""
    config.paired = ""
    config.parts = dict(
        network=network,
        average=average,
        first_stage=first_stage,
        text=text,
        vocabulary="",  # beside the text encoder, if nothing else is said
        folder="",
    )
    config.prompts = prompts
    config.seed = seed
    config.samples, config.shard, config.batch = samples, shard, batch
    config.pictures = pictures
    config.sampler = sampler_of(published)
    config.uint8 = published.uint8
    config.network = "inception-fid"
    config.network_weights = "pt_inception-2015-12-05-6726825d.pth"
    config.tool = tool
    config.neighbours = 3
    config.extrapolate = False
    config.cache = ""
    config.lpips = dict(net="", trunk="", linear="")
    config.clip = dict(captions="", network="clip-vit-b32", weights="", vocabulary="")
    config.data = {
        "source": "",
        "pad_to": 0,
        "crop": "",
        "size": 0,
        "reference": "train",
        "floor": "",
        "limit": 0,
        "published": "",
        "published_count": 0,
        **data,
    }
    if smoke:
        _shrink(config)
    return config


def dit_row(arg, *, size: int, steps: int) -> ml_collections.ConfigDict:
    """A row of DiT-XL/2 at 256 or 512 pixels, with 50, 100 or 250 steps."""
    statistics = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}[size]
    network = f"DiT-XL-2-{size}x{size}"
    return row(
        arg,
        protocol=f"dit_{steps}_cfg1p5",
        network=network,
        model=f"{network}.pt",
        first_stage="sd-vae-ft-ema",
        tool="adm",
        data=dict(source=f"npz:{statistics}", published=statistics, published_count=IMAGENET),
        samples=10_000,
        seed=0,
        **({"shard": 100, "batch": 10} if size == 512 else {}),
    )


def _shrink(config: ml_collections.ConfigDict) -> None:
    """The same path on the family's random-weight miniature: seconds on a CPU, no file but the prompts."""
    network = config.parts.network
    miniature = next(m for name, m in _MINIATURES.items() if network.startswith(name))
    config.model = miniature
    config.parts = dict.fromkeys(("network", "first_stage", "text", "vocabulary", "folder"), "")
    config.parts.average = False
    config.samples, config.shard, config.batch = 8, 4, 4
    config.sampler.steps = _SMOKE_STEPS
    config.network, config.network_weights, config.tool = "thumbnail", "", ""
    in_pixels = miniature == "random:miniature"
    config.data.source = "synthetic:16" if in_pixels else "synthetic_rgb:16"
    config.data.crop, config.data.size = "lsun", 8 if in_pixels else 16
    config.data.published, config.data.published_count = "", 0
    if miniature in _PROMPTED:
        config.prompts = str(pathlib.Path(__file__).with_name("smoke_prompts.txt"))
        config.pictures = 2
