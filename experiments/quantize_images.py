"""Real images for the methods of `experiments.quantize` that can train on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from qdiff_jax.data.images import load_images, to_unit_range
from qdiff_jax.eval.asked import Asked
from qdiff_jax.stages.noising import Images, Noising

# Methods, and parts of recipes, that train on images where there are some.
TRAINED = ("binarydm",)


@dataclasses.dataclass(frozen=True)
class TrainingImages:
    """source: images to train on in place of recorded states, as in `data.images` ("idx:DIR"), "" for none.
    split: "train" or "test"."""

    source: str = ""
    split: str = "train"


def training_images(
    config: TrainingImages, methods: Collection[str], asked: Asked
) -> Images | None:
    """The images that `methods` train on, None without a source.

    Raises ValueError where nothing trains on images, and for a network that images cannot simply be noised
    for: of latents, of prompts, a flow model, or one that does not predict the noise.
    """
    if not config.source:
        return None
    trained = sorted(set(TRAINED) & set(methods))
    diffusion = asked.diffusion
    shape = diffusion.image_shape
    faults = {
        f"of {TRAINED} no variant trains on them": not trained,
        "this network denoises latents": asked.pipeline.first_stage is not None,
        "this network reads prompts": bool(asked.prompts),
        "a flow model has no noise schedule": diffusion.schedule is None,
        "this network does not predict the noise": (
            diffusion.source["schedule"].get("prediction", "eps") != "eps"
        ),
    }
    for fault, there in faults.items():
        if there:
            raise ValueError(f"config.data.source names images, and {fault}; leave it empty.")
    made = load_images(config.source, config.split, pad_to=shape[0], num_classes=diffusion.classes)
    if made.images.shape[1:] != shape:
        raise ValueError(
            f"config.data.source has images of {made.images.shape[1:]}, and the network takes {shape}."
        )
    noising = Noising(diffusion.schedule, diffusion.null_class)
    labels = None if diffusion.classes is None else made.labels
    return Images(to_unit_range(made.images), noising, labels)
