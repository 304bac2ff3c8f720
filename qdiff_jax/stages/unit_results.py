"""What one reconstructed unit leaves behind: codes, scales and biases, written once, atomically.

A finished unit is one safetensors file; a killed run reads those files back and goes on with the first
unit that has none.
"""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, safe_open, save_file

from qdiff_jax.export.qtensor import from_codes
from qdiff_jax.models.program import Unit
from qdiff_jax.quant.qparams import SCALE_FLOOR
from qdiff_jax.sites import flatten_sites, nest_sites
from qdiff_jax.stages.stage import code_bits
from qdiff_jax.stages.unit_trees import Trees, harden

_pack = jax.jit(from_codes, static_argnames="bits")


def unit_result(
    soft: Trees,
    trained: Mapping,
    losses: Sequence[float],
    timed: Sequence[float],
    keep_alphas: bool = False,
) -> dict:
    """{"codes", "scales", "report"} of a trained unit, on the host; with keep_alphas, also "alphas".

    soft: the unit's soft roundings as they were before training. trained: {"alpha", "scale"} leaves.
    losses: reconstruction loss of every step. timed: (steps, seconds) of a stretch of them.
    """
    alphas = trained.get("alpha", {})
    roundings = []
    for key, alpha in alphas.items():
        module, op_name = key.split(":")
        rounding = flatten_sites(soft[int(module)])[op_name].rhs
        roundings.append(rounding.replace(alpha=alpha))
    hardened = jax.device_get(harden(roundings)) if roundings else []
    fractions = [(float(f), a.size) for (_, f), a in zip(hardened, alphas.values())]
    losses = np.asarray(losses)
    window = max(1, losses.size // 20)
    steps, seconds = timed
    report = {
        "first_loss": float(losses[:window].mean()) if losses.size else None,
        "last_loss": float(losses[-window:].mean()) if losses.size else None,
        "steps_per_second": float(steps / seconds) if seconds else None,
    }
    if fractions:
        sizes = sum(size for _, size in fractions)
        report["binarised_fraction"] = sum(f * s for f, s in fractions) / sizes
    return {
        "codes": {key: codes for key, (codes, _) in zip(alphas, hardened)},
        "scales": {k: np.maximum(v, SCALE_FLOOR) for k, v in trained.get("scale", {}).items()},
        "alphas": {k: np.asarray(v) for k, v in alphas.items()} if keep_alphas else {},
        "report": report,
    }


def result_path(store: pathlib.Path, position: int, unit_name: str) -> pathlib.Path:
    return store / f"unit_{position:03d}_{unit_name}.safetensors"


def save_result(store: pathlib.Path | None, position: int, unit_name: str, result: Mapping) -> None:
    """Write {"codes", "scales", "report"}, optionally "biases" and "alphas", of a unit; nothing
    half-written is ever seen.

    Raises OSError, with what to do, when the disk is full.
    """
    if store is None:
        return
    store.mkdir(parents=True, exist_ok=True)
    # Not ascontiguousarray, which turns the scalar scale of a tensor into a vector.
    arrays = {f"codes|{k}": np.asarray(v, order="C") for k, v in result["codes"].items()}
    arrays |= {f"scales|{k}": np.asarray(v, order="C") for k, v in result["scales"].items()}
    for kind in ("biases", "alphas"):
        held = result.get(kind, {})
        arrays |= {f"{kind}|{k}": np.asarray(v, order="C") for k, v in held.items()}
    path = result_path(store, position, unit_name)
    temporary = path.with_suffix(".tmp")
    try:
        header = {"report": json.dumps(result["report"]), "crc32": str(_checksum(arrays))}
        save_file(arrays, temporary, metadata=header)
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
            header = handle.metadata()
        report = json.loads(header["report"])
        if header["crc32"] != str(_checksum(arrays)):
            raise ValueError("its arrays do not match their checksum")
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"The unit result {path} is damaged ({error}); delete it and run again: "
            "only this unit is computed anew."
        ) from error
    result: dict = {"codes": {}, "scales": {}, "biases": {}, "alphas": {}, "report": report}
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
        # A rounding that goes on from an earlier pass is soft in the state already.
        grid = getattr(flat[name].rhs, "qparams", flat[name].rhs)
        flat[name] = flat[name].replace(rhs=_pack(codes, grid, code_bits(grid)))
    for key, scale in result["scales"].items():
        node, op_name, side = key.split(":")
        name = f"{unit.nodes[int(node)]}/{op_name}"
        quantizer = getattr(flat[name], side).replace(scale=jnp.asarray(scale))
        flat[name] = flat[name].replace(**{side: quantizer})
    for key, bias in result.get("biases", {}).items():
        node, op_name = key.split(":")
        name = f"{unit.nodes[int(node)]}/{op_name}"
        flat[name] = flat[name].replace(bias=jnp.asarray(bias))
    return nest_sites(flat)


def alphas_of(unit: Unit, result: Mapping) -> dict[str, jax.Array]:
    """{site: alpha} that the result keeps."""
    named = {}
    for key, alpha in result.get("alphas", {}).items():
        node, op_name = key.split(":")
        named[f"{unit.nodes[int(node)]}/{op_name}"] = jnp.asarray(alpha)
    return named


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 over all arrays in the order of their names: safetensors has none of its own."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8), total)
    return total
