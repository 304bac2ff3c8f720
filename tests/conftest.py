"""Strict numerics for the whole suite: no silent promotion of dtype or rank, eight CPU devices."""

import os
import pathlib
import tempfile

import jax
import pytest

from qdiff_jax.runtime.programs import release_programs

from . import main_job

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_threefry_partitionable", True)

_cache = os.environ.get(
    "QDIFF_TEST_CACHE", os.path.join(tempfile.gettempdir(), "qdiff_jax_test_cache")
)
pathlib.Path(_cache).mkdir(parents=True, exist_ok=True)
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """The suite compiles more programs than a process may map."""
    yield
    release_programs()


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> pathlib.Path:
    """The workdir of the main job on its smoke config, run once; copy it before changing anything."""
    workdir = tmp_path_factory.mktemp("main_job") / "smoke"
    main_job.run("quantize", config=main_job.SMOKE, workdir=workdir)
    return workdir
