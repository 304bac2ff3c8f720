"""A stage that is built when its turn comes, from the state that the stages before it have left.

For what a stage is made of that is itself a result: parameters after an equivalence transform, or a
calibration set drawn from the quantized sampler.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qdiff_jax.stages.stage import Model, QuantState, Stage, tuned_params


class Carry(NamedTuple):
    stage: Stage
    inner: Any


def deferred(
    name: str, build: Callable[[QuantState], tuple[Stage, QuantState]], kind: str = "codes"
) -> Stage:
    """The stage that runs `stage` from `state`, where (stage, state) = build(state it was given). kind: its
    own.

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

    return Stage(name, init, run, finish, done, kind)


def on_left_parameters(
    model: Model, build: Callable[[Model], Sequence[Stage]]
) -> tuple[Stage, ...]:
    """The stages build(model), but each is built when its turn comes, on the parameters that the stages before
    it have left: after a transform nothing may read those of the checkpoint.

    build must give stages of the same number, names and kinds for any parameters.
    """

    def later(i: int, stage: Stage) -> Stage:
        def on_left(state: QuantState) -> tuple[Stage, QuantState]:
            own = model._replace(params=tuned_params(model.params, state.aux))
            return build(own)[i], state

        return deferred(stage.name, on_left, stage.kind)

    return tuple(later(i, stage) for i, stage in enumerate(build(model)))
