"""The rounding bench: its smoke run, the table over everything that is there, and its arithmetic."""

import csv

import pytest

from experiments.bench_rounding import (
    cells,
    curves,
    pareto,
    read_cells,
    run_cells,
    summaries,
    write_results,
)
from qdiff_jax.config import load_config

from ..main_job import ROOT, digests

CONFIG = str(ROOT / "configs" / "bench_rounding.py")


def entry(recipe, eps, cpu):
    return {"recipe": recipe, "eps_rel_mse": eps, "cpu_s": cpu}


def test_the_front_keeps_what_nothing_beats_in_both():
    found = pareto(
        [entry("a", 0.5, 1.0), entry("b", 0.3, 4.0), entry("c", 0.4, 5.0), entry("d", None, 0.1)]
    )
    assert found == {"a", "b"}


def test_lengths_of_adaround_at_one_rate_are_one_curve():
    names = ["asym1", "adaround 200 at 1e-2", "adaround 50 at 1e-2", "adaround 50 at 1e-3"]
    given = [{"recipe": name, "cpu_s": float(4 - i)} for i, name in enumerate(names)]
    found = curves(given)
    assert {label: len(held) for label, held in found.items()} == {
        "adaround at 1e-2, more steps": 2,
        "adaround at 1e-3, more steps": 1,
        "asym1": 1,
    }
    assert found["adaround at 1e-2, more steps"][0]["recipe"] == names[2]


def test_a_summary_is_a_mean_with_its_range_and_a_divergence_comes_last():
    row = {"model": "m", "bits": "w4a8", "rollout_mse": 1.0, "cpu_s": 2.0, "compile_s": 0.0}
    rows = [
        {**row, "recipe": "broken", "seed": 0, "eps_rel_mse": None},
        {**row, "recipe": "sound", "seed": 0, "eps_rel_mse": 0.2},
        {**row, "recipe": "sound", "seed": 1, "eps_rel_mse": 0.4},
    ]
    sound, broken = summaries(rows)
    assert (sound["recipe"], sound["seeds"]) == ("sound", 2)
    assert sound["eps_rel_mse"] == pytest.approx(0.3)
    assert sound["eps_rel_mse_spread"] == pytest.approx(0.2)
    assert broken["eps_rel_mse"] is None


def test_every_recipe_makes_a_config_that_is_valid():
    made = cells(load_config(f"{CONFIG}:model=unet_fashion,bits=w4a32,seeds=2"))
    assert len({cell.name for cell in made}) == len(made) == 2 * 21
    by_recipe = {cell.row["recipe"]: cell.config for cell in made}
    assert by_recipe["adaround 200 at 3e-2"].reconstruct.lr == 3e-2
    assert by_recipe["asym1 + bias"].closed_form.target == "layer_fp_output"
    assert not by_recipe["gptq"].closed_form.refit_bias
    assert by_recipe["asym2 + bias by c^2"].closed_form.step_weights == "eps_coefficient"
    assert by_recipe["asym2 + bias in 1 MiB"].closed_form.hessian_mib == 1


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ValueError, match="asym2"):
        load_config(f"{CONFIG}:recipe=gptk")


@pytest.mark.slow
def test_the_smoke_run_resumes_and_tells_recipes_apart(tmp_path):
    given = cells(load_config(f"{CONFIG}:smoke"))
    run_cells(given[:2], tmp_path)
    before = digests(tmp_path / "runs")
    run_cells(given, tmp_path)
    after = digests(tmp_path / "runs")
    assert before.items() <= after.items()
    rows = read_cells(tmp_path)
    assert {row["recipe"] for row in rows} == {cell.row["recipe"] for cell in given}
    assert len({row["eps_rel_mse"] for row in rows}) == len(rows)
    assert all(row["cpu_s"] >= 0 for row in rows)
    text = write_results(tmp_path, "a command").read_text()
    assert all(f"| {cell.row['recipe']}" in text for cell in given)
    with open(tmp_path / "rounding.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(given)
    assert list((tmp_path / "pictures").glob("*.png"))
