"""The models shipped in the package, by name: module, parameters, schedule and classifier in one call."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib.resources
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.config import to_dataclass
from qdiff_jax.diffusion.schedule import NoiseSchedule, make_schedule
from qdiff_jax.export.bundle import file_sha256
from qdiff_jax.models.classifier import Classifier, ClassifierConfig
from qdiff_jax.models.unet_ddpm import UNetConfig, UNetDDPM, unet_program
from qdiff_jax.quant.timed import StepContext, select
from qdiff_jax.runtime.weights import fit_weights, load_weights
from qdiff_jax.stages.stage import Model

_DIFFUSION = {"unet_fashion": "unet_fashion.safetensors"}
_CLASSIFIERS = {"classifier_fashion": "classifier_fashion.safetensors"}


class DiffusionModel(NamedTuple):
    """module, params and the block program (`model`), the schedule it was trained with, its config as
    JSON (`config`, with "family"), the null class (None if unconditional), and where it came from."""

    model: Model
    schedule: NoiseSchedule
    config: dict
    null_class: int | None
    source: dict

    @property
    def image_shape(self) -> tuple[int, int, int]:
        side = self.config["resolution"]
        return (side, side, self.config["in_channels"])


def load(name_or_path: str) -> DiffusionModel:
    """A shipped diffusion model by name, or one that `experiments.train` wrote, by path.

    "random:miniature" is a tiny untrained U-Net, for smoke runs and tests.

    Raises ValueError for an unknown name (listing those there are), a damaged file, or parameters that
    do not fit the config in its header.
    """
    if name_or_path == "random:miniature":
        return miniature()
    path = _resolve(name_or_path, _DIFFUSION)
    params, header = _described(path, "diffusion", ("model", "schedule"))
    model_config = to_dataclass(UNetConfig, header["model"], str(path))
    module = unet(model_config)
    fitted = fit_weights(params, _template(module, model_config), path)
    schedule = header["schedule"]
    return DiffusionModel(
        Model(module, unet_program(model_config), jax.tree.map(jnp.asarray, fitted)),
        make_schedule(schedule["schedule"], schedule["timesteps"]),
        {"family": "unet_ddpm", **header["model"]},
        model_config.num_classes,
        {"name": name_or_path, "sha256": file_sha256(path), "schedule": schedule},
    )


@functools.cache
def miniature() -> DiffusionModel:
    """A class-conditional U-Net of 8 channels on 8x8 images with random weights (seed 0).

    Every kind of block of the real ones is in it; equal widths, so that blocks share compiles.
    """
    config = UNetConfig(
        channels=8,
        multipliers=(1, 1),
        res_blocks=1,
        attention_resolutions=(4,),
        resolution=8,
        in_channels=1,
        out_channels=1,
        groups=4,
        dropout=0.0,
        num_classes=10,
    )
    module = unet(config)
    params = _random_params(_template(module, config), seed=0)
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params)))
    schedule = {"schedule": "linear", "timesteps": 1000}
    return DiffusionModel(
        Model(module, unet_program(config), params),
        make_schedule("linear", 1000),
        {"family": "unet_ddpm", **dataclasses.asdict(config)},
        config.num_classes,
        {"name": "random:miniature", "sha256": digest.hexdigest(), "schedule": schedule},
    )


def _random_params(shapes, seed: int) -> dict:
    """Parameters that keep activations near 1. Drawn by NumPy: compiling the module's own initializers
    takes longer than everything else about a miniature."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        kind = path[-1].key
        if kind == "kernel":
            values /= np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        elif kind == "scale":
            values = np.float32(1.0) + np.float32(0.2) * values
        else:
            values *= np.float32(0.1)
        return jnp.asarray(values)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def from_config(config: Mapping[str, Any]) -> UNetDDPM:
    """The module that a bundle's manifest names. Raises ValueError for an unknown family."""
    fields = dict(config)
    family = fields.pop("family")
    if family != "unet_ddpm":
        raise ValueError(f"Model family {family!r} is unknown; this version knows 'unet_ddpm'.")
    return unet(to_dataclass(UNetConfig, fields, "model"))


@functools.cache
def unet(config: UNetConfig) -> UNetDDPM:
    """One module object per config, so that functions compiled for it are shared."""
    return UNetDDPM(config)


@functools.cache
def predictor(module: Any):
    """The sampler's network of a module: predict(variables, x, ctx, y) -> eps, the same object each time.

    variables: {"params", "quant"}; step tables in quant select their rows by ctx. x: [B, H, W, C].
    """

    def predict(variables, x, ctx: StepContext, y):
        t = jnp.broadcast_to(ctx.t, x.shape[:1])
        quant = select(variables["quant"], ctx)
        return module.apply({"params": variables["params"], "quant": quant}, x, t, y)

    return predict


@functools.cache
def classifier(name_or_path: str = "classifier_fashion"):
    """images [B, H, W, C] in [-1, 1] -> (logits [B, K], features [B, D]); jitted.

    Raises ValueError as `load` does.
    """
    path = _resolve(name_or_path, _CLASSIFIERS)
    params, header = _described(path, "classifier", ("model",))
    config = to_dataclass(ClassifierConfig, header["model"], str(path))
    module = Classifier(config)
    image = jnp.zeros((1, config.resolution, config.resolution, config.in_channels))
    template = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    params = jax.tree.map(jnp.asarray, fit_weights(params, template, path))
    return jax.jit(lambda images: module.apply({"params": params}, images))


def size_in_bytes(params: Mapping) -> int:
    """Bytes of a parameter tree in float32."""
    return 4 * sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _template(module: UNetDDPM, config: UNetConfig):
    x = jnp.zeros((1, config.resolution, config.resolution, config.in_channels))
    y = None if config.num_classes is None else jnp.zeros((1,), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros((1,)), y)["params"]


def _described(path: pathlib.Path, kind: str, needs: tuple[str, ...]) -> tuple[dict, dict]:
    """Weights and their header, which must describe a model of that kind."""
    params, header = load_weights(path)
    lacking = [name for name in needs if name not in header]
    if lacking or header.get("kind", kind) != kind:
        found = f"is of kind {header['kind']!r}" if "kind" in header else "describes no model"
        raise ValueError(
            f"{path} {found}, but a {kind} model is needed, with {list(needs)} in the header of the "
            "file; give weights that experiments.train wrote."
        )
    return params, header


def _resolve(name_or_path: str, shipped: Mapping[str, str]) -> pathlib.Path:
    if name_or_path in shipped:
        assets = importlib.resources.files("qdiff_jax.models") / "assets"
        return pathlib.Path(str(assets / shipped[name_or_path]))
    path = pathlib.Path(name_or_path)
    if path.suffix == ".safetensors":
        return path
    near = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"No shipped model is called {name_or_path!r}; there are {sorted(shipped)}, or give the path of "
        f"a .safetensors file.{hint}"
    )
