"""Where two maps meet, read off block programs, and plans split there."""

import jax
import pytest

from qdiff_jax.models import registry
from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.named_policies import policy
from qdiff_jax.policy import ACTIVATION, Rule, make_plan
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.stages.skip_split import skip_boundaries, split_plan, split_skips
from qdiff_jax.stages.stage import Model, initial_state, run_stage

from .. import tiny_unet

# Unequal widths: what is concatenated must not be halved.
UNEQUAL = UNetConfig(
    channels=4, multipliers=(1, 3), res_blocks=1, attention_resolutions=(), resolution=4, groups=2
)


def boundaries(which):
    net = tiny_unet.network(UNEQUAL)
    return skip_boundaries(net.program, net.params, example_inputs(UNEQUAL), which)


def test_boundaries_are_the_width_of_the_map_that_is_read_first():
    widths = {"up_1_block_0": 12, "up_1_block_1": 12, "up_0_block_0": 12, "up_0_block_1": 4}
    found = boundaries("both")
    assert found == {f"{b}/{op}": w for b, w in widths.items() for op in ("conv1", "nin_shortcut")}
    assert boundaries("shortcut") == {k: w for k, w in found.items() if k.endswith("nin_shortcut")}
    assert boundaries("none") == {}
    shapes = {site.name: site.rhs_shape for site in tiny_unet.network(UNEQUAL).sites}
    assert {name: shapes[name][-2] for name in found} == {
        name: {"up_1_block_0": 24, "up_1_block_1": 16, "up_0_block_0": 16, "up_0_block_1": 8}[
            name.split("/")[0]
        ]
        for name in found
    }
    with pytest.raises(ValueError, match="split 'conv1' is unknown"):
        boundaries("conv1")


def plan(*first):
    sites = tiny_unet.network(UNEQUAL).sites
    return make_plan(sites, (*first, *policy("official:qdiffusion", sites, 4, 8)))


def test_a_split_plan_changes_those_operands_and_no_other():
    found = boundaries("shortcut")
    before, after = plan(), split_plan(plan(), found)
    for old, new in zip(before.entries, after.entries, strict=True):
        if old.site not in found:
            assert new == old
            continue
        axis = -2 if old.operand == "weight" else -1
        assert new.spec == QuantSpec(granularity="split", axis=axis, boundary=found[old.site])
        assert (new.bits, new.operand) == (old.bits, old.operand)
        assert new.rule.endswith("split")


def test_what_has_no_split_form_is_named():
    site = "up_0_block_0/nin_shortcut"
    dynamic = Rule("per token", site, ("input",), 8, QuantSpec(granularity="token"))
    with pytest.raises(ValueError, match=f"{site}:input is planned per token, dynamic"):
        split_plan(plan(dynamic), boundaries("shortcut"))
    tensor = Rule("one scale", site, ("weight",), 4, ACTIVATION)
    with pytest.raises(ValueError, match=f"{site}:weight is planned per tensor"):
        split_plan(plan(tensor), boundaries("shortcut"))
    kept = Rule("kept", site, ("weight", "input"), None, None)
    assert split_plan(plan(kept), boundaries("shortcut")).of(site) == {}


def test_a_model_without_skips_is_left_as_it_is_and_the_log_says_so(caplog):
    model = registry.load("random:dit").model
    caplog.set_level("INFO")
    state = initial_state(make_plan((), ()), jax.random.key(0))
    after, report = run_stage(split_skips(model), state)
    assert report["split"] == {}
    assert after.plan == state.plan
    said = [r for r in caplog.records if "no skip concatenation to split" in r.getMessage()]
    assert len(said) == 1


def test_it_comes_before_anything_is_calibrated():
    net = tiny_unet.network(UNEQUAL)
    model = Model(net.module, net.program, net.params)
    state = initial_state(plan(), jax.random.key(0)).replace(quant={"block": {}})
    with pytest.raises(ValueError, match="'split_skips' changes the site plan after"):
        run_stage(split_skips(model, "shortcut"), state)
