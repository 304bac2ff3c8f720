"""Architectures by the name that configs, weights and bundles give them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from qdiff_jax.config import to_dataclass
from qdiff_jax.models.dit import DiT, DiTConfig, dit_program
from qdiff_jax.models.pixart import PixArt, PixArtConfig, pixart_program
from qdiff_jax.models.program import Node
from qdiff_jax.models.unet_ddpm import UNetConfig, UNetDDPM, unet_program
from qdiff_jax.models.unet_ldm import UNetLDM, UNetLDMConfig, unet_ldm_program


class Family(NamedTuple):
    """config: frozen dataclass of sizes, with `resolution`, `in_channels`, `num_classes` and `null_class`.
    Where the condition is no label it has `context_dim` and `context_length`, `vector_dim`, or a function
    `example_condition` (see `example_inputs`). module: config -> Linen module with the attribute `config`.
    program: config -> its block program."""

    config: type
    module: Callable[[Any], nn.Module]
    program: Callable[[Any], tuple[Node, ...]]


FAMILIES = types.MappingProxyType(
    {
        "unet_ddpm": Family(UNetConfig, UNetDDPM, unet_program),
        "dit": Family(DiTConfig, DiT, dit_program),
        "pixart": Family(PixArtConfig, PixArt, pixart_program),
        "unet_ldm": Family(UNetLDMConfig, UNetLDM, unet_ldm_program),
    }
)


def parse_model(fields: Mapping[str, Any], where: str = "model") -> Any:
    """The config dataclass of {"family": name, ...sizes}.

    Raises ValueError for an unknown family (with the nearest) or a misspelt size; `where` names the
    place in the message.
    """
    sizes = dict(fields)
    name = sizes.pop("family", None)
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{where}.family is {name!r}; this version knows {sorted(FAMILIES)}.{hint}"
        )
    return to_dataclass(FAMILIES[name].config, sizes, where)


def model_json(config: Any) -> dict:
    """The inverse of `parse_model`: sizes and "family" as JSON values."""
    return {"family": _family_of(config)[0], **dataclasses.asdict(config)}


@functools.cache
def make_module(config: Any) -> nn.Module:
    """One module object per config, so that functions compiled for it are shared."""
    return _family_of(config)[1].module(config)


def program_of(config: Any) -> tuple[Node, ...]:
    """The block program of the module that `make_module` returns."""
    return _family_of(config)[1].program(config)


def example_inputs(config: Any, batch: int = 1) -> tuple:
    """(x, t, y) of the shapes and dtypes that the module takes, zeros; y: labels [batch] int32, a context
    [batch, L, D] or numbers [batch, D] float32, what the config's own `example_condition` gives, or None if
    unconditional."""
    side = config.resolution
    y = None
    if hasattr(config, "example_condition"):
        y = config.example_condition(batch)
    elif config.num_classes is not None:
        y = jnp.zeros((batch,), jnp.int32)
    elif getattr(config, "context_dim", None) is not None:
        y = jnp.zeros((batch, config.context_length, config.context_dim))
    elif getattr(config, "vector_dim", None) is not None:
        y = jnp.zeros((batch, config.vector_dim))
    return jnp.zeros((batch, side, side, config.in_channels)), jnp.zeros((batch,)), y


def parameter_shapes(config: Any) -> dict:
    """The module's parameter tree as ShapeDtypeStructs; nothing is computed."""
    module = make_module(config)
    return jax.eval_shape(module.init, jax.random.key(0), *example_inputs(config))["params"]


def _family_of(config: Any) -> tuple[str, Family]:
    for name, family in FAMILIES.items():
        if type(config) is family.config:
            return name, family
    raise ValueError(f"{type(config).__name__} is the config of no family in {sorted(FAMILIES)}.")
