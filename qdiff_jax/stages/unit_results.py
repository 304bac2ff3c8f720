"""What one reconstructed unit leaves behind: its codes and scales, written once, atomically.

A finished unit is one safetensors file; a killed run reads those files back and goes on with the first
unit that has none.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, safe_open, save_file

from qdiff_jax.export.qtensor import from_codes
from qdiff_jax.models.program import Unit
from qdiff_jax.sites import flatten_sites, nest_sites
from qdiff_jax.stages.stage import code_bits

_pack = jax.jit(from_codes, static_argnames="bits")


def result_path(store: pathlib.Path, position: int, unit_name: str) -> pathlib.Path:
    return store / f"unit_{position:03d}_{unit_name}.safetensors"


def save_result(store: pathlib.Path | None, position: int, unit_name: str, result: Mapping) -> None:
    """Write {"codes", "scales", "report"} of a unit; nothing half-written is ever seen.

    Raises OSError, with what to do, when the disk is full.
    """
    if store is None:
        return
    store.mkdir(parents=True, exist_ok=True)
    arrays = {f"codes|{k}": np.ascontiguousarray(v) for k, v in result["codes"].items()}
    arrays |= {f"scales|{k}": np.ascontiguousarray(v) for k, v in result["scales"].items()}
    path = result_path(store, position, unit_name)
    temporary = path.with_suffix(".tmp")
    try:
        save_file(arrays, temporary, metadata={"report": json.dumps(result["report"])})
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"The result of unit {unit_name!r} could not be written to {path} ({error}); free some "
            "space and run the same command again: it continues with this unit."
        ) from error


def load_result(store: pathlib.Path | None, position: int, unit_name: str) -> dict | None:
    """The result of a finished unit, or None if it has not been finished.

    Raises ValueError for a file that is damaged.
    """
    if store is None or not (path := result_path(store, position, unit_name)).exists():
        return None
    try:
        arrays = load_file(path)
        with safe_open(path, "np") as handle:
            report = json.loads(handle.metadata()["report"])
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"The unit result {path} is damaged ({error}); delete it and run again: "
            "only this unit is computed anew."
        ) from error
    result: dict = {"codes": {}, "scales": {}, "report": report}
    for key, value in arrays.items():
        kind, _, name = key.partition("|")
        result[kind][name] = value
    return result


def apply_result(quant: Mapping, unit: Unit, result: Mapping) -> dict:
    """A quant tree in which the unit's weights hold their codes and its quantizers their scales."""
    flat = flatten_sites(quant)
    for key, codes in result["codes"].items():
        node, op_name = key.split(":")
        name = f"{unit.nodes[int(node)]}/{op_name}"
        flat[name] = flat[name].replace(rhs=_pack(codes, flat[name].rhs, code_bits(flat[name].rhs)))
    for key, scale in result["scales"].items():
        node, op_name, side = key.split(":")
        name = f"{unit.nodes[int(node)]}/{op_name}"
        quantizer = getattr(flat[name], side).replace(scale=jnp.asarray(scale))
        flat[name] = flat[name].replace(**{side: quantizer})
    return nest_sites(flat)
