"""Flow models: loaded, recorded, quantized, sampled; what needs a noise schedule says so."""

import jax
import numpy as np
import pytest

from configs import quickstart
from experiments.analyze import prepare as analyze
from experiments.quantize import quantize
from experiments.quantize_job import prepare
from qdiff_jax.diffusion.flow import flow_euler, flow_sigmas
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.eval.report import read_report
from qdiff_jax.eval.samples import labels
from qdiff_jax.methods.run import load_for_sampling, make_sampler
from qdiff_jax.models import registry
from qdiff_jax.observe.quantization_noise import Paired
from qdiff_jax.observe.sources import SourceConfig, cached, make_source
from qdiff_jax.observe.trajectory import Trajectory
from qdiff_jax.runtime.weights import save_weights

FLOW = {"schedule": "flow", "timesteps": 1000}


def config(*methods):
    made = quickstart.get_config("smoke")
    made.model = "random:flow"
    made.sampler = dict(name="flow_euler", spacing="scheduler", steps=4, shift=3.0)
    made.variants = {name: dict(method=name, w_bits=4, a_bits=8) for name in methods}
    return made


def test_a_file_with_a_flow_in_its_header_is_a_flow_model(tmp_path):
    tiny = registry.load("random:dit")

    def saved(schedule):
        header = {"kind": "diffusion", "model": tiny.config, "schedule": schedule}
        save_weights(tmp_path / "m.safetensors", tiny.model.params, header)
        return registry.load(str(tmp_path / "m.safetensors"))

    model = saved(FLOW)
    assert model.schedule is None
    assert model.source["schedule"] == FLOW
    assert saved({"schedule": "linear", "timesteps": 1000}).schedule is not None
    with pytest.raises(
        ValueError, match="flow model with timesteps=None and prediction='velocity'"
    ):
        saved({"schedule": "flow"})
    with pytest.raises(ValueError, match="prediction='eps'; give"):
        saved({**FLOW, "prediction": "eps"})


@pytest.mark.slow
def test_a_flow_model_is_quantized_from_config_to_bundle(tmp_path):
    """Nearest, reconstructed with tables by the step, corrected on paired trajectories."""
    made = config("rtn", "tfmq", "ptqd")
    made.ptqd = dict(base="rtn")
    made.reconstruct.steps = 8
    quantize(made, tmp_path)
    rows = {row["name"]: row for row in read_report(tmp_path / "report.json")["variants"]}
    assert set(rows) == {"fp32", *made.variants}
    for name in made.variants:
        assert 0 < rows[name]["eps_rel_mse"] < 1, name
        loaded = load_for_sampling(tmp_path / "variants" / name / "bundle")
        assert loaded.plan.sampler.name == "flow_euler"
        np.testing.assert_array_equal(loaded.plan.timesteps, rows[name]["timesteps"])


def test_full_precision_is_the_euler_method_by_hand():
    """x <- x + (sigma_prev - sigma) u(x, 1000 sigma), from the noisiest level to 0."""
    job = prepare(config("rtn"))
    sigmas = flow_sigmas(4, shift=3.0)
    np.testing.assert_allclose(job.sampler.timesteps, 1000 * sigmas, rtol=1e-6)
    model = job.diffusion.model
    predict, y = registry.predictor(model.module), labels(10, range(2))
    variables = {"params": model.params, "quant": {}}
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    drawn = sample(
        predict, variables, job.sampler, jax.random.key(0), range(2), noise=noise, y=y, record=True
    )
    apply = jax.jit(model.module.apply)
    x = noise
    for sigma, next_sigma in zip(sigmas[::-1], [*sigmas[-2::-1], 0.0]):
        t = np.full((2,), 1000 * sigma, np.float32)
        x = x + np.float32(next_sigma - sigma) * np.asarray(
            apply({"params": model.params}, x, t, y)
        )
    np.testing.assert_allclose(drawn.x, x, atol=2e-5)
    assert np.abs(x - noise).max() > 0.1


def test_what_needs_a_noise_schedule_is_refused():
    made = config("rtn")
    made.model = "random:dit"
    with pytest.raises(ValueError, match="'flow_euler' belongs to 'flow' models"):
        prepare(made)
    made = config("rtn")
    made.sampler = dict(name="ddim", steps=4)
    with pytest.raises(ValueError, match="'ddim' does not sample a model with the schedule 'flow'"):
        prepare(made)
    with pytest.raises(ValueError, match="an online source samples the teacher by DDIM"):
        prepare(config("efficientdm"))
    with pytest.raises(ValueError, match="does not sample a model with the schedule 'flow'"):
        analyze("random:flow", steps=2, samples=2)
    plan = flow_euler(flow_sigmas(2))
    zeros = np.zeros((2, 3, 4, 4, 1), np.float32)
    recorded = Trajectory(
        x=zeros,
        t=plan.timesteps,
        index=plan.index,
        y=None,
        eps=zeros,
        branch=np.zeros(3, np.int32),
        sample=np.arange(3),
    )
    pairs = Paired(recorded, None, plan, None)
    with pytest.raises(ValueError, match="target='noise' noises images by a schedule"):
        cached(pairs, batch_size=1, target="noise")
    source = make_source(SourceConfig(kind="cached", batch_size=1), 2, None, pairs)
    assert source is not None


def test_options_of_the_flow_reach_the_sampler():
    made = config("rtn")
    made.sampler = dict(name="flow_euler", spacing="trailing", steps=4, mu=0.8)
    plan = prepare(made).sampler
    np.testing.assert_allclose(
        plan.timesteps, 1000 * flow_sigmas(4, mu=0.8, spacing="trailing"), rtol=1e-6
    )
    with pytest.raises(ValueError, match="has no option"):
        make_sampler(
            FLOW, {"name": "flow_euler", "spacing": "trailing", "steps": 4, "options": {"eta": 1}}
        )
