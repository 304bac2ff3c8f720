"""`rounding`: read by a method, or refused by it before any work; never passed over without a word."""

import dataclasses

import pytest

from experiments.quantize_config import read_config
from experiments.quantize_job import prepare
from experiments.quantize_settings import method_settings, settings_of
from qdiff_jax.config import load_config
from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.methods.own_rounding import READING
from qdiff_jax.methods.ptq4dit import PTQ4DiTConfig
from qdiff_jax.methods.ptqd import PTQDConfig
from qdiff_jax.methods.registry import METHODS, MethodSettings, build, check_rounds
from qdiff_jax.methods.svdquant import SvdQuantConfig, svdquant
from qdiff_jax.methods.tcaq import TcaqConfig
from qdiff_jax.methods.tdq import TdqConfig
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.low_rank_branches import BranchConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import Method

from ..main_job import ROOT, SMOKE
from ..stages.chain import leaves_equal
from . import cases
from .test_recipes import sets

CONFIGS = ROOT / "configs" / "methods"
SOLVED = MethodSettings(
    rounding="closed_form",
    closed_form=ClosedFormConfig(walk_batch=12),
    weights=ReconstructConfig(batch_size=8, walk_batch=12),
    svdquant=cases.SVDQUANT,
)
REFUSING = {"rtn", "ptq4dm", "efficientdm", "binarydm"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_that_it_rounds_so_or_refuses(name):
    network = cases.model("dit" if name == "ptq4dit" else "unet")
    settings = dataclasses.replace(SOLVED, ptqd=PTQDConfig(base="brecq"))
    assert (name in READING) == (name not in {*REFUSING, "closed_form", "ptqd"})
    if name in REFUSING:
        with pytest.raises(ValueError, match=f"'closed_form' has no meaning for {name}.*svdquant"):
            build(name, network, sets(), settings)
    else:
        made = build(name, network, sets(), settings)
        assert name == "closed_form" or "rounding=closed_form" in made.notes
    default = dataclasses.replace(settings, rounding=MethodSettings.rounding)
    assert "rounding=closed_form" not in build(name, network, sets(), default).notes


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("ptqd", {}, "for ptqd: rtn rounds to nearest"),
        ("csb+rtn", {}, r"for csb\+rtn: rtn rounds to nearest"),
        ("csb+efficientdm", {}, "efficientdm trains its codes"),
        ("tdq", {"tdq": TdqConfig(mode="qat")}, "tdq with tdq.mode='qat' trains its codes"),
        (
            "ptq4dit",
            {"ptq4dit": PTQ4DiTConfig(reconstruction=False)},
            "ptq4dit without ptq4dit.reconstruction rounds to nearest",
        ),
        (
            "csb+svdquant",
            {"svdquant": SvdQuantConfig(branch=BranchConfig(gptq=True))},
            "svdquant with svdquant.branch.gptq rounds by GPTQ",
        ),
    ],
)
def test_what_decides_the_codes_otherwise_is_named(name, own, message):
    with pytest.raises(ValueError, match=message):
        check_rounds(name, dataclasses.replace(SOLVED, **own))


def test_par_repeats_svdquant_in_closed_form_alone():
    settings = dataclasses.replace(SOLVED, tcaq=TcaqConfig(rounds=2))
    made = build("svdquant+par", cases.model(), sets(), settings)
    assert [stage.kind for stage in made.stages[-5:]] == ["codes"] + 4 * ["rounds"]
    layerwise = dataclasses.replace(settings, rounding=MethodSettings.rounding)
    with pytest.raises(ValueError, match="par has nothing to repeat; set rounding='closed_form'"):
        build("svdquant+par", None, None, layerwise)


@pytest.mark.slow
def test_a_recipe_solves_for_codes_after_a_transform_and_again_on_other_states():
    """On the transformer, where CSB changes the parameters and one input of every block is shifted."""
    settings = dataclasses.replace(SOLVED, tcaq=TcaqConfig(rounds=1))
    stages = build("csb+svdquant+par", cases.model("dit"), sets(), settings).stages
    first = cases.finish(
        Method("csb+svdquant", stages[:-2]), cases.begin(cases.case_plan("svdquant dit"))
    )
    again = cases.finish(Method("par", stages[-2:]), first.state)
    for made, name in ((first, "svdquant_weights"), (again, "par_round_1")):
        assert all(
            u["loss"] <= u["nearest_loss"] for u in made.reports[name]["units"] if u["trained"]
        )
    before, after = (flatten_sites(made.state.quant) for made in (first, again))
    assert set(after) == set(before)
    assert [n for n in before if not leaves_equal(before[n].rhs, after[n].rhs)]
    for entry in again.state.plan.quantized("weight"):
        name, site = entry.site, after[entry.site]
        assert leaves_equal(before[name].substitute, site.substitute), name
        assert isinstance(site.rhs, QTensor), name
        assert site.bias is not None, name


@pytest.mark.parametrize("name", ["brecq+efficientdm", "csb+svdquant+efficientdm", "closed_form"])
def test_training_may_go_on_from_codes_that_are_solved_for(name):
    check_rounds(name, SOLVED)


def test_a_base_that_there_is_not_is_still_named():
    with pytest.raises(ValueError, match="PTQD goes on top of another method, not of 'nearest'"):
        check_rounds("ptqd", dataclasses.replace(SOLVED, ptqd=PTQDConfig(base="nearest")))


def test_a_job_refuses_it_before_any_work_and_keeps_its_yardstick():
    asked = {"rounding": "closed_form"}
    config = read_config(load_config(SMOKE, asked))
    settings = method_settings(config)
    for name, variant in config.variants.items():
        nearest = variant.method == "rtn"
        own = settings_of(config, settings, name)
        assert own.rounding == ("adaround" if nearest else "closed_form"), name
    for words in ("efficientdm.py:smoke", "ptq4dm.py:smoke", "baseline.py:smoke"):
        with pytest.raises(ValueError, match="rounding='closed_form' has no meaning for"):
            prepare(load_config(str(CONFIGS / words), asked))
    config = read_config(load_config(f"{CONFIGS}/svdquant.py:smoke,rounding=closed_form"))
    own = settings_of(config, method_settings(config), "svdquant_w4a4")
    assert (own.rounding, own.svdquant.branch.gptq) == ("closed_form", False)


def test_svdquant_has_its_closed_form_in_place_of_nearest_codes():
    stages = build("svdquant", cases.model(), sets(), SOLVED).stages
    assert [stage.name for stage in stages[3:]] == ["low_rank_branches", "svdquant_weights"]
    assert stages[-1].kind == "codes"
    data = (cases.model(), cases.calibration(), cases.calibration(), cases.TIMESTEPS)
    with pytest.raises(ValueError, match="rounding 'adaround' is unknown; use one of"):
        svdquant(*data, rounding="adaround")
    both = dataclasses.replace(cases.SVDQUANT, branch=BranchConfig(gptq=True))
    with pytest.raises(ValueError, match="branch.gptq rounds layer by layer"):
        svdquant(*data, rounding="closed_form", config=both)
