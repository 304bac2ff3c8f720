"""The libraries of the extra `parity`, and how a module of theirs is run beside ours."""

import contextlib
import importlib
import pathlib
import warnings

import numpy as np
import pytest

from ..parity.networks import seeded

BUFFERS = ("pos_embed.pos_embed",)  # floats that are computed, not learned
COMMAND = "pip install -e '.[parity]'"


def need(*names):
    """The modules of these names; skips the tests of a file where one is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, while they are imported
        return [pytest.importorskip(n, reason=f"{n} is not installed; {COMMAND}") for n in names]


@contextlib.contextmanager
def quietly():
    """Their warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(library, name, **options):
    """A module of diffusers or transformers in evaluation mode, with weights that follow from their names."""
    import torch

    with quietly():
        made = getattr(importlib.import_module(library), name)
        if library == "transformers":
            config = made.config_class
            model = made(config(**options))
        else:
            model = made(**options)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = {k: torch.from_numpy(np.array(v)) for k, v in seeded.state_dict(shapes).items()}
    for key, value in model.state_dict().items():
        if not value.is_floating_point() or key in BUFFERS:
            state[key] = value  # positions and the like
    if "encoder.embed_tokens.weight" in state:
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state)
    return model.eval()


def saved(model, folder: pathlib.Path) -> pathlib.Path:
    """The folder that `save_pretrained` makes of it."""
    with quietly():
        model.save_pretrained(folder)
    return folder


def both(model, call):
    """(float64 result, largest error of float32 for each sample): call(model, dtype) -> torch tensor."""
    import torch

    found = []
    with torch.no_grad(), quietly():
        for dtype in (torch.float32, torch.float64):
            found.append(call(model.to(dtype), dtype).double().numpy())
    model.float()
    return found[1], per_sample(*found)


def per_sample(one, two):
    return np.abs(one - two).reshape(len(one), -1).max(1)


def nhwc(array):
    return np.moveaxis(np.asarray(array), 1, -1)


def draw(key, *shape):
    return seeded.normal(key, shape).astype(np.float32)
