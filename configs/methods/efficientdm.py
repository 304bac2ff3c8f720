"""EfficientDM: low-rank updates rounded together with the weights, learned from the teacher's own trajectories.

    python -m experiments.quantize --config=configs/methods/efficientdm.py:w4a4 --workdir=/tmp/efficientdm

Paper: EfficientDM (He et al. 2024, arXiv:2310.03270). Words behind the colon: bits `w4a4` (default), `w8a8`,
`w4a8`, `w2a8`, `w2a4`, `w6a6`, `w8a4`, `w4a32`; `model=unet` (default), `model=dit`; `policy=common` (default)
or `policy=official` (the code's table: embedding, first and last layer at 8 bits, shortcuts, downsampling and
attention products in full precision); `variant=fixed` (default) or `variant=faithful` (the code's shared
delta_w and float zero points); `base=full_precision` starts the updates from the unrounded weights;
`ranges=minmax` (the paper) or `ranges=mse` of weights. For ablations: `untuned` (ranges and nothing more),
`no_lora` (scales alone learn), `no_talsq` (one learned activation scale for all steps), `rates=mean` (one rate
for all layers, the mean of the scale-aware ones), `source=cached` (the recorded calibration trajectories) and
with it `target=noise` (ordinary diffusion training on what they end in, in place of distillation) and
`order=trajectory` (all of a batch at one step, the noisiest first) or `order=mixed` (every sample at a step of
its own; the default of `target=noise`): set the same order on both sides to compare targets alone.
Round-to-nearest stands beside it. The paper's sizes: 16,000 steps, batch 2, trajectories of 100 steps with eta
1, whose tables are taken over to the sampler's 20 steps: hours on a CPU. `laptop` trains on the sampler's own
timesteps, 600 steps of batch 8 at rates that are 125 times (updates) and 10 times (tables) the paper's; `smoke`
runs in seconds (`efficientdm.py:smoke`). Every field of `EfficientDMConfig` is a key:
`--config.efficientdm.training.remat=True` recomputes blocks in place of keeping them. Guided training:
`--config.sampler.guidance_scale=3` and, as published, `--config.efficientdm.source.guidance_scale=1.5`.

Expected of `efficientdm.py:w4a4,laptop`: an eps error well below that of round-to-nearest. On the DiT, 300
steps of the same rates under SVDQuant's table leave 0.040 (README, "Recipes across papers"; the command and the
commit are there).
"""

import dataclasses

from configs.methods._start import parse, start
from qdiff_jax.methods.efficientdm import EfficientDMConfig
from qdiff_jax.observe.sources import ORDERS, SourceConfig
from qdiff_jax.stages.qalora import QALoRAConfig

BITS = ("w4a4", "w8a8", "w4a8", "w2a8", "w2a4", "w6a6", "w8a4", "w4a32")


def get_config(arg=None):
    arg = parse(
        arg,
        bits=BITS,
        policy=("common", "official"),
        variant=("fixed", "faithful"),
        base=("quantized", "full_precision"),
        ranges=("", "minmax", "mse"),
        untuned=False,
        no_lora=False,
        no_talsq=False,
        rates=("scale_aware", "mean"),
        source=("online", "cached"),
        target=("teacher", "noise"),
        order=("", *ORDERS),
    )
    config = start(arg, rtn="rtn", efficientdm="efficientdm")
    if arg.policy == "official":
        config.policy = "official:efficientdm"
    config.activations.observer = "mse"
    own = dict(
        steps=16_000,
        lora=not arg.no_lora,
        lora_divisor=2500.0,
        scale_lr=1e-6,
        activation_lr=5e-4,
        weight_method="minmax",
        variant=arg.variant,
        weighted=False,
    )
    source = dict(
        kind=arg.source,
        batch_size=2,
        sampling_steps=100,
        eta=1.0,
        guidance_scale=-1.0,
        target=arg.target,
        order=arg.order or ("mixed" if arg.target == "noise" else "trajectory"),
    )
    student = dict(rank=32, base=arg.base, talsq=not arg.no_talsq, rates=arg.rates)
    if arg.laptop:
        # So few steps need faster rates and better ranges to start from.
        own.update(
            steps=600,
            lora_divisor=20.0,
            scale_lr=1e-5,
            activation_lr=5e-3,
            weight_method="mse",
        )
        source.update(batch_size=8, sampling_steps=0)
    if arg.smoke:
        own.update(steps=8)
        source.update(batch_size=2, sampling_steps=0)
        student.update(rank=2)
    if arg.ranges:
        own.update(weight_method=arg.ranges)
    if arg.untuned:
        own.update(steps=0)
    made = EfficientDMConfig(**own, source=SourceConfig(**source), student=QALoRAConfig(**student))
    config.efficientdm = dataclasses.asdict(made)
    return config
