"""The rounding bench: its smoke run, the table over everything that is there, and its arithmetic."""

import csv
import json
import subprocess
import sys

import jax
import pytest

from experiments import bench_rounding, bench_rounding_table
from experiments.bench_rounding import CELL, TIMED, cells, read_cells, run_cells, shown_command
from experiments.bench_rounding_table import (
    MADE,
    curves,
    merged,
    pareto,
    read_rows,
    summaries,
    write_results,
)
from experiments.quantize_config import read_config
from experiments.quantize_report import made_at
from experiments.quantize_settings import check_sizes
from qdiff_jax.config import load_config
from qdiff_jax.eval.report import PROVENANCE_KEYS, reference_metrics
from qdiff_jax.observe.archive import load_record, save_record

from ..main_job import ROOT, digests

CONFIG = str(ROOT / "configs" / "bench_rounding.py")
ROW = {"model": "m", "bits": "w4a8", "recipe": "gptq", "seed": 0}
STAGE = {
    "cpu_seconds": 20.0,
    "compile_seconds": 30.0,
    "compile_cpu_seconds": 0.5,
    "resumed": False,
}


def entry(recipe, eps, cpu, share=None):
    return {"recipe": recipe, "eps_rel_mse": eps, "eps_share": share, "cpu_s": cpu}


def finished(out, name, stages, *, cell=ROW, again=None, sensitivity=None):
    """A cell's folder as a run leaves it; stages: of its quantize.json, again: of that of its second run."""
    workdir = out / "runs" / name
    figures = {
        **reference_metrics(),
        **dict.fromkeys(("calibrate_s", "reconstruct_s", "compile_s")),
    }
    variant = {"w_bits": 4, "a_bits": 8, "stored_bytes": 1, **figures}
    variant |= {"eps_rel_mse": 0.5, "rollout_mse": 0.5}
    provenance = {**dict.fromkeys(PROVENANCE_KEYS, "said by the report"), "commit": "aaaaaaa"}
    variants = [{**variant, "name": each} for each in ("fp32", "rounded")]
    report = {"format": 1, "variants": variants, "provenance": provenance}
    files = {
        CELL: cell,
        "report.json": report,
        "variants/rounded/quantize.json": {"commit": "aaaaaaa", "stages": stages},
    }
    if again is not None:
        files[f"{TIMED}/quantize.json"] = {"commit": "bbbbbbb", "stages": again}
    if sensitivity is not None:
        files["trajectories/sensitivity.json"] = sensitivity
    for path, record in files.items():
        save_record(workdir / path, record)
    return workdir


def test_the_front_keeps_what_nothing_beats_in_both():
    found = pareto(
        [entry("a", 0.5, 1.0), entry("b", 0.3, 4.0), entry("c", 0.4, 5.0), entry("d", None, 0.1)]
    )
    assert found == {"a", "b"}


def test_the_front_compares_shares_where_all_have_them():
    given = [entry("a", 0.5, 1.0, 0.9), entry("b", 0.6, 2.0, 0.8), entry("c", None, 0.1)]
    assert pareto(given) == {"a", "b"}
    assert pareto([*given, entry("d", 0.7, 9.0)]) == {"a"}


def test_shares_are_of_nearest_with_the_same_seed():
    row = {"model": "m", "bits": "w4a8", "cpu_s": 2.0, "compile_s": 0.0, "rollout_mse": 1.0}
    row |= {"fell_back": None, "units": None}
    errors = {("nearest", 0): 0.1, ("nearest", 1): 0.4, ("a", 0): 0.09, ("b", 1): 0.2}
    errors |= {("c", 0): 0.05, ("c", 2): 0.05, ("d", 0): 0.1, ("d", 1): 0.1}
    rows = [{**row, "recipe": r, "seed": s, "eps_rel_mse": e} for (r, s), e in errors.items()]
    rows.append({**row, "recipe": "e", "seed": 0, "eps_rel_mse": None, "rollout_mse": None})
    found = {each["recipe"]: each for each in summaries(rows)}
    shares = {name: each["eps_share"] for name, each in found.items()}
    assert shares.pop("a") == pytest.approx(0.9)
    assert shares.pop("b") == pytest.approx(0.5)  # though its error is larger
    assert shares.pop("d") == pytest.approx(0.5)
    assert shares.pop("nearest") == pytest.approx(1.0)
    assert shares == {"c": None, "e": None}  # without nearest at seed 2, and diverged
    assert found["c"]["rollout_share"] is None
    assert list(found)[0] in "bd"
    assert list(found)[-3:] == ["nearest", "c", "e"]


def test_lengths_of_adaround_at_one_rate_are_one_curve():
    names = ["asym1", "adaround 200 at 1e-2", "adaround 50 at 1e-2", "adaround 50 at 1e-3"]
    given = [{"recipe": name, "cpu_s": float(4 - i)} for i, name in enumerate(names)]
    found = curves([*given, {"recipe": "diverged", "cpu_s": None}])
    assert {label: len(held) for label, held in found.items()} == {
        "adaround at 1e-2": 2,
        "adaround at 1e-3": 1,
        "asym1": 1,
        "diverged": 1,
    }
    assert found["adaround at 1e-2"][0]["recipe"] == names[2]


def test_a_summary_is_a_mean_with_its_range_and_a_divergence_comes_last():
    row = {"model": "m", "bits": "w4a8", "rollout_mse": 1.0, "cpu_s": 2.0, "compile_s": 0.0}
    row |= {"fell_back": None, "units": None}
    fallen = {"fell_back": 1, "units": 22}
    rows = [
        {**row, "recipe": "broken", "seed": 0, "eps_rel_mse": None},
        {**row, "recipe": "sound", "seed": 0, "eps_rel_mse": 0.2, **fallen},
        {**row, "recipe": "sound", "seed": 1, "eps_rel_mse": 0.4, **fallen},
    ]
    sound, broken = summaries(rows)
    assert (sound["recipe"], sound["seeds"]) == ("sound", 2)
    assert sound["eps_rel_mse"] == pytest.approx(0.3)
    assert sound["eps_rel_mse_spread"] == pytest.approx(0.2)
    assert (sound["fell_back"], sound["units"]) == (2, 44)
    assert broken["eps_rel_mse"] is None
    assert broken["units"] is None


def test_every_recipe_makes_a_config_that_is_valid():
    made = cells(load_config(f"{CONFIG}:model=unet_fashion,bits=w4a8,seeds=2"))
    assert len({cell.name for cell in made}) == len(made) == 2 * 37
    by_recipe = {cell.row["recipe"]: cell.config for cell in made}
    assert by_recipe["adaround 200 at 3e-2"].reconstruct.lr == 3e-2
    assert by_recipe["adaround 200 at 3e-2"].reconstruct.temporal_steps == 0
    assert by_recipe["adaround 1000 at 1e-1"].reconstruct.schedule == "cosine"
    assert by_recipe["adaround 1000 at 3e-2 (2000 for time)"].reconstruct.temporal_steps == 2000
    assert by_recipe["adaround 1000 at 3e-2 + scales"].reconstruct.activation_steps == 1000
    assert by_recipe["asym1 + bias"].closed_form.target == "layer_fp_output"
    assert not by_recipe["gptq"].closed_form.refit_bias
    assert by_recipe["asym2 + bias"].closed_form.activations
    assert not by_recipe["asym2 + bias (blind)"].closed_form.activations
    assert by_recipe["asym2 + bias by c^2"].closed_form.step_weights == "eps_coefficient"
    assert by_recipe["asym2 + bias in 1 MiB"].closed_form.hessian_mib == 1


def test_what_concerns_activations_is_left_out_where_they_are_not_quantized():
    made = cells(load_config(f"{CONFIG}:model=unet_fashion,bits=w4a32,seeds=1"))
    assert len(made) == 34
    assert not {c.row["recipe"] for c in made if "scales" in c.name or "blind" in c.name}
    with pytest.raises(ValueError, match="concern quantized activations"):
        cells(load_config(f"{CONFIG}:bits=w4a32,recipe=asym2 + bias (blind)"))


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ValueError, match="asym2"):
        load_config(f"{CONFIG}:recipe=gptk")


def test_the_command_is_shown_without_the_places_of_this_machine():
    given = [
        "--config=a.py:recipe=x y",
        "--out",
        "/tmp/a",
        "--compile_cache=/tmp/b",
        "--rows=/tmp/c.csv",
        "--config.b=1",
    ]
    shown = "python -m experiments.bench_rounding '--config=a.py:recipe=x y' --config.b=1 --out=W"
    assert shown_command(given) == shown
    assert shown_command(["--out=/tmp/a", *given[:1]]).endswith(
        "'--config=a.py:recipe=x y' --out=W"
    )


class TestRows:
    @pytest.fixture(autouse=True)
    def without_pictures(self, monkeypatch):
        monkeypatch.setattr(
            bench_rounding_table, "_draw", lambda entries, labels, stem: stem.with_suffix(".png")
        )

    def test_seconds_are_of_the_second_run_and_of_the_rollouts_that_weigh_steps(self, tmp_path):
        stages = {
            "0_calibrate_activations": {**STAGE, "cpu_seconds": 1000.0},
            "1_calibrate_weights": {**STAGE, "cpu_seconds": 1.0},
            "2_closed_form_weights": {**STAGE, "compile_cpu_seconds": 9.0},
        }
        again = {"2_closed_form_weights": {**STAGE, "cpu_seconds": 15.0}}
        rollouts = {"importance": [1.0], "cpu_seconds": 4.0, "compile_seconds": 2.0}
        finished(tmp_path, "first", stages)
        finished(tmp_path, "second", stages, again=again, sensitivity=rollouts)
        finished(tmp_path, "third", stages, again=again, sensitivity={"importance": [1.0]})
        first, second, third = read_cells(tmp_path)
        assert (first["cpu_s"], first["compile_s"]) == (21.0, 60.0)
        assert first["notes"] == [
            "compiled for more than a twentieth of its CPU seconds and was not timed again"
        ]
        assert (second["cpu_s"], second["compile_s"]) == (19.0, 62.0)
        assert second["notes"] == ["timed at commit bbbbbbb"]
        assert third["cpu_s"] == 15.0
        assert "not counted" in third["notes"][1]

    def test_what_cpu_seconds_are_not_is_said(self, tmp_path):
        clipped = {
            "cpu_seconds": 0.0,
            "compile_seconds": 40.0,
        }  # the wall's, taken from the other clock
        finished(tmp_path, "a", {"0_gptq": clipped})
        finished(tmp_path, "b", {"0_gptq": {**STAGE, "compile_cpu_seconds": None}})
        finished(tmp_path, "c", {"0_gptq": {**STAGE, "resumed": True, "uncounted": True}})
        finished(tmp_path, "d", {"0_gptq": STAGE})
        said = [" ".join(row["notes"]) for row in read_cells(tmp_path)]
        assert "taken off: too low" in said[0]
        assert "with compiling" in said[1]
        assert "counts twice" in said[2]
        assert "kept no seconds" in said[2]
        assert said[3] == ""

    def test_units_that_fell_back_are_counted(self, tmp_path):
        units = [{"unit": name, "trained": name != "c"} for name in "abc"]
        stage = {**STAGE, "units": units, "fell_back": ["b"]}
        finished(tmp_path, "a", {"0_closed_form_weights": stage, "1_tune": STAGE})
        finished(tmp_path, "b", {"0_brecq_weights": STAGE}, cell={**ROW, "recipe": "adaround"})
        solved, stepped = read_cells(tmp_path)
        assert (solved["fell_back"], solved["units"]) == (1, 2)
        assert (stepped["fell_back"], stepped["units"]) == (None, None)
        lines = write_results(tmp_path, [solved, stepped]).read_text().splitlines()
        assert any(line.endswith("| fell back to nearest, of units |") for line in lines)
        assert any(line.startswith("| gptq") and line.endswith("| 1/2 |") for line in lines)
        whole = {**solved, "fell_back": 0}
        assert "fell back" not in write_results(tmp_path, [whole, stepped]).read_text()

    def test_origins_are_listed_and_differences_named(self, tmp_path):
        made = {"command": "python -m x", "commit": "ccccccc", "machine": "m", "jax_version": "1"}
        finished(tmp_path, "a", {"0_gptq": STAGE}, cell={**ROW, **made})
        alone = write_results(tmp_path, read_cells(tmp_path)).read_text()
        assert "commit ccccccc, m, jax 1: 1 cell\n" in alone
        assert "`python -m x`: 1 cell\n" in alone
        assert "not recorded" not in alone
        assert "Not all cells" not in alone
        finished(tmp_path, "b", {"0_gptq": STAGE}, cell={**ROW, "seed": 1})
        both = write_results(tmp_path, read_cells(tmp_path)).read_text()
        assert "commit aaaaaaa, said by the report, jax said by the report: 1 cell\n" in both
        assert "a command that was not recorded" in both
        assert "Not all cells were made at one commit" in both
        with open(tmp_path / "rounding.csv", newline="") as file:
            assert [row["commit"] for row in csv.DictReader(file)] == ["ccccccc", "aaaaaaa"]

    def test_rows_of_a_table_made_before_are_read_as_they_were(self, tmp_path):
        units = [{"unit": name, "trained": True} for name in "ab"]
        stage = {**STAGE, "units": units, "fell_back": [], "compile_cpu_seconds": 9.0}
        finished(tmp_path, "a", {"0_gptq": {**stage, "resumed": True}})
        broken = {**ROW, "recipe": "adaround, long", "diverged": "step 3; the loss\tis nan"}
        finished(tmp_path, "b", {}, cell={**broken, **dict.fromkeys(MADE, "said, by hand")})
        rows = read_cells(tmp_path)
        assert len(rows[0]["notes"]) == 2
        write_results(tmp_path, rows)
        assert read_rows(tmp_path / "rounding.csv") == rows
        other = {**rows[0], "seed": 1}
        again = {**rows[0], "eps_rel_mse": 0.25}
        assert merged([rows[0], other], [again, rows[1]]) == [rows[1], again, other]

    def test_a_table_of_something_else_is_refused(self, tmp_path):
        finished(tmp_path, "a", {"0_gptq": STAGE})
        write_results(tmp_path, read_cells(tmp_path))
        path = tmp_path / "rounding.csv"
        text = path.read_text()
        path.write_text(text.replace("recipe,", "receipt,"))
        with pytest.raises(ValueError, match=r"it lacks \['recipe'\]"):
            read_rows(path)
        path.write_text(text.replace("0.5", "half"))
        with pytest.raises(ValueError, match="rounding.csv, line 2: .*half"):
            read_rows(path)


def test_less_to_calibrate_on_has_batches_that_divide_it():
    given = cells(load_config(f"{CONFIG}:recipe=* on *,seeds=1"))
    read = [read_config(cell.config) for cell in given]
    assert {config.calibration.samples for config in read} == {1, 4}
    for config in read:
        check_sizes(config, config.sampler.steps)


class TestRunning:
    @pytest.fixture
    def given(self):
        return cells(load_config(f"{CONFIG}:smoke"))[:2]

    def test_a_cell_that_diverges_is_recorded_and_the_next_one_runs(
        self, given, tmp_path, monkeypatch
    ):
        begun = []

        def run_once(run, out, command):
            begun.append(run.name)
            if run.name == given[0].name:
                raise FloatingPointError("the loss became nan")
            finished(out, run.name, {"0_gptq": STAGE})

        monkeypatch.setattr(bench_rounding, "run_once", run_once)
        run_cells(given, tmp_path, "a command")
        run_cells(given[:1], tmp_path, "a command")
        assert begun == [cell.name for cell in given]
        broken = load_record(tmp_path / "runs" / given[0].name / CELL)
        assert broken["diverged"] == "the loss became nan"
        rows = read_cells(tmp_path)
        assert {row["commit"] for row in rows} == {made_at()["commit"]}
        text = write_results(tmp_path, rows).read_text()
        assert f"| {given[0].row['recipe']} | diverged | – | diverged | – | – | – | 1 |" in text
        assert f"- {given[0].row['recipe']} (seed 0): diverged: the loss became nan." in text
        assert "![]" in text
        diverged = [row for row in rows if row["eps_rel_mse"] is None]
        assert "![]" not in write_results(tmp_path, diverged).read_text()

    def test_a_report_written_anew_does_not_change_where_a_cell_comes_from(
        self, given, tmp_path, monkeypatch
    ):
        old = given[0]
        for cell in given:
            workdir = finished(tmp_path, cell.name, {"0_gptq": STAGE}, cell=cell.row)
        (workdir / CELL).unlink()

        def run_once(run, out, command):
            place = out / "runs" / run.name / "report.json"
            report = load_record(place)
            report["provenance"]["commit"] = "of today"
            save_record(place, report)

        monkeypatch.setattr(bench_rounding, "run_once", run_once)
        for _ in range(2):
            run_cells(given, tmp_path, "a command")
        found = {row["recipe"]: row for row in read_cells(tmp_path)}
        assert {row["commit"] for row in found.values()} == {"aaaaaaa"}
        assert {row["command"] for row in found.values()} == {"not recorded"}
        assert found[old.row["recipe"]]["machine"] == "said by the report"

    def test_stages_run_once_more_where_they_compiled_for_long(self, given, tmp_path, monkeypatch):
        timed = []

        def once_more(job, name, sets, folder, calibration):
            timed.append(folder)
            save_record(folder / "quantize.json", {"commit": "x", "stages": {"0_gptq": STAGE}})

        monkeypatch.setattr(bench_rounding, "run_once", lambda *_: None)
        for name in ("prepare", "sets_of"):
            monkeypatch.setattr(bench_rounding, name, lambda *_: None)
        monkeypatch.setattr(bench_rounding, "trajectories", lambda *_: (None, None))
        monkeypatch.setattr(bench_rounding, "quantize_one", once_more)
        long = {"0_gptq": {**STAGE, "compile_cpu_seconds": 1.1}}
        places = [
            finished(tmp_path, cell.name, stages)
            for cell, stages in zip(given, ({"0_gptq": STAGE}, long), strict=True)
        ]
        for _ in range(2):
            run_cells(given, tmp_path, "a command")
        assert timed == [places[1] / TIMED]
        (places[1] / TIMED / "quantize.json").unlink()  # killed in the middle
        (places[1] / TIMED / "stages").mkdir()
        with monkeypatch.context() as without:
            cache = jax.config.jax_compilation_cache_dir
            jax.config.update("jax_compilation_cache_dir", None)
            without.setattr(bench_rounding.logging, "warning", lambda *told: timed.append(told))
            run_cells(given, tmp_path, "a command")
            jax.config.update("jax_compilation_cache_dir", cache)
        assert "compile cache" in timed.pop()[0]
        run_cells(given, tmp_path, "a command")
        assert timed == [places[1] / TIMED] * 2
        assert not (places[1] / TIMED / "stages").exists()


def test_cells_of_given_rows_are_not_made_again(tmp_path):
    finished(tmp_path / "before", "a", {"0_gptq": STAGE}, cell={**ROW, "model": "random:miniature"})
    rows = read_cells(tmp_path / "before")
    held = [{**rows[0], "recipe": name} for name in ("gptq", "nearest", "adaround 50 at 1e-2")]
    held += [{**rows[0], "recipe": "asym2 + bias + tuning"}]
    write_results(tmp_path / "before", held)
    args = [
        "-m",
        "experiments.bench_rounding",
        f"--config={CONFIG}:smoke",
        f"--out={tmp_path / 'W'}",
    ]
    args += [f"--rows={tmp_path / 'before' / 'rounding.csv'}"]
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "W" / "runs").exists()
    found = read_rows(tmp_path / "W" / "rounding.csv")
    assert sorted(row["recipe"] for row in found) == sorted(row["recipe"] for row in held)


@pytest.mark.slow
def test_the_smoke_run_resumes_and_tells_recipes_apart(tmp_path):
    given = cells(load_config(f"{CONFIG}:smoke"))
    run_cells(given[:2], tmp_path, "a command")
    before = digests(tmp_path / "runs")
    run_cells(given, tmp_path, "another command")
    after = digests(tmp_path / "runs")
    assert before.items() <= after.items()
    rows = read_cells(tmp_path)
    assert {row["recipe"] for row in rows} == {cell.row["recipe"] for cell in given}
    assert len({row["eps_rel_mse"] for row in rows}) == len(rows)
    assert all(row["cpu_s"] > 0 for row in rows)
    assert sorted(row["command"] for row in rows) == ["a command"] * 2 + ["another command"] * 2
    for folder in (tmp_path / "runs").iterdir():
        first = folder / "variants" / "rounded"
        if (folder / TIMED).exists():
            assert digests(first / "bundle") == digests(folder / TIMED / "bundle")
    text = write_results(tmp_path, rows).read_text()
    assert all(f"| {cell.row['recipe']}" in text for cell in given)
    with open(tmp_path / "rounding.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(given)
    assert list((tmp_path / "pictures").glob("*.png"))
    assert json.loads((tmp_path / "runs" / given[0].name / CELL).read_text())["jax_version"]
