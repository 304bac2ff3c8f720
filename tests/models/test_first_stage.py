"""First stages: the published sizes, diffusers' numbers from either layout of names, what is refused."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qdiff_jax.models.autoencoder import AutoencoderConfig, Decoder, autoencoder_shapes
from qdiff_jax.models.first_stage import (
    FIRST_STAGES,
    decode,
    encode,
    nearest_codes,
    posterior,
    quantize,
)
from qdiff_jax.models.port.first_stage import (
    diffusers_config,
    first_stage_params,
    load_first_stage,
)

from ..parity.networks import seeded
from ..tiny_unet import QUICK, random_params

CASE = pathlib.Path(__file__).parents[1] / "parity" / "networks" / "first_stage.npz"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
LAYOUTS = ("compvis", "diffusers", "diffusers of 2022")
TINY = AutoencoderConfig((1, 2), z_channels=3, embed_dim=4, channels=4, res_blocks=1, groups=2)


@functools.cache
def stored(kind):
    with np.load(CASE, allow_pickle=False) as file:
        case = {k.removeprefix(f"{kind}/"): file[k] for k in file.files if k.startswith(f"{kind}/")}
    return case, json.loads(str(case.pop("meta")))


def tensors(kind, layout):
    """The seeded weights by the names, and in the shapes, of one layout."""
    _, meta = stored(kind)
    state = seeded.state_dict(meta["manifest"])
    if layout == "compvis":
        state = {theirs: state[ours] for theirs, ours in meta["names"].items()}
        # Its attention is made of 1x1 convolutions.
        square = [k for k, v in state.items() if ".attn" in k and v.ndim == 2]
        assert square
        return state | {key: state[key][:, :, None, None] for key in square}
    if layout == "diffusers of 2022":
        for new, old in OLD.items():
            state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
        assert any("proj_attn" in key for key in state)
    return state


@functools.cache
def network(kind, layout="compvis"):
    config = diffusers_config(stored(kind)[1]["config"])
    return first_stage_params(tensors(kind, layout), config)


@functools.cache
def jitted(function):
    return jax.jit(function, static_argnums=0, compiler_options=QUICK)


def close(found, kind, name):
    """Within 4 times what the reference's own float32 is from its float64."""
    case, _ = stored(kind)
    error = np.abs(np.asarray(found) - case[f"out/{name}"]).max()
    assert error < 4 * case[f"float32_error/{name}"], (name, error)


def test_the_published_sizes():
    """The counts of diffusers' modules of these sizes."""
    shapes = {name: autoencoder_shapes(config) for name, config in FIRST_STAGES.items()}
    assert {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()} == {
        "vq-f4": 55_322_782,
        "vq-f4-noattn": 53_219_486,
        "vq-f8": 67_717_295,
        "vq-f8-n256": 67_652_783,
        "kl-f4": 55_312_063,
        "kl-f8": 83_653_863,
        "sd": 83_653_863,
        "sdxl": 83_653_863,
    }
    assert "mid_attn_1" not in shapes["vq-f4-noattn"]["decoder"]
    # Attention at 32 x 32, the latent's resolution, and only there.
    found = [name for name in shapes["vq-f8"]["encoder"] if "attn" in name]
    assert sorted(found) == ["down_3_attn_0", "down_3_attn_1", "mid_attn_1"]
    assert FIRST_STAGES["kl-f4"].factor == 4
    assert FIRST_STAGES["vq-f8"].factor == 8


def images_of(kind, z):
    """Decoded without the encoder's parameters, which decoding does not need; z without its scale."""
    params, config = network(kind)
    decoding = {name: part for name, part in params.items() if name != "encoder"}
    with jax.default_matmul_precision("highest"):
        return jitted(decode)(config, decoding, z * config.scale_factor)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_decoding_is_that_of_diffusers(kind):
    close(images_of(kind, stored(kind)[0]["z"]), kind, "decoded")


def test_the_latent_of_a_vq_model():
    (params, config), case = network("vq"), stored("vq")[0]
    with jax.default_matmul_precision("highest"):
        latents = jitted(encode)(config, params, case["image"])
    close(latents / config.scale_factor, "vq", "latents")
    codes = nearest_codes(params["codebook"], jnp.asarray(case["z"]))
    np.testing.assert_array_equal(codes, case["out/indices"])


def test_a_vq_model_quantizes_inside_the_decoder():
    params, config = network("vq")
    z = jnp.asarray(stored("vq")[0]["z"])
    quantized = quantize(params["codebook"], z)
    assert float(jnp.abs(quantized - z).max()) > 0.1
    images = images_of("vq", z)
    np.testing.assert_array_equal(images, images_of("vq", quantized))
    plain = jax.jit(functools.partial(decode, config, requantize=False), compiler_options=QUICK)
    assert float(jnp.abs(plain(params, z * config.scale_factor) - images).max()) > 1e-2


def test_the_latent_of_a_kl_model():
    """The posterior, its mean times the scale as the latent, and draws of it."""
    (params, config), case = network("kl"), stored("kl")[0]

    def all_of_them(image, keys):
        draws = jax.vmap(lambda key: encode(config, params, image, key))(keys)
        return *posterior(config, params, image), encode(config, params, image), draws

    keys = jax.random.split(jax.random.key(0), 200)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(all_of_them, compiler_options=QUICK)
        mean, logvar, latent, draws = run(case["image"], keys)
    close(mean, "kl", "mean")
    close(logvar, "kl", "logvar")
    assert config.scale_factor == 0.18215
    np.testing.assert_allclose(latent, config.scale_factor * mean, rtol=1e-6)
    unit = (draws / config.scale_factor - mean[None]) / jnp.exp(0.5 * logvar)[None]
    # 12,800 independent standard normal numbers: five standard errors.
    assert unit.size == 12800
    assert abs(float(unit.mean())) < 5 / 113
    assert abs(float(jnp.square(unit).mean()) - 1) < 5 * 2**0.5 / 113


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_every_layout_gives_the_same_parameters(kind, tmp_path):
    params, config = network(kind)
    for layout in LAYOUTS[1:]:
        other, _ = network(kind, layout)
        jax.tree.map(np.testing.assert_array_equal, params, other)
    whole = {f"first_stage_model.{k}": v for k, v in tensors(kind, "compvis").items()}
    whole |= {
        "first_stage_model.loss.logvar": np.zeros(()),
        "model.diffusion_model.out.2.bias": np.zeros(3),
        "scale_factor": np.float32(0.25),
    }
    whole = {key: np.asarray(value, order="C") for key, value in whole.items()}
    safetensors.numpy.save_file(whole, tmp_path / "model.ckpt")
    other, its_config = load_first_stage(tmp_path / "model.ckpt", config)
    jax.tree.map(np.testing.assert_array_equal, params, other)
    assert its_config == dataclasses.replace(config, scale_factor=0.25)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strict_both_ways(layout):
    whole, (_, config) = tensors("vq", layout), network("vq")
    with pytest.raises(ValueError, match=r"the file does not fit.*1 tensors without.*encoder\.odd"):
        first_stage_params({**whole, "encoder.odd.weight": np.zeros(3)}, config, "the file")
    lacking = next(key for key in whole if key.endswith("conv1.weight") and "decoder" in key)
    del whole[lacking]
    with pytest.raises(
        ValueError, match=r"1 parameters without a tensor: decoder/\w+/conv1/kernel"
    ):
        first_stage_params(whole, config)


def test_codes_are_those_of_the_distances():
    generator = np.random.default_rng(0)
    codebook = generator.standard_normal((50, 3)).astype(np.float32)
    z = generator.standard_normal((2, 5, 4, 3)).astype(np.float32)
    distance = np.square(z[:, :, :, None].astype(np.float64) - codebook).sum(-1)
    codes = nearest_codes(jnp.asarray(codebook), jnp.asarray(z))
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    # Codes are fixed points, and of equal ones the first is taken.
    doubled = jnp.concatenate([codebook, codebook])
    np.testing.assert_array_equal(nearest_codes(doubled, quantize(jnp.asarray(codebook), z)), codes)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    params = random_params(autoencoder_shapes(TINY))
    half = dataclasses.replace(TINY, dtype="bfloat16")
    z = jnp.asarray(seeded.normal("z", (1, 4, 4, 4)).astype(np.float32))
    images, rough = (jitted(decode)(config, params, z) for config in (TINY, half))
    assert rough.dtype == jnp.float32
    error = float(jnp.abs(images - rough).max() / jnp.abs(images).max())
    assert 1e-4 < error < 0.1


def test_a_folder_of_diffusers(tmp_path):
    _, meta = stored("kl")
    safetensors.numpy.save_file(
        tensors("kl", "diffusers"), tmp_path / "diffusion_pytorch_model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(meta["config"]))
    params, config = load_first_stage(tmp_path)
    assert (config.scale_factor, config.channels, config.multipliers) == (0.18215, 8, (1, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, params, network("kl")[0])
    with pytest.raises(ValueError, match="file without a config: say which.*vq-f4"):
        load_first_stage(tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="no first stage is called 'f4'; there are vq-f4"):
        load_first_stage(tmp_path, "f4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "f describes a AutoencoderTiny"),
        ({"norm_type": "spatial"}, "norm_type='spatial'"),
        ({"use_quant_conv": False}, "use_quant_conv=False"),
        ({"shift_factor": 0.1}, "shift_factor=0.1"),
        ({"block_out_channels": [8, 12]}, r"block_out_channels=\[8, 12\]"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types="),
    ],
)
def test_configs_of_other_architectures(change, message):
    with pytest.raises(ValueError, match=message):
        diffusers_config(stored("vq")[1]["config"] | change, "f")


def test_a_config_that_is_cut():
    fields = dict(stored("vq")[1]["config"])
    cut = {k: v for k, v in fields.items() if k not in ("latent_channels", "num_vq_embeddings")}
    with pytest.raises(ValueError, match="f lacks latent_channels, num_vq_embeddings: it is cut"):
        diffusers_config(cut, "f")


def test_a_vq_config_without_a_scale_is_ldms():
    fields = dict(stored("vq")[1]["config"])
    fields.pop("scaling_factor")
    assert diffusers_config(fields).scale_factor == 1


def test_wrong_inputs():
    params = random_params(autoencoder_shapes(TINY))
    with pytest.raises(
        ValueError, match=r"\[B, H, W, 3\] with sides divisible by 2, got \(1, 5, 4, 3\)"
    ):
        posterior(TINY, params, jnp.zeros((1, 5, 4, 3)))
    with pytest.raises(ValueError, match=r"latents \[B, h, w, 4\], got \(1, 2, 2, 3\)"):
        jax.eval_shape(Decoder(TINY).apply, {"params": params["decoder"]}, jnp.zeros((1, 2, 2, 3)))
    vq = dataclasses.replace(TINY, codes=5)
    with pytest.raises(ValueError, match="no posterior"):
        posterior(vq, params, jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="without a key"):
        encode(vq, params, jnp.zeros((1, 4, 4, 3)), jax.random.key(0))
    with pytest.raises(ValueError, match="groups=32 must divide"):
        AutoencoderConfig((1,), 3, 3, channels=48)
    with pytest.raises(ValueError, match="dtype='float16'"):
        dataclasses.replace(TINY, dtype="float16")
    with pytest.raises(ValueError, match="scale_factor=0"):
        dataclasses.replace(TINY, scale_factor=0)
