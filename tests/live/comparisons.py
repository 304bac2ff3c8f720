"""One network of ours against one of diffusers: what both are given, and how far apart they may be."""

import dataclasses

import jax
import numpy as np

from qdiff_jax.models import first_stage
from qdiff_jax.models.families import make_module

from ..tiny_unet import QUICK
from .references import both, draw, nhwc, per_sample

TIMES = (3, 977)  # of the two samples of every batch


def unet_call(x, y):
    """For `both`: y is None, labels or a context."""
    import torch

    def call(model, dtype):
        given = [torch.tensor(x, dtype=dtype), torch.tensor(TIMES)]
        if y is not None:
            given.append(torch.tensor(y, dtype=dtype if y.dtype == np.float32 else None))
        return model(*given).sample

    return call


def dit_call(x, y):
    import torch

    def call(model, dtype):
        given = dict(timestep=torch.tensor(TIMES), class_labels=torch.tensor(y))
        return model(torch.tensor(x, dtype=dtype), **given).sample

    return call


def pixart_call(x, y):
    import torch

    def call(model, dtype):
        def tensor(name):
            return torch.tensor(y[name], dtype=dtype) if name in y else None

        return model(
            torch.tensor(x, dtype=dtype),
            tensor("context"),
            timestep=torch.tensor(TIMES),
            added_cond_kwargs={n: tensor(n) for n in ("resolution", "aspect_ratio")},
            encoder_attention_mask=tensor("mask"),
        ).sample

    return call


def as_released(model, semantics):
    """A DiT of diffusers with one embedder in every block, as released files repeat it. The official network
    is diffusers' class with the frequencies and the eps of its weights."""
    shared = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
        if semantics == "official":
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6


def ours(component, x, t, y, **changed):
    """[B, ...] in NHWC. changed: fields of the config."""
    config = dataclasses.replace(component.config, **changed)
    run = jax.jit(make_module(config).apply, compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        return np.asarray(run({"params": component.params}, nhwc(x), np.float32(t), y))


def check(out, expected, floor):
    """At t = 3 within four times the reference's own error, at 977 within that of the time table."""
    error = per_sample(out, nhwc(expected))
    assert error[0] <= 4 * floor[0], (error, floor)
    assert error[1] <= 3e-4, (error, floor)
    assert expected.std() > 0.1


def check_first_stage(model, component, size):
    """Encoder and decoder at images of `size`, each within four times the reference's own error."""
    import torch

    config, params = component.config, component.params
    image = draw("live image", 2, 3, *size)
    latents = draw("live latents", 2, config.embed_dim, *(side // config.factor for side in size))

    def encoded(model, dtype):
        out = model.encode(torch.tensor(image, dtype=dtype))
        return out.latents if config.codes else out.latent_dist.mean

    def decoded(model, dtype):
        return model.decode(torch.tensor(latents, dtype=dtype)).sample

    with jax.default_matmul_precision("highest"):
        z = first_stage.encode(config, params, nhwc(image)) / config.scale_factor
        pixels = first_stage.decode(config, params, nhwc(latents) * config.scale_factor)
    for out, call in ((z, encoded), (pixels, decoded)):
        expected, floor = both(model, call)
        error = per_sample(np.asarray(out), nhwc(expected))
        # The scale that goes in and out again rounds twice more.
        assert (error <= 4 * floor + 1e-6).all(), (error, floor)
        assert expected.std() > 0.1
