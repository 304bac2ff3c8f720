"""Loading a state dict: every tensor has a place and every parameter a tensor, or one error says all."""

import re

import jax
import numpy as np
import pytest

from qdiff_jax.models.port import unet_ddpm, unet_ldm_diffusers
from qdiff_jax.models.port.looks import look_of, looks_like
from qdiff_jax.models.port.strict import (
    Row,
    Table,
    our_place,
    port_parameters,
    take,
    with_moving_average,
)

from .. import ldm_cases, test_pixart
from . import test_dit_port, test_unet_ddpm_names

TABLE = Table(
    rows=(
        Row(r"(down\.\d)\.conv", r"\1/conv", "conv"),
        Row(r"(down\.\d)\.(q|k)", r"\1/\2", "dense"),
        Row(r"(down\.\d)\.norm", r"\1/norm", "norm"),
        Row(r"emb", "label/table", "embed"),
        Row(r"scale", "label/scale", "tensor"),
    ),
    drops=(r"betas", r"model_ema\..*"),
)
SHAPES = {
    "down_0": {
        "conv": {"kernel": (3, 3, 2, 5), "bias": (5,)},
        "q": {"kernel": (2, 4)},
        "norm": {"scale": (2,), "bias": (2,)},
    },
    "label": {"table": {"embedding": (7, 4)}, "scale": ()},
}
TORCH = {
    "down.0.conv.weight": (5, 2, 3, 3),
    "down.0.conv.bias": (5,),
    "down.0.q.weight": (4, 2),
    "down.0.norm.weight": (2,),
    "down.0.norm.bias": (2,),
    "emb.weight": (7, 4),
    "scale": (),
    "betas": (1000,),
}


def shapes(tree=SHAPES):
    if isinstance(tree, tuple):
        return np.empty(tree, np.float32)
    return {name: shapes(node) for name, node in tree.items()}


def state(**changes):
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(s) for k, s in {**TORCH, **changes}.items() if s is not None}


def test_layouts_follow_from_the_kind_of_layer():
    torch = state()
    tree = port_parameters(torch, TABLE, shapes())
    kernel = tree["down_0"]["conv"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(
        kernel[1, 2, 0], torch["down.0.conv.weight"][:, 0, 1, 2].astype("f")
    )
    np.testing.assert_array_equal(
        tree["down_0"]["q"]["kernel"], torch["down.0.q.weight"].T.astype("f")
    )
    np.testing.assert_array_equal(
        tree["label"]["table"]["embedding"], torch["emb.weight"].astype("f")
    )
    assert tree["label"]["scale"].shape == ()


@pytest.mark.parametrize("ones", [(1,), (1, 1)])
def test_convolutions_of_size_one_become_dense(ones):
    torch = state(**{"down.0.q.weight": (4, 2, *ones)})
    kernel = port_parameters(torch, TABLE, shapes())["down_0"]["q"]["kernel"]
    np.testing.assert_array_equal(kernel, torch["down.0.q.weight"].reshape(4, 2).T.astype("f"))


def test_one_error_lists_all_that_does_not_fit():
    torch = state(
        **{
            "down.0.q.weight": (4, 3),  # of another shape
            "down.0.norm.bias": None,  # missing
            "down.0.k.weight": (4, 2),  # named in the table, but the model has no such layer
            "first_stage.x": (1,),  # no row
        }
    )
    said = (
        "m.ckpt does not fit this model: 2 tensors without a parameter: down.0.k.weight (would be "
        "down_0/k/kernel), first_stage.x; 1 parameters without a tensor: down_0/norm/bias; 1 tensors of "
        "another shape: down.0.q.weight (4, 3) for down_0/q/kernel (2, 4)."
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        port_parameters(torch, TABLE, shapes(), source="m.ckpt")
    double = Table((Row(r"(down\.\d)\.(?:q|other)", r"\1/q", "dense"), *TABLE.rows), TABLE.drops)
    with pytest.raises(ValueError, match=r"two tensors: down_0/q/kernel from down.0.q.weight and"):
        port_parameters(state(**{"down.0.other.weight": (4, 2)}), double, shapes())


def test_a_long_list_begins_with_what_the_tensors_look_like():
    other = test_dit_port.official()
    other["odd\nname"] = np.zeros(3)
    with pytest.raises(ValueError, match="does not fit") as error:
        port_parameters(other, TABLE, shapes(), source="m.ckpt")
    begin = (
        f"m.ckpt does not fit this model: it looks like a DiT in official names (width 96, 3 blocks); "
        f"{len(other)} tensors without a parameter, 7 parameters without a tensor. All of them: "
    )
    assert str(error.value).startswith(begin)
    assert all(key in str(error.value) for key in other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.astype(np.int8), r"1 tensors that are not of .*: down.0.q.weight \(int8\)\."),
        (lambda w: w > 0, r"1 tensors that are not of .*: down.0.q.weight \(bool\)\."),
        (lambda w: w + 1j, r"1 tensors that are not of .*: down.0.q.weight \(complex128\)\."),
        (lambda w: np.where(w < w.max(), w, np.nan), "1 tensors with NaN .*: down.0.q.weight."),
        (lambda w: np.where(w < w.max(), w, -np.inf), "1 tensors with NaN .*: down.0.q.weight."),
        (lambda w: 1e300 * w, "1 tensors with NaN .*: down.0.q.weight."),  # beyond float32
    ],
)
def test_values_that_are_no_weights_are_refused(change, message):
    torch = state()
    torch["down.0.q.weight"] = change(torch["down.0.q.weight"])
    torch["betas"] = np.array([np.nan])  # dropped
    with pytest.raises(ValueError, match=message):
        port_parameters(torch, TABLE, shapes())


def test_networks_are_told_apart_by_their_names():
    sd = ldm_cases.state_dict("text")
    assert look_of(sd).families == ("unet_ldm",)
    assert looks_like({key: value.shape for key, value in sd.items()}).startswith(
        "a U-Net with cross-attention, as Stable Diffusion's, in diffusers' layout (width "
    )
    assert set(look_of(ldm_cases.state_dict("ddpm")).families) == {"unet_ddpm", "unet_ldm"}
    assert look_of(test_dit_port.as_diffusers(test_dit_port.official())).layout == "diffusers"
    assert look_of(test_pixart.official("sigma")).families == ("pixart",)
    assert look_of({"odd.weight": 0}) is None
    assert looks_like({"odd.weight": (3,)}) == ""


def test_ported_denoisers_lie_on_the_device_as_the_other_networks_do():
    guided, ddpm = ldm_cases.CONFIGS["ldm4"], test_unet_ddpm_names.CONFIG
    pixart = test_pixart.parameters("sigma")
    trees = (
        test_dit_port.parameters(),
        pixart,
        unet_ddpm.from_diffusers(ldm_cases.state_dict("ddpm"), ddpm),
        unet_ldm_diffusers.from_diffusers(ldm_cases.state_dict("ldm4"), guided),
    )
    for tree in trees:
        for leaf in jax.tree.leaves(tree):
            assert isinstance(leaf, jax.Array)
            assert leaf.dtype == np.float32


def test_a_leaf_that_its_kind_of_layer_does_not_have_is_no_parameter():
    assert our_place(TABLE, "down.3.norm.weight")[0] == "down_3/norm/scale"
    assert our_place(TABLE, "down.3.norm.running_mean") is None
    assert our_place(TABLE, "emb.bias") is None


def test_a_checkpoint_is_taken_apart_by_prefix():
    file = {"model.unet.a.weight": 1, "model.first.b": 2, "scale_factor": 3, "betas": 4}
    parts = take(
        file,
        {"unet": "model.unet.", "first": "model.first."},
        keep=("scale_factor",),
        drops=("betas",),
    )
    assert parts == {"": {"scale_factor": 3}, "unet": {"a.weight": 1}, "first": {"b": 2}}
    with pytest.raises(ValueError, match=r"2 tensors of no part we know: scale_factor, betas"):
        take(file, {"rest": "model."})


def test_moving_averages_are_found_from_the_models_own_names():
    file = {
        "model.net.a.0.weight": 1,
        "model.net.a.bias": 2,
        "model_ema.neta0weight": 10,
        "model_ema.netabias": 20,
        "model_ema.decay": 0.9,
        "model_ema.num_updates": 5,
        "cond.x": 3,
    }
    assert with_moving_average(file) == {
        "model.net.a.0.weight": 10,
        "model.net.a.bias": 20,
        "cond.x": 3,
    }
    with pytest.raises(ValueError, match="no moving averages"):
        with_moving_average({"model.a": 1})
    more = {**file, "model_ema.other": 1, "model.net.c": 1}
    with pytest.raises(ValueError, match=r"\(model.net.c\) and 1 averages .* \(model_ema.other\)"):
        with_moving_average(more)
    with pytest.raises(
        ValueError, match=r"share an average: model.net.a.bias and model.net.ab.ias"
    ):
        with_moving_average({**file, "model.net.ab.ias": 1})
