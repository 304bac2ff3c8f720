"""What four published evaluation tools do differently, in one table, so that `tool=` sets all of it.

Numbers of different tools do not compare: the same samples of the same model differ in FID by the resize
alone, in IS by the splits, in precision by the arithmetic. A table is matched only with its own tool:

    adm             guided-diffusion's evaluator: FID, sFID, IS, precision, recall (DiT, PTQ4DiT, Q-DiT, ...)
    torch-fidelity  FID, IS, KID, precision, recall (latent diffusion, TFMQ-DM)
    pytorch-fid     FID
    clean-fid       FID, KID, in its "clean" mode

A distance carries the name FID, sFID, KID or IS only in the features of the 2015 Inception network; in any
other it is named after its network. Versions: torch-fidelity 0.4.0 (its development versions took the first
set for the real one, which interchanges precision and recall), pytorch-fid 0.3.0, clean-fid 0.1.35.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qdiff_jax.eval.frechet import moments_distance
from qdiff_jax.eval.inception_score import inception_score
from qdiff_jax.eval.intervals import (
    Interval,
    distance_interval,
    kernel_interval,
    score_interval,
)
from qdiff_jax.eval.kid import kernel_inception_distance
from qdiff_jax.eval.moments import Moments, moments_of
from qdiff_jax.eval.precision_recall import precision_recall, precision_recall_intervals
from qdiff_jax.eval.resize import resize

# Beginning of the name of the network whose distances are called FID, sFID, KID and IS.
INCEPTION = "inception"
_TITLES = {
    "frechet": "FID",
    "frechet_infinity": "FID at infinitely many samples",
    "spatial_frechet": "sFID",
    "kernel": "KID",
    "score": "IS",
}
_PLAIN = {
    "frechet": "Frechet distance",
    "frechet_infinity": "Frechet distance at infinitely many samples",
    "spatial_frechet": "spatial Frechet distance",
    "kernel": "kernel distance",
    "score": "class score",
    "precision": "precision",
    "recall": "recall",
}


class Tool(NamedTuple):
    """One tool's conventions. A metric that it does not have is None."""

    rule: str  # of the resize, see resize.RULES
    unit_first: (
        bool  # resizes x/255 and maps to 2x - 1; the others resize x and map to (x - 128)/128
    )
    clip: bool  # the resized values to 0..255
    spatial: bool  # reports sFID
    score: Mapping[str, Any] | None  # arguments of inception_score
    kernel: Mapping[str, Any] | None  # arguments of kernel_inception_distance
    manifold: Mapping[str, Any] | None  # arguments of precision_recall


TOOLS = {
    "adm": Tool(
        rule="tf1_bilinear",
        unit_first=False,
        clip=False,
        spatial=True,
        score={"splits": None, "split_size": 5000, "shuffle": False},
        kernel=None,
        manifold={"k": 3, "dtype": "float16", "block": 10000},
    ),
    "torch-fidelity": Tool(
        rule="tf1_bilinear",
        unit_first=False,
        clip=False,
        spatial=False,
        score={"splits": 10, "shuffle": True, "seed": 2020},
        kernel={"subsets": 100, "subset_size": 1000, "seed": 2020, "tool": "torch-fidelity"},
        manifold={"k": 3, "dtype": "float32"},
    ),
    "pytorch-fid": Tool("bilinear", True, False, False, None, None, None),
    "clean-fid": Tool(
        rule="bicubic_smooth",
        unit_first=False,
        clip=True,
        spatial=False,
        score=None,
        kernel={"subsets": 100, "subset_size": 1000, "tool": "clean-fid"},
        manifold=None,
    ),
}


def find_tool(name: str) -> Tool:
    """The table's row. Raises ValueError for an unknown name."""
    if name not in TOOLS:
        raise ValueError(f"evaluation tool {name!r} is not known; use one of {tuple(TOOLS)}.")
    return TOOLS[name]


@partial(jax.jit, static_argnames=("tool", "size"))
def preprocess(images: jax.Array, tool: str, size: int = 299) -> jax.Array:
    """What the tool feeds its network: float32 [B, size, size, 3], about [-1, 1].

    Args:
      images: uint8 [B, H, W, 1 or 3]; grey images are repeated to three channels, as all tools do.
      tool: a key of TOOLS.
      size: side of the network's input.

    Raises ValueError for another dtype or shape: a rounding rule to uint8 is part of the measurement.
    """
    row = find_tool(tool)
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"preprocess takes uint8 images [B, H, W, 1 or 3], got {images.dtype} {images.shape}; "
            "round samples to uint8 by the rule of the model's code first."
        )
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    if row.unit_first:
        return 2.0 * resize(images.astype(jnp.float32) / 255.0, size, row.rule) - 1.0
    values = resize(images, size, row.rule)
    values = jnp.clip(values, 0.0, 255.0) if row.clip else values
    return (values - 128.0) / 128.0


def metric_name(metric: str, network: str) -> str:
    """How a metric in the features of `network` is called, as in "FID" or "kernel distance (dino)".

    Args:
      metric: "frechet", "frechet_infinity", "spatial_frechet", "kernel", "score", "precision" or "recall".
      network: its name; the 2015 Inception's begins with "inception". Whose weights bear that name is for
        the caller to say: `inception.is_published` knows the published file, and a result states the
        digest of the parameters (`FeatureNetwork.fingerprint`).
    """
    if metric not in _PLAIN:
        raise ValueError(f"metric {metric!r} is not known; use one of {tuple(_PLAIN)}.")
    if network.startswith(INCEPTION):
        return _TITLES.get(metric, metric)
    return f"{_PLAIN[metric]} ({network})"


def distribution_metrics(
    generated: Mapping[str, np.ndarray],
    real: Mapping[str, Any],
    *,
    tool: str,
    network: str,
) -> dict[str, float]:
    """Every metric that the tool reports, by its rules, from features already taken.

    Args:
      generated: {"pool": [N, D], "spatial": [N, S], "logits_unbiased" or "logits": [N, C]} in the order of
        the files. A network without spatial features or logits has no sFID or score; the logits
        without the last layer's bias are used where there are both, as the tools do.
      real: "pool" and "spatial" are features or the `Moments` of a published reference; precision,
        recall and the kernel distance need features.
      tool: a key of TOOLS.
      network: name of the feature network, which names the metrics.

    Returns {name: value}, names from `metric_name`. Raises ValueError as the metrics do.
    """
    row = find_tool(tool)
    found = {"frechet": moments_distance(_moments(generated["pool"]), _moments(real["pool"]))}
    if row.spatial and "spatial" in generated and "spatial" in real:
        found["spatial_frechet"] = moments_distance(
            _moments(generated["spatial"]), _moments(real["spatial"])
        )
    logits = generated.get("logits_unbiased", generated.get("logits"))
    if row.score is not None and logits is not None:
        found["score"] = inception_score(logits, **row.score).mean
    if not isinstance(real["pool"], Moments):
        if row.kernel is not None:
            found["kernel"] = kernel_inception_distance(
                generated["pool"], real["pool"], **row.kernel
            ).mean
        if row.manifold is not None:
            both = precision_recall(generated["pool"], real["pool"], **row.manifold)
            found["precision"], found["recall"] = both.precision, both.recall
    return {metric_name(metric, network): value for metric, value in found.items()}


def distribution_intervals(
    generated: Mapping[str, np.ndarray],
    real: Mapping[str, Any],
    *,
    tool: str,
    network: str,
    level: float = 0.95,
    mesh: Mesh | None = None,
) -> dict[str, Interval]:
    """`distribution_metrics`, each value with its confidence interval over the generated samples.

    Args:
      generated, real, tool, network: as there.
      level: the coverage aimed at.
      mesh: split the work of the kernel distance, precision and recall over its devices.

    Returns {name: interval}; the reference is taken as fixed, but precision and recall, whose manifolds both
    sets make, vary over both. Raises ValueError as the metrics and their intervals do.
    """
    row = find_tool(tool)
    layers = {"frechet": "pool"}
    if row.spatial and "spatial" in generated and "spatial" in real:
        layers["spatial_frechet"] = "spatial"
    found = {
        name: distance_interval(np.asarray(generated[layer]), _moments(real[layer]), level=level)
        for name, layer in layers.items()
    }
    logits = generated.get("logits_unbiased", generated.get("logits"))
    if row.score is not None and logits is not None:
        found["score"] = score_interval(logits, level=level, **row.score)
    if not isinstance(real["pool"], Moments):
        sets = generated["pool"], real["pool"]
        if row.kernel is not None:
            found["kernel"] = kernel_interval(*sets, level=level, subsets=row.kernel, mesh=mesh)
        if row.manifold is not None:
            _, found["precision"], found["recall"] = precision_recall_intervals(
                *sets, **row.manifold, level=level, mesh=mesh
            )
    return {metric_name(metric, network): interval for metric, interval in found.items()}


def _moments(features) -> Moments:
    return features if isinstance(features, Moments) else moments_of(features)
