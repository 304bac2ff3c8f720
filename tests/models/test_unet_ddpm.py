"""The DDPM U-Net: the published model's size, its numbers, and what it refuses."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.port.unet_ddpm import from_native
from qdiff_jax.models.unet_ddpm import (
    Downsample,
    UNetConfig,
    UNetDDPM,
    Upsample,
    group_norm,
    timestep_embedding,
    unet_program,
)

from ..tiny_unet import QUICK, SMALL, forward, inputs, network, quantized
from .ddpm_native_keys import seeded

CASES = pathlib.Path(__file__).parents[1] / "parity" / "cases"
CLASSES = dataclasses.replace(SMALL, num_classes=5)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return group_norm("norm", 32, x)


def stored(name):
    with np.load(CASES / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def shapes_of(config):
    x, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 32, 32, 3), (1,)))
    return jax.eval_shape(UNetDDPM(config).init, jax.random.key(0), x, t)["params"]


def nhwc(x):
    return np.transpose(x, (0, 2, 3, 1))


def test_the_cifar_model_has_the_published_parameters():
    shapes = shapes_of(UNetConfig.cifar10())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 35_746_307
    assert len(jax.tree.leaves(shapes)) == 328
    # The program's blocks are the parameter tree's, which is what units are cut from.
    assert {node.name for node in unet_program(UNetConfig.cifar10())} == set(shapes)


def test_parity_with_the_reference_implementation():
    case = stored("native_ddpm_pesser")
    meta = json.loads(str(case["meta"]))
    native = meta["native_config"]
    config = UNetConfig(
        channels=native["ch"],
        multipliers=tuple(native["ch_mult"]),
        res_blocks=native["num_res_blocks"],
        attention_resolutions=tuple(native["attn_resolutions"]),
        resolution=native["resolution"],
    )
    state_dict = {k: seeded(k, s, meta["seed"]) for k, s in meta["manifest"].items()}
    params = from_native(state_dict, config)
    run = jax.jit(UNetDDPM(config).apply, compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        eps = run({"params": params}, nhwc(case["in/x"]), case["in/t"].astype(np.float32))
    error = np.abs(np.asarray(eps) - nhwc(case["out/sample_f64"])).max(axis=(1, 2, 3))
    # Late steps carry the float32 rounding of sin(t f), which no two frameworks share.
    tolerance = np.where(case["in/t"] <= 10, 3e-5, 3e-4)
    assert sorted(tolerance) == [3e-5, 3e-4]
    assert (error < tolerance).all(), error


def test_single_operations_match_the_reference():
    case = stored("ops_ddpm")
    kernel = np.transpose(case["in/conv_w"], (2, 3, 1, 0))[..., :8]  # Downsample keeps its width
    params = {"conv": {"kernel": kernel, "bias": case["in/conv_b"][:8]}}
    x = nhwc(case["in/conv_x"])
    down = Downsample().apply({"params": params}, x)
    np.testing.assert_allclose(down, nhwc(case["out/conv3x3_s2_asym01"])[..., :8], atol=3e-6)

    identity = np.zeros((3, 3, 8, 8), np.float32)
    identity[1, 1] = np.eye(8)
    params = {"conv": {"kernel": identity, "bias": np.zeros(8, np.float32)}}
    up = Upsample().apply({"params": params}, x)
    np.testing.assert_array_equal(up, nhwc(case["out/nearest2x"]))

    weights = {"params": {"norm": {"scale": case["in/gn_w"], "bias": case["in/gn_b"]}}}
    norm = Norm()
    for kind in (
        "small",
        "offset",
    ):  # a wrong eps shows on the first, a fast variance on the second
        y = norm.apply(weights, nhwc(case[f"in/gn_x_{kind}"]))
        expected = nhwc(case[f"out/groupnorm32_eps1e-06_{kind}_f64"])
        np.testing.assert_allclose(y, expected, atol=5e-5)

    table = timestep_embedding(jnp.asarray(case["in/t"], jnp.float32), 128)
    np.testing.assert_allclose(table, case["out/temb_d128_flip0_shift1"], atol=6e-5)


def test_fractional_timesteps_lie_between_whole_ones():
    low, middle, high = timestep_embedding(jnp.float32([10.0, 10.5, 11.0]), 8)[:, 5]
    assert min(low, high) < middle < max(low, high)


def test_labels_of_a_conditional_model():
    net = network(CLASSES)
    x, t = inputs(CLASSES, 2)
    one, null = (
        forward(CLASSES)({"params": net.params}, x, t, jnp.full((2,), label, jnp.int32))
        for label in (1, 5)
    )
    assert np.isfinite(null).all()  # num_classes itself is the null class
    assert np.abs(one - null).max() > 1e-3
    with pytest.raises(ValueError, match="conditional on 5 classes: pass y"):
        net.module.apply({"params": net.params}, x, t)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    x, t = inputs(config, 2)
    variables = {"params": network(config).params}
    expected = forward(SMALL)({"params": network(SMALL).params}, x, t)
    eps = forward(config)(variables, x, t)
    assert eps.dtype == jnp.float32
    error = np.abs(eps - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.05  # rounded to 8 bits of mantissa, and no worse
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("form", ["packed", "ranges", "execute"])
def test_a_quantized_bfloat16_model_traces(form):
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    quant = quantized(config, packed=form != "ranges", execute=form == "execute")
    x, t = inputs(config, 2)
    out = jax.eval_shape(
        network(config).module.apply, {"params": network(config).params, "quant": quant}, x, t
    )
    assert out.dtype == jnp.float32


def test_widths_may_be_no_multiples_of_the_first():
    # 352 * (480 / 352) is a little below 480.
    config = dataclasses.replace(SMALL, channels=352, multipliers=(1, 480 / 352), groups=32)
    shapes = parameter_shapes(config)
    assert config.widths == (352, 480)
    assert shapes["down_1_block_0"]["conv1"]["kernel"].shape == (3, 3, 352, 480)


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="groups=32 must divide every width, and 48 is not"):
        UNetConfig(channels=48)
    with pytest.raises(ValueError, match="multiplier 1.2578 is no whole number"):
        UNetConfig(multipliers=(1, 1.2578))
    with pytest.raises(ValueError, match="resolution=30 must be divisible by 8"):
        UNetConfig(resolution=30)
