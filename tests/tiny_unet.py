"""Two small U-Nets shared by the tests of the core, with random weights and hand-made quantizers.

Nothing is compiled to make them: parameters come from shapes, codes from NumPy.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdiff_jax.export.qtensor import from_codes
from qdiff_jax.models.program import Node
from qdiff_jax.models.unet_ddpm import UNetConfig, UNetDDPM, unet_program
from qdiff_jax.named_policies import policy
from qdiff_jax.policy import SitePlan, make_plan
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import Site, SiteQuant, list_sites, nest_sites

# Every kind of block: two levels, up- and downsampling, shortcuts, attention in the middle.
TINY = UNetConfig(
    channels=8, multipliers=(1, 2), res_blocks=1, attention_resolutions=(), resolution=8, groups=4
)
# One level: the least that has skips, attention and time projections.
SMALL = UNetConfig(
    channels=8, multipliers=(1,), res_blocks=1, attention_resolutions=(), resolution=4, groups=4
)
QUICK = {"xla_backend_optimization_level": 0}  # halves the seconds of compiling a network
STEPS = (900.0, 500.0, 100.0)  # what the step tables below are calibrated for


class Network(NamedTuple):
    module: nn.Module
    program: tuple[Node, ...]
    params: dict
    sites: tuple[Site, ...]


def inputs(config: UNetConfig, batch: int, seed: int = 0):
    """x [batch, H, W, C] and t [batch], cycling through STEPS."""
    shape = (batch, config.resolution, config.resolution, config.in_channels)
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return x, np.resize(np.float32(STEPS), batch)


def random_params(shapes, seed: int = 0) -> dict:
    """Parameters of the given shapes, scaled so that activations stay near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        z = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(z / np.float32(np.sqrt(np.prod(leaf.shape[:-1]))))
        return jnp.asarray(1.0 + 0.2 * z if name == "scale" else 0.1 * z, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def network(config: UNetConfig) -> Network:
    module = UNetDDPM(config)
    x, t = inputs(config, 1)
    y = None if config.num_classes is None else np.zeros(1, np.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, y)["params"]
    sites = list_sites(module, x, t, y)
    return Network(module, unet_program(config), random_params(shapes), sites)


@functools.cache
def forward(config: UNetConfig):
    """The network jitted: (variables, x, t) -> eps. One function object, hence one compile cache."""
    return jax.jit(network(config).module.apply, compiler_options=QUICK)


def qparams(spec, bits_or_codes, lo, hi) -> QParams:
    """Affine QParams of a range given as numbers or arrays, made in NumPy."""
    qmin, qmax = bits_or_codes
    lo, hi = np.minimum(np.float32(lo), 0), np.maximum(np.float32(hi), 0)
    scale = (hi if spec.symmetric else hi - lo) / np.float32(qmax - qmin)
    zero = np.zeros_like(scale) if spec.symmetric else qmin - np.round(lo / scale)
    leaves = (scale, zero, qmin, qmax)
    return QParams(*(jnp.asarray(leaf, jnp.float32) for leaf in leaves), spec)


def nearest(kernel, grid: QParams, bits: int):
    """Packed nearest codes of a kernel under per-channel QParams."""
    scale, zero, qmin, qmax = (np.asarray(leaf) for leaf in jax.tree.leaves(grid))
    codes = np.clip(np.round(np.asarray(kernel) / scale) + zero, qmin, qmax)
    return from_codes(codes.astype(np.int32), grid, bits)


def plan_of(config: UNetConfig, name: str = "common", w_bits: int = 8, a_bits: int = 8) -> SitePlan:
    sites = network(config).sites
    return make_plan(sites, policy(name, sites, w_bits, a_bits))


def kernel_of_site(params, name: str):
    for part in name.split("/"):
        params = params[part]
    return params["kernel"]


def quantized(
    config: UNetConfig,
    w_bits: int = 8,
    a_bits: int = 8,
    *,
    packed: bool = True,
    execute: bool = False,
    tables: bool = False,
) -> dict:
    """A quant tree for the common policy, activations within +-4 (softmax within 1).

    packed: weights as QTensors, else as QParams. tables: activations by step over STEPS, each row with
    another range.
    """
    net = network(config)

    def activation(entry):
        lo, hi = (0.0, 1.0) if entry.operand == "softmax" else (-4.0, 4.0)
        if not tables:
            return qparams(entry.spec, entry.codes, lo, hi)
        rows = [qparams(entry.spec, entry.codes, lo * f, hi * f) for f in (1.0, 0.7, 0.5)]
        table = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)
        return TimeIndexed(table, jnp.asarray(STEPS, jnp.float32), "step")

    flat = {}
    for site in net.sites:
        entries = plan_of(config, "common", w_bits, a_bits).of(site.name)
        left, right = (entries[role] for role in site.operands)
        if site.has_weight:
            kernel = np.asarray(kernel_of_site(net.params, site.name)).reshape(
                -1, site.rhs_shape[-1]
            )
            rhs = qparams(right.spec, right.codes, kernel.min(0), kernel.max(0))
            if packed:
                rhs = nearest(kernel_of_site(net.params, site.name), rhs, right.bits)
        else:
            rhs = activation(right)
        flat[site.name] = SiteQuant(
            activation(left), rhs, execute=execute, product=not site.has_weight
        )
    return nest_sites(flat)
