"""kill -9 at several moments, then the same command: it ends with the bits of an uninterrupted run."""

import pathlib
import random
import signal
import subprocess
import time

from .. import main_job


def units_done(workdir: pathlib.Path) -> int:
    return len(list(workdir.glob("variants/*/stages/*/unit_*.safetensors")))


def run_until(workdir: pathlib.Path, units: int, delay: float) -> bool:
    """Start the job and kill it `delay` seconds after that many units are done; False if it ended first."""
    process = subprocess.Popen(
        main_job.command("quantize", config=main_job.SMOKE, workdir=workdir),
        cwd=main_job.ROOT,
        env=main_job.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and units_done(workdir) < units and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    return process.wait() == -signal.SIGKILL


def test_killed_at_random_moments_it_continues_to_the_same_bits(smoke_run, tmp_path):
    whole = units_done(smoke_run)
    assert whole > 20
    chosen = random.Random(1)
    # One kill among the first units of each reconstruction, one late, one wherever it falls.
    targets = (
        2,
        chosen.randrange(5, whole // 2),
        whole // 2 + 2,
        chosen.randrange(whole // 2, whole),
    )
    workdir = tmp_path / "killed"
    killed = [run_until(workdir, units, chosen.uniform(0.0, 0.3)) for units in sorted(targets)]
    assert sum(killed) >= 3
    assert not (workdir / "report.json").exists()
    main_job.run("quantize", config=main_job.SMOKE, workdir=workdir)
    pattern = "variants/*/bundle/weights.safetensors"
    expected = main_job.digests(smoke_run, pattern)
    assert len(expected) == len(main_job.VARIANTS)
    assert main_job.digests(workdir, pattern) == expected
    samples = "variants/*/samples.npz"
    assert main_job.digests(workdir, samples).keys() == main_job.digests(smoke_run, samples).keys()
