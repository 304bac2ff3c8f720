"""What one number each says of many images: nearness to real ones, fidelity, coverage, obedience.

Everything here works on sets as one network describes them (`described`). A value stands beside its interval
over samples and, for a distance, beside its floor: the distance of as many real images of another split to the
same reference, below which no model can be told from the data.
"""

from __future__ import annotations

from jax.sharding import Mesh

from qdiff_jax.eval.described import GROUPS, Described, class_agreement
from qdiff_jax.eval.frechet import frechet_infinity, moments_distance
from qdiff_jax.eval.intervals import (
    Interval,
    distance_interval,
    kernel_interval,
    score_jackknife,
)
from qdiff_jax.eval.kid import kernel_inception_distance, mmd2
from qdiff_jax.eval.moments import Moments, moments_of
from qdiff_jax.eval.precision_recall import precision_recall_intervals
from qdiff_jax.eval.tools import Tool, find_tool

_NEIGHBOURS = 3


def check_protocol(
    tool: str, k: int | None, generated: int, real: int, *, extrapolated_dim: int | None = None
) -> None:
    """Refuses what `measure` could not do with so many images, before any is drawn.

    Args:
      tool, k: as there.
      generated, real: numbers of images.
      extrapolated_dim: dimension of the pooled features, if the Frechet distance is to be extrapolated.

    Raises ValueError for a k that contradicts the tool's, fewer images than the tool's subsets have, or
    no more than twice `extrapolated_dim`.
    """
    if extrapolated_dim is not None and generated // 2 <= extrapolated_dim:
        raise ValueError(
            f"{generated} samples are too few to extrapolate a Frechet distance in {extrapolated_dim} "
            f"dimensions: half of them have a singular covariance; use at least "
            f"{2 * extrapolated_dim + 2}, or do not extrapolate."
        )
    if not tool:
        return
    row = find_tool(tool)
    theirs = _NEIGHBOURS if row.manifold is None else row.manifold["k"]
    if k is not None and k != theirs:
        raise ValueError(
            f"precision and recall with {k} neighbours are not those of {tool}, which takes {theirs}: "
            "leave k at that, or use no tool."
        )
    # clean-fid shrinks its subsets.
    if row.kernel is not None and row.kernel["tool"] != "clean-fid":
        needed = row.kernel["subset_size"]
        if min(generated, real) < needed:
            raise ValueError(
                f"{tool} draws subsets of {needed} for its kernel distance, and there are {generated} "
                f"generated and {real} real images; use more, or no tool."
            )


def measure(
    generated: Described,
    reference: Described,
    floor: Described | None,
    *,
    tool: str = "",
    k: int | None = None,
    extrapolate: bool = False,
    mesh: Mesh | None = None,
) -> dict[str, dict]:
    """All distribution metrics of `generated` against `reference`, as JSON values by name.

    Each entry has `value`, `low`, `high` (95 %, over the generated images; of precision and recall over both
    sets). A distance also has `floor` and `floor_n`, the number of real images that gave it. Precision and
    recall have `generated_n` and `real_n`: both depend on the sizes, and every image is used, as the published
    evaluators do (ADM's sets 50,000 against 10,000). Class agreement has `real`, the accuracy on the reference.

    Args:
      generated: described with `tool` and `count`, if the tool reports a score.
      reference: the real images.
      floor: real images of another split, the yardstick of the distances; as many of them as are generated,
        if there are.
      tool: by whose conventions (`tools.TOOLS`), and only the metrics that it has; "" for all in ours:
        the kernel distance over all pairs, exact float32 manifolds, no score.
      k: neighbours of precision and recall, 3 by default.
      extrapolate: also the Frechet distance at infinitely many samples, its interval as wide as that of the
        distance at all of them.
      mesh: split the work of the kernel distance, precision and recall over its devices.

    Raises ValueError as `check_protocol` does, where the score was not gathered for this tool, and with
    `extrapolate` for sets, the floor's too, of no more than twice the features' dimension.
    """
    count, dim = generated.features.shape
    check_protocol(
        tool, k, count, len(reference.features), extrapolated_dim=dim if extrapolate else None
    )
    row = find_tool(tool) if tool else None
    scored = row is not None and row.score is not None and generated.predicted is not None
    if scored and (generated.score is None or generated.tool != tool):
        raise ValueError(f"describe the generated images with tool={tool!r} and their count.")
    moments = moments_of(reference.features)
    real = None if floor is None else floor.features[:count]
    infinity = _infinity(generated.features, real, moments) if extrapolate else None
    result = {"frechet": _entry(distance_interval(generated.features, moments))}
    if real is not None:
        result["frechet"] |= _floor(moments_distance(moments_of(real), moments), len(real))
    if generated.spatial is not None and (row is None or row.spatial):
        result["spatial_frechet"] = _spatial(generated, reference, floor)
    if infinity is not None:
        shift = infinity["value"] - result["frechet"]["value"]
        ends = {end: result["frechet"][end] + shift for end in ("low", "high")}
        result["frechet_infinity"] = infinity | ends
    if row is None or row.kernel is not None:
        result["kernel"] = _kernel(generated.features, reference.features, real, row, mesh)
    if scored:
        result["score"] = _entry(score_jackknife(generated.score, GROUPS))
    if row is None or row.manifold is not None:
        manifold = {"k": k or _NEIGHBOURS} if row is None else row.manifold
        _, *found = precision_recall_intervals(
            generated.features, reference.features, **manifold, mesh=mesh
        )
        sizes = {"generated_n": count, "real_n": len(reference.features)}
        result |= {n: _entry(f) | sizes for n, f in zip(("precision", "recall"), found)}
    if generated.predicted is not None and (generated.labels >= 0).all() and not tool:
        result["class_agreement"] = _entry(class_agreement(generated))
        result["class_agreement"]["real"] = class_agreement(reference).estimate
    return result


def _spatial(generated: Described, reference: Described, floor: Described | None) -> dict:
    moments = reference.spatial.moments
    own = generated.spatial
    entry = _entry(distance_interval(own.kept, moments, own=own.moments))
    if floor is not None:
        count = len(generated.features)
        real = floor.spatial.moments
        if real.n > count:
            real = moments_of(floor.spatial.kept[:count])
        entry |= _floor(moments_distance(real, moments), real.n)
    return entry


def _infinity(generated, real, moments: Moments) -> dict:
    def extrapolated(features) -> float:
        return frechet_infinity(features, moments, smallest=len(features) // 2).distance

    entry = {"value": extrapolated(generated)}
    return entry if real is None else entry | _floor(extrapolated(real), len(real))


def _kernel(generated, reference, real, row: Tool | None, mesh: Mesh | None) -> dict:
    subsets = None if row is None else row.kernel
    entry = _entry(kernel_interval(generated, reference, subsets=subsets, mesh=mesh))
    if real is None:
        return entry
    if subsets is None:
        value = mmd2(real, reference, mesh=mesh)
    else:
        value = kernel_inception_distance(real, reference, **subsets, mesh=mesh).mean
    return entry | _floor(value, len(real))


def _floor(value: float, count: int) -> dict:
    return {"floor": value, "floor_n": count}


def _entry(interval: Interval) -> dict:
    return {"value": interval.estimate, "low": interval.low, "high": interval.high}
