"""The ledger of claims: every claim names two configs that are valid, and its smoke run resumes."""

import json
import pathlib
import re

import pytest

from experiments.claims import Claim, ledger, runs_of
from qdiff_jax.config import load_config
from qdiff_jax.eval.verdicts import HOLDS, NO_EFFECT, REVERSED

from ..main_job import ROOT, digests

CONFIG = str(ROOT / "configs" / "claims.py")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("model", ["unet", "dit"])
def test_the_two_sides_of_a_claim_differ_and_measure_alike(model):
    config = load_config(f"{CONFIG}:model={model},seeds=2")
    claims = [Claim(*values) for values in config.claims]
    assert ("split" in {claim.name for claim in claims}) == (model == "unet")
    for claim in claims:
        pairs = runs_of(claim, config)
        assert len(pairs) == 2
        for with_it, without in pairs:
            assert with_it.parsed != without.parsed
            assert with_it.parsed.model == without.parsed.model == f"{model}_fashion"
            assert with_it.parsed.evaluation == without.parsed.evaluation
            assert with_it.parsed.evaluation.samples == 256
            scales = {run.parsed.sampler.guidance_scale for run in (with_it, without)}
            assert scales == {config.guidance_scale}
            assert with_it.parsed.seed == without.parsed.seed
            (ours,), (theirs,) = (run.parsed.variants.values() for run in (with_it, without))
            assert ours.targets == theirs.targets
            for run, variant in ((with_it, ours), (without, theirs)):
                named = re.search(r"method=(\w+)", run.given)
                own = pathlib.Path(run.given.partition(":")[0]).stem
                assert variant.method == (named[1] if named else own)
        assert pairs[0][0].name != pairs[1][0].name


def test_claims_that_a_model_has_no_layers_for_are_refused():
    for claim, model, other in (("csb", "unet", "dit"), ("split", "dit", "unet")):
        with pytest.raises(
            ValueError, match=f"claim={claim} asks for nothing .*: take model={other}"
        ):
            load_config(f"{CONFIG}:claim={claim},model={model}")


def test_an_unknown_claim_lists_those_there_are():
    with pytest.raises(ValueError, match="tiar"):
        load_config(f"{CONFIG}:claim=tia")


@pytest.mark.slow
def test_the_smoke_ledger_is_made_once(tmp_path):
    config = load_config(f"{CONFIG}:smoke")
    text = ledger(config, tmp_path).read_text()
    (row,) = json.loads((tmp_path / "claims.json").read_text())
    assert row["verdict"] in (HOLDS, NO_EFFECT, REVERSED)
    assert row["smallest"] <= row["rollout_ratio"] <= row["largest"]
    assert f"**{row['verdict']}**" in text
    before = digests(tmp_path / "runs")
    ledger(config, tmp_path)
    assert digests(tmp_path / "runs") == before
