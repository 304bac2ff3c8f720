"""Which metric to trust at which number of samples: how many order known damages correctly.

    python -m experiments.efficiency --config=configs/evaluate.py --reference=W/fp32 \
        --variants=W/rtn_w8a8,W/rtn_w4a8,W/rtn_w4a4 --out=W/efficiency --config.data.source=idx:DIR

`--variants` are workdirs of `experiments.evaluate`, from least to most damage, `--reference` that of full
precision; all from the same seed and sampler. Writes efficiency.json, .md, .png and .pdf.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from experiments import command_line
from experiments.evaluate_config import check_alike, read_config, read_result
from experiments.evaluate_real import described, load_judge, real_images, with_classes
from qdiff_jax.analysis.column import COLOURS, column, dress, legend, line_style, save
from qdiff_jax.data.images import to_unit_range
from qdiff_jax.eval.described import Described
from qdiff_jax.eval.efficiency import Efficiency, samples_needed
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.frechet import distance_to
from qdiff_jax.eval.kid import mmd2
from qdiff_jax.eval.moments import moments_of
from qdiff_jax.eval.paired import WINDOW, mse, ssim
from qdiff_jax.eval.precision_recall import precision_recall, recall_alone
from qdiff_jax.eval.shards import read_shards
from qdiff_jax.observe.archive import save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress, progress

SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 5000)
_COSTLY_DRAWS = 30  # of metrics that compare every sample with every other


class Metric(NamedTuple):
    """of: (variant, indices) -> value. rising: grows with damage. paired: needs full precision's
    samples from the same noise. smallest: fewest samples it is defined for."""

    of: Callable[[int, np.ndarray], float]
    rising: bool
    paired: bool
    smallest: int = 4
    costly: bool = False


def metrics_of(
    sets: list[Described], images: list[np.ndarray], real: Described
) -> dict[str, Metric]:
    """The metrics by name; sets and images: full precision first, then the variants.

    Labels of `real` that are unknown (-1), or not the network's classes, leave out the class agreement."""
    pairs = {
        "pixel MSE": ([_each(mse, images[0], other) for other in images[1:]], True),
        "feature distance": (
            [np.square(s.features - sets[0].features).sum(axis=1) for s in sets[1:]],
            True,
        ),
    }
    if min(images[0].shape[1:3]) >= WINDOW:
        pairs["SSIM"] = ([_each(ssim, images[0], other) for other in images[1:]], False)
    found = {
        name: Metric(_mean_of(values), rising, True) for name, (values, rising) in pairs.items()
    }
    variants = sets[1:]
    if real.predicted is not None and real.labels.min() >= 0:
        right = [(s.predicted == s.labels).astype(float) for s in variants]
        found["class agreement"] = Metric(_mean_of(right), False, False)
    inside = [
        precision_recall(s.features, real.features).generated_inside.astype(float) for s in variants
    ]
    found["precision"] = Metric(_mean_of(inside), False, False)
    distance = distance_to(moments_of(real.features))

    def frechet(v, i):
        return distance(moments_of(variants[v].features[i]))

    def kernel(v, i):
        return mmd2(variants[v].features[i], real.features[: 4 * len(i)])

    def recall(v, i):
        return recall_alone(variants[v].features[i], real.features)

    found["Frechet distance"] = Metric(frechet, True, False)
    found["kernel distance"] = Metric(kernel, True, False, costly=True)
    found["recall"] = Metric(recall, False, False, 8, costly=True)
    return found


def _each(function, reference: np.ndarray, other: np.ndarray, batch: int = 500) -> np.ndarray:
    jitted = jax.jit(function)
    return np.concatenate(
        [
            np.asarray(
                jitted(to_unit_range(reference[i : i + batch]), to_unit_range(other[i : i + batch]))
            )
            for i in range(0, len(reference), batch)
        ]
    )


def _mean_of(values: list[np.ndarray]):
    return lambda variant, indices: float(values[variant][indices].mean())


def draw(found: dict[str, Efficiency], path: pathlib.Path) -> None:
    """Share of right orders against number of samples, one line a metric; PNG and PDF."""
    figure, (axes,) = column((3.1,))
    for index, (name, result) in enumerate(found.items()):
        style = line_style(index)
        if index >= len(COLOURS):  # a colour's second curve
            style["markerfacecolor"] = "white"
        axes.plot(result.sizes, 100 * result.correct, label=name, **style)
    axes.axhline(95, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    dress(axes, "samples", "draws in the right order (%)")
    legend(axes, loc="upper left", bbox_to_anchor=(-0.1, -0.2), ncols=2, columnspacing=1.0)
    save(figure, path)


def efficiency(
    config: Any, reference: str, variants: Sequence[str], out: pathlib.Path, draws: int
) -> str:
    """All metrics on all variants; writes the files and returns efficiency.md.

    config: of the evaluations. reference, variants: their workdirs. draws: subsets of each size. Raises
    ValueError for evaluations that were not measured alike or not by this config, and for shards that are
    missing.
    """
    config = read_config(config)
    workdirs = [reference, *variants]
    protocols = [read_result(workdir)["protocol"] for workdir in workdirs]
    check_alike(list(zip(workdirs, protocols)))
    files = [drawn_shards(pathlib.Path(w), protocols[0]["samples"]) for w in workdirs]
    judge = load_judge(config, next(read_shards(files[0])).images.shape[1:])
    _same("network", judge.network.name, protocols[0]["network"], reference)
    _same("network_sha256", judge.network.fingerprint, protocols[0]["network_sha256"], reference)
    _same("tool", config.tool, protocols[0]["tool"], reference)
    real = real_images(config, judge, config.data.reference, None)
    _same("reference_sha256", real.digest, protocols[0]["reference_sha256"], reference)
    sets, images = [], []
    for paths in files:
        shards = list(read_shards(paths))
        images.append(np.concatenate([shard.images for shard in shards]))
        sets.append(described(judge, [(s.images, s.labels) for s in shards]))
    classes = int(real.described.labels.max()) + 1
    *sets, known = with_classes(judge, classes, *sets, real.described)
    metrics = metrics_of(sets, images, known)
    count = len(images[0])
    sizes = [size for size in SIZES if size <= count // 2]
    found: dict[str, Efficiency] = {}
    with progress("metrics", len(metrics)) as tell:
        for done, (name, metric) in enumerate(metrics.items()):
            found[name] = samples_needed(
                metric.of,
                len(sets) - 1,
                count,
                [size for size in sizes if size >= metric.smallest],
                rising=metric.rising,
                draws=min(_COSTLY_DRAWS, draws) if metric.costly else draws,
            )
            tell(done + 1)
    save_record(
        out / "efficiency.json",
        {
            "variants": list(variants),
            "network": judge.network.name,
            "pool": count,
            "metrics": {
                name: {
                    "sizes": result.sizes.tolist(),
                    "correct": result.correct.tolist(),
                    "needed": result.needed,
                    "paired": metrics[name].paired,
                }
                for name, result in found.items()
            },
        },
    )
    lines = [f"{count:,} samples of each, features of `{judge.network.name}`.", ""]
    lines += ["| metric | samples needed | needs full precision's samples |", "|---|---|---|"]
    lines += [
        f"| {name} | {result.needed or f'more than {result.sizes[-1]}'} | "
        f"{'yes' if metrics[name].paired else 'no'} |"
        for name, result in found.items()
    ]
    text = "\n".join(lines) + "\n"
    write_atomic(out / "efficiency.md", text)
    draw(found, out / "efficiency")
    return text


def drawn_shards(workdir: pathlib.Path, samples: int) -> list[pathlib.Path]:
    """The shards of the first `samples` images: a workdir may hold more, of a longer run before.

    Raises ValueError where some are missing.
    """
    folder = workdir / "shards"
    paths = sorted(p for p in folder.glob("*.npz") if p.stem.isdigit() and int(p.stem) < samples)
    found = sum(len(shard.labels) for shard in read_shards(paths))
    if found != samples:
        raise ValueError(
            f"{folder} has {found} of the {samples} samples that {workdir} was measured on; run "
            "experiments.evaluate there again."
        )
    return paths


def _same(name: str, ours: Any, theirs: Any, workdir: str) -> None:
    if ours != theirs:
        raise ValueError(
            f"{workdir} was measured with {name} {theirs!r} and the config gives {ours!r}; give the "
            "config of the evaluations."
        )


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    args = flags.FLAGS
    log_progress()
    enable_compile_cache(args.compile_cache)
    out = pathlib.Path(args.out)
    print(efficiency(args.config, args.reference, args.variants, out, args.draws))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config of the evaluations.", lock_config=True)
    flags.DEFINE_string("reference", None, "Workdir of full precision's evaluation.")
    flags.DEFINE_list("variants", None, "Workdirs from least to most damage.")
    flags.DEFINE_string("out", None, "Folder for the results.")
    flags.DEFINE_integer("draws", 200, "Random subsets of each size.", lower_bound=10)
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["config", "reference", "variants", "out"])
    command_line.run(main)
