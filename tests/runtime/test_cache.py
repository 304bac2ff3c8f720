"""Compile accounting counts what happens inside its block only, and tells cache hits apart."""

import jax
import jax.numpy as jnp
import pytest

from qdiff_jax.runtime.cache import compile_account, enable_compile_cache


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
    assert outer.backend_compiles == 2
    assert outer.seconds == pytest.approx(first.seconds + again.seconds)


def test_a_warm_function_costs_nothing():
    double = jax.jit(lambda v: v * 2)
    x = double(jnp.ones(3))
    with compile_account() as account:
        double(x)
    assert (account.seconds, account.backend_compiles) == (0.0, 0)
