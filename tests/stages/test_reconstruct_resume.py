"""Reconstruction survives: kills at any moment, damaged files, a full disk, a loss that blows up."""

import dataclasses
import errno
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
from absl import logging

from qdiff_jax.runtime.checkpoint import CheckpointError
from qdiff_jax.stages import unit_results
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.stage import run_stage
from qdiff_jax.stages.unit_steps import step_inputs

from . import chain

CALIBRATION = chain.calibration(per_step=8)
CONFIG = ReconstructConfig(
    steps=12, batch_size=8, lr=4e-2, schedule="cosine", walk_batch=32, save_seconds=0.0
)
CHUNK = 5  # does not divide the steps: saves at 5 and 10


def stage(config=CONFIG, calibration=CALIBRATION, **options):
    return reconstruct(chain.model(), chain.UNITS, calibration, config, **options)


def without_timing(report):
    return [{k: v for k, v in unit.items() if k != "steps_per_second"} for unit in report["units"]]


@pytest.fixture(scope="module")
def start():
    return chain.state()


@pytest.fixture(scope="module")
def whole(start):
    return run_stage(stage(), start)


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """A store in which the first two units are finished; to be copied before use."""
    store = tmp_path_factory.mktemp("finished") / "store"
    work = stage()
    chain.run_until(work, work.init(start, store), 2)
    return store


@pytest.fixture
def store(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "store"))


def trained_units(start, store, **options):
    """Units that took a step when the stage was run again, and the outcome."""
    seen = []
    work = stage(on_progress=lambda done, total, unit, loss: seen.append(unit), **options)
    state, report = run_stage(work, start, store, chunk=CHUNK)
    return list(dict.fromkeys(seen)), state, report


class TestKilled:
    # In the first unit, in the middle of the third, between two units, at once after resuming.
    @pytest.mark.parametrize("kills", [(1,), (8,), (6,), (2, 1, 0, 5)])
    def test_resumed_equals_uninterrupted(self, start, whole, tmp_path, kills):
        for chunks in kills:
            work = stage()
            carry = work.init(start, tmp_path)
            for _ in range(chunks):
                carry = work.run(carry, CHUNK)
            del carry
        state, report = run_stage(stage(), start, tmp_path, chunk=CHUNK)
        assert chain.leaves_equal(state.quant, whole[0].quant)
        assert without_timing(report) == without_timing(whole[1])

    def test_seconds_are_at_least_those_before_the_kill(self, start, whole, tmp_path):
        def kill(done, total, unit, loss):
            if unit == "b":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_stage(stage(on_progress=kill), start, tmp_path, chunk=CHUNK)
        before = json.loads((tmp_path / "seconds.json").read_text())
        report = run_stage(stage(), start, tmp_path, chunk=CHUNK)[1]
        assert (whole[1]["resumed"], report["resumed"]) == (False, True)
        assert report["cpu_seconds"] > before["cpu_seconds"] > 0
        assert report["seconds"] > before["seconds"] > 0

    def test_unit_is_taken_up_at_the_step_it_was_saved_at(self, start, tmp_path):
        work = stage()
        carry = chain.run_until(work, work.init(start, tmp_path), 2, CHUNK)
        carry = work.run(work.run(carry, CHUNK), CHUNK)
        losses = carry.unit["losses"]
        assert (carry.position, carry.step) == (2, 10)
        again = stage()
        carry = chain.run_until(again, again.init(start, tmp_path), 2, CHUNK)
        carry = again.run(carry, 1)
        assert carry.step == 11
        np.testing.assert_array_equal(carry.unit["losses"][:10], np.float32(losses))

    def test_finished_units_are_read_back_and_leave_no_checkpoint(self, start, whole, store):
        assert [path.name for path in sorted(store.iterdir())] == [
            "unit_000_time.safetensors",
            "unit_001_mix.safetensors",
        ]
        units, state, report = trained_units(start, store)
        assert units == ["a", "b", "c"]
        assert chain.leaves_equal(state.quant, whole[0].quant)
        assert without_timing(report) == without_timing(whole[1])

    def test_half_written_result_is_ignored(self, start, whole, store):
        (store / "unit_002_a.tmp").write_bytes(b"half")
        units, state, _ = trained_units(start, store)
        assert units == ["a", "b", "c"]
        assert chain.leaves_equal(state.quant, whole[0].quant)

    def test_length_of_chunks_changes_nothing(self, start, whole):
        state, _ = run_stage(stage(), start, chunk=7)
        assert chain.leaves_equal(state.quant, whole[0].quant)


class TestDamage:
    def damage(self, path, how):
        data = bytearray(path.read_bytes())
        if how == "cut":
            data = data[: len(data) // 2]
        elif how == "flipped":
            data[-1] ^= 1
        else:
            data = b""
        path.write_bytes(bytes(data))

    @pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
    def test_damaged_result_is_named_and_can_be_deleted(self, start, whole, store, how):
        path = store / "unit_001_mix.safetensors"
        self.damage(path, how)
        with pytest.raises(ValueError, match="unit_001_mix.safetensors is damaged.*delete it"):
            run_stage(stage(), start, store)
        path.unlink()
        units, state, _ = trained_units(start, store)
        assert units == ["mix", "a", "b", "c"]
        assert chain.leaves_equal(state.quant, whole[0].quant)


class TestFullDisk:
    def test_result_that_cannot_be_written(self, start, whole, store, monkeypatch):
        def full(*args, **options):
            pathlib.Path(args[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(unit_results, "save_file", full)
            with pytest.raises(OSError, match=r"result of unit 'a'.*free some space and run"):
                run_stage(stage(), start, store, chunk=CHUNK)
        assert not [path for path in store.iterdir() if path.suffix == ".tmp"]
        units, state, _ = trained_units(start, store)
        assert units == ["a", "b", "c"]
        assert chain.leaves_equal(state.quant, whole[0].quant)

    def test_checkpoint_that_cannot_be_written(self, start, store, monkeypatch):
        none_free = types.SimpleNamespace(free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: none_free)
        with pytest.raises(CheckpointError, match="disk is too full.*free some space"):
            run_stage(stage(), start, store, chunk=CHUNK)


class TestNotANumber:
    def test_unit_and_step_are_named_and_earlier_units_kept(self, start, whole, tmp_path):
        """One sample is NaN; the first minibatch that holds it decides the step."""
        poisoned = CALIBRATION.x.copy()
        rows = step_inputs(CONFIG, start.key, len(CALIBRATION), 1, 0, CONFIG.steps).rows
        row = next(r for r in range(len(CALIBRATION)) if r not in rows[:3] and r in rows[3:9])
        step = int(np.flatnonzero((rows == row).any(axis=1))[0])
        poisoned[row] = np.nan
        bad = dataclasses.replace(CALIBRATION, x=poisoned)
        with pytest.raises(FloatingPointError, match=rf"unit 'mix' became nan at step {step};"):
            run_stage(stage(calibration=bad), start, tmp_path, chunk=CHUNK)
        assert (tmp_path / "unit_000_time.safetensors").exists()
        units, _, _ = trained_units(start, tmp_path)
        assert "time" not in units

    def test_values_that_only_the_last_step_spoilt(self, start):
        """A finite loss whose update overflows would harden into arbitrary codes."""
        config = dataclasses.replace(CONFIG, steps=1, lr=float("inf"), schedule="constant")
        with pytest.raises(FloatingPointError, match="last step of unit 'time'"):
            run_stage(stage(config), start)


class TestMemory:
    def test_streams_through_files_give_the_same_codes(self, start, whole, tmp_path):
        state, _ = run_stage(stage(dataclasses.replace(CONFIG, memory_mib=0)), start, tmp_path)
        assert chain.leaves_equal(state.quant, whole[0].quant)
        assert not list((tmp_path / "spill").iterdir())  # given back

    def test_too_little_memory_and_no_folder(self, start):
        with pytest.raises(MemoryError, match="give a folder to stream to"):
            run_stage(stage(dataclasses.replace(CONFIG, memory_mib=0)), start)


def test_rates_too_small_to_decide_anything_are_warned_of(caplog):
    logging.use_absl_handler()
    with caplog.at_level("WARNING"):
        ReconstructConfig(steps=200, lr=1e-3)
        assert "expect little change from nearest rounding" in caplog.text
        caplog.clear()
        ReconstructConfig()
        assert not caplog.text
