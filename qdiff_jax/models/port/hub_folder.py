"""One network from a folder in Hugging Face's layout: sizes from its config.json, weights beside it.

A folder is a local one, one of the hub's cache (`models--OWNER--REPO`), or `hub:OWNER/REPO[@REVISION]
[/SUBFOLDER]`, of which config.json and the weights are fetched (`eval.hub`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qdiff_jax.eval.hub import PREFIX, folder_on_disk, on_disk
from qdiff_jax.eval.networks.state_dict import fingerprint
from qdiff_jax.models.dit import DiTConfig
from qdiff_jax.models.pixart import PixArtConfig
from qdiff_jax.models.port import dit, pixart, unet_ddpm, unet_ldm_diffusers
from qdiff_jax.models.port.clip import text_config, text_params
from qdiff_jax.models.port.diffusers_config import NETWORKS, network_config
from qdiff_jax.models.port.first_stage import diffusers_config, first_stage_params
from qdiff_jax.models.port.t5 import t5_config, t5_params
from qdiff_jax.models.registry import DiffusionModel, assembled
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.runtime.state_dicts import FOLDER_FILES, load_config, load_state_dict

_NETWORKS: Mapping[type, Callable] = {
    UNetConfig: unet_ddpm.from_diffusers,
    UNetLDMConfig: unet_ldm_diffusers.from_diffusers,
    DiTConfig: dit.from_diffusers,
    PixArtConfig: pixart.from_diffusers,
}
_FIRST_STAGES = ("AutoencoderKL", "VQModel")
_TEXTS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
_ENCODED = ("T5ForConditionalGeneration",)  # whole T5s, whose decoder is left out


_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}


class Component(NamedTuple):
    """kind: "network" (config of a family of `models.families`), "first_stage" (`AutoencoderConfig`) or "text"
    (`TextConfig` or `T5Config`). params: of its module. name: of the class that the folder names."""

    kind: str
    config: Any
    params: dict
    name: str


def load_component(where) -> Component:
    """The network in a folder, float32.

    Raises ValueError: no such folder, a class or an option that is not built here, or weights that do not
    fit the config, listing all that is missing, left over or of another shape.
    """
    folder = component_folder(where)
    fields = load_config(folder)
    kind, config, name = component_config(fields, folder / "config.json")
    tensors = load_state_dict(folder)
    if kind == "first_stage":
        params, config = first_stage_params(tensors, config, folder)
    elif kind == "text":
        read = t5_params if name.startswith("T5") else text_params
        params = read(tensors, config, folder)
    else:
        params = _NETWORKS[type(config)](tensors, config, folder)
    return Component(kind, config, params, name)


_DISCRETE = (
    *(
        "DDPM",
        "DDIM",
        "PNDM",
        "LMSDiscrete",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
    ),
    *("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"),
    *("KDPM2Discrete", "KDPM2AncestralDiscrete"),
)


def load_diffusion(where) -> DiffusionModel:
    """The diffusion network in a folder with the schedule of its scheduler_config.json, which lies beside it
    or in the pipeline's folder `scheduler`.

    Raises ValueError as `load_component`; for a component that is no diffusion network; or no scheduler, or
    one whose schedule is not built here.
    """
    component = load_component(where)
    if component.kind != "network":
        raise ValueError(
            f"{where} holds a {component.name}, and a diffusion network is needed; give the folder of the "
            "U-Net or transformer."
        )
    schedule = schedule_json(*_scheduler(str(where)))
    digest = fingerprint(component.params)
    source = {"name": str(where), "sha256": digest, "schedule": schedule}
    return assembled(component.config, component.params, source)


def schedule_json(fields: Mapping[str, Any], source: object = "scheduler_config.json") -> dict:
    """The JSON of a schedule, as `diffusion.schedule.schedule_of` takes it, from a scheduler's config.

    Only what the network was trained with is read; sampler, spacing and offset are the config's of a run.

    Raises ValueError, naming `source`, for betas or a prediction that are not built here.
    """
    timesteps = fields.get("num_train_timesteps", 1000)
    if str(fields.get("_class_name")).startswith("FlowMatch"):
        return {"schedule": "flow", "timesteps": timesteps}
    name = str(fields.get("_class_name"))
    if name.removesuffix("Scheduler") not in _DISCRETE:
        raise ValueError(
            f"{source} describes a {name}, whose schedule is not built here; there are "
            f"{', '.join(_DISCRETE)} and FlowMatch."
        )
    betas, prediction = (
        fields.get("beta_schedule", "linear"),
        fields.get("prediction_type", "epsilon"),
    )
    other = {n: fields[n] for n in ("trained_betas", "rescale_betas_zero_snr") if fields.get(n)}
    if betas not in _BETAS:
        other["beta_schedule"] = betas
    if prediction not in _PREDICTIONS:
        other["prediction_type"] = prediction
    if other:
        said = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise ValueError(f"{source} describes a schedule that is not built here: {said}.")
    made = {"schedule": _BETAS[betas], "timesteps": timesteps}
    if betas != "squaredcos_cap_v2":
        made["options"] = {
            "beta_start": fields.get("beta_start", 1e-4),
            "beta_end": fields.get("beta_end", 0.02),
        }
    return made if prediction == "epsilon" else {**made, "prediction": _PREDICTIONS[prediction]}


def _scheduler(where: str) -> tuple[dict, pathlib.Path]:
    """(fields, path) of the scheduler's config of a network at `where`."""
    where = where.rstrip("/")
    name, parent = "scheduler_config.json", where.rpartition("/")[0]
    if where.startswith(PREFIX):
        # A subfolder lies three names deep, hub:OWNER/REPO/SUBFOLDER.
        path = on_disk(f"{parent}/scheduler/{name}" if where.count("/") > 1 else f"{where}/{name}")
        return load_config(path), path
    folder = component_folder(where)
    for path in (folder / name, folder.parent / "scheduler" / name):
        if path.is_file():
            return load_config(path), path
    raise ValueError(
        f"there is no {name} in {folder} or {folder.parent / 'scheduler'}: the schedule that the network was "
        "trained with is read from it."
    )


def component_config(
    fields: Mapping[str, Any], source: object = "config.json"
) -> tuple[str, Any, str]:
    """(kind, config, name of the class) as in `Component`, from the fields of a config.json.

    Raises ValueError, naming `source`, for a class that is not read here, or an option of it.
    """
    name = fields.get("_class_name") or next(iter(fields.get("architectures") or ()), None)
    if name in NETWORKS:
        return "network", network_config(fields, source), name
    if name in _FIRST_STAGES:
        return "first_stage", diffusers_config(fields, source), name
    if name in (*_TEXTS, *_ENCODED):
        read = t5_config if name.startswith("T5") else text_config
        return "text", read(fields, source), name
    known = ", ".join((*NETWORKS, *_FIRST_STAGES, *_TEXTS))
    raise ValueError(f"{source} describes a {name}, which is not read here; there are {known}.")


def component_folder(where) -> pathlib.Path:
    """The folder on disk of a local folder, a folder of the hub's cache, or `hub:OWNER/REPO[/SUBFOLDER]`.

    Raises ValueError: nothing there, a file, a cache without the revision it names, or as `folder_on_disk`.
    """
    if str(where).startswith(PREFIX):
        return folder_on_disk(str(where), needs=("config.json",), any_of=FOLDER_FILES)
    folder = pathlib.Path(where)
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; give the folder of one network with its config.json, or "
            "hub:OWNER/REPO/SUBFOLDER."
        )
    snapshots = folder / "snapshots"
    if not snapshots.is_dir() or (folder / "config.json").is_file():
        return folder
    main = folder / "refs" / "main"
    names = sorted(path.name for path in snapshots.iterdir())
    chosen = main.read_text("utf-8").strip() if main.is_file() else "".join(names[:1])
    if chosen not in names or (not main.is_file() and len(names) > 1):
        raise ValueError(
            f"the cache folder {folder} has the revisions {', '.join(names) or 'none'} and "
            f"{'names ' + chosen if main.is_file() else 'names none'} in refs/main; give the folder of one."
        )
    return snapshots / chosen
