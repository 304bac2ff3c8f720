"""EfficientDM as a method: its site policy, who is left alone, its words, what it refuses, one whole run."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.quantize import quantize
from experiments.quantize_config import read_config
from experiments.quantize_settings import method_settings
from experiments.sample import sample_bundle
from qdiff_jax.config import flatten, load_config
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.eval.samples import Samples
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.export.integer import integer_op, simulated_op
from qdiff_jax.methods.efficientdm import EfficientDMConfig, efficientdm, left_alone, phases_of
from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.registry import from_config, miniature
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.archive import load_arrays
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.observe.sources import Sampling, SourceConfig
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.timed import TimeIndexed, select, step_context
from qdiff_jax.sites import flatten_sites, list_sites
from qdiff_jax.stages.qalora import QALoRAConfig

from ..main_job import ROOT

CONFIG = ROOT / "configs" / "methods" / "efficientdm.py"
TIMES = np.float32([100.0, 900.0])
SAMPLING = Sampling(make_schedule("linear"), "linspace", None, (8, 8, 1), 10, 10)
ENDS = {
    "random:miniature": {"temb/dense_0", "temb/dense_1", "conv_in/conv", "out/conv_out"},
    "random:dit": {"t_embedder/mlp_0", "t_embedder/mlp_2", "x_embedder/proj", "final_layer/linear"},
}


def calibration():
    zeros = np.zeros(2, np.int32)
    x = np.zeros((2, 8, 8, 1), np.float32)
    return CalibrationSet(x, TIMES, np.arange(2, dtype=np.int32), zeros, zeros, x)


def planned(name, policy_name, w_bits=4, a_bits=4):
    module = miniature(name).model.module
    sites = list_sites(module, *example_inputs(module.config))
    return make_plan(sites, policy(policy_name, sites, w_bits, a_bits))


@pytest.mark.parametrize("name", ENDS)
def test_the_official_policy_is_the_table_of_the_code(name):
    plan = planned(name, "official:efficientdm")
    bits = {(e.site, e.operand): e.bits for e in plan.entries}
    assert {site for (site, _), b in bits.items() if b == 8} == ENDS[name]
    for (site, operand), b in bits.items():
        kept = operand in ("q", "k", "v", "softmax")
        kept |= site.endswith("nin_shortcut") or "_downsample/" in site
        assert (b is None) == kept, site
    if name == "random:miniature":
        assert bits["down_0_downsample/conv", "weight"] is None
        assert bits["up_1_upsample/conv", "weight"] == 4
        assert bits["up_0_block_0/nin_shortcut", "input"] is None


@pytest.mark.parametrize("name", ENDS)
def test_embedding_and_ends_are_left_alone_where_they_are_at_8_bits(name):
    model = miniature(name).model
    assert left_alone(model, planned(name, "official:efficientdm")) == ENDS[name]
    assert left_alone(model, planned(name, "common", 8, 8)) == ENDS[name]
    ends = {site for site in ENDS[name] if not site.startswith(("temb", "t_embedder"))}
    assert left_alone(model, planned(name, "common")) == ends
    assert left_alone(model, planned(name, "official:qdiffusion")) == set()


def test_its_stages_and_what_it_refuses():
    model = miniature().model
    made = efficientdm(model, calibration(), TIMES, sampling=SAMPLING)
    names = [stage.name for stage in made.stages]
    assert names == ["calibrate_weights", "calibrate_activations", "efficientdm"]
    assert made.notes == "fixed, source=online, steps=16000"
    with pytest.raises(ValueError, match="give `sampling`"):
        efficientdm(model, calibration(), TIMES)
    cached = EfficientDMConfig(source=SourceConfig(kind="cached"))
    with pytest.raises(ValueError, match="give `paired`"):
        efficientdm(model, calibration(), TIMES, sampling=SAMPLING, config=cached)
    # Before anything is calibrated: the tables are for the sampler's own schedule.
    every = EfficientDMConfig(
        student=QALoRAConfig(subsample="every"), source=SourceConfig(sampling_steps=5)
    )
    with pytest.raises(ValueError, match="has no every-n-th entry for 2 steps"):
        efficientdm(model, calibration(), TIMES, sampling=SAMPLING, config=every)
    wrongs = (
        dict(variant="paper"),
        dict(weight_method="max"),
        dict(steps=-1),
        dict(loss="eps"),
        dict(scale_lr=-1e-6),
        dict(activation_lr=float("nan")),
        dict(lora_lr=-1.0),
        dict(lora_divisor=0.0),
        dict(lora_divisor=float("nan")),
        dict(variant="faithful", student=QALoRAConfig(base="full_precision")),
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match="EfficientDMConfig"):
            EfficientDMConfig(**wrong)
    for wrong in (dict(rates="layer"), dict(rank=0)):
        with pytest.raises(ValueError, match=f"QALoRAConfig.{next(iter(wrong))}"):
            QALoRAConfig(**wrong)


def test_the_one_phase_of_the_paper():
    (phase,) = phases_of(EfficientDMConfig())
    assert phase.steps == 16_000
    assert phase.labels == {"lora": 1 / 2500, "scales": 1e-6, "tables": 5e-4}
    assert phase.losses == {"eps_sum": 1.0}
    shared = QALoRAConfig(base_delta_shared=True, rates="constant")
    (phase,) = phases_of(EfficientDMConfig(student=shared, lora_lr=0.1))
    assert phase.labels == {"lora": 0.1, "scales": 1e-6, "base_scales": 1e-6, "tables": 5e-4}
    (phase,) = phases_of(EfficientDMConfig(lora=False))
    assert set(phase.labels) == {"scales", "tables"}


@pytest.mark.parametrize(
    "words",
    [
        "w4a4",
        "w8a8,laptop",
        "w2a4,official,faithful,smoke",
        "w2a8,model=dit,no_talsq,rates=mean,laptop",
        "w4a8,base=full_precision,ranges=mse",
        "w4a4,source=cached,target=noise,untuned",
        "w4a4,source=cached,target=noise,order=trajectory",
        "w4a4,source=cached,order=mixed",
        "w6a6,no_lora",
    ],
)
def test_every_word_of_the_config_is_read(words):
    config = read_config(load_config(f"{CONFIG}:{words}"))
    assert {v.method for v in config.variants.values()} == {"rtn", "efficientdm"}
    made = method_settings(config).efficientdm
    given = words.split(",")
    assert (config.policy == "official:efficientdm") == ("official" in given)
    assert made.variant == ("faithful" if "faithful" in given else "fixed")
    assert made.student.talsq == ("no_talsq" not in given)
    assert made.source.kind == ("cached" if "source=cached" in given else "online")
    assert (made.steps == 0) == ("untuned" in given)
    assert made.lora == ("no_lora" not in given)
    assert made.student.rates == ("mean" if "rates=mean" in given else "scale_aware")
    base = "full_precision" if "base=full_precision" in given else "quantized"
    assert made.student.base == base
    ranges = "mse" if {"ranges=mse", "laptop"} & set(given) else "minmax"
    assert made.weight_method == ranges
    order = "mixed" if "order=mixed" in given or "untuned" in given else "trajectory"
    assert made.source.order == order  # noise is noised to mixed steps where nothing is said
    assert made.source.target == ("noise" if "target=noise" in given else "teacher")
    assert ("dit" in config.model) == ("model=dit" in given)
    if words == "w4a4":  # the paper's figures
        assert made == EfficientDMConfig()
        assert method_settings(config).activations.observer == "mse"


def test_every_field_is_a_key_of_the_config():
    given = {
        "training.remat": True,
        "training.weight_decay": 0.0,
        "training.save_seconds": 5.0,
        "student.zp_ste": False,
        "student.subsample": "every",
        "loss": "eps_mse",
        "lora_lr": 0.5,
    }
    config = load_config(f"{CONFIG}:laptop", {f"efficientdm.{k}": v for k, v in given.items()})
    made = dataclasses.asdict(method_settings(read_config(config)).efficientdm)
    assert {name: flatten(made)[name] for name in given} == given
    assert set(flatten(made)) == set(flatten(config.efficientdm.to_dict()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "guided"),
    [("w4a4", True), ("w2a8,official,faithful", False), ("w4a4,model=dit,no_talsq", False)],
)
def test_the_whole_method_runs_to_a_bundle_and_a_report(words, guided, tmp_path):
    scales = {"sampler.guidance_scale": 3.0, "efficientdm.source.guidance_scale": 1.5}
    config = load_config(f"{CONFIG}:{words},smoke", scales if guided else {})
    name = f"efficientdm_{words[:4]}"
    with config.unlocked():
        del config.variants[f"rtn_{words[:4]}"]
    quantize(config, tmp_path)
    (_, variant) = json.loads((tmp_path / "report.json").read_text())["variants"]
    assert variant["name"] == name
    assert np.isfinite(variant["eps_rel_mse"])
    folder = tmp_path / "variants" / name
    bundle = load_bundle(folder / "bundle")
    tables = {n for n, s in flatten_sites(bundle.quant).items() if isinstance(s.lhs, TimeIndexed)}
    assert bool(tables) == ("no_talsq" not in words)
    assert not tables & {"conv_in/conv", "out/conv_out", "x_embedder/proj", "final_layer/linear"}
    drawn = load_arrays(folder / "samples.npz", Samples).x
    np.testing.assert_array_equal(sample_bundle(folder / "bundle", tmp_path / "again"), drawn)
    layers_execute_as_simulated(bundle)
    executed = sample_bundle(folder / "bundle", tmp_path / "executed", execute=True)
    # Layer by layer the same; over a whole sampling codes next to a tie fall either way.
    assert np.square(executed - drawn).mean() < 0.05 * np.square(drawn).mean()


def layers_execute_as_simulated(bundle):
    """Every layer and product with two quantized operands, on one input: to 1e-5 of its largest output."""
    module, rng, seen = from_config(bundle.manifest["model"]), np.random.default_rng(0), 0
    flat = flatten_sites(select(bundle.quant, step_context(0.0, 1)))
    for site in list_sites(module, *example_inputs(module.config)):
        held = flat.get(site.name)
        if held is None or held.lhs is None or held.rhs is None:
            continue
        x = rng.standard_normal(site.lhs_shape).astype(np.float32)
        x = np.abs(x) / 3 if site.operands[0] == "softmax" else x
        other = None if site.has_weight else rng.standard_normal(site.rhs_shape).astype("float32")
        given = (site.operator, x, held.lhs, held.rhs)
        simulated, made = (np.asarray(f(*given, rhs=other)) for f in (simulated_op, integer_op))
        np.testing.assert_allclose(
            made, simulated, rtol=0, atol=1e-5 * np.abs(simulated).max(), err_msg=site.name
        )
        seen += 1
    assert seen > 5
