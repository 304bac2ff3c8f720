"""Networks, one file per published architecture, and the weights shipped with the package."""

from __future__ import annotations

from typing import Any, NamedTuple


class Loaded(NamedTuple):
    """A diffusion model: Linen module (apply({"params": params}, x, t, y) -> eps), parameters, and the
    noise schedule it was trained with."""

    module: Any
    params: dict
    schedule: Any


def load(name_or_path: str) -> Loaded:
    """A shipped model by name ("unet_fashion", "dit_fashion"), or a file of experiments.train by path.

    `models.registry.load` also returns its block program, config and origin. Raises ValueError for an
    unknown name, listing those there are.
    """
    # Imported here because the registry's own imports (stages, sites) import files of this package.
    from qdiff_jax.models import registry

    model, schedule, *_ = registry.load(name_or_path)
    return Loaded(model.module, model.params, schedule)
