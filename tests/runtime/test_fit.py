"""The training loop saves, logs, stops and refuses to go on, whatever the step computes."""

import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.runtime import checkpoint
from qdiff_jax.runtime.fit import Diverged, RunConfig, fit


def _step(state, x):
    state = {"sum": state["sum"] + x}
    return state, {"loss": state["sum"], "grad_norm": x}


def _load(first, count):
    return np.arange(first, first + count, dtype=np.float32)


def _fit(tmp_path, *, start=0, total=25, state=0.0, step=_step, load=_load, visit=None, **run):
    written = []
    result = fit(
        step,
        {"sum": jnp.float32(state)},
        load,
        start=start,
        total=total,
        run=RunConfig(**{"chunk": 5, "log_every": 10, "checkpoint_every": 10, **run}),
        checkpoints=tmp_path,
        write=lambda step, values: written.append((step, values)),
        visit=visit,
    )
    return *result, written


def test_logs_means_and_saves_on_the_way(tmp_path):
    state, done, written = _fit(tmp_path, keep=9)
    assert done == 25
    assert float(state["sum"]) == sum(range(25))
    assert [step for step, _ in written] == [10, 20, 25]
    sums = np.cumsum(np.arange(25))
    assert written[1][1]["loss"] == sums[10:20].mean()
    assert written[2][1]["grad_norm"] == np.arange(20, 25).mean()
    assert checkpoint.all_steps(tmp_path) == [10, 20, 25]


def test_visits_see_the_state_of_their_step(tmp_path):
    def visit(step, state):
        return {"seen": float(state["sum"]) - sum(range(step))}

    _, _, written = _fit(tmp_path, visit=visit, visit_every=10)
    assert [(s, v["seen"]) for s, v in written if "seen" in v] == [(10, 0), (20, 0), (25, 0)]


def test_resuming_in_the_middle_ends_the_same(tmp_path):
    _fit(tmp_path / "a", total=10)
    middle = checkpoint.restore(tmp_path / "a", {"sum": jnp.float32(0)})
    state, done, _ = _fit(tmp_path / "a", start=middle.step, state=middle.tree["sum"])
    assert (done, float(state["sum"])) == (25, sum(range(25)))


def test_a_signal_saves_and_stops(tmp_path):
    def load(first, count):
        if first == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return _load(first, count)

    state, done, _ = _fit(tmp_path, load=load, checkpoint_every=1000)
    assert done == 15
    restored = checkpoint.restore(tmp_path, {"sum": jnp.float32(0)})
    assert (restored.step, float(restored.tree["sum"])) == (15, sum(range(15)))


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_divergence_names_the_step_and_keeps_the_sound_checkpoint(tmp_path, name):
    def step(state, x):
        state, metrics = _step(state, x)
        return state, {**metrics, name: jnp.where(x == 17, jnp.nan, 0.0)}

    with pytest.raises(Diverged, match="not finite at step 18; the checkpoint of step 10 is sound"):
        _fit(tmp_path, step=step, log_every=5)
    assert checkpoint.all_steps(tmp_path) == [10]


def test_divergence_is_seen_before_a_checkpoint_is_written(tmp_path):
    def step(state, x):
        return state, {"loss": jnp.where(x == 8, jnp.inf, 0.0), "grad_norm": x}

    with pytest.raises(Diverged, match="step 9; no checkpoint was made yet"):
        _fit(tmp_path, step=step, log_every=1000, checkpoint_every=10)
    assert checkpoint.all_steps(tmp_path) == []


def test_the_clock_saves_too(tmp_path):
    _fit(tmp_path, total=10, checkpoint_every=1000, checkpoint_minutes=0.0, keep=9)
    assert checkpoint.all_steps(tmp_path) == [5, 10]


def test_run_config_is_checked():
    with pytest.raises(ValueError, match="run.chunk must be at least 1"):
        RunConfig(chunk=0)
