"""Recipes: parts of methods in one, equal to the method they were taken from, refused in a senseless order."""

import dataclasses
import inspect
import runpy

import numpy as np
import pytest

from experiments.quantize import quantize
from experiments.quantize_config import read_config
from experiments.quantize_job import prepare
from qdiff_jax.config import load_config
from qdiff_jax.eval.report import read_report
from qdiff_jax.export.qtensor import QTensor, codes
from qdiff_jax.methods.par import par
from qdiff_jax.methods.ptq4dit import PTQ4DiTConfig, ptq4dit
from qdiff_jax.methods.recipes import PARTS, check_order, compose
from qdiff_jax.methods.registry import METHODS, CalibrationSets, MethodSettings, build, methods_of
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.qalora import QALoRAConfig, qalora
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import KINDS, Method, fold_weights

from ..main_job import ROOT
from ..stages.chain import leaves_equal
from . import cases

CONFIGS = {
    "dit_csb_svdquant_efficientdm": (
        "csb+svdquant+efficientdm",
        {"csb+rtn", "svdquant", "efficientdm"},
    ),
    "unet_tcr_tfmq_par_ptqd": ("tcr+tfmq+par+ptqd", {"tcr+rtn", "tfmq", "tfmq+par", "rtn+ptqd"}),
}


def sets():
    drawn = cases.Sampling(cases.make_schedule("linear"), "linspace", None, (4, 4, 3), 3, 3)
    both = cases.calibration()
    return CalibrationSets(both, both, cases.TIMESTEPS, paired=cases.pairs(), sampling=drawn)


def run(recipe, case, steps=0, **own):
    """The outcome of a recipe with the settings and the plan of a case."""
    network = cases.CASES[case].network
    settings = dataclasses.replace(cases.settings(case, steps), **own)
    made = build(recipe, cases.model(network), sets(), settings)
    return cases.finish(made, cases.begin(cases.case_plan(case)))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("svdquant+csb", "'csb' changes the parameters .*'svdquant' before it changes the grids"),
        ("efficientdm+svdquant", "'svdquant' changes the grids.*put 'svdquant' first"),
        ("brecq+svdquant", "'brecq' and 'svdquant' both decide the codes"),
        ("brecq+ptq4dit", "both decide the codes of the weights; keep one of them"),
        ("binarydm+efficientdm", "both train the network"),
        ("csb+tcr", r"quantizes no weights; end it with .* 'csb\+tcr\+rtn'"),
        ("tcr+par+tfmq", "nothing before it has quantized"),
        ("ptqd+rtn", "nothing before it has quantized"),
        ("rtn+ptqd+efficientdm", "'ptqd' before it corrects the sampling"),
        ("tcr+rtn+par", "'par' decides codes again.*which 'rtn' cannot"),
        ("csb+csb+rtn", "has 'csb' twice"),
        ("tcr+tcaq", "'tcr' and 'tcaq' both bring the transform of tcaq"),
        ("csb+ptq4dit", "'csb' and 'ptq4dit' both bring the transform of ptq4dit"),
        ("tfmq+efficientdm", "one range for each activation, and 'tfmq' leaves tables by step"),
        ("csb+smoothing", "Part 'smoothing' of the recipe .* is unknown"),
        ("csb+brec", "Did you mean 'brecq'"),
    ],
)
def test_an_order_that_makes_no_sense_is_one_sentence(recipe, message):
    with pytest.raises(ValueError, match=message):
        check_order(recipe)
    with pytest.raises(ValueError, match=message):
        build(recipe, None, None, MethodSettings())


def test_a_part_alone_is_no_method():
    with pytest.raises(ValueError, match=r"'csb' is a part: put it in a recipe, 'csb\+rtn'"):
        methods_of("csb")


def test_every_method_is_made_of_the_kinds_that_its_part_has():
    assert set(METHODS) <= set(PARTS)
    for name in cases.CASES:
        entry = cases.CASES[name].entry
        made = cases.method(name, 0)
        kinds = {stage.kind for stage in made.stages}
        if entry == "ptqd":  # its base is another part
            assert kinds == {"ranges", "codes", "correction"}
            continue
        if name == "tdq qat":  # in place of codes, and never in a recipe
            assert kinds == {"plan", "ranges", "training"}
            continue
        rounds = {"rounds"} if name.startswith("tcaq") else set()  # none at zero steps
        factors = {"transform"} if name == "tcaq" else set()
        assert kinds | rounds | factors == set(PARTS[entry].kinds) | ({"training"} & kinds), name
        assert kinds <= set(KINDS)
        # SVDQuant can be repeated in closed form alone.
        able = entry != "svdquant" or "rounding" in cases.CASES[name].options
        assert (PARTS[entry].repeats and able) == (made.again is not None)


def test_a_recipe_of_a_methods_own_parts_is_the_method():
    """Factors first, everything else built on the parameters that they leave: PTQ4DiT to the last bit."""
    given = (cases.calibration(), cases.TIMESTEPS)
    own = dict(
        weights=ReconstructConfig(steps=0, walk_batch=12, batch_size=8),
        activations=ActivationConfig(batch_size=6, margin=1.5),
    )

    def builder(csb):
        config = PTQ4DiTConfig(csb=csb)
        return lambda model, before: ptq4dit(model, *given, config=config, **own)

    model = cases.model("dit")
    apart = compose("csb+brecq", model, {"csb": builder(True), "brecq": builder(False)})
    whole = builder(True)(model, None)
    assert [s.name for s in apart.stages] == [s.name for s in whole.stages]
    plan = cases.case_plan("ptq4dit")
    made, wanted = (cases.finish(m, cases.begin(plan)).state for m in (apart, whole))
    assert leaves_equal(made.quant, wanted.quant)
    assert leaves_equal(made.aux, wanted.aux)
    unfolded = cases.finish(builder(False)(model, None), cases.begin(plan)).state
    assert not leaves_equal(made.quant, unfolded.quant)


def test_ptqd_is_its_base_and_its_correction():
    whole = cases.outcome("ptqd").state
    made = run("rtn+ptqd", "ptqd").state
    assert leaves_equal(made.quant, whole.quant)
    assert leaves_equal(made.aux, whole.aux)


def test_training_goes_on_from_the_codes_and_the_branch_before_it():
    """The student begins as the network that SVDQuant left, and without steps ends as it."""
    before = cases.outcome("svdquant").state
    made = run("svdquant+efficientdm", "svdquant")
    assert made.reports["efficientdm"]["codes_moved"] == 0.0
    assert leaves_equal(made.state.quant, before.quant)
    model = cases.model()
    student = qalora(model, QALoRAConfig(rank=2), cases.TIMESTEPS, cases.TIMESTEPS)
    trainable, fixed, _ = student.begin(before)
    begun = student.variables(trainable, fixed, model.params)
    params, quant = fold_weights(model.params, before.quant)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    at = (x, np.full(2, 500.0, np.float32), np.zeros(2, np.int32))
    forward = cases.forward("unet")
    wanted = np.asarray(forward({"params": params, "quant": quant}, *at))
    found = np.asarray(forward(begun, *at))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has codes already, and base='full_precision'"):
        qalora(model, QALoRAConfig(base="full_precision"), cases.TIMESTEPS, cases.TIMESTEPS).begin(
            before
        )


@pytest.mark.slow
def test_training_moves_codes_and_leaves_the_branch_as_it_is():
    before = flatten_sites(cases.outcome("svdquant").state.quant)
    made = run(
        "svdquant+efficientdm",
        "svdquant",
        cases.STEPS,
        efficientdm=cases.settings("efficientdm", 8).efficientdm,
    )
    report, after = made.reports["efficientdm"], flatten_sites(made.state.quant)
    # A branch of rank 2 leaves so little of this network that training has nothing to gain.
    assert report["last_loss"] < 2 * report["first_loss"]
    assert report["codes_moved"] > 0
    assert set(after) == set(before)
    moved = 0
    for name, site in before.items():
        assert leaves_equal(after[name].substitute, site.substitute), name
        if isinstance(site.rhs, QTensor):
            moved += int((np.asarray(codes(site.rhs)) != np.asarray(codes(after[name].rhs))).sum())
    assert moved


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["adaround", "closed_form"])
def test_par_repeats_the_rounding_before_it(rounding):
    """Other codes on the ranges that the method before it has calibrated."""
    settings = dataclasses.replace(cases.settings("brecq", cases.STEPS), rounding=rounding)
    stages = build("brecq+par", cases.model(), sets(), settings).stages
    assert [stage.name for stage in stages[3:]] == ["resample_1", "par_round_1"]
    first = cases.finish(Method("brecq", stages[:3]), cases.begin(cases.case_plan("brecq"))).state
    again = cases.finish(Method("par", stages[3:]), first).state
    before, after = flatten_sites(first.quant), flatten_sites(again.quant)
    assert set(after) == set(before)
    assert [n for n in before if not leaves_equal(before[n].rhs, after[n].rhs)]
    for name, site in after.items():
        assert leaves_equal(before[name].lhs, site.lhs), name
        assert site.product or site.rhs is None or isinstance(site.rhs, QTensor)


def test_settings_that_leave_nothing_of_a_part_are_named():
    settings = MethodSettings(ptq4dit=PTQ4DiTConfig(csb=False))
    with pytest.raises(ValueError, match="settings of ptq4dit leave nothing of its part 'csb'"):
        build("csb+rtn", cases.model("dit"), sets(), settings)
    tuned = cases.settings("closed_form", 3)
    with pytest.raises(ValueError, match="give it the stage 'tune', which has no place"):
        build("closed_form+ptqd", cases.model(), sets(), tuned)
    base = Method("brecq", cases.method("brecq", 0).stages)
    with pytest.raises(
        ValueError, match="par repeats a reconstruction of weights, and 'brecq' before it has none"
    ):
        par(cases.model(), base, cases.pairs(), cases.calibration(), 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_holds_the_recipe_and_each_of_its_parts(name):
    path = ROOT / "configs" / "recipes" / f"{name}.py"
    recipe, alone = CONFIGS[name]
    doc = inspect.cleandoc(runpy.run_path(str(path))["__doc__"])
    assert f"python -m experiments.quantize --config=configs/recipes/{name}.py:w4a4" in doc
    assert "Expected" in doc
    assert f"{name}.py:smoke" in doc
    for words in ("w4a4", "w4a8,laptop", "w8a8,rounding=closed_form", "smoke"):
        read = read_config(load_config(f"{path}:{words}"))
        assert [v.method for v in read.variants.values()][-1] == recipe
        left_out = {"efficientdm"} if "closed_form" in words else set()
        assert {v.method for v in read.variants.values()} == {recipe, *alone} - left_out
    only = read_config(load_config(f"{path}:only,laptop"))
    assert [v.method for v in only.variants.values()] == [recipe]
    for part in recipe.split("+"):
        left = read_config(load_config(f"{path}:no_{part},only"))
        (variant,) = left.variants.values()
        assert part not in variant.method.split("+")
    other = read_config(load_config(f"{path}:only,parts=brecq+ptqd"))
    assert [v.method for v in other.variants.values()] == ["brecq+ptqd"]
    with pytest.raises(ValueError, match="both decide the codes"):
        read_config(load_config(f"{path}:only,parts=brecq+rtn"))
    with pytest.raises(ValueError, match="leave the words that begin with no_ out"):
        load_config(f"{path}:parts=brecq+ptqd,no_{recipe.split('+')[0]}")


def test_words_of_the_recipes():
    unet, dit = (
        ROOT / "configs" / "recipes" / f"{name}.py" for name in sorted(CONFIGS, reverse=True)
    )
    left = read_config(load_config(f"{unet}:no_tfmq,no_par,only"))
    assert [v.method for v in left.variants.values()] == ["tcr+rtn+ptqd"]
    weighted = read_config(load_config(f"{dit}:w4a4,weights=eps_coefficient"))
    assert weighted.efficientdm.weighted
    assert weighted.efficientdm.source.sampling_steps == 0  # of the sampler's own steps
    with pytest.raises(ValueError, match="weighted lets steps count by .*'uniform'"):
        read_config(load_config(f"{dit}:w4a4", {"efficientdm.weighted": True}))


def test_a_recipe_for_another_network_is_refused_before_any_work():
    path = ROOT / "configs" / "recipes" / "unet_tcr_tfmq_par_ptqd.py"
    with pytest.raises(ValueError, match="this network has none of them"):
        prepare(load_config(f"{path}:smoke,only,parts=csb+rtn"))


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        (
            "csb+rtn",
            {"ptq4dit": {"csb": False}},
            "ptq4dit.csb is off, which leaves nothing of .* 'csb'",
        ),
        (
            "brecq+par",
            {"tcaq": {"rounds": 0}},
            "tcaq.rounds is 0, which leaves nothing of .* 'par'",
        ),
        ("tcr+rtn", {"tcaq": {"tcr": False}}, "tcaq.tcr is off, which leaves nothing of .* 'tcr'"),
        (
            "closed_form+ptqd",
            {"closed_form": {"tune_steps": 3}},
            "tune_steps is 3, and tuning has no",
        ),
        ("csb+svdquant", {"svdquant": {"group": 5}}, "groups of 5 do not divide"),
        (
            "csb+svdquant",
            {"ptq4dit": {"reconstruction": False}, "rounding": "closed_form"},
            "leave out rounding='closed_form'",
        ),
    ],
)
def test_settings_that_leave_a_part_nothing_are_found_before_any_work(parts, changes, message):
    path = ROOT / "configs" / "recipes" / "dit_csb_svdquant_efficientdm.py"
    config = load_config(f"{path}:smoke,only,parts={parts}")
    with config.unlocked():
        config.update(changes)
    with pytest.raises(ValueError, match=message):
        prepare(config)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", ",rounding=closed_form"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_smoke_run_reports_the_recipe_and_its_parts(name, words, tmp_path):
    config = load_config(f"{ROOT}/configs/recipes/{name}.py:smoke{words}")
    quantize(config, tmp_path)
    variants = read_report(tmp_path / "report.json")["variants"]
    assert {v["name"] for v in variants} == {"fp32", *config.variants}
    assert np.isfinite([v["eps_rel_mse"] for v in variants]).all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (name, f"{size}parts={parts}")
        for name in CONFIGS
        for size in ("smoke,", "laptop,", "")
        for parts in ("csb+binarydm", "tcr+efficientdm", "tcr+svdquant", "tcr+tdq", "tcr+par+rtn")
    ],
)
def test_parts_that_a_recipe_did_not_foresee_have_the_size_that_is_asked_for(name, words):
    """The sub-dict of each part's method is that of the method's own config under the same word."""
    size, method = words.rpartition("parts=")[0], words.rpartition("+")[2]
    method = {"rtn": "tcaq"}.get(method, method)
    config = load_config(f"{ROOT}/configs/recipes/{name}.py:{words}").to_dict()
    model = "" if method == "binarydm" else f"model={name[:4].rstrip('_')},"
    own = load_config(f"{ROOT}/configs/methods/{method}.py:{model}{size}").to_dict()
    if method == "svdquant":
        own["svdquant"]["branch"]["smoothing"] = config["svdquant"]["branch"]["smoothing"]
    if method == "efficientdm":  # the recipe on the DiT trains fewer steps
        assert config["efficientdm"].pop("steps") <= own["efficientdm"].pop("steps")
        assert config["activations"] == own["activations"]
    if method == "tcaq":  # the recipe on the U-Net takes one round in its smoke
        assert config["tcaq"].pop("rounds") <= own["tcaq"].pop("rounds")
    assert config[method] == own[method]
    if method == "binarydm":
        assert config["calibration"] == own["calibration"]
        assert config["data"] == own["data"]
