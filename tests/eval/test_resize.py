"""resize: every tool's stored network input, PIL itself, torch's rules at their edges, the two crops."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from qdiff_jax.eval.resize import RULES, crop_resize, resize, resize_matrix
from qdiff_jax.eval.tools import preprocess

from ..parity import eval_inputs

STORED = pathlib.Path(__file__).parents[1] / "parity" / "cases"
CASES, ADM = np.load(STORED / "eval_tools.npz"), np.load(STORED / "adm.npz")


@pytest.mark.parametrize("size", eval_inputs.SIZES)
@pytest.mark.parametrize("tool", ["adm", "torch-fidelity", "pytorch-fid", "clean-fid"])
def test_the_tools_own_network_input(tool, size):
    found = np.asarray(preprocess(eval_inputs.images(size), tool))
    assert found.shape == (2, 299, 299, 3)
    # 1e-4 of the 0..255 range in units of the network's input.
    expected = ADM[f"resize/{size}"] if tool == "adm" else CASES[f"resize/{tool}/{size}"]
    np.testing.assert_allclose(found[eval_inputs.PICKED], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("into", "out"), [(40, 13), (13, 40), (20, 20)])
@pytest.mark.parametrize("rule", ["bilinear_smooth", "bicubic_smooth"])
def test_pil_in_float(rule, into, out):
    image = eval_inputs.images(into, count=1)[0, :, :, 0].astype(np.float32)
    kind = Image.Resampling.BICUBIC if rule == "bicubic_smooth" else Image.Resampling.BILINEAR
    expected = np.asarray(Image.fromarray(image).resize((out, out), resample=kind))
    found = resize(image[None, :, :, None], out, rule)[0, :, :, 0]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_rules_keep_constants_and_differ():
    matrices = [resize_matrix(30, 7, rule) for rule in RULES]
    for matrix in matrices:
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-6)
    for i, matrix in enumerate(matrices):
        assert all(abs(matrix - other).max() > 0.02 for other in matrices[:i])
    for rule in RULES:
        np.testing.assert_array_equal(resize_matrix(5, 5, rule), np.eye(5))


def test_rectangles_keep_their_axes():
    image = np.arange(12.0, dtype=np.float32).reshape(1, 3, 4, 1)
    found = np.asarray(resize(image, 2, "tf1_bilinear"))[0, :, :, 0]
    np.testing.assert_allclose(found, [[0.0, 2.0], [6.0, 8.0]])  # sources 0, 1.5 by 0, 2


def test_lsun_crop_cuts_the_central_square():
    image = np.zeros((20, 33, 3), np.uint8)
    image[:, 6:26] = 200  # (33 - 20) // 2 = 6
    np.testing.assert_array_equal(crop_resize(image, 8), np.full((8, 8, 3), 200))
    rough = eval_inputs.images(40, count=1)[0]
    pil = np.asarray(Image.fromarray(rough).resize((16, 16), resample=Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop_resize(rough, 16), pil)


def test_adm_crop_halves_before_the_cubic():
    image = eval_inputs.images(70, count=1)[0][:64]
    halved = Image.fromarray(image).resize((35, 32), resample=Image.Resampling.BOX)
    scaled = np.asarray(halved.resize((26, 24), resample=Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop_resize(image, 24, "adm"), scaled[:, 1:25])
    assert crop_resize(image[..., :1], 24, "adm").shape == (24, 24, 1)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="'lanczos' is not known"):
        resize_matrix(3, 4, "lanczos")
    with pytest.raises(ValueError, match="positive sizes"):
        resize_matrix(3, 0, "bilinear")
    with pytest.raises(ValueError, match=r"images \[B, H, W, C\]"):
        resize(np.zeros((3, 3)), 4, "bilinear")
    with pytest.raises(ValueError, match="uint8 image"):
        crop_resize(np.zeros((3, 3, 3)), 2)
    with pytest.raises(ValueError, match="'centre' is not known"):
        crop_resize(np.zeros((3, 3, 3), np.uint8), 2, "centre")
