"""Fair timing of a few rivals on a machine that is not quiet: interleaved rounds, medians, spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Timing(NamedTuple):
    """Seconds of one rival, one entry per round. cpu: of all threads of this process."""

    wall: np.ndarray
    cpu: np.ndarray

    def summary(self, per: int = 1) -> dict[str, float]:
        """Medians in milliseconds per one of `per` repetitions; spread: half the range of the middle
        half of the CPU times, relative to their median."""
        low, high = np.quantile(self.cpu, [0.25, 0.75])
        return {
            "wall_ms": float(np.median(self.wall)) / per * 1e3,
            "cpu_ms": float(np.median(self.cpu)) / per * 1e3,
            "spread": float((high - low) / 2 / np.median(self.cpu)),
        }


def interleave(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time every rival once a round, in an order that rotates; each ran once before (compiling).

    A rival must not return before its work is done. What disturbs the machine then disturbs all alike,
    and the ratio within a round is worth more than either time.
    """
    for rival in rivals.values():
        rival()
    names = list(rivals)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            began, spent = time.perf_counter(), time.process_time()
            rivals[name]()
            cpu[name].append(time.process_time() - spent)
            wall[name].append(time.perf_counter() - began)
    return {name: Timing(np.array(wall[name]), np.array(cpu[name])) for name in names}


def ratio(ours: Timing, theirs: Timing) -> dict[str, float]:
    """Median over rounds of ours / theirs, in CPU and in wall time, with the quartiles of the former."""
    cpu, wall = ours.cpu / theirs.cpu, ours.wall / theirs.wall
    low, high = np.quantile(cpu, [0.25, 0.75])
    return {
        "ratio": float(np.median(cpu)),
        "ratio_low": float(low),
        "ratio_high": float(high),
        "ratio_wall": float(np.median(wall)),
    }


def spent(work: Callable[[], object]) -> tuple[object, dict[str, float]]:
    """The result of `work()`, and its CPU and wall seconds: for what is done once."""
    began, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - began,
    }
