"""Channel outliers: a few channels much larger than the rest, which decide the range of all.

Documented for transformers in general (SmoothQuant, Xiao et al. 2023) and for DiT in particular
(PTQ4DiT, Wu et al. 2024; Q-DiT, Chen et al. 2024): one range per tensor then leaves the ordinary
channels a handful of codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qdiff_jax.analysis.observed import channel_ranges, step_values
from qdiff_jax.analysis.subject import Subject, is_temporal
from qdiff_jax.models.program import temporal_nodes

_FEWEST = 4  # channels, below which a median says nothing


class Outliers(NamedTuple):
    """L inputs of layers and K block outputs (the residual stream), in order of execution.

    verdict: median_ratio and largest_ratio over the inputs of dense layers that see the image, the site
    of the largest (without such layers, over convolutions; "kind" says which), stream_largest_ratio
    over the stream, and codes_left: how many of 256 codes an ordinary channel of the worst input has
    under one symmetric range.
    kinds: of each input, "dense", "conv" or "temporal". ratio [L] and stream_ratio [K]: over
    channels, largest / median of the largest magnitude. site: the worst input; magnitudes [C]: its
    channels' largest magnitudes, and by_step [S, C] the same by timestep.
    """

    verdict: dict
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    ratio: np.ndarray
    stream: tuple[str, ...]
    stream_ratio: np.ndarray
    site: str
    magnitudes: np.ndarray
    timesteps: np.ndarray
    by_step: np.ndarray


def largest_over_median(magnitudes: np.ndarray) -> float:
    """[C] magnitudes -> largest / median; 1 when all are zero, inf when only the median is."""
    top, middle = float(magnitudes.max()), float(np.median(magnitudes))
    if top == 0:
        return 1.0
    return top / middle if middle > 0 else float("inf")


def channel_outliers(subject: Subject, on_step: Callable | None = None) -> Outliers:
    """Per-channel magnitudes of every layer's input and of every block's output, full precision."""
    by_step = {
        name: np.maximum(np.abs(lo), np.abs(hi))
        for name, (lo, hi) in channel_ranges(subject, on_step).items()
        if name.endswith(":input") and lo.shape[1] >= _FEWEST
    }
    operators = {f"{site.name}:input": site.operator.kind for site in subject.sites}
    names = tuple(by_step)
    kinds = tuple(
        "temporal" if is_temporal(subject.model, name) else operators[name] for name in names
    )
    ratio = np.array([largest_over_median(by_step[name].max(axis=0)) for name in names])
    kind = "dense" if "dense" in kinds else "conv"
    counted = [i for i, k in enumerate(kinds) if k == kind]
    worst = max(counted, key=lambda i: ratio[i])
    stream = _stream(subject)
    stream_ratio = np.array([largest_over_median(m) for m in stream.values()])
    return Outliers(
        verdict={
            "kind": kind,
            "median_ratio": float(np.median(ratio[counted])),
            "largest_ratio": float(ratio[worst]),
            "largest_at": names[worst],
            "stream_largest_ratio": float(stream_ratio.max()),
            "stream_largest_at": list(stream)[int(stream_ratio.argmax())],
            "codes_left": float(256.0 / ratio[worst]),
        },
        names=names,
        kinds=kinds,
        ratio=ratio,
        stream=tuple(stream),
        stream_ratio=stream_ratio,
        site=names[worst],
        magnitudes=by_step[names[worst]].max(axis=0),
        timesteps=np.asarray(subject.trajectory.t),
        by_step=by_step[names[worst]],
    )


def _stream(subject: Subject) -> dict[str, np.ndarray]:
    """{block: [C] largest magnitude} of what the blocks that see the image hand on."""
    program = subject.model.program
    temporal = set(temporal_nodes(program))
    # The last block writes the prediction, whose channels are those of the image.
    names = [node.name for node in program[:-1] if node.name not in temporal]
    top: dict[str, np.ndarray] = {}
    for values in step_values(subject, names):
        for name, value in values.items():
            largest = np.abs(value).reshape(-1, value.shape[-1]).max(axis=0)
            top[name] = np.maximum(top.get(name, 0.0), largest)
    return top
