"""Letting go of compiled programs before the operating system refuses more of them.

XLA's CPU backend maps the pages of every program it compiles or loads, some four regions each, and keeps
them as long as JAX caches the program. Linux allows a process 65,530 regions (`vm.max_map_count`); the
program that does not fit ends the process by a segmentation fault. A process that runs many methods or
models one after the other gets there.
"""

from __future__ import annotations

import gc
import pathlib

import jax

_MAPS = pathlib.Path("/proc/self/maps")
_LIMIT = pathlib.Path("/proc/sys/vm/max_map_count")


def mapped_share() -> float:
    """Share of the memory regions a process may have that this one has; 0 where Linux does not say."""
    try:
        with _MAPS.open("rb") as file:
            return sum(1 for _ in file) / int(_LIMIT.read_text())
    except (OSError, ValueError):
        return 0.0


def release_programs(above: float = 0.5) -> bool:
    """Drop JAX's compiled programs if the process has more than this share of its regions; returns whether.

    What is needed again is compiled again, or read from the compile cache. Arrays stay.
    """
    if mapped_share() <= above:
        return False
    jax.clear_caches()
    gc.collect()
    return True
