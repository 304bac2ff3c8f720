"""The models shipped in the package, by name: module, parameters, schedule and classifier in one call."""

from __future__ import annotations

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
from qdiff_jax.diffusion.samplers import LEARNED_RANGE, SamplerPlan
from qdiff_jax.diffusion.schedule import NoiseSchedule, schedule_of
from qdiff_jax.eval.hub import PREFIX
from qdiff_jax.export.bundle import file_sha256
from qdiff_jax.models.classifier import Classifier, ClassifierConfig
from qdiff_jax.models.dit import DiTConfig
from qdiff_jax.models.families import (
    make_module,
    model_json,
    parameter_shapes,
    parse_model,
    program_of,
)
from qdiff_jax.models.pixart import PixArtConfig
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.quant.timed import StepContext, select
from qdiff_jax.runtime.weights import fit_weights, load_weights
from qdiff_jax.stages.stage import Model

_DIFFUSION = {
    "unet_fashion": "unet_fashion.safetensors",
    "dit_fashion": "dit_fashion.safetensors",
}
_CLASSIFIERS = {"classifier_fashion": "classifier_fashion.safetensors"}


class DiffusionModel(NamedTuple):
    """module, params and the block program (`model`), the schedule it was trained with (None for a flow
    model, which has no alpha_bar), its config as JSON (`config`, with "family"), the null class (None if it
    has none: unconditional, or never trained without its condition), and where it came from."""

    model: Model
    schedule: NoiseSchedule | None
    config: dict
    null_class: int | None
    source: dict

    @property
    def classes(self) -> int | None:
        """How many classes there are to sample; None for a model without labels."""
        return self.config["num_classes"]

    @property
    def feature_class(self) -> int | None:
        """The class that temporal features are taken for: the null class, or 0 where there is none."""
        return 0 if self.null_class is None and self.classes is not None else self.null_class

    @property
    def image_shape(self) -> tuple[int, int, int]:
        side = self.config["resolution"]
        return (side, side, self.config["in_channels"])


def load(name_or_path: str) -> DiffusionModel:
    """A shipped diffusion model by name, one that `experiments.train` wrote, by path, or a network in Hugging
    Face's layout with its scheduler: a folder or `hub:OWNER/REPO[/SUBFOLDER]` (`port.hub_folder`).

    The names that begin with "random:" are tiny untrained models of each family, for smoke runs and tests;
    "random:ldm", "random:dit_latent", "random:sd" and "random:pixart" have the other parts of a pipeline in
    `miniature_pipelines`. A model whose header has the schedule "flow" predicts the velocity and is sampled by
    `flow_euler` alone (`diffusion.flow`); "random:flow" is one.

    Raises ValueError for an unknown name (listing those there are), a damaged file, parameters that do not
    fit the config in its header, or a schedule that is none.
    """
    if name_or_path in _MINIATURES:
        return miniature(name_or_path)
    shipped = name_or_path in _DIFFUSION
    if name_or_path.startswith(PREFIX) or (not shipped and pathlib.Path(name_or_path).is_dir()):
        from qdiff_jax.models.port import hub_folder  # which assembles its model here

        return hub_folder.load_diffusion(name_or_path)
    path = _resolve(name_or_path, _DIFFUSION)
    params, header = _described(path, "diffusion", ("model", "schedule"))
    # Files written when there was one family do not name it.
    model_config = parse_model({"family": "unet_ddpm", **header["model"]}, str(path))
    fitted = fit_weights(params, parameter_shapes(model_config), path)
    schedule = header["schedule"]
    return assembled(
        model_config,
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), fitted),
        {"name": name_or_path, "sha256": file_sha256(path), "schedule": schedule},
    )


RANDOM = "random:"  # what the names of miniatures begin with

_MINI_DIT = DiTConfig(
    width=16,
    depth=2,
    heads=2,
    patch=2,
    resolution=8,
    in_channels=1,
    num_classes=10,
    learn_sigma=False,
)
_MINIATURES = {
    "random:miniature": UNetConfig(
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
    ),
    "random:dit": _MINI_DIT,
    "random:flow": _MINI_DIT,
    "random:ldm": UNetLDMConfig(
        channels=8,
        multipliers=(1, 1),
        res_blocks=1,
        attention_downsampling=(2,),
        resolution=8,
        in_channels=1,
        out_channels=1,
        heads=2,
        head_channels=None,
        num_classes=10,
        context_dim=8,
        groups=4,
    ),
    "random:dit_latent": DiTConfig(
        width=16, depth=2, heads=2, patch=2, resolution=8, in_channels=4, num_classes=10
    ),
    "random:sd": UNetLDMConfig(
        channels=8,
        multipliers=(1, 1),
        res_blocks=1,
        attention_downsampling=(2,),
        resolution=8,
        in_channels=4,
        out_channels=4,
        heads=2,
        head_channels=None,
        context_dim=8,
        context_length=16,
        groups=4,
    ),
    "random:pixart": PixArtConfig(
        width=24,
        depth=2,
        heads=2,
        resolution=8,
        caption_dim=8,
        caption_length=12,
        micro_conditions=True,
    ),
}


def names() -> tuple[str, ...]:
    """What `load` knows by name: the shipped models and the miniatures."""
    return (*_DIFFUSION, *_MINIATURES)


@functools.cache
def miniature(name: str = "random:miniature") -> DiffusionModel:
    """A U-Net (DDPM's, or latent diffusion's with transformers), DiT or PixArt on 8x8 images or latents, with
    random weights (seed 0): conditional on ten classes, or on prompts ("random:sd", "random:pixart"); of noise
    or of a flow ("random:flow").

    Every kind of block of the real ones is in it; equal widths, so that blocks share compiles.
    """
    config = _MINIATURES[name]
    params = random_params(parameter_shapes(config), seed=0)
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params)))
    schedule = {"schedule": "flow" if name == "random:flow" else "linear", "timesteps": 1000}
    return assembled(
        config, params, {"name": name, "sha256": digest.hexdigest(), "schedule": schedule}
    )


def assembled(config: Any, params: dict, source: dict) -> DiffusionModel:
    """The model of a family's config and its parameters. source: JSON with "name", "sha256" of the weights,
    and "schedule", as `schedule_of` takes it."""
    schedule = source["schedule"]
    return DiffusionModel(
        Model(make_module(config), program_of(config), params),
        _noise_schedule(schedule, source["name"]),
        model_json(config),
        config.null_class,
        source,
    )


def _noise_schedule(config: Mapping, where: str) -> NoiseSchedule | None:
    """None for a flow model, which has a number of timesteps and nothing else."""
    if config.get("schedule") != "flow":
        return schedule_of(config)
    timesteps, prediction = config.get("timesteps"), config.get("prediction", "velocity")
    if not isinstance(timesteps, int) or timesteps < 1 or prediction != "velocity":
        raise ValueError(
            f"{where} is a flow model with timesteps={timesteps!r} and prediction={prediction!r}; give the "
            "number that t = 1 is (1000) as timesteps, and 'velocity' or no prediction."
        )
    return None


def random_params(shapes, seed: int) -> dict:
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


def from_config(config: Mapping[str, Any]) -> Any:
    """The module that a bundle's manifest names. Raises ValueError for an unknown family."""
    return make_module(parse_model(config))


@functools.cache
def predictor(module: Any, variance: bool = False):
    """The sampler's network of a module: predict(variables, x, ctx, y) -> eps, the same object each time.

    variables: {"params", "quant"}; step tables in quant select their rows by ctx. x: [B, H, W, C].
    A network that learns its variance answers with the noise estimate alone, unless `variance`: then
    with both, [B, H, W, 2 C], as the DDPM sampler with "learned_range" reads them.
    """

    def predict(variables, x, ctx: StepContext, y):
        t = jnp.broadcast_to(ctx.t, x.shape[:1])
        quant = select(variables["quant"], ctx)
        output = module.apply({"params": variables["params"], "quant": quant}, x, t, y)
        return output if variance else output[..., : x.shape[-1]]

    return predict


def sampling_predictor(module: Any, plan: SamplerPlan):
    """The `predictor` that a plan reads: with the variance exactly for "learned_range".

    Raises ValueError if the plan wants a variance that the network does not learn.
    """
    variance = plan.sampler.name == LEARNED_RANGE
    if variance and not getattr(module.config, "learn_sigma", False):  # the DDPM U-Net has none
        raise ValueError(
            "the sampler's variance 'learned_range' needs a network that learns one (learn_sigma); "
            "take 'fixed_small' or 'fixed_large'."
        )
    return predictor(module, variance)


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
    near = difflib.get_close_matches(name_or_path, [*shipped, *_MINIATURES], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"No shipped model is called {name_or_path!r}; there are {sorted(shipped)}, or give the path of "
        f"a .safetensors file.{hint}"
    )
