"""Every method of the registry on a small network: the cases of the common suite, each run once.

With zero steps no optimizer step is compiled, and what is left of a method are its stages, its ranges
and its unit-by-unit walk; with `STEPS` it optimizes too.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.methods.efficientdm import EfficientDMConfig
from qdiff_jax.methods.registry import CalibrationSets, MethodSettings, build
from qdiff_jax.methods.svdquant import SvdQuantConfig
from qdiff_jax.methods.tcaq import TcaqConfig
from qdiff_jax.methods.tdq import TdqConfig
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.quantization_noise import Paired, paired
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.observe.sources import Sampling, SourceConfig
from qdiff_jax.observe.trajectory import Trajectory
from qdiff_jax.policy import Rule, SitePlan, make_plan
from qdiff_jax.stages.batch_ranges import BatchRangeConfig
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.finetune import FinetuneConfig
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.low_rank_branches import BranchConfig
from qdiff_jax.stages.qalora import QALoRAConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import (
    Method,
    Model,
    QuantState,
    initial_state,
    run_stage,
    tuned_params,
)
from qdiff_jax.stages.time_scales import TimeScaleConfig
from qdiff_jax.stages.train_binary import BinaryTrainConfig
from qdiff_jax.stages.train_time_scales import TrainConfig

from .. import tiny_dit, tiny_unet

# Residual blocks, skips, attention and time projections, conditional on a class; one resolution.
CONFIG = UNetConfig(
    channels=8,
    multipliers=(1,),
    res_blocks=1,
    attention_resolutions=(),
    resolution=4,
    groups=4,
    num_classes=3,
)
TIMESTEPS = np.float32([100.0, 500.0, 900.0])
STEPS = 8


class Net(NamedTuple):
    """kept_weight, kept_input: sites of which one operand stays in full precision in every case.
    other_policy: one that keeps `kept_sites` whole. plain: some leaves that are no kernels."""

    tiny: Any
    config: Any
    kept_weight: str
    kept_input: str
    other_policy: str
    kept_sites: frozenset[str]
    plain: frozenset[str]


# Maps of one shape, so that one calibration set serves both.
NETWORKS = {
    "unet": Net(
        tiny_unet,
        CONFIG,
        "mid_block_1/conv2",
        "up_0_block_1/conv1",
        "official:tfmq",
        frozenset({"temb/dense_0", "conv_in/conv"}),
        frozenset({"conv_in/conv/bias", "mid_block_1/norm1/scale"}),
    ),
    "dit": Net(
        tiny_dit,
        tiny_dit.CONFIG,
        "blocks_0/mlp_fc1",
        "blocks_1/attn_proj",
        "official:tdq",
        frozenset({"blocks_0/attn_qk", "blocks_1/attn_pv"}),
        frozenset({"x_embedder/proj/bias", "t_embedder/y_embedder/embedding"}),
    ),
}
# Groups of 4 and rank 2 fit the tiny widths but for an image of 3 channels. One smoothing: searching it costs
# another compile for each shape of a layer.
SVDQUANT = SvdQuantConfig(
    group=4,
    misfit="adapt",
    branch=BranchConfig(rank=2, alpha=0.5, beta=0.5, iterations=10, samples=12, rows=64),
)


class Case(NamedTuple):
    """entry: of the registry. policy: the one it runs under when nothing else is asked. options: of
    `MethodSettings`. slow: whether all its tests are. reports: progress reports until the run is
    killed where a part of the calibration is done; late: until it is killed where it learns. network: which of
    `NETWORKS`. w_bits: of its weights. mode: of TDQ."""

    entry: str
    policy: str = "common"
    options: Mapping[str, Any] = {}
    slow: bool = False
    reports: int = 2
    network: str = "unet"
    late: int = 11
    w_bits: int = 4
    mode: str = "ptq"


CASES = {
    "rtn": Case("rtn"),
    "brecq": Case("brecq"),
    "tfmq": Case("tfmq"),
    # The same weights and another set of step tables, which cost a compile of the network.
    "tfmq faithful": Case("tfmq", options={"variant": "faithful"}, slow=True),
    "qdiffusion": Case("qdiffusion", "official:qdiffusion", options={"split": "both"}),
    "ptq4dm": Case("ptq4dm", "official:ptq4dm"),
    # A program for each shape of a layer, minutes of compiling; the stage has default tests on a chain.
    "closed_form": Case("closed_form", slow=True),
    # The base method reports its four batches, then the statistics their three steps.
    "ptqd": Case("ptqd", reports=5),
    "tdq": Case("tdq"),
    # Channel factors compile two programs for each block and one for each layer; their stage has default
    # tests on a chain. Their four batches are reported before those of the activation ranges.
    "tcaq": Case("tcaq", options={"tcaq": TcaqConfig(tcr=False)}),
    "tcaq whole": Case("tcaq", slow=True, reports=6),
    # Killed in the activation ranges, after the four batches of its factors.
    "ptq4dit": Case("ptq4dit", "official:ptq4dit", reports=6, network="dit"),
    # Twelve blocks are reported; by the sixth some layers have their results in the store.
    "svdquant": Case("svdquant", "official:svdquant", options={"svdquant": SVDQUANT}, reports=6),
    # The same branches, then every layer's shape compiles again as in "closed_form"; killed among its blocks.
    "svdquant closed form": Case(
        "svdquant",
        "official:svdquant",
        options={"svdquant": SVDQUANT, "rounding": "closed_form"},
        slow=True,
        reports=15,
    ),
    # Of its five units: killed with the first block in the store.
    "svdquant dit": Case(
        "svdquant",
        "official:svdquant",
        options={"svdquant": SVDQUANT},
        slow=True,
        reports=3,
        network="dit",
    ),
    # Four batches of the calibration, then three chunks of training.
    "efficientdm": Case("efficientdm", late=5),
    "efficientdm dit": Case("efficientdm", late=5, network="dit", slow=True),
    "tdq qat": Case("tdq", late=5, mode="qat", slow=True),
    "binarydm": Case("binarydm", "official:binarydm", w_bits=1),
}
UNLEARNED = ("rtn", "ptq4dm", "ptqd", "svdquant")
LEARNING = tuple(n for n, case in CASES.items() if case.entry not in UNLEARNED)


class Outcome(NamedTuple):
    state: QuantState
    reports: dict


@functools.cache
def model(network: str = "unet") -> Model:
    net = NETWORKS[network].tiny.network(NETWORKS[network].config)
    return Model(net.module, net.program, net.params)


def forward(network: str):
    """The network jitted: (variables, x, t, y) -> eps."""
    return NETWORKS[network].tiny.forward(NETWORKS[network].config)


def network_of(planned: SitePlan) -> str:
    """The name of the network whose sites the plan speaks of."""
    nodes = {entry.site.split("/")[0] for entry in planned.entries}
    return next(n for n in NETWORKS if nodes <= {node.name for node in model(n).program})


@functools.cache
def calibration() -> CalibrationSet:
    """8 samples of every step, shuffled."""
    rng = np.random.default_rng(3)
    index = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), 8))
    z = rng.standard_normal((24, 4, 4, 3)).astype(np.float32)
    y = rng.integers(0, 4, 24).astype(np.int32)
    x = z * np.float32(1 + index)[:, None, None, None]
    return CalibrationSet(x, TIMESTEPS[index], index, np.zeros(24, np.int32), y, z)


@functools.cache
def pairs() -> Paired:
    """States and full-precision estimates of 4 samples at the 3 steps: drawn, not recorded."""
    schedule = make_schedule("linear")
    sampler = ddim(schedule, TIMESTEPS)
    x, eps = np.random.default_rng(4).standard_normal((2, 3, 4, 4, 4, 3)).astype(np.float32)
    trajectory = Trajectory(
        x=x,
        t=TIMESTEPS,
        index=np.arange(3, dtype=np.int32),
        y=np.arange(4, dtype=np.int32) % 3,
        eps=eps,
        branch=np.zeros(4, np.int32),
        sample=np.arange(4),
    )
    return paired(trajectory, None, sampler, schedule)


@functools.cache
def plan(
    name: str = "common", w_bits: int = 4, a_bits: int | None = 8, network: str = "unet"
) -> SitePlan:
    """A named policy, but for one weight and one activation that stay in full precision."""
    net = NETWORKS[network]
    sites = net.tiny.network(net.config).sites
    kept = [Rule("kept weight", net.kept_weight, ("weight",), None, None)]
    if a_bits is not None:
        kept.append(Rule("kept input", net.kept_input, ("input",), None, None))
    return make_plan(sites, (*kept, *policy(name, sites, w_bits, a_bits)))


def case_plan(
    name: str, policy_name: str | None = None, a_bits: int | None = 8, w_bits: int | None = None
) -> SitePlan:
    """What a case runs under. policy_name, w_bits: in place of its own."""
    case = CASES[name]
    return plan(policy_name or case.policy, w_bits or case.w_bits, a_bits, case.network)


def settings(name: str, steps: int, devices: int = 1, save_seconds: float = 60.0) -> MethodSettings:
    case = CASES[name]
    made = MethodSettings(
        weights=ReconstructConfig(
            steps=steps,
            batch_size=8,
            lr=5e-2,
            schedule="cosine",
            walk_batch=12,
            save_seconds=save_seconds,
            devices=devices,
        ),
        activations=ActivationConfig(batch_size=6, margin=1.5),
        activation_steps=2 if steps and case.entry == "qdiffusion" else 0,
        closed_form=ClosedFormConfig(walk_batch=12, check_samples=12, devices=devices),
        tune_steps=steps,
        batch_ranges=BatchRangeConfig(bins=256, candidates=10),
        tdq=TdqConfig(
            mode=case.mode,
            scales=TimeScaleConfig(encoding=16, hidden=8, steps=steps, batch_size=8),
            train=TrainConfig(
                steps=steps, batch_size=8, lr=5e-3, warmup=2, save_seconds=save_seconds
            ),
        ),
        efficientdm=EfficientDMConfig(
            steps=steps,
            lora_divisor=5.0,
            weight_method="mse",
            # Its own schedule: the tables of the outcome are interpolated.
            source=SourceConfig(sampling_steps=4),
            student=QALoRAConfig(rank=2),
            training=FinetuneConfig(save_seconds=save_seconds),
        ),
        binarydm=BinaryTrainConfig(
            steps=3 * steps,
            batch_size=8,
            lr=5e-3,
            lrm_samples=8,
            gate_samples=8,
            checks=4,
            save_seconds=save_seconds,
        ),
        **case.options,
    )
    # Rounds sample the network, which compiles it once more.
    return dataclasses.replace(made, tcaq=dataclasses.replace(made.tcaq, rounds=min(steps, 1)))


def method(name: str, steps: int, on_progress: Callable | None = None, **own) -> Method:
    """own: devices and save_seconds of `settings`."""
    sampling = Sampling(make_schedule("linear"), "linspace", None, (4, 4, 3), 3, 3)
    sets = CalibrationSets(
        calibration(), calibration(), TIMESTEPS, paired=pairs(), sampling=sampling
    )
    case = CASES[name]
    return build(case.entry, model(case.network), sets, settings(name, steps, **own), on_progress)


def begin(planned: SitePlan, seed: int = 5) -> QuantState:
    return initial_state(planned, jax.random.key(seed), "a" * 64)


def finish(made: Method, state: QuantState, store=None, chunk=3, entered=lambda stage: None):
    """The outcome of all stages in order. entered: is told the name of every stage that begins."""
    reports = {}
    for i, stage in enumerate(made.stages):
        entered(stage.name)
        folder = None if store is None else store / f"{i}_{stage.name}"
        state, reports[stage.name] = run_stage(stage, state, folder, chunk=chunk)
    return Outcome(state, reports)


@functools.cache
def outcome(name: str, steps: int = 0, policy_name: str | None = None, a_bits: int | None = 8):
    """Of a case, run once. policy_name: in place of the case's own."""
    return finish(method(name, steps), begin(case_plan(name, policy_name, a_bits)))


def kill(name: str, steps: int, store, reports: int, stage: str | None = None) -> None:
    """Run a case until the report after so many (of that stage, or of all), where it is killed."""
    left, running = [reports], []

    def on_progress(done, total, **shown):
        left[0] -= stage in (None, running[-1])
        if left[0] < 0:
            raise KeyboardInterrupt

    made = method(name, steps, on_progress, save_seconds=0.0)
    # Without steps a chunk is a batch of the calibration, and one after the other is saved.
    chunk = 3 if steps else 1
    with pytest.raises(KeyboardInterrupt):
        finish(made, begin(case_plan(name)), store, chunk, running.append)


def resume(name: str, steps: int, store) -> Outcome:
    """The case from the start of the method, on what a killed run has left in the store."""
    return finish(method(name, steps), begin(case_plan(name)), store)


def parameters(state: QuantState) -> dict:
    """The full-precision parameters that the codes of a state are for."""
    return tuned_params(model(network_of(state.plan)).params, state.aux)
