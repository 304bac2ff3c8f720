"""What samples are asked for, by their global index: classes or prompts in turn, as the network reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qdiff_jax.diffusion.guidance import Guidance
from qdiff_jax.eval.samples import guidance_of, labels
from qdiff_jax.models.pipeline import Pipeline, conditions, decode, null_condition
from qdiff_jax.models.registry import DiffusionModel


class Asked(NamedTuple):
    """A pipeline and the prompts that its samples are asked for; none where it reads no prompts."""

    pipeline: Pipeline
    prompts: tuple[str, ...] = ()

    @property
    def diffusion(self) -> DiffusionModel:
        return self.pipeline.diffusion

    def conditions(self, indices: Sequence[int]) -> Any:
        """y of the samples with these global indices, a row for each: labels int32 [N], what
        `pipeline.conditions` makes of prompts, or None."""
        if not self.prompts:
            return labels(self.diffusion.classes, indices)
        return conditions(self.pipeline, [self.prompts[i % len(self.prompts)] for i in indices])

    def null(self, scale: float) -> Any:
        """What guidance of this scale gives the unconditional branch: the null class, the empty prompt's row,
        or None. A negative scale asks for no guidance, and no text is encoded for it."""
        if not self.prompts:
            return self.diffusion.null_class
        return null_condition(self.pipeline) if scale >= 0 else None

    def guidance(self, scale: float) -> Guidance | None:
        """Raises ValueError for a scale that needs a branch which the model does not have."""
        return guidance_of(scale, self.null(scale))

    def images(self, samples: np.ndarray, batch_size: int) -> np.ndarray:
        """The pictures of what the network drew, [N, H, W, C] in about [-1, 1]."""
        return decode(self.pipeline, samples, batch_size)


def asked_of(pipeline: Pipeline, prompts: Sequence[str], name: str) -> Asked:
    """Raises ValueError for a pipeline, called `name`, that reads prompts and gets none, or the reverse."""
    if pipeline.takes != "prompts" and prompts:
        raise ValueError(f"{name} reads no prompts, and got {len(prompts)}: leave them out.")
    if pipeline.takes == "prompts" and not prompts:
        raise ValueError(f"{name} reads prompts and got none: name a text file with one a line.")
    return Asked(pipeline, tuple(prompts))
