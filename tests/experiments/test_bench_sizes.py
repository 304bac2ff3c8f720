"""The bench of real sizes: shapes of a network, what is timed and what is extrapolated."""

import json
import math

import pytest

from experiments import bench_sizes
from experiments.bench_sizes import cut, kernels_of, measure, parse_kernels, write_results
from qdiff_jax.quant.hessian_size import hessian_parts, rounding_cost
from qdiff_jax.stages.layer_rounding import ClosedFormConfig


def test_the_kernels_of_dit_xl2_are_all_but_its_biases_and_tables():
    kernels = kernels_of("DiT-XL-2-256x256")
    held = sum(count * math.prod(shape) for shape, count in kernels.items())
    # 675,129,632 parameters in all: position table 256 x 1152, label table 1001 x 1152, biases.
    assert 0.99 * 675_129_632 < held < 675_129_632 - 256 * 1152 - 1001 * 1152
    assert kernels[(1152, 6 * 1152)] == 28


def test_long_layers_are_extrapolated_from_the_rate_of_short_ones(tmp_path):
    kernels = {(3, 3, 4, 8): 2, (16, 8): 1, (4096, 4096): 3}
    found = measure(kernels, 64, 32, ClosedFormConfig(), most_seconds=0.5)
    assert [row["kernel"] for row in found] == [(16, 8), (3, 3, 4, 8), (4096, 4096)]
    assert [row["measured"] for row in found] == [True, True, False]
    assert all(row["seconds"] > 0 for row in found)
    text = write_results("some", found, 64, "a command", tmp_path)
    assert "| 3x3x4x8 | 2 | 1 |" in text
    assert "(extrapolated)" in text
    assert len(json.loads((tmp_path / "sizes_some.json").read_text())) == 3


def test_nothing_is_extrapolated_from_a_hessian_that_is_cut_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_sizes, "time_layer", lambda *_: {"sums": 1.0, "rounding": 0.0})
    config = ClosedFormConfig(hessian_mib=1)
    kernels = {(3, 3, 16, 16): 2, (3, 3, 60, 256): 1, (3, 3, 60, 8192): 1}
    parts = {shape: hessian_parts(shape, config.hessian_mib) for shape in kernels}
    assert [cut(shape, n) for shape, n in parts.items()] == ["whole", "taps", "taps"]
    whole, taps, more = (rounding_cost(s, 64, n).multiply_adds for s, n in parts.items())
    # Every layer takes a second, so that at the rate of the whole one the next would take taps / whole.
    assert 1 < taps / whole < more / taps
    found = measure(kernels, 64, 32, config, most_seconds=taps / whole - 0.1)
    assert [row["seconds"] for row in found] == [1.0, None, None]
    text = write_results("some", found, 64, "a command", tmp_path)
    assert "2.00 CPU s in all without 2 layers that are not counted" in text
    found = measure(kernels, 64, 32, config, most_seconds=taps / whole + 0.1)
    assert [row["measured"] for row in found] == [True, True, False]
    assert found[2]["seconds"] == pytest.approx(more / taps)


@pytest.mark.parametrize("text", ["3x3x4", "ax4", "0x4", ""])
def test_what_is_no_kernel_is_refused(text):
    with pytest.raises(ValueError, match="--kernels"):
        parse_kernels(text)


def test_an_unknown_model_lists_those_there_are():
    with pytest.raises(ValueError, match="DiT-XL-2-256x256"):
        kernels_of("dit_xl3")
