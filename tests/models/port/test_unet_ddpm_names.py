"""Names of the released DDPM U-Nets, native and diffusers'."""

import json
import pathlib

import jax
import numpy as np
import pytest

from qdiff_jax.models.families import make_module
from qdiff_jax.models.port.strict import our_place
from qdiff_jax.models.port.unet_ddpm import NATIVE, from_diffusers, from_native, native_key
from qdiff_jax.models.unet_ddpm import UNetConfig

from ...tiny_unet import QUICK
from ..ldm_cases import meta, nhwc, state_dict, stored

CASE = pathlib.Path(__file__).parents[2] / "parity" / "cases" / "native_ddpm_pesser.npz"
CONFIG = UNetConfig(
    channels=32, multipliers=(1, 2), res_blocks=1, attention_resolutions=(4,), resolution=8
)


def test_every_diffusers_name_has_a_native_one():
    before = from_diffusers(state_dict("ddpm"), CONFIG)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in state_dict("ddpm").items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        renamed[key] = tensor
    assert any(".proj_attn." in key for key in renamed)
    jax.tree.map(np.testing.assert_array_equal, from_diffusers(renamed, CONFIG), before)
    assert (
        native_key("up_blocks.0.resnets.2.conv_shortcut.bias", 4)
        == "up.3.block.2.nin_shortcut.bias"
    )
    assert native_key("unknown.weight", 4) == "unknown.weight"
    with pytest.raises(ValueError, match="old and new names are mixed"):
        from_diffusers({**renamed, **state_dict("ddpm")}, CONFIG)


@pytest.mark.slow
def test_parity_with_diffusers():
    case, t = stored(), np.float32(meta()["times"])
    params = from_diffusers(state_dict("ddpm"), CONFIG)
    run = jax.jit(make_module(CONFIG).apply, compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        out = run({"params": params}, nhwc(case["ddpm/in/x"]), t)
    expected = case["ddpm/out/sample_f64"]
    floor = np.abs(case["ddpm/out/sample"] - expected)[0].max()
    error = np.abs(np.asarray(out) - nhwc(expected)).max(axis=(1, 2, 3))
    assert error[0] <= 4 * floor
    assert error[1] <= 3e-4


def test_a_native_state_dict_that_does_not_fit_is_refused_both_ways():
    with np.load(CASE, allow_pickle=False) as file:
        manifest = json.loads(str(file["meta"]))["manifest"]
    assert all(our_place(NATIVE, key) is not None for key in manifest)
    key = "down.1.attn.0.q.weight"
    assert our_place(NATIVE, key)[0] == "down_1_attn_0/q/kernel"
    assert our_place(NATIVE, "model_ema.decay") is None
    tensors = {"model_ema.decay": np.zeros(()), "conv_in.bias": np.zeros(32)}
    with pytest.raises(
        ValueError, match=r"1 tensors without a parameter: model_ema.decay; \d+ param"
    ):
        from_native(tensors, CONFIG)
