"""Judges a model or a bundle by many samples: nearness to real images, precision, recall, classes.

    python -m experiments.evaluate --config=configs/evaluate.py --workdir=/tmp/eval_unet \
        --config.data.source=idx:/data/fashion_mnist
    python -m experiments.evaluate --config=configs/evaluate.py:ddim50,model=dit_fashion \
        --workdir=/tmp/eval_dit --config.data.source=idx:/data/fashion_mnist

Operating points: `dpm20` (20-step DPM-Solver++(2M), guided, 10,000 samples), `ddim50` and `ddim100`
(guided, 2,000), `free50` and `free100` (the same without guidance), `main20` (the main job's sampler, for its
bundles: 20 steps on the quadratic grid without guidance), `board20` (512 samples of it, for the many bundles of
`experiments.compare`). `--config.bundle=DIR` judges a
quantized bundle instead of `model`, with its own model and step tables but the sampler given here, which
must be the one it was calibrated for. Features: the shipped classifier's; others by `--config.network=...`
and `--config.network_weights=...`, a path or `hub:OWNER/REPO/FILE`. Reference: the test set, floor: images
of the training set. Expected figures: README and the cards in qdiff_jax/models/assets. `evaluate.py:smoke`
runs in seconds on drawn shapes.
"""

import ml_collections

from configs._sampler import sampler
from qdiff_jax.config import parse_arg

POINTS = {
    "dpm20": ("dpmpp_2m", "solver_linspace", 20, True, 10_000),
    "ddim50": ("ddim", "uniform", 50, True, 2_000),
    "ddim100": ("ddim", "uniform", 100, True, 2_000),
    "main20": ("ddim", "quad", 20, False, 2_000),
    "board20": ("ddim", "quad", 20, False, 512),
    "free50": ("ddim", "uniform", 50, False, 2_000),
    "free100": ("ddim", "uniform", 100, False, 2_000),
}


def get_config(arg=None):
    arg = parse_arg(arg, point=tuple(POINTS), model="unet_fashion", guidance=3.0, smoke=False)
    name, spacing, steps, guided, samples = POINTS[arg.point]
    config = ml_collections.ConfigDict()
    config.model = arg.model
    config.bundle = ""
    config.paired = ""
    config.parts = dict(
        network="", average=False, first_stage="", text="", vocabulary="", folder=""
    )
    config.prompts = ""
    config.pictures = 0
    config.seed = 0
    config.samples = samples
    config.shard = 256 if arg.point == "board20" else 500
    config.batch = 10 if guided else 20  # what two CPU cores do fastest; hundreds on a GPU or TPU
    scale = arg.guidance if guided else -1.0
    config.sampler = sampler(name=name, spacing=spacing, steps=steps, guidance_scale=scale)
    config.network = "classifier_fashion"
    config.network_weights = ""
    config.tool = ""
    config.neighbours = 3
    config.extrapolate = False
    config.cache = ""
    config.uint8 = "round"
    config.lpips = dict(net="", trunk="", linear="")
    config.clip = dict(captions="", network="clip-vit-b32", weights="", vocabulary="")
    config.data = dict(
        source="tfds:fashion_mnist",
        pad_to=32,
        crop="",
        size=0,
        reference="test",
        floor="train",
        limit=0,
        published="",
        published_count=0,
    )
    if arg.smoke:
        config.samples, config.shard, config.batch = 40, 20, 20
        config.sampler.steps = 2
        config.sampler.guidance_scale = -1.0
        config.data.source, config.data.limit = "synthetic:64", 64
    return config
