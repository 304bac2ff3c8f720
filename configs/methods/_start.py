"""What the configs of this folder share: their words for bits, model and size, and where they start from."""

import pathlib

import ml_collections

from configs import quickstart
from configs.eval._published import sampler_of
from qdiff_jax.config import parse_arg
from qdiff_jax.diffusion.protocols import PROTOCOLS

MODELS = {"unet": "unet_fashion", "dit": "dit_fashion"}
# For the configs of methods that reconstruct weights: the papers' way, or solved without steps.
ROUNDING = {"rounding": ("adaround", "closed_form")}
MINIATURES = {
    "unet": "random:miniature",
    "dit": "random:dit",
    "ldm": "random:ldm",
    "sd": "random:sd",
}
# Published pipelines, for the configs that name them: the network, and the row whose sampler is taken.
PIPELINES = {
    "ldm": ("cin256-v2", "imagenet_20_cfg3"),
    "sd": ("sd-v1-4", "sd14_plms50_cfg7p5"),
}
PROMPTS = pathlib.Path(__file__).parents[1] / "eval" / "smoke_prompts.txt"
BITS = ("w4a8", "w8a8", "w4a4", "w4a32", "w6a6", "w8a4")


def parse(arg, bits=BITS, model=tuple(MODELS), **own):
    """The words behind the colon, with a method's own. bits, model: what there is, the default first."""
    return parse_arg(
        arg,
        bits=bits,
        model=model,
        laptop=False,
        smoke=False,
        **own,
    )


def start(arg, **variants):
    """The main job's config with the model, the size and the bits asked for.

    variants: {name: method}; names get the bits behind them. Papers' sizes unless `laptop` or `smoke`.
    """
    words = "smoke" if arg.smoke else None if arg.laptop else "paper"
    config = ml_collections.ConfigDict(quickstart.get_config(words))
    if arg.laptop and not arg.smoke:
        # As many steps from half the samples each: half the time of the main job's.
        config.reconstruct.batch_size = 16
    config.rounding = getattr(arg, "rounding", "adaround")
    if arg.model in PIPELINES:
        _latent(config, arg.smoke, *PIPELINES[arg.model])
    config.model = MINIATURES[arg.model] if arg.smoke else MODELS.get(arg.model, "")
    w_bits, a_bits = (int(part) for part in arg.bits[1:].split("a"))
    config.variants = {
        f"{name}_{arg.bits}": dict(method=method, w_bits=w_bits, a_bits=a_bits)
        for name, method in variants.items()
    }
    return config


def _latent(config, smoke, network, row):
    """A published pipeline and the sampler of its figures; where it is, the command says."""
    steps = config.sampler.steps
    config.sampler = sampler_of(PROTOCOLS[row])
    config.classifier = ""
    if smoke:
        config.sampler.steps = steps
        config.prompts = str(PROMPTS) if network == "sd-v1-4" else ""
    else:
        config.parts.network = network
        config.activations.batch_size = 32  # PLMS calls the network once more than it has steps
