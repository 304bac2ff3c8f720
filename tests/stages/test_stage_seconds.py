"""What a stage took survives a kill: seconds are kept in its store and go on from there."""

import json
import time

import pytest

from qdiff_jax.stages.stage import Stage, run_stage

STEPS, EACH = 6, 0.02


class Kill(Exception):
    pass


def stage(kill_at: int | None = None) -> Stage:
    """Counts to STEPS and works EACH seconds a step; its store holds the number."""

    def init(state, store):
        place = None if store is None else store / "step"
        return (int(place.read_text()) if place and place.exists() else 0), store

    def run(carry, n):
        step, store = carry
        if step == kill_at:
            raise Kill
        until = time.process_time() + EACH
        while time.process_time() < until:
            pass
        if store is not None:
            store.mkdir(parents=True, exist_ok=True)
            (store / "step").write_text(str(step + 1))
        return step + 1, store

    return Stage("count", init, run, lambda carry: (carry[0], {}), lambda carry: carry[0] == STEPS)


def kept(store) -> dict:
    return json.loads((store / "seconds.json").read_text())


class TestKilled:
    def test_seconds_go_on_from_those_before_the_kill_and_leave_the_pause_out(self, tmp_path):
        store = tmp_path / "store"
        began = time.monotonic()
        with pytest.raises(Kill):
            run_stage(stage(kill_at=4), None, store)
        before = kept(store)
        assert before["cpu_seconds"] >= 4 * EACH
        pause = 0.3
        time.sleep(pause)
        with pytest.raises(Kill):  # at once after resuming: nothing is lost
            run_stage(stage(kill_at=4), None, store)
        assert kept(store) == before
        count, report = run_stage(stage(), None, store)
        assert count == STEPS
        assert report["resumed"]
        assert "uncounted" not in report
        assert report["cpu_seconds"] >= before["cpu_seconds"] + 2 * EACH
        assert before["seconds"] < report["seconds"] < time.monotonic() - began - pause
        assert kept(store).items() <= report.items()

    def test_a_store_without_seconds_says_that_they_are_not_counted(self, tmp_path):
        (tmp_path / "step").write_text("2")
        with pytest.raises(Kill):
            run_stage(stage(kill_at=4), None, tmp_path)
        report = run_stage(stage(), None, tmp_path)[1]  # still: of the first of three processes
        assert report["resumed"]
        assert report["uncounted"]
        assert report["cpu_seconds"] >= 4 * EACH

    @pytest.mark.parametrize("text", ["{", "[]", '{"seconds": 1.0}'])
    def test_damaged_seconds_are_named(self, tmp_path, text):
        (tmp_path / "seconds.json").write_text(text)
        with pytest.raises(ValueError, match=r"seconds.json .*delete it"):
            run_stage(stage(), None, tmp_path)


@pytest.mark.parametrize("stored", [True, False])
def test_an_uninterrupted_stage_is_not_resumed(tmp_path, stored):
    report = run_stage(stage(), None, tmp_path / "store" if stored else None)[1]
    assert report["resumed"] is False
    assert "uncounted" not in report
    assert report["cpu_seconds"] >= STEPS * EACH
    assert report["compile_seconds"] == report["compile_cpu_seconds"] == 0.0
