"""PixArt: the published models' size, the numbers of the reference, and the conditions it takes."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free, evaluate
from qdiff_jax.models.families import (
    example_inputs,
    make_module,
    model_json,
    parameter_shapes,
    parse_model,
    program_of,
)
from qdiff_jax.models.pixart import PixArt, PixArtConfig, positions
from qdiff_jax.models.port.pixart import (
    PUBLISHED,
    from_diffusers,
    from_official,
    null_caption,
)
from qdiff_jax.models.program import check_order, temporal_nodes, units_with_time_block
from qdiff_jax.models.registry import predictor
from qdiff_jax.named_policies import policy
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.timed import step_context
from qdiff_jax.sites import list_sites

from ..tiny_unet import QUICK
from .ddpm_native_keys import seeded

CASE = pathlib.Path(__file__).parents[1] / "parity" / "cases" / "pixart.npz"
SIGMA = PixArtConfig(
    width=48,
    depth=2,
    heads=2,
    resolution=8,
    interpolation=1.0,
    caption_dim=20,
    caption_length=5,
)
CONFIGS = {
    "alpha": dataclasses.replace(SIGMA, interpolation=2.0, micro_conditions=True),
    "sigma": SIGMA,
}


@functools.cache
def case(name):
    with np.load(CASE, allow_pickle=False) as stored:
        meta = json.loads(str(stored["meta"]))
        own = {
            key.removeprefix(name + "/"): stored[key]
            for key in stored.files
            if key.startswith(name + "/")
        }
        return own, meta


def official(name):
    _, meta = case(name)
    return {k: seeded(k, s, meta["seed"]) for k, s in meta[name]["manifest"].items()}


@functools.cache
def parameters(name):
    return from_official(official(name), CONFIGS[name])


@functools.cache
def forward(config):
    return jax.jit(make_module(config).apply, compiler_options=QUICK)


def inputs(name):
    arrays, _ = case(name)
    names = ["context", "mask"]
    if CONFIGS[name].micro_conditions:
        names += ["resolution", "aspect_ratio"]
    y = {key: arrays[f"in/{key}"] for key in names}
    return np.moveaxis(arrays["in/x"], 1, -1), arrays["in/t"].astype(np.float32), y


def test_the_published_models_have_the_published_parameters():
    counts = {}
    for name in ("PixArt-XL-2-1024-MS", "PixArt-Sigma-XL-2-1024-MS"):
        shapes = parameter_shapes(PUBLISHED[name])
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        with_parameters = {node.name for node in program_of(PUBLISHED[name])} - {"y_mask"}
        assert with_parameters == set(shapes)
    assert counts["PixArt-XL-2-1024-MS"] == 611_349_152
    third = 384
    sizes = 2 * ((256 + 1) * third + (third + 1) * third)
    assert counts["PixArt-Sigma-XL-2-1024-MS"] == 611_349_152 - sizes


def test_the_released_configs():
    """Pixels / 8, interpolation of positions, tokens of a caption, micro conditions: none is a parameter's
    shape but the last."""
    found = {}
    for name, c in PUBLISHED.items():
        own = (c.width, c.depth, c.heads, c.patch, c.mlp_ratio, c.in_channels, c.out_channels)
        assert (*own, c.caption_dim) == (1152, 28, 16, 2, 4.0, 4, 8, 4096)
        found[name] = (c.resolution, c.interpolation, c.caption_length, c.micro_conditions)
    assert found == {
        "PixArt-XL-2-256x256": (32, 1.0, 120, False),
        "PixArt-XL-2-512x512": (64, 1.0, 120, False),
        "PixArt-XL-2-1024-MS": (128, 2.0, 120, True),
        "PixArt-Sigma-XL-2-256x256": (32, 0.5, 300, False),
        "PixArt-Sigma-XL-2-512-MS": (64, 1.0, 300, False),
        "PixArt-Sigma-XL-2-1024-MS": (128, 2.0, 300, False),
        "PixArt-Sigma-XL-2-2K-MS": (256, 4.0, 300, False),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_the_reference_implementation(name):
    """ "sigma" is a rectangle larger than the base size: positions are squeezed into its places."""
    arrays, _ = case(name)
    with jax.default_matmul_precision("highest"):
        out = forward(CONFIGS[name])({"params": parameters(name)}, *inputs(name))
    expected = np.moveaxis(arrays["out/sample_f64"], 1, -1)
    floor = np.abs(arrays["out/sample"] - arrays["out/sample_f64"]).max()
    error = np.abs(np.asarray(out) - expected).max(axis=(1, 2, 3))
    early = arrays["in/t"] <= 10
    assert (error <= np.where(early, 8 * floor, 3e-4)).all(), (error, floor)


def as_diffusers(state):
    """The official state dict in the layout of diffusers, joined layers taken apart."""
    whole = {
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
    }
    embedders = {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}
    for ours, theirs in embedders.items():
        for number, i in ((1, 0), (2, 2)):
            name = f"adaln_single.emb.{theirs}_embedder.linear_{number}"
            whole[f"{ours}_embedder.mlp.{i}"] = name
    inner = {
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    joined = {"attn.qkv": ("attn1", "qkv"), "cross_attn.kv_linear": ("attn2", "kv")}
    out = {}
    for key, tensor in state.items():
        module, leaf = key.rsplit(".", 1)
        if key == "final_layer.scale_shift_table":
            out["scale_shift_table"] = tensor
        elif module in whole:
            out[f"{whole[module]}.{leaf}"] = tensor
        elif leaf == "scale_shift_table":
            out[f"transformer_{key}"] = tensor
        else:
            _, number, name = module.split(".", 2)
            block = f"transformer_blocks.{number}"
            if name in joined:
                theirs, letters = joined[name]
                for letter, part in zip(letters, np.split(tensor, len(letters)), strict=True):
                    out[f"{block}.{theirs}.to_{letter}.{leaf}"] = part
            else:
                out[f"{block}.{inner[name]}.{leaf}"] = tensor
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_of_diffusers_holds_the_same_parameters(name):
    theirs = as_diffusers(official(name))
    shapes = {key: list(tensor.shape) for key, tensor in theirs.items()}
    assert (
        shapes == case(name)[1][name]["diffusers"]
    )  # the names and shapes are those of their class
    tree = from_diffusers(theirs, CONFIGS[name])
    jax.tree.map(np.testing.assert_array_equal, tree, parameters(name))
    short = {k: v for k, v in theirs.items() if k != "transformer_blocks.0.attn2.to_v.bias"}
    with pytest.raises(ValueError, match=r"lacks attn2.to_v, parts of blocks\.0\.cross_attn\.kv"):
        from_diffusers(short, CONFIGS[name])


def test_what_an_official_file_holds_beside_the_parameters():
    caption = np.ones((5, 20), np.float32)
    extra = {"y_embedder.y_embedding": caption, "pos_embed": np.zeros((1, 16, 48), np.float32)}
    file = {"state_dict": {**official("sigma"), **extra}}
    jax.tree.map(np.testing.assert_array_equal, from_official(file, SIGMA), parameters("sigma"))
    np.testing.assert_array_equal(null_caption(file), caption)
    with pytest.raises(ValueError, match="no y_embedder.y_embedding; encode the empty prompt"):
        null_caption(official("sigma"))
    with pytest.raises(
        ValueError, match=r"without a parameter: csize_embedder\.mlp\.0\.weight \(w"
    ):
        from_official(official("alpha"), SIGMA)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_position_table_of_a_file_is_ours_or_is_refused(name):
    config, state = CONFIGS[name], official(name)

    def load(table):
        return from_official({**state, "pos_embed": np.asarray(table)[None]}, config, "f")

    own = positions(48, 4, 4, 4, config.interpolation)
    for table in (own, own.astype(np.float16), own.astype(ml_dtypes.bfloat16)):
        load(table)
    for table in (
        positions(48, 4, 4, 4, 3 - config.interpolation),
        own.reshape(4, 4, 48).swapaxes(0, 1),
    ):
        with pytest.raises(ValueError, match=r"f has a position table up to .* away"):
            load(table.reshape(16, 48))
    with pytest.raises(ValueError, match=r"pos_embed \(1, 64, 48\), and this model \(1, 16, 48\)"):
        load(positions(48, 8, 8, 4, config.interpolation))


def test_an_axis_spans_the_places_of_the_base_size():
    table = positions(8, 4, 8, base=4, interpolation=2.0).reshape(4, 8, 8)
    np.testing.assert_allclose(table[0, :, 0], np.sin(np.arange(8) * 0.25), atol=1e-6)  # columns
    np.testing.assert_allclose(table[:, 0, 4], np.sin(np.arange(4) * 0.5), atol=1e-6)  # rows


def test_masked_tokens_are_not_read_and_guidance_takes_a_null_caption():
    x, t, y = inputs("sigma")
    predict = jax.jit(predictor(make_module(SIGMA)), compiler_options=QUICK)
    variables = {"params": parameters("sigma"), "quant": {}}
    padded = {**y, "context": np.where(y["mask"][..., None] > 0, y["context"], 9.0)}
    same = [predict(variables, x, step_context(3.0), given) for given in (y, padded)]
    np.testing.assert_array_equal(*same)
    null = {"context": np.full((5, 20), 0.5, np.float32), "mask": np.float32([1, 0, 0, 0, 0])}
    _, raw = evaluate(
        predict, classifier_free(4.5, null, form="calls"), variables, x, step_context(3.0), y
    )
    assert raw.shape == (2, 2, *x.shape[1:])  # the noise estimate, without the learned variance
    np.testing.assert_array_equal(raw[:, 0], same[0])
    other = jax.tree.map(lambda row, like: np.broadcast_to(row, like.shape), null, y)
    np.testing.assert_array_equal(raw[:, 1], predict(variables, x, step_context(3.0), other))


def test_blocks_and_operators_are_what_quantization_walks():
    for config in CONFIGS.values():
        program = program_of(config)
        check_order(program, units_with_time_block(program), ("x", "t", "y"))
        assert temporal_nodes(program) == ("t_embedder", "t_block")
        sites = list_sites(make_module(config), *example_inputs(config))
        for mode in ("common", "official:qdiffusion"):
            assert make_plan(sites, policy(mode, sites, 4, 8)).entries
        block = {site.name for site in sites if site.name.startswith("blocks_1/")}
        self_and_mlp = ("attn_qkv", "attn_qk", "attn_pv", "attn_proj", "mlp_fc1", "mlp_fc2")
        cross = ("q_linear", "kv_linear", "qk", "pv", "proj")
        expected = (*self_and_mlp, *(f"cross_attn_{name}" for name in cross))
        assert block == {f"blocks_1/{name}" for name in expected}
    assert parse_model(model_json(SIGMA)) == SIGMA


def test_mistakes_are_named():
    x, t, y = inputs("sigma")
    with pytest.raises(ValueError, match=r"pass y, a dict of \['context', 'mask'\]"):
        PixArt(SIGMA).apply({}, x, t)
    with pytest.raises(ValueError, match="'aspect_ratio', 'context', 'mask', 'resolution'"):
        PixArt(CONFIGS["alpha"]).apply({}, x, t, y)
    with pytest.raises(ValueError, match="9 x 12 does not divide into patches of 2"):
        PixArt(SIGMA).apply({}, jnp.zeros((2, 9, 12, 4)), t, y)
    with pytest.raises(ValueError, match="width=100 must be divisible by heads=16"):
        PixArtConfig(width=100)
    with pytest.raises(ValueError, match="width=64 must be divisible by 3"):
        PixArtConfig(width=64, micro_conditions=True)
    with pytest.raises(ValueError, match="resolution=9 must be divisible by patch=2"):
        PixArtConfig(resolution=9)
    with pytest.raises(ValueError, match="interpolation must be positive"):
        PixArtConfig(interpolation=0.0)
    with pytest.raises(ValueError, match="dtype 'float16'"):
        PixArtConfig(dtype="float16")
