"""What a training step of EfficientDM and BinaryDM holds, beside what it cannot do without.

    python -m experiments.bench_memory --out=experiments/results/training_memory.md

On the shipped networks at the batch of the `laptop` configs, W4A4 with step tables (EfficientDM) and W1A4
(BinaryDM), with blocks kept and recomputed, EfficientDM also with guidance. The figures are the compiler's plan
of one step (XLA's `memory_analysis`), not a measured peak; `sum` is the teacher, as much for the student's
weights, and what is trained with its optimizer's state. Compiling takes minutes on a CPU.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments import command_line
from qdiff_jax.diffusion.guidance import classifier_free
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.models import registry
from qdiff_jax.models.families import example_inputs
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.observe.sources import online
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.sites import SiteQuant, flatten_sites, list_sites, nest_sites, side_of
from qdiff_jax.stages.finetune import FinetuneConfig, Phase, finetune
from qdiff_jax.stages.qalora import QALoRAConfig, qalora
from qdiff_jax.stages.stage import Model, QuantState, initial_state, run_stage
from qdiff_jax.stages.train_binary import BinaryTrainConfig, train_binary
from qdiff_jax.stages.weights import calibrate_weights
from qdiff_jax.stages.whole_network import Carry, step_memory

GRID = make_timesteps("uniform", 1000, 20)
PHASES = (Phase(8, {"lora": 1e-3, "scales": 1e-6, "tables": 1e-3}, {"eps_sum": 1.0}),)


class Case(NamedTuple):
    """method: "efficientdm" or "binarydm". a_bits: None for full precision."""

    method: str
    a_bits: int | None = 4
    batch: int = 8
    remat: bool = False
    guided: bool = False
    rank: int = 32
    lrm: float = 1e-4


class Memory(NamedTuple):
    """Bytes: of the teacher, of what is trained, of its optimizer's state, and the plan of a step."""

    teacher: int
    trained: int
    optimizer: int
    plan: dict[str, int]

    @property
    def sum(self) -> int:
        student = self.teacher  # quantized weights in floats, as the forward pass multiplies them
        return self.teacher + student + self.trained + self.optimizer

    @property
    def ratio(self) -> float:
        return self.plan["peak"] / self.sum


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure(model: Model, case: Case, **compile_options) -> tuple[Memory, Carry]:
    """The memory of a case on a network, and the carry before its first step (nothing is trained)."""
    carry = begin(model, case)
    plan = step_memory(carry, **compile_options)
    trained, optimizer = size(carry.work["trainable"]), size(carry.work["optimizer"])
    if case.method == "binarydm":  # what is trained is the student's weights
        trained = 0
    return Memory(size(model.params), trained, optimizer, plan), carry


def begin(model: Model, case: Case) -> Carry:
    config = model.module.config
    sites = list_sites(model.module, *example_inputs(config))
    binary = case.method == "binarydm"
    plan = make_plan(
        sites,
        policy("official:binarydm" if binary else "common", sites, 4 - 3 * binary, case.a_bits),
    )
    state, _ = run_stage(
        calibrate_weights(model, method="minmax"), initial_state(plan, jax.random.key(0))
    )
    state = with_activations(state)
    shape = (config.resolution, config.resolution, config.in_channels)
    classes = config.num_classes
    if binary:
        y = None if classes is None else np.zeros(case.batch, np.int32)
        x, t = np.zeros((case.batch, *shape), np.float32), np.zeros(case.batch, np.float32)
        zeros = np.zeros(case.batch, np.int32)
        states = CalibrationSet(x, t, zeros, zeros, y, x)
        training = BinaryTrainConfig(
            steps=8,
            batch_size=case.batch,
            lrm=case.lrm,
            lrm_samples=case.batch,
            interval=0,
            remat=case.remat,
        )
        return train_binary(model, states, states, training).init(state, None)
    guidance = classifier_free(1.5, classes) if case.guided else None
    source = online(
        ddim(make_schedule("linear"), GRID, eta=1.0),
        shape=shape,
        batch_size=case.batch,
        guidance=guidance,
        classes=classes,
    )
    student = qalora(model, QALoRAConfig(rank=case.rank), GRID, GRID)
    training = FinetuneConfig(remat=case.remat)
    return finetune("tuned", model, student, source, PHASES, training).init(state, None)


def with_activations(state: QuantState) -> QuantState:
    """The state with a range for every planned activation, which no bytes depend on."""
    flat = dict(flatten_sites(state.quant))
    for entry in state.plan.quantized("input", "q", "k", "softmax", "v"):
        site = flat.get(entry.site, SiteQuant(product=entry.operand != "input"))
        grid = from_range(entry.spec, -4.0, 4.0, *entry.codes)
        flat[entry.site] = site.replace(**{side_of(entry.operand): grid})
    return state.replace(quant=nest_sites(flat))


def cases_of(name: str) -> list[Case]:
    both = (False, True)
    cases = [Case("efficientdm", remat=remat, guided=guided) for guided in both for remat in both]
    if name == "unet_fashion":
        cases += [Case("binarydm", batch=16, remat=remat) for remat in both]
    return cases


def row(name: str, case: Case, made: Memory) -> str:
    bits = "W1A4" if case.method == "binarydm" else "W4A4"
    cells = (
        name,
        f"{case.method} {bits}",
        case.batch,
        "yes" if case.guided else "no",
        "recomputed" if case.remat else "kept",
        f"{made.sum / 2**20:.1f}",
        f"{made.plan['peak'] / 2**20:.1f}",
        f"{made.ratio:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main(argv) -> None:
    if argv[1:]:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    head = f"{(__doc__ or '').strip()}\n\njax {jax.__version__}, {jax.default_backend()}.\n\n"
    rows = [
        "| network | method | batch | guided | blocks | sum MiB | plan MiB | plan / sum |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in flags.FLAGS.models.split(","):
        model = registry.load(name).model
        for case in cases_of(name):
            # Of LLVM alone, which comes after the memory has been laid out.
            made, _ = measure(model, case, xla_backend_optimization_level=0)
            rows.append(row(name, case, made))
            print(rows[-1], flush=True)
            pathlib.Path(flags.FLAGS.out).write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The file of the table, written anew after every row.")
    flags.DEFINE_string("models", "dit_fashion,unet_fashion", "Which networks.")
    flags.mark_flags_as_required(["out"])
    command_line.run(main)
