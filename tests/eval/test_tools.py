"""tools: one name sets every convention; a distance is named by its network."""

import pathlib

import numpy as np
import pytest

from qdiff_jax.eval import tools
from qdiff_jax.eval.moments import moments_of

from ..parity import eval_inputs

STORED = pathlib.Path(__file__).parents[1] / "parity" / "cases"
CASES, ADM = np.load(STORED / "eval_tools.npz"), np.load(STORED / "adm.npz")
GENERATED = {
    "pool": eval_inputs.features(1, 90),
    "spatial": eval_inputs.features(3, 90, dim=5),
    "logits": eval_inputs.logits(),
}
REAL = {
    "pool": eval_inputs.features(2, 110) * np.float32(1.1),
    "spatial": eval_inputs.features(4, 110, dim=5) * np.float32(1.1),
}


def small_subsets(monkeypatch, name):
    """The tools' subsets of 1000 do not fit the small case; their other rules stay."""
    row = tools.TOOLS[name]
    changed = row._replace(kernel={**row.kernel, "subsets": 8, "subset_size": 40})
    monkeypatch.setitem(tools.TOOLS, name, changed)


def test_torch_fidelity(monkeypatch):
    small_subsets(monkeypatch, "torch-fidelity")
    found = tools.distribution_metrics(
        GENERATED, REAL, tool="torch-fidelity", network="inception-2015-12-05"
    )
    assert list(found) == ["FID", "IS", "KID", "precision", "recall"]
    np.testing.assert_allclose(found["FID"], CASES["fid/torch-fidelity"], rtol=1e-6)
    np.testing.assert_allclose(found["IS"], CASES["is/torch-fidelity"][0], rtol=1e-6)
    np.testing.assert_allclose(found["KID"], CASES["kid/torch-fidelity"][0], rtol=1e-4)
    np.testing.assert_allclose(
        [found["precision"], found["recall"]], CASES["pr/torch-fidelity"], rtol=1e-6
    )


def test_adm_with_features_and_with_published_moments():
    found = tools.distribution_metrics(GENERATED, REAL, tool="adm", network="inception")
    assert list(found) == ["FID", "sFID", "IS", "precision", "recall"]
    np.testing.assert_allclose(found["FID"], ADM["fid"], rtol=1e-6)
    np.testing.assert_allclose(found["sFID"], ADM["sfid"], rtol=1e-6)
    np.testing.assert_allclose(found["IS"], ADM["is"], rtol=1e-6)
    np.testing.assert_allclose([found["precision"], found["recall"]], ADM["pr"], rtol=1e-6)
    published = {name: moments_of(x) for name, x in REAL.items()}
    again = tools.distribution_metrics(GENERATED, published, tool="adm", network="inception")
    assert again == {name: found[name] for name in ("FID", "sFID", "IS")}


@pytest.mark.parametrize("tool", ["pytorch-fid", "clean-fid"])
def test_the_distance_of_the_others(tool):
    real = dict(REAL)
    if tool == "clean-fid":
        real["pool"] = moments_of(real["pool"])
    found = tools.distribution_metrics(GENERATED, real, tool=tool, network="inception")
    assert list(found) == ["FID"]
    np.testing.assert_allclose(found["FID"], CASES[f"fid/{tool}"], rtol=1e-6)


def test_only_inception_lends_its_names():
    assert tools.metric_name("frechet", "inception-2015-12-05") == "FID"
    assert tools.metric_name("frechet", "dinov2-vitl14") == "Frechet distance (dinov2-vitl14)"
    assert tools.metric_name("kernel", "classifier_fashion").startswith("kernel distance (")
    assert tools.metric_name("recall", "inception") == "recall"
    for network, name in (
        ("inception-fid", "FID at infinitely many samples"),
        ("dino", "Frechet distance at infinitely many samples (dino)"),
    ):
        assert tools.metric_name("frechet_infinity", network) == name
    with pytest.raises(ValueError, match="'fid' is not known"):
        tools.metric_name("fid", "inception")


def test_grey_images_are_repeated_and_floats_refused():
    grey = eval_inputs.images(12)[..., :1]
    colour = np.repeat(grey, 3, axis=-1)
    np.testing.assert_array_equal(
        tools.preprocess(grey, "adm", size=16), tools.preprocess(colour, "adm", size=16)
    )
    with pytest.raises(ValueError, match="takes uint8 images"):
        tools.preprocess(grey.astype(np.float32), "adm", size=16)
    with pytest.raises(ValueError, match="'fid' is not known"):
        tools.preprocess(grey, "fid", size=16)
