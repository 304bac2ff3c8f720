"""PTQD as a whole: on a small network to its bundle and back, on the shipped one its claims."""

import importlib.resources
import inspect
import json
import runpy

import jax
import numpy as np
import pytest

from experiments.quantize import quantize
from qdiff_jax.config import load_config
from qdiff_jax.diffusion.corrections import AffineCorrection, affine_hooks
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import ddim, ddpm
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.eval import variant
from qdiff_jax.export.bundle import load_bundle, stored_bytes
from qdiff_jax.methods.ptqd import ptqd
from qdiff_jax.methods.run import load_for_sampling
from qdiff_jax.models.registry import predictor
from qdiff_jax.observe.quantization_noise import Paired, paired
from qdiff_jax.observe.trajectory import record_trajectories
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.correct import variance_says
from qdiff_jax.stages.stage import Method, run_stage

from .. import main_job
from . import cases, test_orderings

CONFIG = str(main_job.ROOT / "configs" / "methods" / "ptqd.py")
BITS = ("w4a8", "w8a8", "w4a4", "w4a32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Ancestral DDIM on the miniature U-Net, with bits by step."""
    workdir = tmp_path_factory.mktemp("ptqd")
    config = load_config(f"{CONFIG}:smoke,mixed,eta=1", {"ptqd.step_bits": (4, 8)})
    quantize(config, workdir)
    return workdir / "variants" / "ptqd_w4a8"


def stage_report(run, name):
    stages = json.loads((run / "quantize.json").read_text())["stages"]
    return next(report for key, report in stages.items() if key.endswith(name))


@pytest.mark.slow
def test_the_bundle_holds_the_correction_of_every_step(run):
    bundle = load_bundle(run / "bundle")
    table, report = bundle.correction.table, stage_report(run, "calibrate_correction")
    assert isinstance(table, AffineCorrection)
    assert table.scale.shape == table.shift.shape == (4, 1)
    np.testing.assert_allclose(table.scale[:, 0], 1 / (1 + np.array(report["slope"])), rtol=1e-6)
    assert (np.asarray(table.variance) > 0).all()
    assert stored_bytes(run / "bundle").by_kind["correction"] == 4 * 4 * 4
    assert bundle.manifest["extra"]["method"] == "ptqd"
    assert "base=rtn" in bundle.manifest["extra"]["notes"]


@pytest.mark.slow
def test_a_new_process_samples_with_the_correction_bit_for_bit(run, tmp_path):
    main_job.run("sample", bundle=run / "bundle", out=tmp_path)
    (mine, theirs) = (np.load(folder / "samples.npz")["x"] for folder in (tmp_path, run))
    np.testing.assert_array_equal(mine, theirs)
    # And it is the correction that made them.
    loaded = load_for_sampling(run / "bundle")
    assert loaded.hooks.init(mine)["table"] is loaded.correction


@pytest.mark.slow
def test_bits_by_step_are_in_the_quantizers_of_the_target_activations_alone(run):
    bundle, report = load_bundle(run / "bundle"), stage_report(run, "calibrate_step_bits")
    assert report["bits"] == sorted(report["bits"], reverse=True)
    assert set(report["bits"]) <= {4, 8}
    flat = flatten_sites(bundle.quant)
    for entry in bundle.manifest["plan"]:
        if entry["operand"] in ("weight",) or entry["bits"] is None:
            continue
        field = "lhs" if entry["operand"] in ("input", "q", "softmax") else "rhs"
        held = getattr(flat[entry["site"]], field)
        target = entry["rule"] == "activations at target bits"
        assert isinstance(held, TimeIndexed) == target
        if target:
            levels = np.asarray(held.table.qmax) - np.asarray(held.table.qmin) + 1
            np.testing.assert_array_equal(np.log2(levels), report["bits"])


def pairs_of(plan, schedule) -> Paired:
    """Pairs on the network of the methods' common suite: its own estimates, 3 steps of 4 samples."""
    trajectory = record_trajectories(
        predictor(cases.model().module),
        {"params": cases.model().params, "quant": {}},
        plan,
        jax.random.key(0),
        range(4),
        shape=(4, 4, 3),
        y=np.arange(4, dtype=np.int32) % 3,
    )
    return paired(trajectory, None, plan, schedule)


@pytest.mark.slow
def test_without_quantization_the_correction_is_the_identity():
    schedule = make_schedule("linear")
    source = pairs_of(ddim(schedule, cases.TIMESTEPS), schedule)
    made = ptqd(cases.model(), Method("nothing", ()), source)
    state, report = run_stage(made.stages[-1], cases.begin(cases.plan()))
    table = state.aux["correction"].table
    np.testing.assert_allclose(table.scale, 1.0, atol=1e-6)
    np.testing.assert_allclose(table.shift, 0.0, atol=1e-6)
    np.testing.assert_allclose(table.variance, 0.0, atol=1e-9)
    assert "deterministic" in report["variance"]
    assert "deterministic" in made.notes


def test_killed_in_the_statistics_it_keeps_the_steps_that_are_done(tmp_path):
    """What is resumed from them is compared in the common suite."""
    cases.kill("ptqd", 0, tmp_path, cases.CASES["ptqd"].reports)
    assert len(np.load(next(tmp_path.glob("*/statistics.npz")))["slope"]) == 2


def test_what_becomes_of_the_variance_is_said():
    noisy = cases.pairs()._replace(plan=ddpm(make_schedule("linear"), cases.TIMESTEPS))
    assert "whole residual variance at 2 of 2 steps" in variance_says(noisy, np.zeros(3), True)
    assert "at 0 of 2 steps" in variance_says(noisy, np.full(3, 1e3), True)
    assert "nominal noise" in variance_says(noisy, np.zeros(3), False)


def test_the_config_says_what_to_run_and_what_to_expect():
    doc = inspect.cleandoc(runpy.run_path(CONFIG)["__doc__"])
    assert "python -m experiments.quantize --config=configs/methods/ptqd.py:w4a8 --workdir=" in doc
    assert "Expected" in doc
    for bits in BITS:
        for model in ("unet", "dit"):
            config = load_config(f"{CONFIG}:{bits},base=tfmq,model={model},laptop")
            (values,) = config.variants.values()
            assert f"w{values.w_bits}a{values.a_bits}" == bits
            assert config.model == f"{model}_fashion"


@pytest.mark.slow
class TestOrderings:
    """On the shipped U-Net, DDIM eta 0: round-to-nearest with and without the correction, other samples
    than it was measured on, for three sets of trajectories. ROLLOUT is the most that the corrected rollout
    error may be of the other, for every set."""

    ROLLOUT = 0.8
    SETS = (0, 200, 216)
    pytestmark = [
        pytest.mark.skipif(
            not importlib.resources.files("qdiff_jax.models")
            .joinpath("assets/unet_fashion.safetensors")
            .is_file(),
            reason="the package was built without assets/unet_fashion.safetensors",
        )
    ]

    def corrected(self, bits, first):
        o = test_orderings
        w, a = (int(part) for part in bits[1:].split("a"))
        state = o.nearest(w, None if a == 32 else a)
        if a != 32:
            state = o.calibrated(state)
        pairs = paired(o.trajectory(first), None, o.sampler(), o.shipped().schedule)
        made = ptqd(o.shipped().model, Method("nothing", ()), pairs)
        state, _ = run_stage(made.stages[-1], state)
        return state, affine_hooks(state.aux["correction"], o.sampler())

    @pytest.mark.parametrize("bits", BITS)
    def test_teacher_forced_error_falls_at_every_bit_setting(self, bits):
        o = test_orderings
        for seed, first in enumerate(self.SETS):
            state, hooks = self.corrected(bits, first)
            plain = o.eps_error(state, seed)
            better = variant.teacher_forced(
                o.predict(), o.variables(state), o.trajectory(100 + 16 * seed), hooks=hooks
            )
            assert better.mse < plain.mse

    def test_rollout_error_falls_at_w4a8(self):
        o = test_orderings
        plain = None
        for first in self.SETS:
            state, hooks = self.corrected("w4a8", first)
            plain = o.rollout_error(state) if plain is None else plain
            indices = range(1000, 1016)
            drawn = sample(
                o.predict(),
                o.variables(state),
                o.sampler(),
                jax.random.key(9),
                list(indices),
                shape=o.shipped().image_shape,
                y=o.labels(indices),
                hooks=hooks,
            ).x
            better = variant.rollout(o.full_precision_samples(), drawn, None)["rollout_mse"]
            assert better <= self.ROLLOUT * plain
