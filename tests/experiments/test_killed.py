"""The main job is killed again and again, and ends with the codes of a run that never was."""

import random
import re
import signal
import subprocess
import time

from .. import main_job
from ..main_job import SMOKE, VARIANTS, digests

# When to strike: at a random moment after the first file of a pattern has appeared.
MOMENTS = {
    "before or while trajectories are sampled": "config.json",
    "while round-to-nearest is calibrated or sampled": "variants/rtn_*/quantize.json",
    "in the first units of BRECQ": "variants/brecq_w4a8/stages/*/unit_001_*",
    "in the middle of a unit of BRECQ": "variants/brecq_w4a8/stages/*/unit_*.partial/50",
    "in the last units of BRECQ": "variants/brecq_w4a8/stages/*/unit_012_*",
    "in the middle of a unit of TFMQ-DM": "variants/tfmq_w4a8/stages/*/unit_*.partial/50",
    "while TFMQ-DM is calibrated or sampled": "variants/tfmq_w4a8/stages/*/unit_016_*",
}


def _kill(workdir, pattern, delay, flags) -> str:
    """Runs the job until `delay` seconds after a file of the pattern is there; returns its log."""
    log = workdir.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            main_job.command("quantize", **flags),
            cwd=main_job.ROOT,
            env=main_job.environment(),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        deadline = time.monotonic() + 400
        while process.poll() is None and not any(workdir.glob(pattern)):
            assert time.monotonic() < deadline, f"{pattern} never appeared"
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()[-3000:]
    return log.read_text()


def test_killed_at_any_moment_it_ends_with_the_same_codes(smoke_run, tmp_path):
    rng = random.Random(7)
    workdir = tmp_path / "w"
    flags = dict(config=SMOKE, workdir=workdir)
    # A checkpoint as often as the units allow it, so that some kills fall behind one.
    flags["config__reconstruct__save_seconds"] = 0.0
    logs = []
    for pattern in MOMENTS.values():
        # Inside a unit only the next hundredths of a second are of interest.
        delay = rng.uniform(0.0, 0.01 if "partial" in pattern else 1.0)
        logs.append(_kill(workdir, pattern, delay, flags))
    logs.append(main_job.run("quantize", **flags))
    assert digests(workdir, "**/bundle/*") == digests(smoke_run, "**/bundle/*")
    for name in VARIANTS:
        assert digests(workdir / "variants" / name, "samples.npz") == digests(
            smoke_run / "variants" / name, "samples.npz"
        )
    assert (workdir / "report.html").exists()
    assert not list(workdir.rglob(".bundle.*"))
    print(re.findall(r"unit \w+ continues at step \d+", "".join(logs)))
