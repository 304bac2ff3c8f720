"""Skip concatenations: two feature maps of different scale under one quantizer.

In the up path of a U-Net a block reads [h, skip]; the two parts have different spreads, so that the
pooled distribution is bimodal in scale and one step size serves neither (Q-Diffusion, Li et al. 2023,
"shortcut-splitting quantization").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qdiff_jax.analysis.grids import rounded
from qdiff_jax.analysis.observed import step_values
from qdiff_jax.analysis.subject import NotApplicable, Subject
from qdiff_jax.models.program import Node, condition_nodes
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec, code_range

_POSITIONS = 16  # of each map and step that enter the pooled statistics
_BINS = 120


class Skips(NamedTuple):
    """S timesteps ascending, K blocks that concatenate, in order of execution. Part 0 is h, 1 the skip.

    verdict: over blocks, median_ratio and largest_ratio of `ratio`, the block of the largest, the
    median of `separation`, and the share of blocks that are bimodal (bimodality above 5/9).
    std: [S, K, 2]. ratio: [K], the larger over the smaller standard deviation of the parts, all
    steps pooled. separation: [K], Ashman's D between the log standard deviations of the channels of
    the two parts (2 and more: two clean modes). bimodality: [K], Sarle's coefficient of those logs (a
    uniform distribution has 5/9). split_gain: [K], mean squared error of the part with the smaller
    spread under one 8-bit range for both, over that under a range of its own.
    block: of the picture; edges [B+1], densities [2, B]: its values, each part normalised to 1.
    """

    verdict: dict
    timesteps: np.ndarray
    blocks: tuple[str, ...]
    std: np.ndarray
    ratio: np.ndarray
    separation: np.ndarray
    bimodality: np.ndarray
    split_gain: np.ndarray
    block: str
    edges: np.ndarray
    densities: np.ndarray


def concatenating(program: tuple[Node, ...]) -> dict[str, tuple[str, str]]:
    """{block: (h, skip)} of the blocks that read two feature maps.

    Raises NotApplicable when there are none.
    """
    conditions = {*condition_nodes(program), "t", "y"}
    maps = {node.name: tuple(r for r in node.reads if r not in conditions) for node in program}
    found = {name: reads for name, reads in maps.items() if len(reads) == 2}
    if not found:
        raise NotApplicable(
            "no block of this model concatenates a skip, so there is nothing bimodal to look for; "
            "use a U-Net."
        )
    return found


def sarle(values: np.ndarray) -> float:
    """Sarle's bimodality coefficient of [n] values, with the finite-sample correction."""
    n = values.size
    centred = values - values.mean()
    second = np.mean(centred**2)
    if n < 4 or second == 0:
        return float("nan")
    skew = np.mean(centred**3) / second**1.5 * np.sqrt(n * (n - 1)) / (n - 2)
    excess = np.mean(centred**4) / second**2 - 3.0
    excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * excess + 6.0)
    return float((skew**2 + 1.0) / (excess + 3.0 * (n - 1) ** 2 / ((n - 2) * (n - 3))))


def ashman(first: np.ndarray, second: np.ndarray) -> float:
    """Ashman's D of two samples: distance of the means in units of the root mean variance."""
    gap = abs(first.mean() - second.mean())
    return float(np.sqrt(2.0) * gap / max(np.sqrt(first.var() + second.var()), 1e-12))


def _error(values: np.ndarray, spanning: np.ndarray, bits: int) -> float:
    spec = QuantSpec()
    grid = from_range(spec, spanning.min(), spanning.max(), *code_range(spec, bits))
    return float(np.mean(np.square(np.asarray(rounded(grid, values)) - values)))


def skip_concatenations(
    subject: Subject, *, bits: int = 8, on_step: Callable | None = None
) -> Skips:
    """The two parts of every concatenation, along the full-precision trajectories.

    Raises NotApplicable for a model without skips.
    """
    pairs = concatenating(subject.model.program)
    names = list(dict.fromkeys(name for pair in pairs.values() for name in pair))
    rng = np.random.default_rng(subject.seed)
    drawn: dict[str, list] = {name: [] for name in names}
    for values in step_values(subject, names, on_step):
        for name, value in values.items():
            flat = value.reshape(value.shape[0], -1, value.shape[-1])
            chosen = rng.choice(flat.shape[1], min(_POSITIONS, flat.shape[1]), replace=False)
            drawn[name].append(flat[:, chosen].reshape(-1, flat.shape[-1]))
    parts = {name: np.stack(rows) for name, rows in drawn.items()}  # [S, n, C]
    std = np.stack(
        [np.stack([parts[p].std(axis=(1, 2)) for p in pair], axis=-1) for pair in pairs.values()],
        axis=1,
    )
    rows = []
    for pair in pairs.values():
        pooled = [parts[p].reshape(-1, parts[p].shape[-1]) for p in pair]
        scales = [np.log10(np.maximum(v.std(axis=0), 1e-12)) for v in pooled]
        spread = [float(v.std()) for v in pooled]
        small = pooled[int(np.argmin(spread))]
        both = np.concatenate([v.ravel() for v in pooled])
        rows.append(
            (
                max(spread) / max(min(spread), 1e-12),
                ashman(*scales),
                sarle(np.concatenate(scales)),
                _error(small, both, bits) / max(_error(small, small, bits), 1e-30),
            )
        )
    ratio, separation, bimodality, gain = np.array(rows).T
    blocks = tuple(pairs)
    block = blocks[int(ratio.argmax())]
    edges, densities = _histograms([parts[p].ravel() for p in pairs[block]])
    return Skips(
        verdict={
            "median_ratio": float(np.median(ratio)),
            "largest_ratio": float(ratio.max()),
            "largest_at": block,
            "median_separation": float(np.median(separation)),
            "share_bimodal": float(np.mean(bimodality > 5 / 9)),
            "median_split_gain": float(np.median(gain)),
        },
        timesteps=np.asarray(subject.trajectory.t),
        blocks=blocks,
        std=std,
        ratio=ratio,
        separation=separation,
        bimodality=bimodality,
        split_gain=gain,
        block=block,
        edges=edges,
        densities=densities,
    )


def _histograms(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    edges = np.linspace(min(p.min() for p in parts), max(p.max() for p in parts), _BINS + 1)
    return edges, np.stack([np.histogram(p, edges, density=True)[0] for p in parts])
