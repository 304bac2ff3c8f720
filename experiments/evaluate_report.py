"""What `experiments.evaluate` shows: report.html of one evaluation, a table of several."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from qdiff_jax.data.images import to_unit_range
from qdiff_jax.eval import page
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.plots import plot_samples
from qdiff_jax.eval.shards import Shard
from qdiff_jax.eval.tables import ABSENT, Column, significant
from qdiff_jax.eval.tools import metric_name

MEANINGS = {
    "frechet": "Frechet distance to the reference in the network's features; 0 is equal. Only with the "
    "2015 Inception network is it called FID.",
    "frechet_infinity": "the same, extrapolated to infinitely many samples by a line in 1/N.",
    "spatial_frechet": "Frechet distance of the network's spatial features.",
    "score": "exponential of the mean divergence of the class posterior from its mean, over splits.",
    "kernel": "squared maximum mean discrepancy in the network's features, cubic polynomial kernel.",
    "precision": "share of samples inside the manifold of the reference (k nearest neighbours).",
    "recall": "share of the reference inside the manifold of the samples.",
    "class_agreement": "share of samples that the network puts into the class asked for; under "
    "'real', its accuracy on the reference.",
    "mse": "mean squared difference to the paired samples, pixels in [-1, 1].",
    "psnr_db": "peak signal-to-noise ratio against the paired samples, in dB.",
    "ssim": "structural similarity to the paired samples, 1 is equal.",
    "sqnr_db": "signal-to-quantization-noise ratio against the paired samples, in dB.",
    "lpips": "distance to the paired samples in the layers of the named trunk, weighted as people judge "
    "it; 0 is equal.",
    "clip_score": "mean cosine of image and prompt, or caption of its class, in the named CLIP's space; "
    "under 'real', the same of real images by their classes.",
}
_PLAIN = {
    "class_agreement": "class agreement",
    "mse": "MSE",
    "psnr_db": "PSNR (dB)",
    "ssim": "SSIM",
    "sqnr_db": "SQNR (dB)",
}
_SHOWN = 40


def shown(value: float | None) -> str:
    """A value of metrics.json as text; null is what equal pairs have in dB."""
    return "exact" if value is None else significant(value)


def metric_title(metric: str, protocol: Mapping) -> str:
    """How a metric of metrics.json is called: a distance by its network, and only Inception's FID."""
    network = protocol["network"]
    if metric == "lpips":
        return f"LPIPS ({protocol['lpips']['net']})"
    if metric == "clip_score":
        return f"CLIP score ({protocol['clip']['network']})"
    if metric in _PLAIN:
        return _PLAIN[metric]
    return metric_name(metric, network)


def _column(header: str, meaning: str) -> Column:
    return Column(header, "", meaning, lambda variant, reference: "")


_COLUMNS = (
    _column("Metric", "What is measured; explained on mouse-over and below."),
    _column("Value", "On all samples of the run."),
    _column("95 % low", "Lower end of the interval over samples."),
    _column("95 % high", "Upper end of the interval over samples."),
    _column("Real", "The same of real images: floor of a distance, accuracy of the classifier."),
)


def write_report(result: Mapping, first: Shard, workdir: pathlib.Path) -> None:
    """report.html and samples.png of one evaluation; `first` is a shard to show."""
    picture = plot_samples(
        {"samples": to_unit_range(first.images[:_SHOWN])}, workdir / "samples.png", 10
    )
    measured = result["protocol"]
    cells = [
        [
            metric_title(name, measured),
            shown(entry["value"]),
            shown(entry["low"]),
            shown(entry["high"]),
            significant(entry["floor"] if "floor" in entry else entry["real"])
            if {"floor", "real"} & set(entry)
            else ABSENT,
        ]
        for name, entry in result["metrics"].items()
    ]
    terms = [
        Column(metric_title(name, measured), "", MEANINGS[name], lambda variant, reference: "")
        for name in result["metrics"]
    ]
    values = [[shown(entry["value"]) for entry in result["metrics"].values()]]
    sampler = result["protocol"]["sampler"]
    network = measured["network"]
    lead = f"{measured['samples']} samples, {sampler['name']} with {sampler['steps']} steps, "
    lead += f"features of {network}." if network else "compared with no real images."
    html = page.page(
        f"Evaluation of {result['subject'].get('name', 'a model')}",
        lead,
        [("Metrics", _COLUMNS, cells), ("What they mean", terms, values)] if cells else [],
        {"The first samples; one column a class where there are ten": picture},
        {
            **{key: str(value) for key, value in result["subject"].items()},
            **{key: str(value) for key, value in result["protocol"].items()},
            **{key: str(value) for key, value in result["cost"].items()},
        },
    )
    write_atomic(workdir / "report.html", html)


def write_comparison(results: Mapping[str, Mapping], out: pathlib.Path) -> str:
    """comparison.md and comparison.html of evaluations that were measured alike; returns the former."""
    names = list(next(iter(results.values()))["metrics"])
    measured = next(iter(results.values()))["protocol"]
    titles = [metric_title(name, measured) for name in names]
    header = ["evaluation", *titles]
    rows = []
    for workdir, result in results.items():
        metrics = result["metrics"]
        rows.append(
            [
                pathlib.Path(workdir).name,
                *(
                    f"{shown(metrics[n]['value'])} "
                    f"[{shown(metrics[n]['low'])}, {shown(metrics[n]['high'])}]"
                    if n in metrics
                    else ABSENT
                    for n in names
                ),
            ]
        )
    reference = next(iter(results.values()))
    real = [
        next((shown(entry[key]) for key in ("floor", "real") if key in entry), ABSENT)
        for entry in (reference["metrics"][name] for name in names)
    ]
    rows.append(["real images", *real])
    lines = [header, ["---"] * len(header), *rows]
    sampler = measured["sampler"]
    scale = sampler["guidance_scale"]
    text = (
        f"{measured['samples']:,} samples each, {sampler['name']} with {sampler['steps']} steps "
        f"({sampler['spacing']}), {'no guidance' if scale < 0 else f'guidance {scale:g}'}, features of "
        f"{measured['network']}; [95 % interval].\n\n"
    )
    text += "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    write_atomic(out / "comparison.md", text)
    columns = [
        _column("Evaluation", "Its workdir."),
        *(_column(title, MEANINGS[name]) for title, name in zip(titles, names)),
    ]
    provenance = {key: str(value) for key, value in measured.items()}
    html = page.page(
        "Evaluations side by side",
        "All measured by one protocol; intervals cover 95 %.",
        [("Metrics", columns, rows)],
        {},
        provenance,
    )
    write_atomic(out / "comparison.html", html)
    return text
