"""The main job on its smoke config, run as users run it: by its command, in a process of its own."""

import hashlib
import os
import pathlib
import re
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = str(ROOT / "configs" / "quickstart.py:smoke")
VARIANTS = ("rtn_w8a8", "rtn_w4a8", "brecq_w4a8", "tfmq_w4a8", "closed_form_w4a8")


def environment() -> dict[str, str]:
    # The key of a compiled program counts the devices: with as many as the tests have, both share one
    # cache.
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(jax.device_count())}


def command(experiment: str, **flags) -> list[str]:
    flags = {"compile_cache": jax.config.jax_compilation_cache_dir, **flags}
    given = [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", f"experiments.{experiment}", *given]


def run(experiment: str, **flags) -> str:
    """Runs an experiment to its end and returns its log."""
    done = subprocess.run(
        command(experiment, **flags), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def compiled(log: str) -> tuple[int, int]:
    """(programs asked of the compiler, those of them found in the cache) as the log says."""
    found = re.search(r"programs compiled: (\d+), found in the cache: (\d+)", log)
    return int(found[1]), int(found[2])


def digests(folder: pathlib.Path, pattern: str = "**/*") -> dict[str, str]:
    """{relative path: SHA-256} of the files under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
