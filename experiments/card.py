"""The card of a shipped model, from the run that trained it and the evaluations that judged it.

    python -m experiments.card --training=runs/unet --evaluations=W/dpm20,W/ddim50 \
        --weights=qdiff_jax/models/assets/unet_fashion.safetensors \
        --data="Fashion-MNIST (Xiao et al. 2017, MIT licence)" --hardware="one x86-64 core" \
        --command="python -m experiments.train --config=configs/train_unet_fashion.py --workdir=W"

`--training` names the workdirs of a run that was continued in others, the first to the last. `--weights` is
what the run exported (`--export`, `--export_bits=16`) and the evaluations judged. Writes
beside it `<name>.md`, `<name>_loss.png` and `<name>.png` (the grid of the last evaluation). Every number in
the card is read from the files of the run and of the evaluations.
"""

from __future__ import annotations

import json
import logging as python_logging
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import app, flags, logging

from experiments import command_line
from experiments.evaluate_config import read_result
from qdiff_jax.analysis.column import column, dress, plain_log, save
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.tables import significant
from qdiff_jax.export.bundle import file_sha256
from qdiff_jax.runtime.metrics import read_metrics
from qdiff_jax.runtime.weights import load_weights

METRICS = ("class_agreement", "recall", "precision", "frechet", "kernel")


def training_facts(records: Sequence[Mapping], config: Mapping) -> dict[str, str]:
    """Steps, images seen, seconds and losses of a run, as text for the card."""
    steps = records[-1]["step"]
    images = steps * config["data"]["batch"]
    rates = [r["steps_per_second"] for r in records if "steps_per_second" in r]
    # Seconds count from each start of the process, so that a resumed run has several clocks.
    seconds = sum(
        (b["step"] - a["step"]) / b["steps_per_second"]
        for a, b in zip(records, records[1:])
        if "steps_per_second" in b
    )
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    shown = [losses[round(f * (len(losses) - 1))] for f in (0.02, 0.1, 0.3, 0.6, 1.0)]
    return {
        "training": f"{steps:,} steps of {config['data']['batch']} ({images:,} images seen), Adam at "
        f"{config['optimizer']['peak_lr']:g}, the last {config['optimizer']['cooldown']:,} steps falling "
        f"to 0, averaged weights ({config['optimizer']['ema']})",
        "time": f"{seconds / 3600:.1f} hours of stepping, {np.median(rates):.2f} steps a second "
        "(median; other work on the machine included)",
        "loss": ", ".join(f"{loss:.4f} at step {step:,}" for step, loss in shown)
        + f" (means of {losses[1][0] - losses[0][0]} steps)",
    }


def figures_table(results: Mapping[str, Mapping]) -> list[str]:
    """One row an evaluation, as Markdown lines."""
    names = [m for m in METRICS if any(m in r["metrics"] for r in results.values())]
    lines = [
        "| sampler | guidance | samples | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for result in results.values():
        sampler = result["protocol"]["sampler"]
        scale = sampler["guidance_scale"]
        cells = []
        for name in names:
            entry = result["metrics"][name]
            text = significant(entry["value"])
            if "floor" in entry:
                text += f" (floor {significant(entry['floor'])})"
            cells.append(text)
        lines.append(
            f"| {sampler['name']}, {sampler['steps']} steps | {'none' if scale < 0 else f'{scale:g}'} | "
            f"{result['protocol']['samples']:,} | " + " | ".join(cells) + " |"
        )
    return lines


def draw_loss(
    records: Sequence[Mapping], stem: pathlib.Path, label: str = "loss (MSE of eps)"
) -> None:
    """The loss over steps, logged means as they are; PNG and PDF beside the weights."""
    losses = np.array([(r["step"], r["loss"]) for r in records if "loss" in r])
    figure, (axes,) = column((2.0,))
    axes.plot(losses[:, 0], losses[:, 1], color="#0072B2", linewidth=0.9)
    axes.set_yscale("log")
    dress(axes, "training step", label)
    plain_log(axes)
    save(figure, stem)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    args = flags.FLAGS
    python_logging.getLogger("fontTools").setLevel(python_logging.WARNING)  # every glyph of a PDF
    weights = pathlib.Path(args.weights)
    records = [record for folder in args.training for record in read_metrics(pathlib.Path(folder))]
    config = json.loads((pathlib.Path(args.training[-1]) / "config.json").read_text())["config"]
    params, _ = load_weights(weights)
    leaves = jax.tree.leaves(params)
    results = {path: read_result(path) for path in args.evaluations}
    for path, result in results.items():
        if result["subject"]["sha256"] != file_sha256(weights):
            raise ValueError(f"{path} judged other weights than {weights}; evaluate them anew.")
    stem = weights.with_suffix("")
    draw_loss(records, stem.with_name(stem.name + "_loss"))
    grid = pathlib.Path(args.evaluations[-1]) / "samples.png"
    shutil.copyfile(grid, stem.with_suffix(".png"))
    facts = {
        "data": args.data,
        "network": f"{sum(leaf.size for leaf in leaves):,} parameters, stored as {leaves[0].dtype}; "
        f"`{json.dumps(config['model'], sort_keys=True)}`",
        "process": f"{config['diffusion']['schedule']} schedule, {config['diffusion']['timesteps']:,} "
        f"steps, eps prediction, labels dropped with probability {config['diffusion']['label_dropout']}",
        "command": f"`{args.command}`",
        "hardware": args.hardware,
        **training_facts(records, config),
    }
    judge = next(iter(results.values()))["protocol"]
    lines = [
        f"# {weights.stem}",
        "",
        f"![samples]({stem.name}.png)",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
        f"![loss]({stem.name}_loss.png)",
        "",
        "## Figures",
        "",
        f"In the features of `{judge['network']}` against the {judge['reference']} set; a floor is the "
        "distance of as many real images of the other split to the same reference. Made by "
        "`python -m experiments.evaluate --config=configs/evaluate.py`.",
        "",
        *figures_table(results),
        "",
    ]
    if args.notes:
        lines += ["## Notes", "", pathlib.Path(args.notes).read_text().strip(), ""]
    write_atomic(stem.with_suffix(".md"), "\n".join(lines))
    logging.info("wrote %s", stem.with_suffix(".md"))


if __name__ == "__main__":
    flags.DEFINE_list(
        "training", None, "Workdirs of experiments.train, in the order of their steps."
    )
    flags.DEFINE_list(
        "evaluations", None, "Workdirs of experiments.evaluate; the last one's grid is shown."
    )
    flags.DEFINE_string("weights", None, "The .safetensors file to ship.")
    flags.DEFINE_string("data", None, "The data set and its licence.")
    flags.DEFINE_string("hardware", None, "What it was trained on.")
    flags.DEFINE_string("command", None, "The command that trains it.")
    flags.DEFINE_string("notes", None, "A Markdown file to append.")
    flags.mark_flags_as_required(
        ["training", "evaluations", "weights", "data", "hardware", "command"]
    )
    command_line.run(main)
