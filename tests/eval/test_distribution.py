"""Distribution metrics together: intervals that cover, floors, tools obeyed, labels."""

import numpy as np
import pytest

from qdiff_jax.eval import tools
from qdiff_jax.eval.described import gather
from qdiff_jax.eval.distribution import check_protocol, measure
from qdiff_jax.eval.frechet import frechet_infinity
from qdiff_jax.eval.kid import kernel_inception_distance, kernel_influence, mmd2
from qdiff_jax.eval.moments import moments_of
from qdiff_jax.runtime.mesh import data_mesh

DIM = 5  # more samples than twice that can be extrapolated from


def layers(n, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((n, DIM)) + shift).astype(np.float32)
    labels = rng.integers(0, 3, n).astype(np.int32)
    logits = np.eye(3, dtype=np.float32)[(labels + (np.arange(n) % 4 == 0)) % 3]
    return {"pool": features, "spatial": features[:, :3] + 1, "logits": logits}, labels


def described(n, seed, shift=0.0, tool="", without=("spatial",)):
    found, labels = layers(n, seed, shift)
    kept = {name: value for name, value in found.items() if name not in without}
    return gather([kept], labels, tool=tool, count=n)


def test_equal_distributions_reach_the_floor_and_shifted_ones_do_not():
    reference, floor = described(600, 0), described(600, 1)
    near = measure(described(400, 2), reference, floor)
    far = measure(described(400, 3, shift=1.0), reference, floor)
    for name in ("frechet", "kernel"):
        assert near[name]["floor_n"] == 400
        assert near[name]["low"] < near[name]["floor"] < near[name]["high"]
        assert far[name]["low"] > far[name]["floor"]
    assert far["frechet"]["value"] == pytest.approx(DIM, rel=0.15)
    assert far["precision"]["value"] < near["precision"]["value"]
    assert (near["recall"]["generated_n"], near["recall"]["real_n"]) == (400, 600)
    assert near["class_agreement"]["value"] == 0.75
    assert near["class_agreement"]["real"] == 0.75
    assert measure(described(400, 2), reference, None)["frechet"].keys() == {"value", "low", "high"}


def test_a_tools_conventions_replace_ours(monkeypatch):
    """Every tool: the metrics that it has and no other, with the values of `distribution_metrics`."""
    for name in ("torch-fidelity", "clean-fid"):
        row = tools.TOOLS[name]
        small = {**row.kernel, "subsets": 4, "subset_size": 50}
        monkeypatch.setitem(tools.TOOLS, name, row._replace(kernel=small))
    generated, real = layers(300, 0)[0], layers(300, 1)[0]
    for name, metrics in {
        "adm": {"frechet", "spatial_frechet", "score", "precision", "recall"},
        "torch-fidelity": {"frechet", "kernel", "score", "precision", "recall"},
        "pytorch-fid": {"frechet"},
        "clean-fid": {"frechet", "kernel"},
    }.items():
        found = measure(
            described(300, 0, tool=name, without=()), described(300, 1, without=()), None, tool=name
        )
        assert set(found) == metrics
        expected = tools.distribution_metrics(generated, real, tool=name, network="inception")
        intervals = tools.distribution_intervals(generated, real, tool=name, network="inception")
        assert set(intervals) == set(expected)
        for metric, entry in found.items():
            title = tools.metric_name(metric, "inception")
            assert entry["value"] == pytest.approx(expected[title], rel=1e-6)
            assert intervals[title].estimate == pytest.approx(expected[title], rel=1e-6)
            ends = intervals[title].low, intervals[title].high
            assert (entry["low"], entry["high"]) == pytest.approx(ends, rel=1e-6)
            assert entry["low"] < entry["value"] < entry["high"]


def test_what_contradicts_a_tool_is_refused():
    with pytest.raises(ValueError, match="evaluation tool 'amd' is not known"):
        measure(described(300, 0), described(300, 1), None, tool="amd")
    with pytest.raises(ValueError, match="with 5 neighbours are not those of adm, which takes 3"):
        check_protocol("adm", 5, 300, 300)
    with pytest.raises(ValueError, match="with 5 neighbours are not those of pytorch-fid"):
        check_protocol("pytorch-fid", 5, 300, 300)
    with pytest.raises(
        ValueError, match="subsets of 1000 for its kernel distance, and there are 300"
    ):
        measure(described(300, 0), described(2000, 1), None, tool="torch-fidelity")
    check_protocol("clean-fid", 3, 300, 300)
    check_protocol("", 5, 300, 300)
    for otherwise in ("", "torch-fidelity"):
        generated = described(300, 0, tool=otherwise)
        with pytest.raises(ValueError, match="describe the generated images with tool='adm'"):
            measure(generated, described(300, 1), None, tool="adm")


def test_the_distance_at_infinitely_many_samples_has_its_floor():
    generated, reference, floor = described(80, 2), described(600, 0), described(600, 1)
    found = measure(generated, reference, floor, extrapolate=True)["frechet_infinity"]
    moments = moments_of(reference.features)
    again = frechet_infinity(floor.features[:80], moments, smallest=40)
    assert found["floor"] == again.distance
    assert found["floor_n"] == 80
    assert found["low"] < found["value"] < found["high"]
    with pytest.raises(
        ValueError, match="10 samples are too few to extrapolate .* in 5 dimensions"
    ):
        measure(described(10, 2), reference, None, extrapolate=True)
    with pytest.raises(ValueError, match="subsets of 5 samples have singular covariances in 5"):
        measure(generated, reference, described(10, 1), extrapolate=True)
    assert found["value"] < measure(generated, reference, None)["frechet"]["value"]


def test_the_kernel_s_interval_under_a_tool_has_the_subsets_scatter_too():
    x, y = described(200, 0), described(200, 1)
    rule = {"subsets": 5, "subset_size": 40}
    drawn = kernel_inception_distance(x.features, y.features, **rule)
    tools_own = tools.kernel_interval(x.features, y.features, subsets=rule)
    ours = tools.kernel_interval(x.features, y.features)
    assert tools_own.estimate == drawn.mean
    expected = np.hypot(ours.standard_error, drawn.std / np.sqrt(5))
    assert tools_own.standard_error == pytest.approx(expected)


def test_same_values_on_eight_devices():
    generated, reference, floor = described(70, 2), described(70, 0), described(70, 1)
    alone = measure(generated, reference, floor)
    split = measure(generated, reference, floor, mesh=data_mesh())
    assert alone.keys() == split.keys()
    for name, entry in alone.items():
        assert split[name] == pytest.approx(entry, rel=1e-6, abs=1e-9)


def test_the_kernel_influence_is_the_derivative_and_its_spread_the_error():
    x, y = described(40, 0, 0.5).features, described(50, 1).features
    influence = kernel_influence(x, y)
    # Leaving one out moves the estimate by -I / (n - 1) to first order (the U-statistic's own order).
    without = np.array([mmd2(np.delete(x, i, axis=0), y) for i in range(40)])
    slope = np.polyfit(influence, without, 1)[0]
    assert slope == pytest.approx(-1 / 39, rel=0.1)
    # Over fresh draws the error is what the influence says.
    values = [mmd2(described(40, seed, 0.5).features, y) for seed in range(60)]
    assert np.std(values) == pytest.approx(influence.std() / np.sqrt(40), rel=0.35)
