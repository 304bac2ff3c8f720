"""A small diffusion transformer for the tests of the core, as `tiny_unet` has small U-Nets.

Conditional on a class, two blocks, and maps of the same shape as the U-Net of the methods' common suite.
"""

import functools

import jax
import numpy as np

from qdiff_jax.models.dit import DiT, DiTConfig, dit_program
from qdiff_jax.sites import list_sites

from .tiny_unet import QUICK, STEPS, Network, random_params

CONFIG = DiTConfig(
    width=16,
    depth=2,
    heads=2,
    patch=2,
    resolution=4,
    in_channels=3,
    num_classes=3,
    learn_sigma=False,
)


def inputs(config: DiTConfig, batch: int, seed: int = 0):
    """x [batch, H, W, C] and t [batch], cycling through STEPS."""
    shape = (batch, config.resolution, config.resolution, config.in_channels)
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return x, np.resize(np.float32(STEPS), batch)


@functools.cache
def network(config: DiTConfig) -> Network:
    module = DiT(config)
    x, t = inputs(config, 1)
    y = None if config.num_classes is None else np.zeros(1, np.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, y)["params"]
    sites = list_sites(module, x, t, y)
    return Network(module, dit_program(config), random_params(shapes), sites)


@functools.cache
def forward(config: DiTConfig):
    """The network jitted: (variables, x, t, y) -> eps. One function object, hence one compile cache."""
    return jax.jit(network(config).module.apply, compiler_options=QUICK)
