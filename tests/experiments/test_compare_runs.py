"""Which runs a leaderboard consists of: configs alone, nothing is computed."""

import pytest

from experiments.compare_runs import (
    alone,
    bits_of,
    check_alike,
    make_run,
    marked,
    method_runs,
    with_bits,
)
from qdiff_jax.config import fingerprint

from ..main_job import ROOT

METHODS = ROOT / "configs" / "methods"
SIX = ("ptq4dm", "qdiffusion", "tfmq", "tdq", "tcaq", "ptqd")


def path(method, words="laptop"):
    return f"{METHODS / method}.py:{words}"


def only(run):
    (variant,) = run.parsed.variants.values()
    return variant


@pytest.fixture(scope="module")
def board():
    """The six methods and the baselines, PTQ4DM in both its forms, on both models."""
    given = [path(name, f"laptop,model={m}") for m in ("unet", "dit") for name in SIX]
    given += [path("baseline", f"laptop,method={m}") for m in ("rtn", "brecq", "closed_form")]
    given += [path("ptq4dm", "laptop,plain"), path("ptqd", "laptop,base=brecq")]
    bits = ("w8a8", "w4a8", "w4a4")
    return [marked(r) for r in method_runs(given, bits, {}, closed_form=("w4a8", "w4a4"))]


def test_the_board_of_the_six_measures_alike(board):
    check_alike(board)
    assert {run.parsed.calibration.samples for run in board} == {16, 128}
    assert len({run.name for run in board}) == len(board)


def test_every_method_stands_alone_beside_one_nearest_rounding_of_its_policy(board):
    nearest = [run for run in board if only(run).method == "rtn"]
    places = [(r.parsed.model, r.parsed.policy, bits_of(only(r))) for r in nearest]
    assert len(set(places)) == len(places)
    wanted = {(r.parsed.model, r.parsed.policy, bits_of(only(r))) for r in board}
    assert set(places) == wanted
    assert {policy for _, policy, _ in places} == {"common", "official:qdiffusion"}
    for run in nearest:
        assert run.parsed.sampler.tensor_bits == 0
        assert run.parsed.calibration.samples == 16


def test_twins_in_closed_form_are_of_methods_that_round_and_of_their_bits(board):
    twins = [run for run in board if run.parsed.rounding == "closed_form"]
    assert {bits_of(only(run)) for run in twins} == {"w4a8", "w4a4"}
    found = {run.given.partition(":")[0].rpartition("/")[2] for run in twins}
    assert found == {"qdiffusion.py", "tfmq.py", "tdq.py", "tcaq.py", "baseline.py", "ptqd.py"}
    for run in twins:
        assert "closed form" in run.words
        assert only(run).method not in ("rtn", "ptq4dm", "closed_form")


def test_training_has_no_twin():
    runs = method_runs([path("tdq", "laptop,mode=qat")], ["w4a8"], {}, closed_form=["w4a8"])
    assert [only(run).method for run in runs] == ["rtn", "tdq"]


def test_what_stands_beside_a_branch_has_a_twin_unless_gptq_rounds_it():
    given = [path("svdquant", "laptop"), path("svdquant", "laptop,gptq")]
    runs = method_runs(given, ["w4a4"], {}, closed_form=["w4a4"])
    found = [
        (only(run).method, run.parsed.svdquant.branch.gptq, run.parsed.rounding) for run in runs
    ]
    assert found == [
        ("rtn", False, "adaround"),
        ("svdquant", False, "adaround"),
        ("svdquant", False, "closed_form"),
        ("svdquant", True, "adaround"),
    ]


def test_widths_that_a_config_does_not_list_are_left_out():
    given = [path("binarydm"), path("baseline")]
    runs = method_runs(given, ["w8a8", "w1a4"], {})
    found = sorted((only(run).method, bits_of(only(run))) for run in runs)
    # Bits of one of them do not make bare signs under its policy stand beside the other.
    assert found == [("binarydm", "w1a4"), ("rtn", "w1a4"), ("rtn", "w8a8")]
    with pytest.raises(ValueError, match=r"binarydm.py lists none of the bits w8a8, w4a8"):
        method_runs(given, ["w8a8", "w4a8"], {})
    with pytest.raises(ValueError, match="no method lists the bits 'w4b8'"):
        method_runs([path("baseline")], ["w8a8", "w4b8"], {})
    with pytest.raises(ValueError, match="'labtop' is not known; did you mean 'laptop'"):
        method_runs([path("baseline", "labtop")], ["w8a8"], {})


def test_a_changed_setting_has_another_folder_and_a_free_one_has_not():
    def name(overrides):
        return marked(make_run(path("tdq", "smoke"), overrides)).name

    assert name({}) == name({"reconstruct.save_seconds": 3.0})
    assert name({}) != name({"reconstruct.lr": 0.5})
    assert name({}).startswith("tdq-smoke-")


def test_alone_is_the_method_that_the_config_is_of():
    run = make_run(path("efficientdm", "w4a4,smoke"), {})
    assert len(run.parsed.variants) == 2
    assert only(alone(run)).method == "efficientdm"
    twice = [path("baseline", "smoke"), path("baseline", "smoke,method=rtn")]
    runs = method_runs(twice, ["w4a8"], {})
    assert len({fingerprint(run.parsed) for run in runs}) == 1
    assert with_bits("configs/x.py", "w4a8") == "configs/x.py:w4a8"
    assert with_bits("configs/x.py:a=b", "w4a8") == "configs/x.py:w4a8,a=b"


def test_overrides_of_one_method_reach_the_rounding_beside_it_where_it_has_them():
    given = {"tcaq.rounds": 1, "evaluation.samples": 8}
    beside, method = method_runs([path("tcaq", "smoke")], ["w4a8"], given)
    assert method.parsed.tcaq.rounds == 1
    assert beside.parsed.evaluation.samples == method.parsed.evaluation.samples == 8
