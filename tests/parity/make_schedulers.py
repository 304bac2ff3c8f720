"""Makes cases/schedulers.npz: trajectories of diffusers' schedulers over an analytic network.

    pip install torch==2.13.0 diffusers==0.42.1 && python tests/parity/make_schedulers.py

For each case the file holds the timesteps of all network calls in visiting order, the network's input at
each, the final sample and, where the sampler is stochastic, the fresh noise of each step. What no package
has (DPMSolverSampler of CompVis, Euler with k-diffusion's interpolation) is computed here in float64 from
the formulas of its source, written in other variables than ours.
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

SHAPE = (2, 3, 2, 2)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(x, t):
    """k1(t) (x - k2(t) m) + 0.05 sin(2 x + 0.004 t), coefficients in float64; x torch or numpy."""
    alpha_bar = np.exp(-(1e-4 * t + 9.95e-6 * t**2))
    k1, k2 = np.sqrt(1 - alpha_bar) / (0.25 * alpha_bar + 1 - alpha_bar), np.sqrt(alpha_bar)
    m = 0.4 * np.cos(np.arange(np.prod(SHAPE[1:]), dtype=np.float64)).reshape(SHAPE[1:])
    if isinstance(x, np.ndarray):
        return k1 * (x - k2 * m) + 0.05 * np.sin(2 * x + 0.004 * t)
    k1, k2, m = (torch.tensor(np.float32(value)) for value in (k1, k2, m))
    return k1 * (x - k2 * m) + 0.05 * torch.sin(2 * x + np.float32(0.004 * t))


def start(seed):
    return np.random.RandomState(seed).standard_normal(SHAPE).astype(np.float32)


def run(scheduler, steps, *, stochastic=False, learned=False, set_to=None, **options):
    """{"t", "x", "final"[, "noise"]} of a scheduler, and its input x_T."""
    scheduler.set_timesteps(**(set_to or {"num_inference_steps": steps}))
    noise = start(3)
    x = (
        torch.tensor(noise) * scheduler.init_noise_sigma
        if hasattr(scheduler, "init_noise_sigma")
        else torch.tensor(noise)
    )
    seen, times, fresh = [], [], []
    for i, t in enumerate(scheduler.timesteps):
        inner = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        seen.append(inner.numpy())
        times.append(float(t))
        output = network(inner, float(t))
        if learned:
            output = torch.cat([output, torch.tanh(output)], dim=1)
        if stochastic:
            # The scheduler draws from a generator; one of the same seed gives us its noise.
            options["generator"] = torch.Generator().manual_seed(100 + i)
            fresh.append(
                torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i)).numpy()
            )
        x = scheduler.step(output, t, x, **options).prev_sample
    case = {"x_T": noise, "t": np.array(times), "x": np.stack(seen), "final": x.numpy()}
    return {**case, "noise": np.stack(fresh)} if stochastic else case


def compvis_dpm(steps, betas):
    """DPM_Solver(predict_x0).sample(skip_type="time_uniform", method="multistep", order=2), float64."""
    grid = np.arange(1, 1001) / 1000
    log_alpha = 0.5 * np.cumsum(np.log(1 - betas))
    nodes = np.linspace(1.0, 1e-3, steps + 1)
    x, denoised, case = start(3).astype(np.float64), [], {"t": [], "x": []}

    def levels(t):
        log_a = np.interp(t, grid, log_alpha)
        sigma = np.sqrt(1 - np.exp(2 * log_a))
        return np.exp(log_a), sigma, log_a - np.log(sigma)

    for i in range(steps):
        t = (nodes[i] - 1e-3) * 1000
        case["t"].append(t)
        case["x"].append(x)
        a, s, lam = levels(nodes[i])
        denoised.append((x - s * network(x, t)) / a)
        a_next, s_next, lam_next = levels(nodes[i + 1])
        h = lam_next - lam
        step = -a_next * np.expm1(-h)
        first_order = i == 0 or (steps < 15 and i == steps - 1)
        if first_order:
            x = s_next / s * x + step * denoised[-1]
        else:
            r = (lam - levels(nodes[i - 1])[2]) / h
            x = s_next / s * x + step * denoised[-1]
            x = x + 0.5 * step * (denoised[-1] - denoised[-2]) / r
    stacked = {name: np.stack(value) for name, value in case.items()}
    return {"x_T": start(3), **stacked, "final": x}


def k_euler(steps, betas):
    """sample_euler of k-diffusion over DiscreteEpsDDPMDenoiser.get_sigmas(steps), float64."""
    alpha_bar = np.cumprod(1 - betas)
    log_sigmas = 0.5 * np.log((1 - alpha_bar) / alpha_bar)
    t = np.linspace(999, 0, steps)
    sigmas = np.append(np.exp(np.interp(t, np.arange(1000), log_sigmas)), 0.0)
    x, seen = start(3) * sigmas[0], []
    for i in range(steps):
        inner = x / np.sqrt(sigmas[i] ** 2 + 1)
        seen.append(inner)
        denoised = x - sigmas[i] * network(inner, t[i])
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return {"x_T": start(3), "t": t, "x": np.stack(seen), "final": x}


def cases():
    scaled = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    free = {"clip_sample": False}
    for name, options in {"ddim": {}, "ddim_v": {"prediction_type": "v_prediction"}}.items():
        yield name, run(DDIMScheduler(**free, **options), 10)
    for spacing, steps in (("trailing", 7), ("linspace", 10)):
        yield f"ddim_{spacing}", run(DDIMScheduler(**free, timestep_spacing=spacing), steps)
    latent = DDIMScheduler(**SD, **free, set_alpha_to_one=False, steps_offset=1)
    yield "ddim_latent_eta", run(latent, 10, stochastic=True, eta=0.7)
    for variance in ("fixed_small", "fixed_large", "learned_range"):
        scheduler = DDPMScheduler(**free, variance_type=variance)
        yield (
            f"ddpm_{variance}",
            run(scheduler, 10, stochastic=True, learned=variance == "learned_range"),
        )
    clipped = DDPMScheduler(prediction_type="v_prediction")
    yield "ddpm_v_clipped", run(clipped, 10, stochastic=True)
    plms = dict(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    for steps in (4, 10):
        yield f"plms_{steps}", run(PNDMScheduler(**SD, **plms), steps)
    yield "plms_v", run(PNDMScheduler(**SD, **plms, prediction_type="v_prediction"), 10)
    for spacing, offset in (("linspace", 0), ("leading", 1), ("trailing", 0)):
        grid = {"timestep_spacing": spacing, "steps_offset": offset}
        solver = DPMSolverMultistepScheduler(**SD, **grid)
        yield f"dpmpp_{spacing}", run(solver, 16 if spacing == "linspace" else 10)
        # 11 steps of a linspace grid are fractional; 10 happen to be integers.
        steps = 11 if spacing == "linspace" else 10
        yield f"euler_{spacing}", run(EulerDiscreteScheduler(**SD, **grid), steps)
    last = {"final_sigmas_type": "sigma_min"}
    solver = DPMSolverMultistepScheduler(
        **SD, **last, prediction_type="v_prediction", lower_order_final=False
    )
    yield "dpmpp_v_sigma_min", run(solver, 10)
    solver = DPMSolverMultistepScheduler(**SD, **last, euler_at_final=True)
    yield "dpmpp_euler_at_final", run(solver, 16)
    yield "euler_v", run(EulerDiscreteScheduler(**SD, prediction_type="v_prediction"), 11)
    yield "flow", run(FlowMatchEulerDiscreteScheduler(), 10)
    yield "flow_shift3", run(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    given = {"sigmas": np.linspace(1.0, 0.1, 10), "mu": 0.8}
    yield "flow_dynamic", run(dynamic, 10, set_to=given)
    yield "compvis_dpm_20", compvis_dpm(20, scaled)
    yield "compvis_dpm_10", compvis_dpm(10, scaled)
    yield "k_euler", k_euler(11, scaled)


def main():
    arrays, meta = {}, {}
    for name, case in cases():
        meta[name] = len(case["t"])
        for key, value in case.items():
            single = key != "t"
            arrays[f"{name}/{key}"] = value.astype(np.float32 if single else np.float64)
    path = pathlib.Path(__file__).parent / "cases" / "schedulers.npz"
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)
    print(path, path.stat().st_size, "bytes;", meta)


if __name__ == "__main__":
    main()
