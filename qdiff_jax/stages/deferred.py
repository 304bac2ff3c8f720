"""A stage that is built when its turn comes, from the state that the stages before it have left.

For what a stage is made of that is itself a result: parameters after an equivalence transform, or a
calibration set drawn from the quantized sampler.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from qdiff_jax.stages.stage import QuantState, Stage


class Carry(NamedTuple):
    stage: Stage
    inner: Any


def deferred(name: str, build: Callable[[QuantState], tuple[Stage, QuantState]]) -> Stage:
    """The stage that runs `stage` from `state`, where (stage, state) = build(state it was given).

    build is called once for each start of the stage and must be a function of the state alone, so that
    a resumed run builds the same one.
    """

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        stage, state = build(state)
        return Carry(stage, stage.init(state, store))

    def run(carry: Carry, n: int) -> Carry:
        return carry._replace(inner=carry.stage.run(carry.inner, n))

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        return carry.stage.finish(carry.inner)

    def done(carry: Carry) -> bool:
        return carry.stage.done(carry.inner)

    return Stage(name, init, run, finish, done)
