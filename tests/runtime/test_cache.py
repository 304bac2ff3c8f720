"""Compile accounting counts what happens inside its block only, and tells cache hits apart."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.runtime.cache import compile_account, enable_compile_cache

TRACE = "/jax/core/compile/jaxpr_trace_duration"
COMPILE = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def fresh_cache(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    assert enable_compile_cache(tmp_path / "xla").is_dir()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_counts_compiles_and_hits(fresh_cache):
    x = jnp.ones(17)
    with compile_account() as outer:
        with compile_account() as first:
            jax.jit(lambda v: v * 3.25 + 17)(x)
        with compile_account() as again:
            jax.jit(lambda v: v * 3.25 + 17)(x)  # a new function with the same program
    assert (first.backend_compiles, first.cache_hits) == (1, 0)
    assert (again.backend_compiles, again.cache_hits) == (1, 1)
    assert first.seconds > 0
    assert first.cpu_seconds > 0
    assert outer.backend_compiles == 2
    assert outer.seconds == pytest.approx(first.seconds + again.seconds, rel=0.1)


def test_a_warm_function_costs_nothing():
    double = jax.jit(lambda v: v * 2)
    x = double(jnp.ones(3))
    with compile_account() as account:
        double(x)
    assert (account.seconds, account.cpu_seconds, account.backend_compiles) == (0.0, 0.0, 0)


def test_jax_says_when_compiling_begins_and_what_lies_inside_counts_once():
    def traced(v):
        return v * jax.jit(lambda w: w + 1.5)(jnp.ones(5)) + jnp.float32(np.arange(5.0).sum())

    began = time.monotonic(), time.process_time()
    with compile_account() as account:
        jax.jit(traced)(jnp.ones(5))
    assert account.backend_compiles >= 1
    assert 0 < account.seconds <= time.monotonic() - began[0]
    assert 0 < account.cpu_seconds <= time.process_time() - began[1]


def test_spans_inside_one_another_count_once():
    with compile_account() as account:
        jax.monitoring.record_scalar(TRACE, 0.0)
        jax.monitoring.record_scalar(COMPILE, 0.0)
        time.sleep(0.02)
        jax.monitoring.record_event_duration_secs(COMPILE, 100.0)
        jax.monitoring.record_event_duration_secs(TRACE, 100.0)
    assert 0.02 <= account.seconds < 50
    assert account.cpu_seconds < 50


def test_an_end_without_a_beginning_leaves_cpu_seconds_unknown():
    with compile_account() as account:
        jax.monitoring.record_event_duration_secs(COMPILE, 2.0)
    assert (account.seconds, account.cpu_seconds) == (2.0, None)
