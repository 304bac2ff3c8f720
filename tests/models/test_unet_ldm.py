"""The U-Nets of latent and guided diffusion: published sizes, numbers, conditions, block program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.models.families import example_inputs, make_module, parameter_shapes, program_of
from qdiff_jax.models.port.strict import our_place
from qdiff_jax.models.port.unet_ldm import native_table
from qdiff_jax.models.port.unet_ldm_diffusers import from_diffusers
from qdiff_jax.models.program import (
    check_order,
    temporal_nodes,
    units_with_projections,
    units_with_time_block,
)
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.models.unet_ldm_published import PUBLISHED
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.skip_split import skip_boundaries

from ..tiny_unet import QUICK
from .ldm_cases import CONFIGS, meta, nhwc, published_shapes, state_dict, stored

# Parameters and tensors of the released files; cin256-v2 without and with its table of classes.
SIZES = {
    "lsun_beds256": (274_056_163, 368),
    "lsun_churches256": (294_966_916, 520),
    "cin256-v2": (400_920_579 + 1001 * 512, 688 + 1),
    "sd-v1-4": (859_520_964, 686),
}
# What the configs and model flags of the releases say: side, channels in and out, width, multipliers,
# downsampling with attention, residual blocks, heads, channels a head, new order, scale-shift and resampling
# residual blocks, classes, context.
_BEDS = (64, 3, 3, 224, (1, 2, 3, 4), {8, 4, 2}, 2, None, 32, False, False, None, None)
_LSUN = (256, 3, 6, 256, (1, 1, 2, 2, 4, 4), {8, 16, 32}, 2, None, 64, False, True, None, None)
RELEASED = {
    "lsun_beds256": _BEDS,
    "celeba256": _BEDS,
    "ffhq256": _BEDS,
    "lsun_churches256": (
        *(32, 4, 4, 192, (1, 2, 2, 4, 4), {1, 2, 4, 8}, 2),
        *(8, None, False, True, None, None),
    ),
    "cin256-v2": (
        *(64, 3, 3, 192, (1, 2, 3, 5), {8, 4, 2}, 2),
        *(1, None, False, False, 1000, (512, 1)),
    ),
    "sd-v1-4": (
        *(64, 4, 4, 320, (1, 2, 4, 4), {4, 2, 1}, 2),
        *(8, None, False, False, None, (768, 77)),
    ),
    "adm_imagenet64": (
        *(64, 3, 6, 192, (1, 2, 3, 4), {2, 4, 8}, 3),
        *(None, 64, True, True, 1000, None),
    ),
    "adm_imagenet128": (
        *(128, 3, 6, 256, (1, 1, 2, 3, 4), {4, 8, 16}, 2),
        *(4, None, False, True, 1000, None),
    ),
    "adm_imagenet256": (*_LSUN[:-2], 1000, None),
    "adm_imagenet256_uncond": _LSUN,
    "adm_imagenet512": (
        *(512, 3, 6, 256, (0.5, 1, 1, 2, 2, 4, 4), {16, 32, 64}, 2),
        *(None, 64, False, True, 1000, None),
    ),
    "adm_lsun256": _LSUN,
}
# Millions, as Dhariwal and Nichol print them (tables 4, 11 and 12).
GUIDED = {
    "adm_imagenet64": 296,
    "adm_imagenet128": 422,
    "adm_imagenet256": 554,
    "adm_imagenet512": 559,
    "adm_lsun256": 552,
}


def test_the_released_configs():
    """Also what the number of parameters does not show: heads, order, side."""
    found = {}
    for name, c in PUBLISHED.items():
        context = None if c.context_dim is None else (c.context_dim, c.context_length)
        assert c.scale_shift_norm == c.resblock_updown
        assert (c.groups, c.transformer_depth) == (32, 1)
        found[name] = (
            *(c.resolution, c.in_channels, c.out_channels, c.channels, c.multipliers),
            *(set(c.attention_downsampling), c.res_blocks, c.heads, c.head_channels),
            *(c.new_attention_order, c.scale_shift_norm, c.num_classes, context),
        )
    assert found == RELEASED


@pytest.mark.parametrize("name", SIZES)
def test_published_models_have_the_published_parameters(name):
    config = PUBLISHED[name]
    leaves = jax.tree.leaves(shapes := published_shapes(name))
    assert (sum(leaf.size for leaf in leaves), len(leaves)) == SIZES[name]
    assert {node.name for node in program_of(config)} == set(shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion_has_the_published_sizes(name):
    shapes = published_shapes(name)
    millions = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert abs(millions - GUIDED[name]) < 1
    if PUBLISHED[name].num_classes is not None:
        assert shapes["time_embed"]["label_emb"]["embedding"].shape[0] == 1000  # no null class


# The slow ones differ from the others in the number of heads and in where the context comes from.
@pytest.mark.parametrize(
    "name",
    [
        "ldm4",
        "guided",
        "text",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("churches", "classes")),
    ],
)
def test_parity_with_the_reference_implementation(name):
    config, case = CONFIGS[name], stored()
    t = np.float32(meta()["times"])
    y = case.get(f"{name}/in/y")
    if name == "classes":
        y = np.int32([1, config.num_classes])  # a class and the null class, by their context there
    elif name == "guided":
        y = y.astype(np.int32)
    params = from_diffusers(state_dict(name), config)
    run = jax.jit(make_module(config).apply, compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        out = run({"params": params}, nhwc(case[f"{name}/in/x"]), t, y)
    expected = case[f"{name}/out/sample_f64"]
    floor = np.abs(case[f"{name}/out/sample"] - expected)[0].max()  # the reference's own, at t = 3
    error = np.abs(np.asarray(out) - nhwc(expected)).max(axis=(1, 2, 3))
    # Late steps carry the float32 rounding of cos(t f), which no two frameworks share.
    assert (t[0], t[1]) == (3, 977)
    assert error[0] <= 4 * floor, (error, floor)
    assert error[1] <= 3e-4, (error, floor)


def test_both_orders_of_attention_are_one_network():
    """diffusers has q, k and v apart: fused in either order, read in the same, they give one output."""
    config = dataclasses.replace(CONFIGS["ldm4"], head_channels=8)
    other = dataclasses.replace(config, new_attention_order=True)
    params = {c: from_diffusers(state_dict("ldm4"), c) for c in (config, other)}
    kernels = [params[c]["middle_block_1"]["qkv"]["kernel"] for c in (config, other)]
    assert not np.array_equal(*kernels)
    np.testing.assert_array_equal(*(np.sort(kernel, axis=1) for kernel in kernels))
    x, t = nhwc(stored()["ldm4/in/x"])[:1], np.float32([3])

    def run(network, weights):
        apply = jax.jit(make_module(network).apply, compiler_options=QUICK)
        return np.asarray(apply({"params": params[weights]}, x, t))

    same, new, mixed = run(config, config), run(other, other), run(config, other)
    np.testing.assert_allclose(new, same, rtol=0, atol=1e-5 * np.abs(same).max())
    assert np.abs(mixed - same).max() > 1e-3 * np.abs(same).max()


def test_a_transformer_of_two_blocks():
    config = dataclasses.replace(CONFIGS["text"], transformer_depth=2)
    program = program_of(config)
    reads = {node.name: node.reads for node in program}
    name = "input_blocks_3_1"
    assert reads[f"{name}_transformer_blocks_1"] == (f"{name}_transformer_blocks_0", "y")
    assert reads[f"{name}_proj_out"] == (f"{name}_transformer_blocks_1", "input_blocks_3_0")
    one, two = parameter_shapes(CONFIGS["text"]), parameter_shapes(config)
    added = {
        key.replace("_transformer_blocks_0", "_transformer_blocks_1")
        for key in one
        if "_transformer_blocks_0" in key
    }
    assert added
    assert set(two) == set(one) | added
    # Names of files, the second block's too.
    keys = {
        f"input_blocks.3.1.transformer_blocks.{i}.attn2.to_k.weight": f"{name}_transformer_blocks_{i}"
        for i in range(2)
    }
    for key, block in keys.items():
        assert our_place(native_table(config), key)[0] == f"{block}/attn2_to_k/kernel"


def test_numbers_as_the_condition_are_added_to_the_time_embedding():
    """h(t) + dense(silu(dense(y))), by hand; y = 0 is not the same as no condition."""
    config = dataclasses.replace(CONFIGS["guided"], num_classes=None, vector_dim=2)
    node = next(node for node in program_of(config) if node.name == "time_embed")
    assert node.reads == ("t", "y")
    assert example_inputs(config, 3)[2].shape == (3, 2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        parameter_shapes(config)["time_embed"],
    )
    assert set(params) == {"dense_0", "dense_2", "label_emb_0", "label_emb_2"}
    t, y = np.float32([3]), np.float32([[0.5, -2.0]])

    def layer(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def embedded(y):
        return np.asarray(node.module.apply({"params": params}, t, y))

    def silu(x):
        return x / (1 + np.exp(-x))

    added = layer("label_emb_2", silu(layer("label_emb_0", y)))
    added -= layer("label_emb_2", silu(layer("label_emb_0", 0 * y)))
    np.testing.assert_allclose(embedded(y) - embedded(0 * y), added, rtol=1e-4, atol=1e-3)
    keys = ("label_emb.0.weight", "label_emb.2.bias")
    places = [our_place(native_table(config), key)[0] for key in keys]
    assert places == ["time_embed/label_emb_0/kernel", "time_embed/label_emb_2/bias"]
    with pytest.raises(ValueError, match="vector_dim=2 stands alone: .* num_classes is 5"):
        dataclasses.replace(CONFIGS["guided"], vector_dim=2)
    x, t, _ = example_inputs(config)
    for y in (None, jnp.zeros((1, 3)), jnp.zeros((1,))):
        with pytest.raises(ValueError, match=r"conditional on numbers: pass y \[B, 2\] float32"):
            jax.eval_shape(make_module(config).init, jax.random.key(0), x, t, y)


def test_a_condition_that_is_missing_or_of_another_kind_is_refused():
    for name, y, match in (
        ("guided", None, r"conditional on 5 classes: pass y \[B\] int32\."),
        ("classes", None, r"conditional on 5 classes: .* with 5 for the null class"),
        ("text", None, r"conditional on a context: pass y \[B, L, 24\] float32, not None"),
        ("text", jnp.zeros((1, 7, 16)), r"not \(1, 7, 16\)"),
        ("text", jnp.zeros((1,), jnp.int32), r"not \(1,\)"),
    ):
        x, t, _ = example_inputs(CONFIGS[name])
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(make_module(CONFIGS[name]).init, jax.random.key(0), x, t, y)


def test_example_inputs_follow_the_condition():
    kinds = {name: example_inputs(config, 2)[2] for name, config in CONFIGS.items()}
    assert kinds["ldm4"] is None
    assert kinds["churches"] is None
    assert (kinds["text"].shape, kinds["text"].dtype) == ((2, 7, 24), jnp.float32)
    for name in ("guided", "classes"):
        assert (kinds[name].shape, kinds[name].dtype) == ((2,), jnp.int32)


def test_blocks_of_the_program():
    program = program_of(CONFIGS["classes"])
    reads = {node.name: node.reads for node in program}
    assert reads["input_blocks_3_0"] == ("input_blocks_2_0", "input_blocks_3_0_emb_layers_1")
    assert reads["input_blocks_3_1_transformer_blocks_0"] == (
        "input_blocks_3_1_proj_in",
        "class_embedder",
    )
    assert reads["input_blocks_3_1_proj_out"] == (
        "input_blocks_3_1_transformer_blocks_0",
        "input_blocks_3_0",
    )
    assert reads["output_blocks_0_0"][:2] == ("middle_block_2", "input_blocks_3_1_proj_out")
    assert reads["output_blocks_1_2"] == ("output_blocks_1_1_proj_out",)  # the upsampling
    # The table of classes depends on the label alone and is no temporal feature.
    temporal = temporal_nodes(program)
    assert temporal[0] == "time_embed"
    assert set(temporal[1:]) == {name for name in reads if name.endswith("_emb_layers_1")}
    for grouping in (units_with_projections, units_with_time_block):
        check_order(program, grouping(program), ("x", "t", "y"))


def test_what_reads_a_skip_is_found():
    config = CONFIGS["text"]
    found = skip_boundaries(
        program_of(config),
        parameter_shapes(config),
        jax.eval_shape(lambda: example_inputs(config)),
    )
    assert found == {
        "output_blocks_0_0/in_layers_2": 64,
        "output_blocks_0_0/skip_connection": 64,
        "output_blocks_1_0/in_layers_2": 64,
        "output_blocks_1_0/skip_connection": 64,
        "output_blocks_2_0/in_layers_2": 64,
        "output_blocks_2_0/skip_connection": 64,
        "output_blocks_3_0/in_layers_2": 32,
        "output_blocks_3_0/skip_connection": 32,
    }


def test_every_product_is_a_site():
    config = CONFIGS["text"]
    sites = {site.name: site for site in list_sites(make_module(config), *example_inputs(config))}
    block = "middle_block_1_transformer_blocks_0"
    found = {name.removeprefix(f"{block}/") for name in sites if name.startswith(block)}
    layers = {f"attn{i}_to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out_0")}
    products = {f"attn{i}_{part}" for i in (1, 2) for part in ("qk", "pv")}
    assert found == layers | products | {"ff_net_0_proj", "ff_net_2"}
    # [B, heads, N, d] against the context's [B, heads, L, d].
    assert sites[f"{block}/attn2_qk"].lhs_shape == (1, 4, 16, 16)
    assert sites[f"{block}/attn2_qk"].rhs_shape == (1, 4, 7, 16)


def test_bfloat16_models_answer_in_float32():
    config = dataclasses.replace(CONFIGS["text"], dtype="bfloat16")
    params = parameter_shapes(config)
    out = jax.eval_shape(make_module(config).apply, {"params": params}, *example_inputs(config))
    assert (out.dtype, out.shape[-1]) == (jnp.float32, config.out_channels)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="heads or head_channels, one of them: they are 8 and 32"):
        UNetLDMConfig(heads=8)
    with pytest.raises(ValueError, match="groups=32 must divide every width, 48 too"):
        UNetLDMConfig(channels=48)
    with pytest.raises(ValueError, match="head_channels=48 must divide every width with attention"):
        UNetLDMConfig(head_channels=48)
    for name in ("heads", "head_channels"):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
            UNetLDMConfig(**{"head_channels": None, name: 0})
    with pytest.raises(ValueError, match=r"attention_downsampling has \[16, 3\], and the 4 levels"):
        UNetLDMConfig(attention_downsampling=(16, 8, 3))
    with pytest.raises(ValueError, match="transformer_depth=2 without a context_dim"):
        UNetLDMConfig(transformer_depth=2)
    with pytest.raises(ValueError, match="transformer_depth must be at least 1, got 0"):
        UNetLDMConfig(transformer_depth=0, context_dim=8)
    with pytest.raises(ValueError, match="new_attention_order with a context_dim"):
        UNetLDMConfig(new_attention_order=True, context_dim=8)
    with pytest.raises(ValueError, match="resolution=12 must be divisible by 8"):
        UNetLDMConfig(resolution=12)
