"""The ledger of claims: its sides differ in what they name, its rows join, and nothing stops it."""

import inspect
import json
import re
import threading

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import claims as claims_config
from experiments import claim_runs, claims, made_once
from experiments.claim_runs import Claim, runs_of
from experiments.claims import assembled, ledger, row_path
from experiments.made_once import Made, attempt, locked
from qdiff_jax.config import as_json, flatten, load_config
from qdiff_jax.eval.verdicts import DISAGREE, HOLDS, NO_EFFECT, NOT_SHOWN, ONE_SEED, REVERSED
from qdiff_jax.observe.archive import load_record, save_record

from ..main_job import ROOT, digests
from .claim_keys import DIFFERING

CONFIG = str(ROOT / "configs" / "claims.py")
# Of a config: settings that one method alone reads.
SECTIONS = ("efficientdm.", "svdquant.", "tdq.", "tcaq.")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def unprepared(monkeypatch):
    """Of runs that are never made; preparing one takes half a second."""
    monkeypatch.setattr(claims, "prepare", lambda config: None)


def config_of(*made, seeds=3):
    """A ledger of claims that are never run: (name, values to change)."""
    config = ConfigDict({"samples": 4, "guidance_scale": -1.0, "only_seeds": ()})
    smoke = Claim(*load_config(f"{CONFIG}:smoke,seeds={seeds}").claims[0])
    config.claims = tuple(tuple(smoke._replace(name=name, **values)) for name, values in made)
    config.chosen = tuple(("unet", name) for name, _ in made)
    return config


def row(claim, seed, ratio=1.0, spread=0.01, **more):
    effect = {"ratio": ratio, "low": ratio * (1 - spread), "high": ratio * (1 + spread)}
    found = {"model": claim.model, "name": claim.name, "bits": claim.bits, "seed": seed, "why": ""}
    found |= {"effect": effect, "commits": ["abc"], "eps_rel_mse": ratio, "temporal_cosine": ratio}
    return found | more


def write_rows(config, out, name, ratios, **more):
    claim = next(Claim(*values) for values in config.claims if values[0] == name)
    for seed, ratio in enumerate(ratios):
        save_record(row_path(claim, config, seed, out), row(claim, seed, ratio, **more))
    return claim


def read(config, out, name=None):
    text = assembled(config, out, "the command").read_text("utf-8")
    rows = json.loads((out / "claims.json").read_text("utf-8"))
    return text, next((row for row in rows if name in (None, row["name"])), None)


def differing(one, other):
    """{flattened key: (one's, other's)} of two runs; a method's variant by its method alone.

    Of two methods the sections that one of them alone reads are left out: PTQD's terms are a claim's own.
    """
    flat = [flatten(as_json(run.parsed)) for run in (one, other)]
    methods = tuple(v.method for run in (one, other) for v in run.parsed.variants.values())
    hidden = ("variants.", *(SECTIONS if methods[0] != methods[1] else ()))
    keys = sorted(k for k in flat[0] | flat[1] if not k.startswith(hidden))
    found = {k: tuple(f.get(k) for f in flat) for k in keys} | {"method": methods}
    return {
        k: tuple(tuple(v) if isinstance(v, list) else v for v in pair)
        for k, pair in found.items()
        if pair[0] != pair[1]
    }


def test_the_sides_of_every_claim_differ_in_the_keys_it_names():
    config = load_config(CONFIG)
    found = {}
    for claim in (Claim(*values) for values in config.claims):
        sides = runs_of(claim, config, 0)
        pairs = [differing(*sides[i : i + 2]) for i in range(0, len(sides), 2)]
        if len(sides) == 4:
            pairs.append(differing(sides[0], sides[2]))
        found[claim.model, claim.name] = pairs
    assert found == DIFFERING


def test_runs_of_a_claim_measure_alike():
    config = load_config(CONFIG)
    for claim in (Claim(*values) for values in config.claims):
        sides = runs_of(claim, config, 0)
        targets = set()
        for run in sides:
            assert run.parsed.model == f"{claim.model}_fashion"
            assert run.parsed.evaluation == sides[0].parsed.evaluation
            assert (run.parsed.evaluation.samples, run.parsed.seed) == (256, 0)
            assert run.parsed.sampler.guidance_scale == config.guidance_scale
            targets |= {variant.targets for variant in run.parsed.variants.values()}
        assert len(targets) <= 1
        assert len(sides) == (0 if claim.of else len(claim.sides))


def test_one_run_has_one_folder_whatever_words_ask_for_it():
    config = load_config(CONFIG)
    measured = claim_runs._measured(config)

    def name(words, changes=(), measured=measured):
        given = f"configs/methods/ptq4dm.py:w8a8,laptop,{words}"
        return claim_runs._run(given, changes, 0, measured).name

    assert name("plain") == name("plain,selector=ndtc") == name("selector=ndtc,plain")
    first = Claim(*config.claims[0])
    (run, _), (other, _) = (runs_of(first, config, seed) for seed in (0, 1))
    assert (run.parsed.seed, other.parsed.seed) == (0, 1)
    assert run.name != other.name
    assert name("plain") != name("plain", ("activations.observer=mse",))
    assert name("plain") != name("plain", (), (("evaluation.samples", 4), measured[1]))


def test_what_is_run_is_chosen_by_words_and_the_ledger_stays_whole():
    whole = load_config(CONFIG)
    assert len(whole.chosen) == len({tuple(c) for c in whole.chosen})
    for words, models, seeds in (
        ("model=dit", {"dit"}, ()),
        ("group=unet_methods,seed=1", {"unet"}, (1,)),
        ("claim=csb", {"dit"}, ()),
    ):
        config = load_config(f"{CONFIG}:{words}")
        assert config.claims == whole.claims
        assert {model for model, _ in config.chosen} == models
        assert config.only_seeds == seeds
    other = load_config(f"{CONFIG}:claim=split,bits=w8a4").claims
    assert {c[:3] for c, own in zip(other, whole.claims) if c != own} == {
        ("split", "unet_methods", "unet")
    }
    every = load_config(f"{CONFIG}:claim=efficientdm_beats_every_ptq,model=dit").chosen
    assert ("dit", "efficientdm_beats_svdquant") in every
    assert len(every) == 3
    assert ("unet", "binarydm_ebb") in load_config(f"{CONFIG}:group=dit_tuned_binary").chosen


def test_words_that_choose_nothing_are_refused():
    for words, message in (
        ("claim=csb,model=unet", r"nothing in common. csb is asked of \['dit'\]"),
        ("model=dit,group=unet_methods", "nothing in common"),
        ("claim=tia", "there are .*tiar"),
        ("claim=fsc,seed=3", "seed=3 is none of the 3"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(f"{CONFIG}:{words}")


def test_the_docstring_counts_the_runs():
    config = load_config(CONFIG)
    # {run: seeds}; one that both groups want counts in the first.
    counted = {group: {} for group in claims_config.GROUPS}
    first, second = claims_config.GROUPS
    for claim in (Claim(*values) for values in config.claims):
        for run in runs_of(claim, config, 0):
            group = first if run.name in counted[first] else claim.group
            counted[group][run.name] = max(counted[group].get(run.name, 0), claim.seeds)
    doc = inspect.cleandoc(claims_config.__doc__)
    said = {name: int(count) for name, count in re.findall(r"`group=(\w+)`: (\d+) runs", doc)}
    assert said == {group: sum(counted[group].values()) for group in (first, second)}


@pytest.mark.parametrize(
    ("aim", "ratios", "more", "expected"),
    [
        ("error", (0.8, 0.81, 0.82), {}, HOLDS),
        ("error", (1.2, 1.21, 1.22), {}, REVERSED),
        ("error", (0.5, 0.8, 0.9), {}, DISAGREE),  # the signs agree, which chance does in a quarter
        ("error", (1.0, 1.001, 0.999), {}, NO_EFFECT),
        ("error", (0.8,), {}, ONE_SEED),
        ("no_worse", (1.0, 1.001, 0.999), {}, HOLDS),
        ("no_worse", (1.0, 1.1, 0.9), {}, NOT_SHOWN),
        ("cheaper", (1.0, 1.001, 0.999), {"bitops": [1e9, 2e9]}, HOLDS),
        ("cheaper", (1.0, 1.001, 0.999), {"bitops": [2e9, 2e9]}, NOT_SHOWN),
        ("spread", (0.8, 0.81, 0.82), {}, HOLDS),
    ],
)
def test_rows_of_seeds_become_a_verdict_by_the_aim(tmp_path, aim, ratios, more, expected):
    config = config_of(("part", {"aim": aim}))
    write_rows(config, tmp_path, "part", ratios, **more)
    text, found = read(config, tmp_path)
    assert found["verdict"] == expected
    assert f"**{expected}**{' so far' if len(ratios) < 3 else ''} |" in text
    assert found["seeds"] == list(range(len(ratios)))
    assert ("3 of 3" in text, f"| {len(ratios)} of 3 |" in text) == (False, len(ratios) < 3)
    # Every seed with its interval, and the means' where there are several.
    assert f"0: {ratios[0]:.3g}" in text.replace("1.00", "1")
    assert (found["rollout"]["low"] is None) == (len(ratios) == 1)
    assert ("against 2.00" in text) == (aim == "cheaper")


def test_a_ratio_that_a_seed_lacks_is_counted(tmp_path):
    config = config_of(("part", {}))
    claim = write_rows(config, tmp_path, "part", (0.8, 0.81, 0.82))
    path = row_path(claim, config, 2, tmp_path)
    save_record(path, {**load_record(path), "temporal_cosine": None})
    text, found = read(config, tmp_path)
    assert found["temporal_cosine"]["seeds"] == 2
    assert "(2 of 3 seeds)" in text


def test_rows_of_other_claims_do_not_stay(tmp_path):
    config = config_of(("part", {}), ("gone", {}))
    for name in ("part", "gone"):
        write_rows(config, tmp_path, name, (0.8, 0.81, 0.82))
    assert len(json.loads(assembled(config, tmp_path, "").with_suffix(".json").read_text())) == 2
    left = config_of(("part", {}))
    assert "gone" not in read(left, tmp_path)[0]
    # Another definition; fewer seeds are the same one.
    assert read(config_of(("part", {"aim": "no_worse"})), tmp_path)[1] is None
    assert read(config_of(("part", {}), seeds=2), tmp_path)[1]["seeds"] == [0, 1, 2]


def test_runs_of_different_commits_are_said_loudly(tmp_path):
    config = config_of(("part", {}), ("other", {}))
    write_rows(config, tmp_path, "part", (0.8, 0.81, 0.82))
    assert "Commit of all runs: abc." in read(config, tmp_path)[0]
    write_rows(config, tmp_path, "other", (0.8, 0.81, 0.82), commits=["abc", "def-dirty"])
    text, _ = read(config, tmp_path)
    assert "MADE BY DIFFERENT CODE: the runs rest on 2 commits, abc, def-dirty" in text


def test_a_claim_of_all_others_needs_each_of_them(tmp_path):
    over_all = {"sides": (), "of": ("a", "b")}
    config = config_of(("a", {}), ("b", {}), ("all", over_all))
    assert read(config, tmp_path, "all")[1] is None
    write_rows(config, tmp_path, "a", (0.8, 0.81, 0.82))
    text, found = read(config, tmp_path, "all")
    assert (found["verdict"], found["of"]) == (NOT_SHOWN, {"a": HOLDS, "b": None})
    assert "not run b" in text
    for ratios, expected in (
        ((0.9, 0.91, 0.92), HOLDS),
        ((1.0, 1.001, 0.999), NO_EFFECT),
        ((1.9, 1.91, 1.92), REVERSED),
    ):
        write_rows(config, tmp_path, "b", ratios)
        text, found = read(config, tmp_path, "all")
        assert found["verdict"] == expected
        # The hardest of them.
        assert found["rollout"]["ratio"] == pytest.approx(sum(ratios) / 3, rel=1e-3)
    assert "reversed by b" in text


def test_seeds_come_one_after_the_other(tmp_path, monkeypatch, unprepared):
    config = config_of(("a", {"seeds": 2}), ("b", {"seeds": 3}))
    asked = []

    def measure(claim, config, seed, out, command):
        asked.append((claim.name, seed))
        return row(claim, seed)

    monkeypatch.setattr(claims, "measure", measure)
    ledger(config, tmp_path)
    assert asked == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2)]
    ledger(config, tmp_path)
    assert len(asked) == 5  # a row is made once
    config.only_seeds = (1,)
    ledger(config, tmp_path / "one")
    assert asked[5:] == [("a", 1), ("b", 1)]


def test_an_error_nobody_foresaw_stops_no_other_claim(tmp_path, monkeypatch, unprepared):
    config = config_of(("a", {"seeds": 1}), ("b", {"seeds": 1}))

    def measure(claim, config, seed, out, command):
        if claim.name == "a":
            raise TypeError("a broken run")
        return row(claim, seed)

    monkeypatch.setattr(claims, "measure", measure)
    with pytest.raises(RuntimeError, match=r"a of .* with seed 0 \(TypeError: a broken run\)"):
        ledger(config, tmp_path)
    rows = {p.name.split("-")[1]: load_record(p) for p in (tmp_path / "rows").iterdir()}
    assert rows["a"]["why"] == "TypeError: a broken run"
    assert not rows["b"]["why"]


def test_fewer_seeds_take_no_row_away(tmp_path, monkeypatch, unprepared):
    monkeypatch.setattr(claims, "measure", lambda claim, config, seed, *_: row(claim, seed))
    ledger(config_of(("a", {"seeds": 3})), tmp_path)
    ledger(config_of(("a", {"seeds": 1})), tmp_path)
    _, found = read(config_of(("a", {"seeds": 1})), tmp_path, "a")
    assert len(found["seeds"]) == 3


def test_a_run_that_cannot_be_is_refused_before_any_runs(tmp_path, monkeypatch):
    given, changes = config_of(("a", {})).claims[0][6][0]
    odd = ((given, (*changes, "calibration.weight_steps=7")), (given, changes))
    config = config_of(("good", {}), ("bad", {"sides": odd}))
    monkeypatch.setattr(claims, "measure", lambda *_: pytest.fail("something ran"))
    with pytest.raises(ValueError, match="weight_steps is 7"):
        ledger(config, tmp_path)
    assert not list(tmp_path.iterdir())
    misspelt = config_of(("bad", {"sides": ((given, ("calibration.weight_stepz=4",)),) * 2}))
    with pytest.raises(ValueError, match="calibration.weight_stepz is not known"):
        ledger(misspelt, tmp_path)


def test_a_run_that_diverges_leaves_its_sentence_and_the_ledger_goes_on(
    tmp_path, monkeypatch, unprepared
):
    config = config_of(("a", {}), ("b", {}))
    broken = claim_runs.runs_of(Claim(*config.claims[0]), config, 0)[1].name
    calls = []

    def fail(config, workdir, command, *, pictures):
        assert not pictures
        assert config.evaluation.samples == 4
        assert command == f"experiments.claims, run {workdir.name}"
        calls.append(workdir.name)
        raise FloatingPointError("the loss became nan")

    monkeypatch.setattr(made_once, "quantize", fail)
    monkeypatch.setattr(made_once, "is_finished", lambda run, workdir: run.name != broken)
    monkeypatch.setattr(claims, "samples_of", lambda workdir, name: np.ones(1))
    found = row(Claim(*config.claims[0]), 0)
    found = {key: found[key] for key in ("effect", "commits", "eps_rel_mse", "temporal_cosine")}
    monkeypatch.setattr(claims, "_effect", lambda aim, runs, made: found)
    ledger(config, tmp_path)
    text, found = read(config, tmp_path)
    assert found["verdict"] == "diverged"
    assert found["seeds"] == [1, 2]
    assert "**diverged**: seed 0, without it: the loss became nan" in text
    # It is remembered, by the other claim of the same run too, until the code changes.
    assert calls == [broken]
    assert read(config, tmp_path, "b")[1]["verdict"] == "diverged"
    monkeypatch.setattr(made_once, "commit", lambda: "another")
    ledger(config, tmp_path)
    assert calls == [broken] * 2


@pytest.mark.parametrize(
    ("value", "verdict", "why"),
    [
        (float("nan"), "diverged", "seed 0, with it: its samples are not finite"),
        (0.0, "no result", "seed 0, an effect needs"),
    ],
)
def test_samples_that_do_not_compare_are_a_row_too(
    tmp_path, monkeypatch, unprepared, value, verdict, why
):
    config = config_of(("a", {}))
    monkeypatch.setattr(claims, "attempt", lambda run, out, command: Made(out))
    for module in (claims, claim_runs):
        monkeypatch.setattr(module, "samples_of", lambda workdir, name: np.full((4, 2), value))
    ledger(config, tmp_path)
    text, found = read(config, tmp_path)
    assert found["verdict"] == verdict
    assert found["why"][0].startswith(why)
    assert f"**{verdict}**: {why}" in text


def waited_for_a_failure(run, tmp_path, monkeypatch):
    """What three at a time find of a run that fails: it is tried once."""
    tried, found = [], []

    def fail(config, workdir, command, *, pictures):
        tried.append(workdir)
        threading.Event().wait(0.2)
        raise FloatingPointError("nan")

    monkeypatch.setattr(made_once, "quantize", fail)
    monkeypatch.setattr(made_once, "is_finished", lambda run, workdir: False)

    def one():
        found.append(attempt(run, tmp_path / "failing", "a command"))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tried) == 1
    return found


def test_one_process_at_a_time_makes_a_run(tmp_path, monkeypatch):
    (run, _) = runs_of(Claim(*load_config(f"{CONFIG}:smoke").claims[0]), config_of(), 0)
    inside, most, made = [0], [0], set()

    def slow(config, workdir, command, *, pictures):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.2)
        made.add(workdir)
        inside[0] -= 1

    monkeypatch.setattr(made_once, "quantize", slow)
    monkeypatch.setattr(made_once, "is_finished", lambda run, workdir: workdir in made)
    threads = [
        threading.Thread(target=attempt, args=(run, tmp_path, "a command")) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert len(made) == 1
    assert [one.why for one in waited_for_a_failure(run, tmp_path, monkeypatch)] == ["nan"] * 3
    # Other runs do not wait for this one.
    with locked(tmp_path / "locks" / "a"), locked(tmp_path / "locks" / "b"):
        pass


@pytest.mark.slow
def test_the_smoke_ledger_is_made_once(tmp_path):
    config = load_config(f"{CONFIG}:smoke")
    text = ledger(config, tmp_path).read_text()
    (found,) = json.loads((tmp_path / "claims.json").read_text())
    assert found["verdict"] == ONE_SEED
    (effect,) = found["effects"]
    assert effect["low"] <= effect["ratio"] <= effect["high"]
    assert f"**{ONE_SEED}**" in text
    assert not list(tmp_path.glob("runs/*/pictures"))
    before = digests(tmp_path / "runs")
    ledger(config, tmp_path)
    assert digests(tmp_path / "runs") == before
    # What the other aims measure, on the same runs.
    runs = runs_of(Claim(*config.claims[0]), config, 0)
    made = [attempt(run, tmp_path, "a command") for run in runs]
    cheaper = claims._effect("cheaper", runs, made)
    assert cheaper["effect"] == effect
    assert cheaper["bitops"][0] == cheaper["bitops"][1] > 0
    spread = claims._effect("spread", runs, made)["effect"]
    assert spread["low"] <= spread["ratio"] <= spread["high"]
    twice = claims._effect("error", (*runs, *runs), [*made, *made])
    assert twice["effect"]["ratio"] == pytest.approx(1.0)
    assert twice["eps_rel_mse"] == pytest.approx(1.0)


def test_a_shift_that_all_samples_share_is_told_apart(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, 4, 4, 1))
    own, shift = rng.normal(size=images.shape), rng.normal(size=(1, 4, 4, 1))
    own -= own.mean(axis=0)
    held = {"fp32": images, "shifted": images + own + 3 * shift, "own": images + own}
    monkeypatch.setattr(claim_runs, "samples_of", lambda workdir, name: held[name])
    for name in ("shifted", "own"):
        _, about = claim_runs.errors(tmp_path, name)
        np.testing.assert_allclose(about, np.square(own).mean((1, 2, 3)))
    share = 9 * np.square(shift).mean() / (9 * np.square(shift).mean() + np.square(own).mean())
    assert claim_runs.shift_share(*claim_runs.errors(tmp_path, "shifted")) == pytest.approx(share)
    assert claim_runs.shift_share(*claim_runs.errors(tmp_path, "own")) == pytest.approx(
        0, abs=1e-12
    )
    assert claim_runs.shift_share(*claim_runs.errors(tmp_path, "fp32")) == 0


def test_a_part_that_changes_nothing_is_said_to(tmp_path):
    config = config_of(("x", {}))
    write_rows(config, tmp_path, "x", (1.0, 1.0, 1.0), spread=0.0)
    text, found = read(config, tmp_path, "x")
    assert found["verdict"] == NO_EFFECT
    assert f"**{NO_EFFECT}**: both sides give the same errors" in text
    write_rows(config, tmp_path, "x", (1.0, 1.0, 1.0))
    assert "same errors" not in read(config, tmp_path, "x")[0]


def test_rows_say_the_common_shift_of_every_side(tmp_path):
    config = config_of(("x", {}))
    write_rows(config, tmp_path, "x", (0.5, 0.6), rollout_about_shift=0.7, shift_shares=[0.25, 0.5])
    text, found = read(config, tmp_path, "x")
    assert found["rollout_about_shift"]["ratio"] == pytest.approx(0.7)
    assert "0: 0.25 / 0.50; 1: 0.25 / 0.50" in text
