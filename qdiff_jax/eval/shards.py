"""Many samples in shards: each a file of uint8 images, so that a killed run goes on with the next one.

What a distribution is judged by are the images as they would be saved, hence uint8; and ten
thousand of them are read back shard by shard, so that memory does not grow with their number.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qdiff_jax.data.images import to_uint8
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.eval.samples import draw_samples, labels
from qdiff_jax.observe.archive import load_arrays, load_record, save_arrays, save_record
from qdiff_jax.runtime.finite import NotFiniteError

# Apart from the indices of calibration trajectories and of paired evaluation samples.
FIRST_INDEX = 2_000_000


@dataclasses.dataclass(frozen=True)
class Shard:
    """images: uint8 [N, H, W, C]. labels: int32 [N], the classes asked for, or the prompts by their numbers;
    -1 if unconditional.
    seconds: of sampling, [] float64."""

    images: np.ndarray
    labels: np.ndarray
    seconds: np.ndarray


def shard_paths(directory: pathlib.Path, count: int, size: int) -> list[tuple[pathlib.Path, range]]:
    """The files of `count` samples in shards of `size`, each with the global indices it holds.

    A longer run continues a shorter one: shard k is the same whatever `count` is, but for the last.
    Raises ValueError unless size divides count.
    """
    if count < 1 or size < 1 or count % size:
        raise ValueError(
            f"samples={count} must be a multiple of the shard size {size}, so that a longer run can "
            "continue this one."
        )
    return [
        (directory / f"{first:07d}.npz", range(FIRST_INDEX + first, FIRST_INDEX + first + size))
        for first in range(0, count, size)
    ]


def claim_shards(directory: pathlib.Path, digest: str, *, write: bool = True) -> None:
    """Notes beside the shards what draws them (`subject.json`), or checks that it is the same still.

    digest: of the weights. A folder without the note, as earlier versions left it, gets one. write: False
    only checks. Raises ValueError if the shards were drawn from other weights.
    """
    path = directory / "subject.json"
    if not path.exists():
        if write:
            save_record(path, {"sha256": digest})
        return
    stored = load_record(path).get("sha256")
    if stored != digest:
        raise ValueError(
            f"{directory} holds samples of other weights ({str(stored)[:12]}..., and these are "
            f"{digest[:12]}...): a model or bundle was remade at the same path, or other prompts were "
            f"written there; use a new workdir, or "
            f"delete {directory} to draw anew."
        )


def sample_shards(
    module: Any,
    variables: Any,
    plan: SamplerPlan,
    directory: pathlib.Path,
    *,
    seed: int,
    count: int,
    size: int,
    batch_size: int,
    shape: tuple[int, ...],
    classes: int | None,
    guidance_scale: float,
    hooks: Hooks = IDENTITY,
    on_shard: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
    uint8_rule: str = "round",
    guided_channels: int = 0,
    wanted: Callable[[Sequence[int]], np.ndarray | None] | None = None,
    condition: Callable[[np.ndarray], Any] | None = None,
    null: Any = None,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[pathlib.Path]:
    """Draws the shards that are not on disk yet; returns the files of all of them, in order.

    Classes come in turn, so that every shard of a multiple of them is balanced. on_shard: called with
    the number of samples there are after each shard. mesh: as in `sample`.
    uint8_rule: of `data.images.to_uint8`. guided_channels, null: as in `draw_samples`. wanted: what the
    samples of global indices are asked for by, int32 [N]; by default the classes in turn. condition: that as
    the network's y; by default labels as they are. decode: samples to images in [-1, 1], by default the
    samples themselves. Raises ValueError as `sample` and `shard_paths` do and for samples that are not
    finite, and OSError for a full disk.
    """
    to_uint8(np.zeros(1), uint8_rule)  # an unknown rule is refused before anything is drawn
    paths = shard_paths(directory, count, size)
    for path, indices in paths:
        if not path.exists():
            began = time.monotonic()
            asked = labels(classes, indices) if wanted is None else wanted(indices)
            x = draw_samples(
                module,
                variables,
                plan,
                seed=seed,
                count=len(indices),
                batch_size=batch_size,
                shape=shape,
                classes=classes,
                guidance_scale=guidance_scale,
                guided_channels=guided_channels,
                y=None if condition is None else condition(asked),
                null=null,
                first=indices.start,
                hooks=hooks,
                mesh=mesh,
            )
            x = x if decode is None else decode(x)
            spent = np.asarray(time.monotonic() - began)
            # Rounded to bytes, NaN would pass for black.
            lost = int((~np.isfinite(x).all(axis=(1, 2, 3))).sum())
            if lost:
                raise NotFiniteError(
                    f"{lost} of {len(x)} samples of {path} are not finite: the model diverged, so that "
                    "there is nothing to evaluate; give its activations more bits, or check its "
                    "sampler and guidance. The shard was not written."
                )
            kept = np.full(len(indices), -1, np.int32) if asked is None else asked
            save_arrays(path, Shard(to_uint8(x, uint8_rule), kept, spent))
        if on_shard is not None:
            on_shard(indices.stop - FIRST_INDEX)
    return [path for path, _ in paths]


def read_shards(paths: Sequence[pathlib.Path]) -> Iterator[Shard]:
    """The shards one after the other. Raises ValueError for one that is missing or damaged."""
    for path in paths:
        yield load_arrays(path, Shard)
