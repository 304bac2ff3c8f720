"""Published DiT files: their names, the numbers they give, and the published sampler around them."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free, evaluate
from qdiff_jax.diffusion.samplers import ddpm
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.models.dit import DiTConfig, dit_program, position_table
from qdiff_jax.models.families import make_module, parameter_shapes
from qdiff_jax.models.port.dit import PUBLISHED, from_diffusers, from_official
from qdiff_jax.models.registry import predictor
from qdiff_jax.quant.timed import step_context

from ...tiny_unet import QUICK
from ..ddpm_native_keys import seeded

CASE = pathlib.Path(__file__).parents[2] / "parity" / "cases" / "dit_official.npz"
CONFIG = DiTConfig(width=96, depth=3, heads=4, patch=2, resolution=8, in_channels=4, num_classes=10)


@functools.cache
def case():
    with np.load(CASE, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files if key != "meta"}
        return arrays, json.loads(str(stored["meta"]))


def official():
    _, meta = case()
    return {key: seeded(key, shape, meta["seed"]) for key, shape in meta["manifest"].items()}


def nhwc(x):
    return np.moveaxis(x, -3, -1)


@functools.cache
def parameters():
    return from_official(official(), CONFIG)


@functools.cache
def forward(config):
    return jax.jit(make_module(config).apply, compiler_options=QUICK)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_imagenet_models_have_the_published_parameters(name):
    config = PUBLISHED[name]
    shapes = parameter_shapes(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    positions = {"DiT-XL-2-256x256": 256, "DiT-XL-2-512x512": 1024}[name]
    assert position_table(config.width, config.resolution // config.patch).shape[0] == positions
    assert (config.width, config.depth, config.heads, config.patch) == (1152, 28, 16, 2)
    assert (config.in_channels, config.out_channels, config.num_classes) == (4, 8, 1000)
    assert (config.mlp_ratio, config.semantics) == (4.0, "official")
    assert count == 675_129_632 - 256 * 1152  # the files also hold the fixed position table
    assert {node.name for node in dit_program(config)} == set(shapes)


@pytest.mark.parametrize("semantics", ["official", "diffusers"])
def test_parity_with_the_reference_implementation(semantics):
    arrays, _ = case()
    config = dataclasses.replace(CONFIG, semantics=semantics)
    with jax.default_matmul_precision("highest"):
        t, y = arrays["in/t"].astype(np.float32), arrays["in/y"].astype(np.int32)
        out = forward(config)({"params": parameters()}, nhwc(arrays["in/x"]), t, y)
    floor = np.abs(arrays["out/sample"] - arrays["out/sample_f64"]).max()
    expected = arrays["out/sample_f64" if semantics == "official" else "out/as_shipped"]
    error = np.abs(np.asarray(out) - nhwc(expected)).max(axis=(1, 2, 3))
    # Late steps carry the float32 rounding of cos(t f), which no two frameworks share.
    early = arrays["in/t"] <= 10
    assert early.any()
    assert (error <= np.where(early, 4 * floor, 3e-4)).all(), error
    # The class as diffusers ships it is another network on the same weights.
    gap = np.abs(arrays["out/as_shipped"] - arrays["out/sample"]).max(axis=(1, 2, 3))
    assert gap.min() > 1e-3
    assert gap.max() > 1


def test_guided_sampling_as_published():
    """Spaced steps, learned variance, three guided channels: the whole chain, with the reference's noise."""
    arrays, _ = case()
    plan = ddpm(make_schedule("linear"), np.array([0, 200, 400, 600]), variance="learned_range")
    predict = predictor(make_module(CONFIG), variance=True)
    guidance = classifier_free(1.5, 10, channels=3, order="conditional_first")
    variables = {"params": parameters(), "quant": {}}
    y = jnp.asarray(arrays["sampling/in/labels"], jnp.int32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(variables, visit, x, noise):
        t, row = visit
        output, _ = evaluate(predict, guidance, variables, x, step_context(t), y)
        return plan.sampler.step(row, (), x, *plan.sampler.read(row, output), noise)[1]

    x = nhwc(arrays["sampling/in/x_T"])
    with jax.default_matmul_precision("highest"):
        for i, j in enumerate(reversed(range(4))):
            visited = nhwc(arrays["sampling/out/visited"][i])
            assert np.abs(x - visited).max() < 1e-4 * np.abs(visited).max()
            visit = jax.tree.map(lambda row: row[j], (plan.timesteps, plan.rows))  # noqa: B023
            x = step(variables, visit, x, nhwc(arrays["sampling/in/noise"][i]))
    final = nhwc(arrays["sampling/out/final"])
    assert np.abs(x - final).max() < 1e-4 * np.abs(final).max()


def as_diffusers(state):
    """The official state dict in the layout of diffusers, embedders copied into every block."""
    whole = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.linear": "proj_out_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
    }
    embedders = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    inner = {
        "adaLN_modulation.1": "norm1.linear",
        "attn.proj": "attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    out = {}
    for key, tensor in state.items():
        module, leaf = key.rsplit(".", 1)
        if module in whole:
            out[f"{whole[module]}.{leaf}"] = tensor
        elif module in embedders:
            for i in range(CONFIG.depth):
                out[f"transformer_blocks.{i}.norm1.emb.{embedders[module]}.{leaf}"] = tensor
        else:
            _, number, name = module.split(".", 2)
            if name == "attn.qkv":
                for letter, part in zip("qkv", np.split(tensor, 3), strict=True):
                    out[f"transformer_blocks.{number}.attn1.to_{letter}.{leaf}"] = part
            else:
                out[f"transformer_blocks.{number}.{inner[name]}.{leaf}"] = tensor
    return out


def test_the_layout_of_diffusers_holds_the_same_parameters():
    theirs = as_diffusers(official())
    jax.tree.map(np.testing.assert_array_equal, from_diffusers(theirs, CONFIG), parameters())
    key = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(ValueError, match=r"blocks\.2.* is not the t_embedder\.mlp\.0\.bias of the"):
        from_diffusers({**theirs, key: theirs[key] + 1}, CONFIG)
    short = {k: v for k, v in theirs.items() if k != "transformer_blocks.1.attn1.to_k.bias"}
    with pytest.raises(ValueError, match=r"lacks attn1\.to_k, parts of blocks\.1\.attn\.qkv\.bias"):
        from_diffusers(short, CONFIG)


def test_a_training_checkpoint_gives_its_moving_average():
    average = {key: 2 * value for key, value in official().items()}
    tree = from_official({"model": official(), "ema": average, "args": None}, CONFIG)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, parameters())
    jax.tree.map(np.testing.assert_array_equal, tree, doubled)


def test_what_does_not_fit_is_refused():
    table = position_table(96, 4)[None]
    from_official({**official(), "pos_embed": table}, CONFIG)
    with pytest.raises(ValueError, match="position table up to 0.1 away"):
        from_official({**official(), "pos_embed": table + 0.1}, CONFIG)
    with pytest.raises(ValueError, match=r"pos_embed \(1, 64, 96\), and this model \(1, 16, 96\)"):
        from_official({**official(), "pos_embed": position_table(96, 8)[None]}, CONFIG)
    with pytest.raises(ValueError, match=r"without a parameter: model_ema\.decay"):
        from_official({**official(), "model_ema.decay": np.zeros(())}, CONFIG)
    deeper = dataclasses.replace(CONFIG, depth=4)
    with pytest.raises(ValueError, match="parameters without a tensor: .*blocks_3_adaLN/dense"):
        from_official(official(), deeper)
