"""Before a method and after it: ranges over t, accumulated error, temporal features, skip concatenations.

    python -m experiments.compare --method=... --bits=w4a4 --out=B
    python -m experiments.remedies --board=B --model=unet_fashion --bits=w4a4 --out=F
    python -m experiments.remedies --variants=W1/variants/brecq_w4a4,W2/variants/tdq_w4a4 --out=F
    python -m experiments.remedies --run=W --variants=rtn_w4a4,tfmq_w4a4 --every --out=F

Of the variants of a board's runs, or of those named (folders of several runs, or names in one `--run`), one
pair is measured for each trouble: a method that answers it (ranges over t: TDQ; accumulated error: PTQD, or a
recipe with PAR; temporal features: TFMQ-DM; skips of two spreads: Q-Diffusion), and what the method stands on,
at the same bits and policy; which, remedies.json says. With `--every`, all variants by every measure, the first
being the one without a remedy. Writes F/remedies.json, .png and .pdf (one column of a paper wide) and prints
the verdict, measured on `--samples` trajectories that no run has seen, each variant with its own correction of
sampling and quantized sampler.
"""

from __future__ import annotations

import collections
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence

import jax
from absl import app, flags

from experiments import command_line
from experiments.quantize_report import commit
from qdiff_jax.analysis.column import save
from qdiff_jax.analysis.figures_remedies import remedies_figure
from qdiff_jax.analysis.remedies import remedies
from qdiff_jax.analysis.remedy_pairs import Held, choose_pairs
from qdiff_jax.analysis.subject import make_subject, to_json
from qdiff_jax.export.manifest import read_manifest
from qdiff_jax.methods.run import (
    Loaded,
    check_comparable,
    load_for_sampling,
    unguided_sampler,
)
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress, progress

_SEED = 1_000_003  # of trajectories that no run has calibrated on


def variant_folders(
    variants: Sequence[str], run: pathlib.Path | None = None
) -> dict[str, pathlib.Path]:
    """{label: folder with a bundle}: of paths, or of names in a workdir of `experiments.quantize`.

    A label is the variant's name, with its run behind it where several have that name. Raises ValueError for a
    variant that is not there.
    """
    folders = []
    for given in variants:
        folder = pathlib.Path(given) if run is None else run / "variants" / given
        if not (folder / "bundle").is_dir():
            there = sorted(path.parent.name for path in folder.parent.glob("*/bundle"))
            raise ValueError(f"{folder} is no finished variant; beside it there are {there}.")
        folders.append(folder)
    if not folders:
        raise ValueError("no variants are given: name some by --variants, or a --board.")
    named = collections.Counter(folder.name for folder in folders)
    return {
        f.name if named[f.name] == 1 else f"{f.name} ({f.absolute().parents[1].name})": f
        for f in folders
    }


def board_folders(board: pathlib.Path, model: str, bits: str) -> dict[str, pathlib.Path]:
    """{label: folder} of a board's variants of a model at bits such as "w4a4".

    Raises ValueError if there are none, naming those there are."""
    found, there = [], set()
    for path in sorted(board.glob("runs/*/variants/*/bundle")):
        manifest = read_manifest(path)
        extra = manifest["extra"]
        width = f"w{extra['w_bits']}a{extra['a_bits']}"
        there.add((manifest["source"]["name"], width))
        if (manifest["source"]["name"], width) == (model, bits):
            found.append(str(path.parent))
    if not found:
        raise ValueError(f"{board} has no variant of {model} at {bits}; there are {sorted(there)}.")
    return variant_folders(found)


def held_in(folder: pathlib.Path) -> Held:
    """What a variant is, by its manifest."""
    extra = read_manifest(folder / "bundle")["extra"]
    alike = (extra["w_bits"], extra["a_bits"], extra.get("policy"))
    return Held(extra["method"], extra.get("notes", ""), alike)


def short_labels(folders: Mapping[str, pathlib.Path]) -> dict[str, str]:
    """{label: a shorter one} of those that are drawn: the variant's name, with its policy where two have that
    name, and all as they are where the policy does not tell them apart."""
    named = collections.Counter(folder.name for folder in folders.values())

    def shorter(folder: pathlib.Path) -> str:
        if named[folder.name] == 1:
            return folder.name
        policy = str(held_in(folder).alike[-1]).removeprefix("official:")
        return f"{folder.name} ({policy})"

    found = {label: shorter(folder) for label, folder in folders.items()}
    return found if len(set(found.values())) == len(found) else {label: label for label in found}


def load_variants(folders: Mapping[str, pathlib.Path]) -> dict[str, Loaded]:
    """The bundles by label.

    Raises ValueError for one whose layers do not compare, a correction of guided estimates, or bundles of
    different models or samplers.
    """
    loaded = {name: load_for_sampling(folder / "bundle") for name, folder in folders.items()}
    names = list(loaded)
    first = loaded[names[0]].manifest
    for name, one in loaded.items():
        check_comparable(one.manifest, name)
        unguided_sampler(one, name)
        for key in ("source", "sampler"):
            mine, theirs = ({**m.get(key), "tensors": None} for m in (one.manifest, first))
            if mine != theirs:
                raise ValueError(
                    f"{name} and {names[0]} differ in their {key}: {mine} and {theirs}."
                )
    return loaded


def measure(
    folders: Mapping[str, pathlib.Path],
    samples: int,
    batch: int,
    out: pathlib.Path,
    *,
    every: bool = False,
    command: str = "",
) -> dict:
    """Measure, draw and write; returns the verdict.

    folders: of `variant_folders` or `board_folders`. every: all by every measure, and no pairs. Raises
    ValueError as `load_variants` and `choose_pairs`.
    """
    pairs = None if every else choose_pairs({n: held_in(f) for n, f in folders.items()})
    wanted = list(folders) if every else list(dict.fromkeys(n for p in pairs.values() for n in p))
    shorter = short_labels({name: folders[name] for name in wanted})
    pairs = pairs and {m: tuple(shorter[n] for n in pair) for m, pair in pairs.items()}
    folders = {shorter[name]: folders[name] for name in wanted}
    wanted = list(folders)
    loaded = load_variants(folders)
    first = loaded[wanted[0]]
    diffusion = registry.load(first.manifest["source"]["name"])
    sampler = unguided_sampler(first, wanted[0])
    with progress("trajectories", samples + 1) as tell:
        subject = make_subject(
            diffusion,
            sampler,
            samples=samples,
            calibration=1,
            seed=_SEED,
            batch=batch,
            on_batch=tell,
        )
    with progress("steps", sampler.steps) as tell:
        found = remedies(
            subject,
            {name: one.variables for name, one in loaded.items()},
            lambda done, total: tell(done),
            measures=pairs,
            hooks={name: one.hooks for name, one in loaded.items()},
            samplers={name: one.plan for name, one in loaded.items()},
        )
    record = {
        **to_json(found),
        "pairs": pairs,
        "made_with": {
            "variants": {name: str(folder) for name, folder in folders.items()},
            "samples": samples,
            "command": command or "experiments.remedies.measure(...)",
            "commit": commit(),
            "machine": f"{platform.machine()}, {jax.default_backend()}",
        },
    }
    save(remedies_figure(found), out / "remedies")
    save_record(out / "remedies.json", record)
    return record["verdict"]


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    values = flags.FLAGS
    if (values.board is None) == (not values.variants) or (values.board and values.run):
        raise app.UsageError("give --board, or --variants (with or without --run).")
    log_progress()
    enable_compile_cache(values.compile_cache)
    if values.board:
        folders = board_folders(pathlib.Path(values.board), values.model, values.bits)
    else:
        folders = variant_folders(values.variants, values.run and pathlib.Path(values.run))
    verdict = measure(
        folders,
        values.samples,
        values.batch,
        pathlib.Path(values.out),
        every=values.every,
        command=shlex.join(["python", "-m", "experiments.remedies", *sys.argv[1:]]),
    )
    for key, value in verdict.items():
        print(f"{key} = {value:.4g}")


if __name__ == "__main__":
    flags.DEFINE_string("board", None, "Folder of experiments.compare.")
    flags.DEFINE_string("model", "unet_fashion", "Which of the board's models.")
    flags.DEFINE_string("bits", "w4a4", "Which of the board's widths.")
    flags.DEFINE_string("run", None, "Workdir of experiments.quantize, whose variants are named.")
    flags.DEFINE_list("variants", [], "Folders of variants, or names in --run.")
    flags.DEFINE_bool("every", False, "Every variant by every measure, instead of pairs.")
    flags.DEFINE_string("out", None, "Folder of the numbers and the picture.")
    flags.DEFINE_integer("samples", 32, "Trajectories to measure on.", lower_bound=2)
    flags.DEFINE_integer("batch", 16, "Samples at a time while sampling.", lower_bound=1)
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["out"])
    command_line.run(main)
