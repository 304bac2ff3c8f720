"""The table of a site plan: every site once, sums that are the model's, what policies keep."""

import csv
import io
import math

import jax
import pytest

from experiments.inspect import config_of, describe, parse_bits, plans_of
from qdiff_jax.eval.cost import network_cost
from qdiff_jax.eval.site_table import architecture_sites, collapse, site_rows, totals
from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.published import PUBLISHED

MODELS = ("random:miniature", "random:ldm", "random:dit")


def inspected(model, *policies, bits=(4, 8)):
    config = config_of(model)
    sites = architecture_sites(config)
    plans, _ = plans_of(sites, policies, bits)
    return config, sites, plans, site_rows(config, plans)


def kernel_size(row):
    return math.prod(map(int, row.shape.split("x")))


@pytest.mark.parametrize("model", MODELS)
def test_every_site_is_there_once_and_rows_add_up_to_the_totals(model):
    config, sites, plans, rows = inspected(model, "common", "official:svdquant")
    assert [row.site for row in rows] == [site.name for site in sites]
    assert len({row.site for row in rows}) == len(rows)
    assert sum(row.macs for row in rows) == network_cost(sites, {}).macs

    leaves = jax.tree_util.tree_flatten_with_path(parameter_shapes(config))[0]
    layers = [leaf for path, leaf in leaves if path[-1].key in ("kernel", "bias")]
    everything = sum(math.prod(leaf.shape) for _, leaf in leaves)
    held = sum(row.parameters for row in rows)
    norms = {"/".join(e.key for e in path[:-1]) for path, _ in leaves if path[-1].key == "scale"}
    of_norms = [
        leaf
        for path, leaf in leaves
        if path[-1].key == "bias" and "/".join(e.key for e in path[:-1]) in norms
    ]
    assert held == sum(math.prod(leaf.shape) for leaf in layers) - sum(
        leaf.size for leaf in of_norms
    )

    for name, plan in plans.items():
        found = totals(config, sites, plan)
        weights = [row for row in rows if row.operands[0] == "weight"]
        bits = {row.site: row.treated[name].bits for row in rows}
        assert found.parameters == everything
        assert found.bitops == sum(row.macs * math.prod(bits[row.site]) for row in rows)
        assert found.layer_bitops == sum(row.macs * math.prod(bits[row.site]) for row in weights)
        kernels = sum(kernel_size(row) for row in weights)
        assert found.size == 4 * (everything - kernels) + sum(
            kernel_size(row) * bits[row.site][0] / 8 for row in weights
        )
        assert found.unquantized == sum(32 in bits[row.site] for row in weights)


def test_full_precision_is_the_parameters_in_float32_and_1024_bitops_each():
    config, sites, plans, rows = inspected("random:dit", "common", bits=(None, None))
    found = totals(config, sites, plans["common"])
    assert found.size == 4 * found.parameters
    assert found.bitops == 1024 * sum(row.macs for row in rows)
    assert (found.quantized, found.scales) == (0, 0)
    assert {row.treated["common"].bits for row in rows} == {(32, 32)}
    # Weights alone: a scale and a zero point for each output channel, none for activations.
    _, _, plans, rows = inspected("random:dit", "common", bits=(4, None))
    channels = sum(int(row.shape.split("x")[-1]) for row in rows if row.operands[0] == "weight")
    assert totals(config, sites, plans["common"]).scales == 8 * channels


def test_who_keeps_the_first_convolution_is_seen():
    policies = ("common", "official:tfmq", "official:qdiffusion", "official:ptqd")
    rows = {row.site: row for row in inspected("random:miniature", *policies)[3]}
    first = rows["conv_in/conv"]
    assert [first.treated[p].bits for p in policies] == [(8, 8), (32, 32), (4, 8), (8, 8)]
    assert first.treated["official:tfmq"].rule == ("conv_in in full precision",) * 2
    assert first.treated["official:tfmq"].granularity == ("", "")
    assert first.treated["common"].granularity == ("channel", "tensor")
    # The next convolution keeps its input alone; the product takes its operands in their order.
    assert rows["down_0_block_0/conv1"].treated["official:tfmq"].bits == (4, 32)
    product = rows["mid_attn_1/pv"]
    assert product.operands == ("softmax", "v")
    assert product.treated["common"].granularity == ("tensor symmetric", "tensor")
    assert product.parameters == 0


def test_svdquant_is_shown_with_the_grids_it_runs_on():
    """Groups of 64, adapted to narrow layers; weights take half a byte and a float16 scale for each group."""
    config, sites, plans, rows = inspected("dit_fashion", "official:svdquant", bits=(4, 4))
    treated = {row.site: row.treated["official:svdquant"].granularity for row in rows}
    assert treated["blocks_0/attn_qkv"] == (
        "group of 64 symmetric signed",
        "group of 64 symmetric signed dynamic",
    )
    assert treated["blocks_0/mlp_fc2"][1] == "group of 64 symmetric dynamic"
    assert treated["blocks_0_adaLN/dense"] == ("group of 64 symmetric signed", "")
    found = totals(config, sites, plans["official:svdquant"])
    assert 8 * found.scales / found.quantized == 0.25
    narrow = {row.site: row for row in inspected("random:dit", "official:svdquant")[3]}
    seen = narrow["blocks_0/attn_qkv"].treated["official:svdquant"].granularity[0]
    assert seen == "group of 16 symmetric signed"


def test_equal_sites_of_numbered_blocks_become_one_row():
    rows = inspected("random:dit", "common")[3]
    merged = {row.site: row for row in collapse(rows)}
    assert merged["blocks_*/attn_qkv"].times == 2
    assert merged["blocks_*/attn_qkv"].parameters == 2 * (16 * 48 + 48)
    # Numbers in the name of a layer stay, and a row alone keeps its name.
    assert merged["blocks_*/mlp_fc1"].times == merged["t_embedder/mlp_0"].times + 1 == 2
    for sums in ("parameters", "macs", "times"):
        assert sum(getattr(row, sums) for row in merged.values()) == sum(
            getattr(row, sums) for row in rows
        )


def test_the_tables_are_whole():
    text, table = describe("random:dit", "w4a8", ["all"], grouped=False)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    sites = [line for line in lines if "blocks_1/" in line]
    assert len(sites) == 6
    assert len({len(line) for line in lines[: len(lines) // 2]}) == 1  # columns line up
    assert "Left out: Policy 'official:tfmq' speaks of the first three convolutions" in text
    rows = list(csv.DictReader(io.StringIO(table)))
    assert len(rows) == len(architecture_sites(config_of("random:dit")))
    last = next(row for row in rows if row["site"] == "final_layer/linear")
    assert last["common first bits"] == "8"
    assert last["official:svdquant first rule"] == "last layer in full precision"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: config_of("sd-v1-5"), "sd-v1-5 is unknown.*Did you mean 'sd-v1-4'"),
        (lambda: parse_bits("4/8"), "must be like w4a8"),
        (lambda: parse_bits("w4a1"), "must be like w4a8"),
        (lambda: inspected("random:dit", "official:tfmq"), "first three convolutions"),
        (lambda: inspected("random:dit", "comon"), "Did you mean 'common'"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_published_figures_of_real_sizes():
    """The quantization review's rows (arXiv 2505.05215): SD v1-4's U-Net is 3438 MB; 102.20 TBOPs of LDM-4 on
    ImageNet are its layers without the products of attention."""
    plans = [inspected(name, "common", bits=(None, None))[:3] for name in ("sd-v1-4", "cin256-v2")]
    sd, cin = (totals(config, sites, plan["common"]) for config, sites, plan in plans)
    assert round(sd.size / 1e6) == 3438
    assert cin.layer_bitops == pytest.approx(102.20e12, rel=1e-3)
    assert set(PUBLISHED) >= {"sd-v1-4", "cin256-v2", "DiT-XL-2-256x256", "ddpm_cifar10"}
