"""Bad input ends a command with one sentence; a defect ends it with its traceback."""

import json
import subprocess
import sys

from experiments.command_line import sentence_of
from qdiff_jax.config import parse_arg
from qdiff_jax.named_policies import policy

from ..main_job import ROOT, environment


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_what_this_project_raises_is_told(tmp_path):
    assert "polcy" in sentence_of(raised(lambda: policy("polcy", [], 8, 8)))
    assert "smke" in sentence_of(raised(lambda: parse_arg("smke", smoke=False)))
    missing = tmp_path / "missing"
    assert str(missing) in sentence_of(raised(missing.read_bytes))


def test_what_others_raise_keeps_its_traceback():
    assert sentence_of(raised(lambda: json.loads("{"))) is None
    assert sentence_of(raised(lambda: policy(3, None, "a", {}))) is None
    assert sentence_of(ValueError("never raised")) is None


def test_a_command_ends_with_the_sentence_alone(tmp_path):
    command = [sys.executable, "-m", "experiments.inspect", "--model=sd-v1-5"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "sd-v1-4" in done.stderr.splitlines()[-1]
